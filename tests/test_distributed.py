"""Two and three gloo processes give the numbers of one: noise, losses, gradients, weights, likelihoods, resumed runs.

torchrun starts this file as a script, three processes that run `everything`, then two of them again, and leave what
came of it in a folder; the process of the tests runs it too, alone, and compares.
"""

import contextlib
import datetime
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # as for a script that is run by its path

import fmkernels as fmk  # noqa: E402
from fmkernels.distributed import gather_rows, score_dataset, shard_rows  # noqa: E402

TIMEOUT = 400  # seconds, many times what it takes
PATIENCE = datetime.timedelta(seconds=120)  # of a process with the others, so that none outlives the tests for long
# 16 images in batches of 7, 7 and 2: no batch divides by the ranks, and of three the last has no row in the third.
ROWS, BATCH, STEPS = 16, 7, 5
RUNS = {
    "ddp": ["--parallel", "ddp", "--float64"],
    "ddp, accumulated": ["--parallel", "ddp", "--float64", "--accumulate", "3", "--network", "transformer"],
    "ddp, fp32": ["--parallel", "ddp", "--network", "unet"],
    "fsdp2": ["--parallel", "fsdp2", "--float64", "--accumulate", "2", "--network", "transformer"],
    "fsdp2, fp16": ["--parallel", "fsdp2", "--amp", "fp16", "--network", "transformer"],
}


class Ends(torch.utils.data.Dataset):
    """Stops before its end, of which a loop over it says nothing."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        if index == 10:
            raise StopIteration
        return tiny().test[index]


class Crash(Exception):
    """What a rank of these tests dies of."""


def tiny(root=None):
    """Images of 4 × 4 with 17 levels."""
    from image_data import ImageData, in_memory

    images = torch.randint(0, 17, (ROWS + 11, 1, 4, 4), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    return ImageData("tiny", (1, 4, 4), 17, in_memory(images[:ROWS]), images[ROWS:])


def place():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def everything(out: Path, checkpoint: Path | None = None) -> dict:
    """All that is compared, in the processes that there are; ``checkpoint``: a folder with one of another number."""
    import train_ddp
    from image_data import READERS

    READERS["tiny"] = tiny
    common = ["--data", "tiny", "--batch", str(BATCH), "--device", "cpu", "--learning-rate", "0.01"]

    def trained(folder, *arguments, steps=STEPS):
        options = train_ddp.options_of([*common, "--out", str(out / folder), "--steps", str(steps), *arguments])
        trainer = train_ddp.Trainer(options)
        for group in trainer.optimizer.param_groups:
            group["eps"] = 1e-3  # with 1e-8 Adam turns the rounding of a gradient that is 0 into a step of any size
        trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 256.0} if "fp16" in arguments else {})
        trainer.run()
        state = trainer.state_dict()
        whole = {f"{part} {name}": value for part in ("model", "average") for name, value in parts_of(state, part)}
        return {**whole, "scale": torch.tensor(trainer.scaler.get_scale())}

    found = {"draws": draws()}
    for name, arguments in RUNS.items():
        with gradients_of_first_step() as gradients:
            weights = trained(name, *arguments)
        found[name] = {"weights": weights, "gradients": gradients}
    found["scores"] = {batch: vars(scored(train_ddp, batch)) for batch in (3, 8)}

    dropped = ["--dropout", "0.2", "--accumulate", "2", "--save-every", "3"]
    for parallel in ("ddp", "fsdp2"):
        arguments = [*dropped, "--parallel", parallel]
        found[f"uninterrupted, {parallel}"] = trained(f"whole {parallel}", *arguments, steps=6)
        if place()[0] == 0:
            shutil.copytree(out / f"whole {parallel}" / "step-00000003", out / f"cut {parallel}" / "step-00000003")
            (out / f"cut {parallel}" / "step-00000004").mkdir()  # a checkpoint that was never finished
        barrier()
        found[f"resumed, {parallel}"] = trained(f"cut {parallel}", *arguments, "--resume", steps=6)
    if checkpoint is not None:
        for parallel in ("ddp", "fsdp2"):
            if place()[0] == 0:
                shutil.copytree(checkpoint / "step-00000005", out / f"moved {parallel}" / "step-00000005")
            barrier()
            arguments = ["--float64", "--resume", "--parallel", parallel]
            found[f"moved, {parallel}"] = trained(f"moved {parallel}", *arguments, steps=8)
    else:
        found["longer"] = trained("ddp", "--float64", "--resume", steps=8)
    return found


def parts_of(state, part):
    values = state[part]["model"] if part == "average" else state[part]
    for name, value in values.items():
        yield name, (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def gradients_of_first_step():
    """Collects the whole gradients that the optimizer first sees."""
    found = {}

    def note(optimizer, *_):
        if not found:
            for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                grad = parameter.grad
                found[number] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def draws() -> dict:
    """What every rank draws for its rows of one batch, gathered; 2 rows leave the third rank without any."""
    rank, world = place()
    found = {}
    for total in (2, 7, 64):
        for mode in ("store", "recompute"):
            fm = fmk.FlowMatching(fmk.SchrodingerBridge(0.3), timesteps=fmk.LogitNormal(stratified=True), noise=mode)
            key = fmk.key(generator=torch.Generator().manual_seed(total))
            x1 = torch.arange(total * 15.0).view(total, 3, 5).sin()
            first, last = shard_rows(total, rank, world)
            batch = fm.sample(x1[first:last], key=key, first_row=first, total_rows=total)
            losses = fm.loss(torch.zeros_like(x1[first:last]), batch, reduction="none")
            found[total, mode] = [gather_rows(value) for value in (batch.x_t, batch.t, losses)]
    key = torch.tensor([5])
    first, last = shard_rows(13, rank, world)
    levels = torch.zeros(last - first, 6, dtype=torch.uint8)
    found["dequantised"] = [gather_rows(fmk.dequantise(levels, key=key, first_row=first))]
    return found


def field_and_options(train_ddp):
    """A field of some network, and how it is scored."""
    trainer = train_ddp.Trainer(train_ddp.options_of(["--data", "tiny", "--out", "nowhere", "--device", "cpu"]))
    field = trainer.fm.velocity(trainer.new_network())
    torch.manual_seed(1)
    for parameter in field.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    probes = fmk.Hutchinson(2)
    return field, {"bits": trainer.data.bits, "draws": 2, "divergence": probes, "rtol": 1e-3, "atol": 1e-3}


def scored(train_ddp, batch):
    key = torch.tensor([9 + place()[0]])  # the first rank's is for all
    field, options = field_and_options(train_ddp)
    return score_dataset(field, tiny().test, batch, key=key, **options)


def failures() -> dict:
    """How errors of one rank end in every rank."""
    rank, _ = place()
    found = {}

    def still(t, x):
        if rank == 1:
            raise Crash("of this field")
        return 0 * x

    wrong = tiny().test.clone()
    wrong[-1, 0, 0, :2] = torch.tensor([0, 99])  # in the share of the last rank
    cases = {
        "levels": lambda: score_dataset(lambda t, x: 0 * x, wrong, 3, bits=math.log2(17)),
        "field": lambda: score_dataset(still, tiny().test, 3, bits=math.log2(17)),
        "argument": lambda: score_dataset(still, tiny().test, 0 if rank == 1 else 3),
        "rows": lambda: gather_rows(torch.zeros(2, 3 + rank)),
        "dtype": lambda: gather_rows(torch.zeros(2, dtype=torch.int64 if rank else torch.float32)),
        "no rows": lambda: gather_rows([1] if rank == 1 else torch.zeros(2)),
        "device": lambda: gather_rows(torch.zeros(2, device="meta" if rank == 1 else "cpu")),
        "shards": lambda: score_dataset(lambda t, x: 0 * x, tiny().test[rank:], 3, bits=math.log2(17)),
        "batches": lambda: score_dataset(lambda t, x: 0 * x, tiny().test, 3 + rank, bits=math.log2(17)),
        "first rows": lambda: score_dataset(lambda t, x: 0 * x, tiny().test, 3, first_row=rank, bits=math.log2(17)),
        "an end": lambda: score_dataset(lambda t, x: 0 * x, Ends(), 3, bits=math.log2(17)),
    }
    for name, case in cases.items():
        try:
            case()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    told = [None] * place()[1]
    dist.all_gather_object(told, found)
    return {name: [one.get(name, "no error") for one in told] for name in cases}


def times_that_arrive() -> dict:
    """The dtype in which FSDP2 hands t to a network in bfloat16, by its option cast_forward_inputs."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    class Echo(torch.nn.Linear):
        def forward(self, x, t):
            seen.append(t.dtype)
            return super().forward(x.to(self.weight.dtype))

    seen = []
    for cast in (True, False):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=cast)
        fully_shard(Echo(4, 4), mp_policy=policy)(torch.ones(2, 4), torch.ones(2))
    return dict(zip((True, False), seen))


def a_rank_dies(out: Path):
    """Rank 1 fails in the middle of a step; the others are in a sum over the gradients with it."""
    import train_ddp

    trainer = train_ddp.Trainer(train_ddp.options_of(["--data", "tiny", "--out", str(out / "dies"), "--device", "cpu"]))
    if place()[0] == 1:
        trainer.loss_of = None
        print("rank 1 dies now", file=sys.stderr, flush=True)
    trainer.train_step()


def main(out: Path):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group(timeout=PATIENCE)
    for world in (3, 2):
        if world == 2:
            dist.destroy_process_group()
            if rank == 2:
                return
            meeting = f"file://{out}/meeting"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=PATIENCE)
        with contextlib.redirect_stderr(io.StringIO()):  # of the bars
            found = everything(out / str(world), out / "1" / "ddp")
        found |= {"failures": failures(), "times": times_that_arrive()}
        if rank == 0:
            torch.save(found, out / str(world) / "found.pt")
    a_rank_dies(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield everything(folder / "1")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def launched(folder, alone):
    """The exit status and what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", __file__, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module", params=[2, 3], ids=["two processes", "three processes"])
def several(request, folder, alone, launched):
    out = folder / str(request.param)
    assert (out / "found.pt").exists(), launched[1]
    return {**torch.load(out / "found.pt", weights_only=False), "out": out}


pytestmark = pytest.mark.slow


def test_every_row_has_one_rank():
    for total in (0, 1, 5, 6, 7, 100, 2**40):
        for world in (1, 2, 3, 7):
            ends = [shard_rows(total, rank, world) for rank in range(world)]
            assert ends[0][0] == 0 and ends[-1][1] == total
            assert all(last == first for (_, last), (first, _) in zip(ends, ends[1:]))
            sizes = [last - first for first, last in ends]
            assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_noise_and_times_are_those_of_one_process(several, alone):
    for case, values in alone["draws"].items():
        for ours, theirs in zip(several["draws"][case], values):
            assert ours.equal(theirs), case


@pytest.mark.parametrize("name", RUNS)
def test_training_is_that_of_one_process(several, alone, name, folder):
    """Losses, gradients, weights and their average; what is left is the order of the sums over rows."""
    half = "--amp" in RUNS[name]
    bound = {"rtol": 1e-12, "atol": 1e-13} if "--float64" in RUNS[name] else {"rtol": 1e-4, "atol": 2e-5}
    if half:
        bound = {"rtol": 0.05, "atol": 0.005}
    logs = [torch.tensor(numbers_of(where / name / "log.jsonl"), dtype=torch.float64) for where in
            (several["out"], folder / "1")]  # fmt: skip
    assert logs[0].shape == (STEPS, 3)
    torch.testing.assert_close(*logs, **bound)
    first, last = logs[1][0, 1], logs[1][-1, 1]
    assert first > 0.5 and last < first, "nothing was learned"
    ours, theirs = several[name]["gradients"], alone[name]["gradients"]
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for number, gradient in theirs.items():
        torch.testing.assert_close(ours[number], gradient, **bound)
    compare(several[name]["weights"], alone[name]["weights"], **bound)
    if half:
        assert several[name]["weights"]["scale"] == alone[name]["weights"]["scale"] > 1


def numbers_of(log):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [[line["step"], line["loss"], line["gradient_norm"]] for line in lines][:STEPS]


def compare(ours, theirs, **bound):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **bound, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_resumed_run_is_the_uninterrupted_one(several, alone, parallel):
    """Bit for bit, with dropout; past a checkpoint that was never finished."""
    for found in (several, alone):
        compare(found[f"resumed, {parallel}"], found[f"uninterrupted, {parallel}"], rtol=0, atol=0)
    differs = several[f"resumed, {parallel}"]["model last.weight"] != alone[f"resumed, {parallel}"]["model last.weight"]
    assert differs.any(), "dropout was not at work"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_run_moves_to_another_number_of_processes(several, alone, parallel):
    compare(several[f"moved, {parallel}"], alone["longer"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batch", [3, 8])
def test_likelihoods_are_those_of_one_process(several, alone, batch):
    """Bit for bit: every image is in the batch it would be in. Batches of 8 leave the third of three ranks idle."""
    ours, theirs = several["scores"][batch], alone["scores"][batch]
    assert theirs["images"] == 11 and theirs["failed"] == 0 and theirs["log_prob"].shape == (11, 2)
    for name, value in theirs.items():
        same = ours[name].equal(value) if isinstance(value, torch.Tensor) else ours[name] == value
        assert same, name


def test_scores_are_those_of_the_streamed_evaluation(alone):
    """And the mean's standard error is that over the images."""
    import train_ddp

    field, options = field_and_options(train_ddp)
    streamed = list(fmk.evaluate_bits_per_dim(field, tiny().test.split(3), key=torch.tensor([9]), **options))
    scores = alone["scores"][3]
    for name in ("bits_per_dim", "log_prob", "stderr", "nfe", "status"):
        assert scores[name].equal(torch.cat([getattr(part, name) for part in streamed])), name
    bits = scores["bits_per_dim"].double()
    assert scores["mean"] == pytest.approx(streamed[-1].mean) == pytest.approx(bits.mean().item())
    assert scores["standard_error"] == pytest.approx(bits.std().item() / math.sqrt(11))


def test_an_error_of_one_rank_is_an_error_of_all(several):
    world = len(several["failures"]["field"])
    field = ["RuntimeError: rank 1 failed: Crash: of this field"] * world
    field[1] = "Crash: of this field"
    assert several["failures"]["field"] == field
    *others, last = several["failures"]["levels"]
    assert last == "ValueError: x: expected levels from 0 to 16, got 0 to 99"
    assert others == [f"RuntimeError: rank {world - 1} failed: {last}"] * (world - 1)
    argument = several["failures"]["argument"]
    assert argument[1] == "ValueError: batch: expected an int of at least 1, got 0"
    assert argument[0] == f"RuntimeError: rank 1 failed: {argument[1]}"
    expected = "ValueError: rows: expected those of rank 0, torch.float32 [n, 3] on cpu"
    expected += ", got torch.float32 [n, 4] on cpu in rank 1"
    assert several["failures"]["rows"] == [expected] * world
    assert all("torch.int64 [n, ] on cpu in rank 1" in text for text in several["failures"]["dtype"])
    no_rows = several["failures"]["no rows"]
    assert no_rows[1] == "TypeError: rows: expected a torch.Tensor, got list"
    assert no_rows[0] == f"RuntimeError: rank 1 failed: {no_rows[1]}"
    assert all("torch.float32 [n, ] on meta in rank 1" in text for text in several["failures"]["device"])
    for name, what in (("shards", "images"), ("batches", "batch"), ("first rows", "first_row")):
        assert all(text.startswith(f"ValueError: {what}: expected") for text in several["failures"][name])
    assert "the whole data set in every process, the same" in several["failures"]["shards"][0]
    *others, last = several["failures"]["an end"]
    assert last.startswith("ValueError: images: expected ") and all(last in text for text in others)


def test_a_rank_that_dies_ends_the_run(launched):
    """Soon, with its error; the other rank is in a sum with it."""
    status, printed = launched
    assert status != 0 and "rank 1 dies now" in printed
    assert "'NoneType' object is not callable" in printed


def test_fsdp2_hands_on_times_in_half_precision_unless_told_not_to(several):
    assert several["times"] == {True: torch.bfloat16, False: torch.float32}


def still(t, x):
    return 0 * x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: shard_rows(4.0, 0, 1), TypeError, "total: expected an int, got float"),
        (lambda: shard_rows(-1, 0, 1), ValueError, "total: expected an int of at least 0, got -1"),
        (lambda: shard_rows(4, 0, 0), ValueError, "world: expected an int of at least 1, got 0"),
        (lambda: shard_rows(4, 3, 3), ValueError, "rank: expected an int below world = 3, got 3"),
        (lambda: gather_rows([1]), TypeError, "rows: expected a torch.Tensor, got list"),
        (lambda: gather_rows(torch.tensor(1)), ValueError, r"rows: expected shape \[n, …\], got a scalar"),
        (lambda: score_dataset(still, iter([])), TypeError, "images: expected a tensor or a map-style data set"),
        (lambda: score_dataset(still, tiny().test, 2.5), TypeError, "batch: expected an int, got float"),
        (lambda: score_dataset(still, tiny().test, gradient="adjoint"), TypeError, "gradient: expected no such option"),
        (lambda: score_dataset(still, tiny().test.float()), TypeError, "x: expected integer levels, got float32"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_data_set_with_labels_and_one_of_no_image():
    images = tiny().test
    labelled = torch.utils.data.TensorDataset(images, torch.arange(len(images)))
    options = {"bits": math.log2(17), "key": torch.tensor([2]), "steps": 2, "method": "midpoint"}
    scores = [score_dataset(still, data, 4, **options) for data in (images, labelled)]
    assert scores[0].log_prob.equal(scores[1].log_prob) and scores[0].images == 11
    none = score_dataset(still, images[:0], 4, draws=3, **options)
    assert none.images == none.failed == 0 and math.isnan(none.mean) and none.nfe.shape == (0, 3)


def test_failed_images_are_counted_and_left_out():
    def half_fails(t, x):
        return torch.where(x.flatten(1).sum(1).view(-1, 1, 1, 1) > 0, torch.nan, -x)

    scores = score_dataset(half_fails, tiny().test, 4, bits=math.log2(17), key=torch.tensor([2]))
    assert 0 < scores.failed < 11 and int(scores.bits_per_dim.isnan().sum()) == scores.failed
    assert math.isfinite(scores.mean) and math.isfinite(scores.standard_error)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant
def test_the_command_of_one_process(tmp_path, capsys):
    import train_ddp

    arguments = ["--data", "digits", "--steps", "2", "--batch", "500", "--device", "cpu", "--out", str(tmp_path)]
    for bad in (["--resume"], ["--dropout", "2"], ["--learning-rate", "nan"]):
        with pytest.raises(SystemExit):
            train_ddp.main([*arguments, *bad])
        printed = capsys.readouterr().err
        assert f"{bad[0]}: expected" in printed
    assert not any(tmp_path.iterdir())
    (tmp_path / "step-00000001").mkdir()  # a checkpoint cut short, with its log
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    train_ddp.main([*arguments, "--likelihood", "--score-batch", "180"])
    assert "bits per dimension over 360 test images" in capsys.readouterr().out
    log = tmp_path / "log.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]
    with pytest.raises(SystemExit):
        train_ddp.main(arguments)
    assert "has a run already; go on with --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--learning-rate: expected 0.001, with which the run .* began, got 0.1"):
        train_ddp.main([*arguments, "--resume", "--learning-rate", "0.1"])
    with pytest.raises(SystemExit, match="--float64: expected torch.float32, with which .* got torch.float64"):
        train_ddp.main([*arguments, "--resume", "--float64"])
    log.write_text(log.read_text()[:-9])  # as a full disk leaves it
    train_ddp.main([*arguments, "--resume", "--steps", "3"])
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 3]
    metadata = tmp_path / "step-00000003" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-20])
    with pytest.raises(RuntimeError, match="step-00000003 does not load; remove it to resume from the one before"):
        train_ddp.main([*arguments, "--resume", "--steps", "4"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_saving_and_seeds_change_only_what_they_should(tmp_path):
    """A save before the first step that is taken counts as no step; dropout depends on the seed."""
    import train_ddp

    def trained(name, *arguments):
        common = ["--steps", "6", "--batch", "64", "--device", "cpu"]
        trainer = train_ddp.Trainer(train_ddp.options_of([*common, "--out", str(tmp_path / name), *arguments]))
        if "fp16" in arguments:
            state = {**trainer.scaler.state_dict(), "scale": 2.0**22}  # the first steps overflow and are skipped
            trainer.scaler.load_state_dict(state)
        trainer.run()
        assert 2**17 < trainer.scaler.get_scale() < 2**22
        return [parameter.detach().clone() for parameter in trainer.network.parameters()]

    often, seldom = (trained(n, "--amp", "fp16", "--save-every", n) for n in ("1", "100"))
    assert all(torch.equal(a, b) for a, b in zip(often, seldom))
    seeds = {train_ddp.seed_of(seed, step) for seed in range(20) for step in range(20)}
    assert len(seeds) == 400 and max(seeds) < 2**32
    torch.manual_seed(train_ddp.seed_of(0, 1))
    mask = torch.rand(4)
    torch.manual_seed(train_ddp.seed_of(1, 1))
    assert not torch.equal(mask, torch.rand(4))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
