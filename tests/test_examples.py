"""The examples on points: tiny runs leave their pictures and numbers, a flow that works and theorems that hold."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

import fmkernels as fmk

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # as for a script that is run by its path
FUSED = {"fused, x0 stored", "fused, x0 redrawn"}


@pytest.fixture(scope="module")
def checkerboard():
    return runpy.run_path(str(EXAMPLES / "checkerboard.py"))


@pytest.fixture(scope="module")
def theorems():
    return runpy.run_path(str(EXAMPLES / "change_of_variables.py"))


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

    for name in ("checkerboard", "trajectories", "few_evaluations"):
        height, width, _ = matplotlib.image.imread(results / f"{name}.png").shape
        assert width > 800 and height > 300
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


def test_few_evaluations_are_worse_than_many(results):
    for name, path in json.loads((results / "checkerboard.json").read_text())["paths"].items():
        assert set(path["given"]) == {"euler", "midpoint"}, name
        for shares in path["given"].values():
            assert shares["4"] > shares["64"] and all(0 < share < 1 for share in shares.values()), name


def test_the_density_is_one(results):
    for name, path in json.loads((results / "checkerboard.json").read_text())["paths"].items():
        assert path["density"]["mass"] == pytest.approx(1, abs=0.1), name
        assert math.log(8) < path["density"]["nats"] < 3, name  # the base has 3.17


def test_density_and_fit_of_the_base(checkerboard):
    """A field that stands still leaves the standard normal, whose fit to the board is known."""

    def still(t, x):
        return 0 * x

    log_density = checkerboard["density"](still, 80)
    middle = (torch.arange(80) + 0.5) / 16 - 2.5
    x, y = middle.view(-1, 1), middle.view(1, -1)
    torch.testing.assert_close(log_density, -0.5 * (x**2 + y**2) - math.log(2 * math.pi))
    fit = checkerboard["fit_of"](log_density)
    assert fit["nats"] == pytest.approx(math.log(2 * math.pi) + 4 / 3, abs=2e-3)  # E‖x‖²/2 on the board is 4/3
    assert fit["mass"] == pytest.approx(math.erf(2.5 / math.sqrt(2)) ** 2, abs=1e-3)


def test_density_is_that_of_the_points_below(checkerboard):
    """Stretching x alone: the first index of the grid is x."""

    def stretch(t, x):
        return x * torch.tensor([math.log(2.0), 0.0])

    log_density = checkerboard["density"](stretch, 10).exp()
    middle = (torch.arange(10) + 0.5) / 2 - 2.5
    normal = torch.distributions.Normal(0, 1)
    expected = (normal.log_prob(middle / 2).exp() / 2).view(-1, 1) * normal.log_prob(middle).exp()
    torch.testing.assert_close(log_density, expected, rtol=1e-2, atol=1e-5)


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


def test_the_theorems_hold(theorems, one_thread, tmp_path, capsys):
    import matplotlib.image

    theorems["main"](["--quick", "--out", str(tmp_path)])
    for name in ("change_of_variables", "continuity", "matching"):
        assert matplotlib.image.imread(tmp_path / f"{name}.png").shape[1] > 1000
    results = json.loads((tmp_path / "change_of_variables.json").read_text())
    for name in ("Gaussian mixture", "network"):
        loose, *_, tight = (row["gap"] for row in results["change_of_variables"] if row["field"] == name)
        assert tight < 1e-2 and tight < loose, name
    assert results["continuity"] < 1e-12
    gaps = [row["conditional"] - row["marginal"] for row in results["losses"]]
    assert max(gaps) - min(gaps) < 0.05 * min(gaps)
    printed = capsys.readouterr().out
    assert "Continuity equation" in printed and "Gaussian mixture" in printed
    assert "| Gaussian mixture" in (tmp_path / "change_of_variables.md").read_text()


def test_both_log_densities_are_the_exact_one(theorems):
    """A linear field: x1 = exp(A)·x0, its density a Gaussian's."""

    class Linear(torch.nn.Module):
        t_range = (0.0, 1.0)
        rates = torch.tensor([0.5, -1.0], dtype=torch.float64)

        def forward(self, t, x):
            return x * self.rates

        def base(self):
            return fmk.StandardNormal()

    field, x1 = Linear(), torch.randn(16, 2, dtype=torch.float64)
    exact = torch.distributions.Normal(0, field.rates.exp()).log_prob(x1).sum(-1)
    torch.testing.assert_close(theorems["log_prob_by_jacobian"](field, x1, 1e-10), exact, rtol=0, atol=1e-8)
    torch.testing.assert_close(theorems["log_prob_by_divergence"](field, x1, 1e-10).log_prob, exact, rtol=0, atol=1e-8)


def test_continuity_notices_a_wrong_velocity(theorems):
    exact = fmk.MarginalField(theorems["ring"](), fmk.CondOT(sigma_min=0.2))
    x = theorems["square_grid"](16, 3.0)
    found = theorems["continuity"](exact, 0.7, x)
    assert (found["change"] + found["outflow"]).abs().max() < 1e-13
    torch.testing.assert_close(found["velocity"], exact(0.7, x))

    class Faster(fmk.MarginalField):
        def forward(self, t, x):
            return 1.01 * super().forward(t, x)

    found = theorems["continuity"](Faster(theorems["ring"](), fmk.CondOT(sigma_min=0.2)), 0.7, x)
    assert (found["change"] + found["outflow"]).abs().max() > 1e-4


def test_the_slope_of_a_power(theorems):
    assert theorems["slope"]({n: 3 * n**-0.5 for n in (4.0, 8.0, 64.0)}) == pytest.approx(-0.5)


def test_gradient_gaps_fall_with_the_draws(theorems, one_thread):
    generator = torch.Generator().manual_seed(0)
    data = theorems["spiral"](64, generator)
    fm = fmk.FlowMatching(fmk.CondOT(sigma_min=0.2))
    exact, model = fmk.MarginalField(data, fm.schedule), theorems["SmoothField"](16).double()
    gaps = theorems["gradient_gaps"](fm, exact, model, 64, generator)
    means = {name: {n: found["gap"] for n, found in values.items()} for name, values in gaps.items()}
    for name, values in means.items():
        assert sorted(values) == [256 * 2**k for k in range(5)], name
        assert theorems["slope"](values) == pytest.approx(-0.5, abs=0.2), name
    conditional, *stable = (values[256] for values in means.values())
    assert max(stable) < 0.9 * conditional  # an averaged target varies less


@pytest.mark.parametrize("argument", [["--steps", "0"], ["--batch", "many"], ["--device", "tpu"]])
def test_a_bad_option_is_explained(checkerboard, argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        checkerboard["main"](argument)
    assert stopped.value.code == 2
    assert argument[0] in capsys.readouterr().err


def test_a_bad_option_of_the_theorems_is_explained(theorems, capsys):
    with pytest.raises(SystemExit) as stopped:
        theorems["main"](["--seed", "one"])
    assert stopped.value.code == 2 and "--seed" in capsys.readouterr().err


# The page of the experiments.


@pytest.mark.parametrize("name", ["change_of_variables", "checkerboard", "digits"])
def test_the_page_has_the_numbers_of_the_committed_results(name):
    from common import markdown_table

    docs = EXAMPLES.parent / "docs"
    page, results = (
        (docs / "experiments.md").read_text(),
        json.loads((docs / "experiments" / f"{name}.json").read_text()),
    )
    script = runpy.run_path(str(EXAMPLES / ("paper_table.py" if name == "digits" else f"{name}.py")))
    shown = [markdown_table(*table[1:3]) in page for table in script["tables"](results)]
    # Of the checkerboard the paths and the curves are shown, of the digits the table itself.
    expected = {"change_of_variables": [True] * 3, "checkerboard": [True, False, True, False], "digits": [True, False]}
    assert shown == expected[name]


def test_optimal_transport_wins_as_the_page_says():
    rows = json.loads((EXAMPLES.parent / "docs" / "experiments" / "digits.json").read_text())["rows"]
    assert {len(runs) for runs in rows.values()} == {3}
    for figure in ("bits", "frechet", "nfe"):
        best = [min(rows, key=lambda name: rows[name][seed][figure]) for seed in range(3)]
        assert best == ["FM, OT path"] * 3, figure


def test_one_percent_of_the_times_carries_a_third_of_scoreflows_weight():
    schedule = fmk.VP()
    t = (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6 * schedule.t_range[1]
    objective = fmk.FlowMatching.named("scoreflow", schedule).objective
    weight = objective.table(t, schedule.coefficients(t))[0][:, 4].sort().values
    assert (weight[-(10**4) :].sum() / weight.sum()).item() == pytest.approx(0.32, abs=0.005)
