"""The table of the paper: its parts are right, and tiny runs on digits and on files in the real formats write it."""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import frechet
import image_data
import networks
import paper_table
import protocols
from test_image_data import cifar_pickles, imagenet_files

import fmkernels as fmk

TINY = ["--steps", "2", "--batch", "4", "--scored", "2", "--samples", "3", "--draws", "2", "--channels", "8"]
TINY += ["--depth", "1", "--rows", "FM, OT path", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Pooled(torch.nn.Module):
    """Stands for Inception: features of uint8 images, by TorchScript."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3)) / 255


class Detector(torch.nn.Module):
    """Classes, or features where they are asked for."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        pooled = images.float().mean(dim=(2, 3))
        return pooled if return_features else pooled[:, :1]


def scripted(module: torch.nn.Module, file: Path) -> Path:
    torch.jit.script(module).save(str(file))
    return file


# The networks.


@pytest.mark.parametrize(
    "size", [protocols.PROTOCOLS[name].network for name in ("cifar10", "imagenet32", "imagenet64")]
)
def test_u_net(size):
    side = 64 if 3 in size.multiples else 32
    small = dataclasses.replace(size, channels=8, depth=1)
    model = networks.UNet((3, side, side), small)
    x, t = torch.randn(2, 3, side, side), torch.tensor([0.2, 0.9])
    assert torch.equal(model(x, t), torch.zeros_like(x))  # its last layer starts at zero
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    value = model(x, t)
    assert value.shape == x.shape and not torch.allclose(value, model(x, t.flip(0)))
    value.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    rows = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(rows, value, rtol=1e-3, atol=1e-4)  # rows are treated apart


def test_u_net_hands_detail_on():
    """Without its lowest resolution the output still depends on the pixels, by way of what every level keeps."""

    class Nothing(torch.nn.Module):
        def forward(self, hidden, times):
            return 0 * hidden

    model = networks.UNet((3, 8, 8), networks.UNetSize(8, (1, 2), 1, (4,)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.middle = torch.nn.ModuleList([Nothing()])
    x, t = torch.randn(1, 3, 8, 8), torch.rand(1)
    assert not torch.allclose(model(x, t), model(x + torch.randn_like(x), t))


def test_u_net_of_the_paper_has_the_blocks_of_its_table():
    with torch.device("meta"):
        model = networks.UNet((3, 64, 64), protocols.PROTOCOLS["imagenet64"].network)
    blocks = [m for m in model.modules() if isinstance(m, networks.ResidualBlock)]
    heads = {m.heads for m in model.modules() if isinstance(m, networks.Attention)}
    assert len(blocks) == 4 * 3 + 4 * 4 + 3 + 3 + 2  # down, up, halving, doubling, middle
    assert heads == {6, 9, 12}  # 64 channels each: attention at 32, 16 and 8


def test_u_net_refuses_a_side_that_does_not_halve():
    with pytest.raises(ValueError, match="halves 2 times, got 6"):
        networks.UNet((3, 6, 6), networks.UNetSize(8, (1, 1, 1), 1, ()))


def test_image_mlp():
    model = networks.ImageMLP((1, 8, 8))
    assert 200_000 < sum(p.numel() for p in model.parameters()) < 500_000
    x, t = torch.randn(3, 1, 8, 8), torch.rand(3)
    assert torch.equal(model(x, t), torch.zeros_like(x))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.allclose(model(x, t), model(x, t + 0.1))


# The Fréchet distance.


def test_frechet_distance_of_gaussians():
    def gaussian(mean, *deviations):
        return torch.tensor(mean).double(), torch.diag(torch.tensor(deviations).double().square())

    a, b = gaussian([1.0, 2.0], 1.0, 3.0), gaussian([0.0, 4.0], 2.0, 0.5)
    assert frechet.frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 6.25)  # ‖Δμ‖² + Σ(Δσ)²
    assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    turned = [(turn @ mean, turn @ covariance @ turn.mT) for mean, covariance in (a, b)]
    assert frechet.frechet_distance(*turned) == pytest.approx(12.25)


def test_moments_are_those_of_all_batches():
    x = torch.randn(50, 3) + 10
    mean, covariance = frechet.moments(lambda batch: batch, x.split(7))
    torch.testing.assert_close(mean, x.double().mean(0))
    torch.testing.assert_close(covariance, x.double().mT.cov())
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        frechet.moments(lambda batch: batch, [x[:1]])


def test_the_classifier_reads_digits():
    data = image_data.load("digits")
    (train,) = data.training_images()
    state = torch.get_rng_state()
    classifier = frechet.train_classifier(train, data.labels[0], steps=100)
    assert torch.equal(torch.get_rng_state(), state)
    assert classifier.accuracy(data.test, data.labels[1]) > 0.9
    reference = frechet.moments(classifier.features, [train])
    assert reference[1].trace() == pytest.approx(100, rel=1e-3)
    noise = torch.randint(17, (360, 1, 8, 8), dtype=torch.uint8)
    real, other = (
        frechet.frechet_distance(frechet.moments(classifier.features, [x]), reference) for x in (data.test, noise)
    )
    assert real < 5 < other


def test_extractors(tmp_path):
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    for module, scale in ((Pooled(), 255), (Detector(), 1)):
        extract = frechet.load_extractor(scripted(module, tmp_path / "network.pt"), "cpu")
        torch.testing.assert_close(extract(images) * scale, images.float().mean((2, 3)))
    (tmp_path / "network.pt").write_text("nothing of the kind")
    for file in (tmp_path / "network.pt", tmp_path / "missing.pt"):
        with pytest.raises(ValueError, match=f"--features .*{file.name}: expected a TorchScript file"):
            frechet.load_extractor(file, "cpu")


def test_statistics(tmp_path):
    file = tmp_path / "statistics.npz"
    np.savez(file, mu=np.ones(3), sigma=np.eye(3))
    mean, covariance = frechet.load_statistics(file)
    assert mean.dtype == torch.float64 and covariance.shape == (3, 3)
    for arrays, message in (
        ({"mu": np.ones(3)}, "expected arrays mu and sigma, got mu"),
        ({"mu": np.ones(3), "sigma": np.eye(2)}, r"expected mu \[F\] and sigma \[F, F\], got \[3\] and \[2, 2\]"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=message):
            frechet.load_statistics(file)
    file.write_bytes(b"PK")
    with pytest.raises(ValueError, match="expected an npz file"):
        frechet.load_statistics(file)


# The rows.


def test_every_row_has_its_published_numbers():
    rows = protocols.objectives(fmk.Uniform())
    assert all(list(published) == list(rows) for published in protocols.PUBLISHED.values())
    assert [fm.objective.prediction for fm in rows.values()] == ["noise", "score", "score", "velocity", "velocity"]
    assert [fm.schedule for fm in rows.values()][-2:] == [fmk.VP(), fmk.CondOT()]
    for table in protocols.PUBLISHED.values():  # what the deck says of them
        assert min(table, key=lambda row: table[row][0]) == min(table, key=lambda row: table[row][2]) == "FM, OT path"


def run_of(tmp_path, row="FM, OT path", **options) -> paper_table.Run:
    data = image_data.load("digits")
    protocol = dataclasses.replace(protocols.PROTOCOLS["digits"], scored=5, samples=7, draws=3, **options)
    fm = protocols.objectives(fmk.Uniform(stratified=True))[row]
    return paper_table.Run(fm, data, protocol, 0, "cpu", tmp_path / "run.pt")


def test_learning_rate(tmp_path):
    run = run_of(tmp_path, steps=100, warmup=10)
    assert [run.rate(step) for step in (0, 4, 9, 10, 55, 99)] == pytest.approx([0.1, 0.5, 1, 1, 0.5, 1 / 90])
    run.protocol = dataclasses.replace(run.protocol, decays=False)
    assert [run.rate(step) for step in (4, 99)] == [0.5, 1.0]


def test_bits_of_the_base(tmp_path):
    """A network that has learnt nothing leaves the standard normal: its bits are known for every draw."""
    run = run_of(tmp_path)
    found = paper_table.bits_of(run, "")
    generator = torch.Generator().manual_seed(0)
    key = fmk.key(generator=generator)
    draws = [fmk.dequantise(run.data.test[:5], run.data.bits, draw=draw, key=key) for draw in range(3)]
    logs = torch.stack([fmk.StandardNormal().log_prob(y) for y in draws], dim=1)
    expected = -(logs.logsumexp(1) - math.log(3)) / (64 * math.log(2)) + math.log2(17 / 2)
    assert found["bits"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert found["bits_stderr"] == pytest.approx(expected.std().item() / math.sqrt(5), rel=1e-3)
    assert found["failed_densities"] == 0 and found["density_nfe"] < 60


def test_samples_of_the_base(tmp_path):
    run = run_of(tmp_path, together=4)
    images, figures = paper_table.draw_samples(run, "")
    assert images.shape == (7, 1, 8, 8) and images.dtype == torch.uint8 and images.max() <= 16
    torch.manual_seed(0)
    noise = torch.cat([torch.randn(4, 1, 8, 8), torch.randn(3, 1, 8, 8)])
    assert torch.equal(images, ((noise + 1) * 8.5).floor().clamp(0, 16).to(torch.uint8))
    assert figures["fewest"] <= figures["nfe"] <= figures["most"] <= figures["calls"]


def test_rows_that_fail_are_counted(tmp_path, monkeypatch):
    run = run_of(tmp_path)

    def wild(x, t):
        return torch.where(x[:, :1, :1, :1] > 0, torch.nan, 0.0) * x

    monkeypatch.setattr(run, "average", torch.nn.Module())
    monkeypatch.setattr(run.average, "forward", wild)
    images, figures = paper_table.draw_samples(run, "")
    assert 0 < figures["failed_samples"] == 7 - len(images)
    run.average.forward = lambda x, t: torch.nan * x
    with pytest.raises(RuntimeError, match="no sample reached the end"):
        paper_table.draw_samples(run, "row")
    with pytest.raises(RuntimeError, match="no density reached the end"):
        paper_table.bits_of(run, "row")


def test_training_goes_on_where_it_stopped(tmp_path):
    run = run_of(tmp_path, steps=6, batch=16, warmup=2)
    run.protocol = dataclasses.replace(run.protocol, steps=3)
    paper_table.train(run, "", 16)
    run.protocol = dataclasses.replace(run.protocol, steps=6)
    run.save()
    again = run_of(tmp_path, steps=6, batch=16, warmup=2)
    again.resume()
    assert again.step == 3 and again.optimizer.state_dict()["state"][0]["step"] == 3
    for one, other in zip(run.average.parameters(), again.average.parameters()):
        assert torch.equal(one, other)
    before = [parameter.clone() for parameter in again.model.parameters()]
    paper_table.train(again, "", 16)
    assert again.step == 6 and any(not torch.equal(*pair) for pair in zip(before, again.model.parameters()))
    with pytest.raises(ValueError, match="expected a run of 9 steps, got one of 6"):
        run_of(tmp_path, steps=9).resume()


def test_microbatches_train_the_same_images(tmp_path, monkeypatch):
    """The gradient of a batch is that of its parts, weighed by their sizes."""
    losses, run = {}, run_of(tmp_path, steps=1, batch=10)
    loss_of = run.fm.loss

    def record(prediction, batch):
        losses[len(losses)] = len(prediction), loss_of(prediction, batch)
        return losses[len(losses) - 1][1]

    monkeypatch.setattr(run.fm, "loss", record)
    loss = paper_table.train(run, "", 4)
    sizes, values = zip(*losses.values())
    assert sizes == (4, 4, 2)
    assert loss == pytest.approx(sum(size / 10 * value.item() for size, value in zip(sizes, values)))


# The command.


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    paper_table.main(["--quick", "--seeds", "2", "--steps", "20", "--out", str(out), "--device", "cpu"])
    return out


def test_the_table_is_written(digits):
    import matplotlib.image

    for name in ("samples", "bars"):
        assert matplotlib.image.imread(digits / f"{name}.png").shape[1] > 1000
    results = json.loads((digits / "results.json").read_text())
    assert list(results["rows"]) == list(protocols.PUBLISHED["cifar10"])
    for name, runs in results["rows"].items():
        assert [run["seed"] for run in runs] == [0, 1], name
        assert all(run["frechet"] > 0 and run["nfe"] > 0 and 2 < run["bits"] < 40 for run in runs), name
        assert len({run["bits"] for run in runs}) == 2, name
    assert results["notes"]["accuracy of the classifier"] > 0.9
    table = (digits / "table.md").read_text()
    assert "| FM, OT path" in table and "2.99 / 6.35 / 142" in table and "±" in table
    assert "| Unconditional BigGAN |" in table and "25.3" in table


def test_networks_in_the_folder_are_used_again(digits, capsys):
    before = json.loads((digits / "results.json").read_text())
    row = ["--rows", "DDPM", "--resume", "--device", "cpu"]
    paper_table.main(["--quick", "--steps", "20", "--out", str(digits), *row])
    (run,) = json.loads((digits / "results.json").read_text())["rows"]["DDPM"]
    assert run["bits"] == before["rows"]["DDPM"][0]["bits"] and run["loss"] is None
    with pytest.raises(SystemExit, match="ddpm-0.pt: expected a run of 30 steps, got one of 20"):
        paper_table.main(["--quick", "--steps", "30", "--out", str(digits), *row])
    (digits / "ddpm-0.pt").write_bytes(b"PK")
    with pytest.raises(SystemExit, match="ddpm-0.pt: expected a network that this command left"):
        paper_table.main(["--quick", "--steps", "20", "--out", str(digits), *row])


def test_cifar_by_the_same_command(tmp_path, capsys):
    cifar_pickles(tmp_path / "data")
    features = scripted(Pooled(), tmp_path / "inception.pt")
    np.savez(tmp_path / "statistics.npz", mu=np.full(3, 0.5), sigma=np.eye(3))
    given = ["--data", "cifar10", "--root", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *TINY]
    given += ["--features", str(features), "--statistics", str(tmp_path / "statistics.npz"), "--microbatch", "3"]
    paper_table.main(given)
    results = json.loads((tmp_path / "out/results.json").read_text())
    (run,) = results["rows"]["FM, OT path"]
    assert run["bits"] == pytest.approx(8.56, abs=0.2)  # the standard normal's of even pixels, ½ log₂(2πe^⅓) + 7
    assert run["frechet"] > 0 and results["protocol"]["network"]["channels"] == 8
    assert "2.99 / 6.35 / 142" in capsys.readouterr().out


def test_imagenet_by_the_same_command(tmp_path, capsys):
    given = ["--data", "imagenet32", "--root", str(imagenet_files(tmp_path / "data")), "--out", str(tmp_path / "out")]
    paper_table.main([*given, *TINY])
    (run,) = json.loads((tmp_path / "out/results.json").read_text())["rows"]["FM, OT path"]
    assert run["frechet"] is None and run["failed_samples"] == 0
    shown = capsys.readouterr().out
    assert "3.53 / 5.02 / 122" in shown and "–" in shown


def test_the_protocol_is_the_papers_where_nothing_else_is_asked():
    options = paper_table.options_of(["--data", "imagenet64", "--root", "nowhere"])
    assert paper_table.protocol_of(options) == protocols.PROTOCOLS["imagenet64"]
    short = paper_table.protocol_of(paper_table.options_of(["--data", "cifar10", "--steps", "500", "--depth", "1"]))
    assert short.warmup == 50 and short.network.depth == 1 and short.network.channels == 256


BAD = [
    (["--data", "mnist"], "--data"),
    (["--rows", "GAN"], "--rows"),
    (["--seeds", "0"], "--seeds"),
    (["--samples", "1"], "--samples"),
    (["--statistics", "file.npz"], "--statistics: needs --features"),
    (["--channels", "8"], "--channels, --depth: the digits' network is no U-Net"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_a_bad_option_is_explained(given, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        paper_table.main(given)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_bad_files_end_the_command_with_a_message(tmp_path):
    for given, message in (
        (["--data", "cifar10"], "data cifar10: needs --root"),
        (["--data", "imagenet64", "--root", str(tmp_path)], "expected train_data_batch_1.npz"),
        (["--features", str(tmp_path / "none.pt")], "--features .*none.pt"),
    ):
        with pytest.raises(SystemExit, match=f"paper_table: .*{message}"):
            paper_table.main(given)


def test_statistics_of_other_features_are_refused(tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.ones(5), sigma=np.eye(5))
    options = argparse.Namespace(
        features=scripted(Pooled(), tmp_path / "network.pt"),
        statistics=tmp_path / "statistics.npz",
        device="cpu",
        seed=0,
    )
    data = image_data.load("cifar10", cifar_pickles(tmp_path / "data"))
    with pytest.raises(ValueError, match="expected those of the extractor's 3 features, got 5"):
        paper_table.Judge(data, options, protocols.PROTOCOLS["cifar10"])
