"""The demo trains: a tiny run of ``examples/checkerboard.py`` leaves its picture, its numbers and a flow that works."""

import json
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "checkerboard.py"
FUSED = {"fused, x0 stored", "fused, x0 redrawn"}


@pytest.fixture(scope="module")
def checkerboard():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at this size threads only wait for one another
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def results(checkerboard, one_thread, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    checkerboard["main"](["--quick", "--device", "cpu", "--out", str(out)])
    return out


def test_the_pictures_and_the_numbers_are_written(results):
    import matplotlib.image

    for name in ("checkerboard", "trajectories"):
        height, width, _ = matplotlib.image.imread(results / f"{name}.png").shape
        assert width > 1000 and height > 300
    heads = json.loads((results / "checkerboard.json").read_text())["heads"]
    assert FUSED < {head["head"] for head in heads}
    assert all(head[figure] > 0 for head in heads for figure in ("points_s", "step_s", "images_s", "images_bytes"))


def test_the_loss_falls_and_the_samples_find_the_dark_squares(results):
    for name, path in json.loads((results / "checkerboard.json").read_text())["paths"].items():
        assert path["final_loss"] < 0.95 * path["first_loss"], name
        assert path["on_dark"] > 0.65, name  # the base has 0.46, points spread evenly over the board 0.5


def test_evaluations_are_counted_for_every_sample(results):
    paths = json.loads((results / "checkerboard.json").read_text())["paths"]
    for name, path in paths.items():
        nfe = path["nfe"]
        assert nfe["min"] < nfe["mean"] < nfe["max"] <= nfe["calls"], name
        assert 14 < nfe["min"] and nfe["max"] < 1000 and 0 <= nfe["rejected"] < 0.7, name
        assert all((nfe[which] - 2) % 6 == 0 for which in ("min", "max")), name  # two to start, six a step


def test_dark_squares(checkerboard):
    torch.manual_seed(0)
    on_dark = checkerboard["on_dark"]
    assert on_dark(checkerboard["checkerboard"](1000)) == 1.0
    assert on_dark(4 * torch.rand(20_000, 2) - 2) == pytest.approx(0.5, abs=0.02)
    assert on_dark(torch.tensor([[2.5, 0.5], [-0.5, 0.5], [0.5, 0.5]])) == pytest.approx(1 / 3)


def rotation(t, x):
    """Half a turn over the time range, faster and faster: angle πt²."""
    return 2 * torch.pi * t.unsqueeze(-1) * torch.stack([-x[:, 1], x[:, 0]], dim=-1)


def test_misplaced(checkerboard):
    torch.manual_seed(0)
    misplaced, board = checkerboard["misplaced"], checkerboard["checkerboard"](100_000)
    assert misplaced(board) < 0.03
    assert misplaced(board + torch.tensor([1.0, 0.0])) == pytest.approx(1.0)
    assert misplaced(board + 100) == pytest.approx(1.0)
    assert misplaced(4 * torch.rand(100_000, 2) - 2) == pytest.approx(0.5, abs=0.03)


def test_integrate_is_second_order(checkerboard):
    rotation.t_range = (0.0, 1.0)
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    errors = []
    for steps in (64, 128):
        first, *_, last = path = checkerboard["integrate"](rotation, start, steps, snapshots=4)
        assert len(path) == 5 and torch.equal(first, start)
        errors.append((last + start).norm())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1) and errors[1] < 1e-3


def test_adapt_meets_the_tolerance(checkerboard):
    rotation.t_range = (0.0, 1.0)
    start = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    solution = checkerboard["adapt"](rotation, start, instants=3)
    angle = torch.tensor(torch.pi / 4)
    way = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()]) * 2])
    expected = torch.stack([start, way.double(), -start], dim=1)
    torch.testing.assert_close(solution.y, expected, rtol=0, atol=1e-4)


def test_every_head_computes_the_same_loss(checkerboard, one_thread):
    x1 = checkerboard["checkerboard"](20_000)
    losses = []
    for name, head in checkerboard["heads"](compiled=False).items():
        prediction = torch.zeros_like(x1, requires_grad=True)
        losses.append(checkerboard["training_step"](head, lambda x_t, t, p=prediction: p, x1).item())
        assert prediction.grad.abs().sum() > 0, name
    # E|x1 − x0|² / 2 = 4/3 + 1, each head with its own draws
    assert losses == pytest.approx([7 / 3] * len(losses), rel=0.03)


@pytest.mark.parametrize("argument", [["--steps", "0"], ["--batch", "many"], ["--device", "tpu"]])
def test_a_bad_option_is_explained(checkerboard, argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        checkerboard["main"](argument)
    assert stopped.value.code == 2
    assert argument[0] in capsys.readouterr().err
