"""Optimal-transport plans under torchcfm's names: POT's as in torchcfm, and the one on the device."""
# ruff: noqa: B023 (what is given to assert_same is called at once)

import itertools
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from test_torchcfm import F32, F64, numpy_words, outcome, same, sample, their_plans

import fmkernels.integrations.torchcfm as ours

ot = pytest.importorskip("ot")


def assert_same(call):
    value, _, *states = outcome(call, ours)
    want, _, *wanted_states = outcome(call, their_plans)
    assert same(value, want) and same(states, wanted_states), f"{value} instead of {want}"


# ---- plans by POT -------------------------------------------------------------------------------------------------

PLANS = {
    "exact": {"method": "exact"},
    "exact_threads": {"method": "exact", "num_threads": 2},
    "sinkhorn": {"method": "sinkhorn", "reg": 0.7},
    "sinkhorn_normalised": {"method": "sinkhorn", "reg": 0.1, "normalize_cost": True},
    "sinkhorn_underflow": {"method": "sinkhorn", "reg": 1e-4},
    "sinkhorn_underflow_quiet": {"method": "sinkhorn", "reg": 1e-4, "warn": False},
    "unbalanced": {"method": "unbalanced", "reg": 0.7, "reg_m": 2.0},
    "partial": {"method": "partial", "reg": 2.0},
    "unknown": {"method": "emd"},
    "none": {"method": None},
}


@pytest.mark.parametrize("plan", PLANS)
def test_plans_by_pot(plan):
    def made(m):
        return m.OTPlanSampler(**PLANS[plan])

    for dtype, shape in ((F32, (6, 3)), (F64, (5, 2, 2)), (F32, (1, 2))):
        x0, x1, t = sample(shape, dtype)
        for call in (
            lambda m: made(m).get_map(x0, x1),
            lambda m: made(m).get_map(x0, x1[: max(1, len(x1) - 2)]),
            lambda m: made(m).sample_map(np.outer(t, t + 1), 9),
            lambda m: made(m).sample_map(np.outer(t, t + 1), len(x0), replace=False),
            lambda m: made(m).sample_plan(x0, x1),
            lambda m: made(m).sample_plan(x0, x1, replace=False),
            lambda m: made(m).sample_plan_with_labels(x0, x1, t, None),
            lambda m: made(m).sample_plan_with_labels(x0, x1, None, x1, replace=False),
            lambda m: made(m).sample_trajectory(torch.stack([x0, x1, x0 + x1], 1)),
            lambda m: [getattr(made(m), name) for name in ("reg", "reg_m", "normalize_cost", "warn")],
            lambda m: [made(m).ot_fn.func, made(m).ot_fn.keywords],
        ):
            assert_same(call)


@pytest.mark.parametrize("warn", [True, False])
def test_a_plan_that_vanishes(warn, monkeypatch):
    """The uniform one stands for it, with a warning of the same class and words, unless it is not wanted."""
    x0, x1, _ = sample((4, 3))
    found = []
    for module in (ours, their_plans):
        sampler = module.OTPlanSampler("exact", warn=warn)
        sampler.ot_fn = lambda a, b, cost: np.zeros_like(cost)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append((sampler.get_map(x0, x1), [(each.category, str(each.message)) for each in caught]))
    assert same(*found) and len(found[0][1]) == warn
    assert (found[0][0] == 1 / 16).all()


def test_a_plan_that_is_not_finite():
    """A warning where torchcfm prints; drawing from it raises in both."""
    x0, x1, _ = sample((5, 3))
    for module in (ours, their_plans):
        sampler = module.OTPlanSampler("exact")
        sampler.ot_fn = lambda a, b, cost: np.full_like(cost, math.nan)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(ValueError):
                sampler.sample_plan(x0, x1)
        assert [str(each.message)[:26] for each in caught] == ["The OT plan is not finite:"] * (module is ours)


def test_wasserstein():
    x0, x1, _ = sample((7, 2, 2))
    for method, power in itertools.product((None, "exact", "sinkhorn", "partial"), (1, 2, 3)):
        assert_same(lambda m: m.wasserstein(x0, x1, method, reg=2.0, power=power))
    assert_same(lambda m: m.wasserstein(x0.double(), x1[:3].double(), anything=1))


def test_without_pot(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    for make in (ours.ExactOptimalTransportConditionalFlowMatcher, lambda: ours.OTPlanSampler("exact")):
        with pytest.raises(ImportError, match=r"expected POT \(pip install POT\).*SinkhornPlanSampler needs none"):
            make()
    x0, x1, t = sample((5, 3))
    matcher = ours.ExactOptimalTransportConditionalFlowMatcher(0.1, ot_sampler=ours.SinkhornPlanSampler())
    assert matcher.sample_location_and_conditional_flow(x0, x1, t)[1].shape == (5, 3)


# ---- the plan on the device ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "reg", "iterations"), [(20, 20, 0.5, 200), (7, 12, 2.0, 100), (40, 40, 0.4, 600)]
)
def test_sinkhorn_against_pot(rows, columns, reg, iterations):
    x0, x1 = torch.randn(rows, 3, dtype=F64), torch.randn(columns, 3, dtype=F64) + 1
    cost = (torch.cdist(x0, x1) ** 2).numpy()
    want = ot.sinkhorn(ot.unif(rows), ot.unif(columns), cost, reg, numItermax=5000, stopThr=1e-11)
    sampler = ours.SinkhornPlanSampler(reg, iterations)
    plan = sampler.get_map(x0, x1)
    assert plan.dtype == F64
    assert abs(plan.numpy() - want).max() < 1e-7 * want.max()
    error = sampler.marginal_error(plan)
    assert error.shape == () and error < 1e-6
    single = sampler.get_map(x0.float(), x1.float())
    assert single.dtype == F32 and abs(single.numpy() - want).max() < 1e-3 * want.max()
    normalised = ours.SinkhornPlanSampler(reg / float(cost.max()), iterations, normalize_cost=True).get_map(x0, x1)
    torch.testing.assert_close(normalised, plan)


def test_the_marginal_error_falls_with_the_iterations_and_rows_are_exact():
    x0, x1 = torch.randn(48, 2, 2, dtype=F64), torch.randn(48, 2, 2, dtype=F64)
    plans = [ours.SinkhornPlanSampler(0.05, n).get_map(x0, x1) for n in (1, 20, 400)]
    errors = [float(ours.SinkhornPlanSampler.marginal_error(plan)) for plan in plans]
    assert errors[0] > 3 * errors[1] > 30 * errors[2] > 0
    for plan in plans:
        torch.testing.assert_close(plan.sum(1), torch.full((48,), 1 / 48, dtype=F64))
    # From the start at a small reg the potentials take thousands of iterations to cross the data.
    far = ours.SinkhornPlanSampler(0.02, 100).get_map(x0.flatten(1)[:, :2], 5 * x1.flatten(1)[:, :2])
    assert ours.SinkhornPlanSampler.marginal_error(far) < 0.2
    lopsided = torch.tensor([[0.5, 0.1], [0.2, 0.2]])
    torch.testing.assert_close(ours.SinkhornPlanSampler.marginal_error(lopsided), torch.tensor(0.1 + 0.1 + 0.2 + 0.2))


def test_rows_of_far_samples_are_exact_too():
    """f + g − C cancels where costs are far above reg: an outlier may not take the draws of the others."""
    x0, x1 = torch.randn(2, 64, 5)
    x1[0] = 1000.0
    plan = ours.SinkhornPlanSampler().get_map(x0, x1)
    torch.testing.assert_close(plan.sum(1), torch.full((64,), 1 / 64))
    assert plan[:, 0].sum() < 1.2 / 64
    wide = ours.SinkhornPlanSampler().get_map(x0.double(), x1.double())
    assert (plan - wide).abs().sum() < 1e-3


def test_sinkhorn_tends_to_the_exact_assignment():
    """Costs in the thousands too, where the products of POT's Sinkhorn underflow."""
    order = torch.randperm(16)
    x0 = torch.randn(16, 784)
    x1 = (2 * x0 + torch.randn(16, 784))[order]
    plan = ours.SinkhornPlanSampler(0.5, 100).get_map(x0, x1)
    assert abs(plan.numpy() - ours.OTPlanSampler("exact").get_map(x0, x1)).max() < 1e-4
    assert torch.equal(plan.argmax(0), order)


def test_pairs_are_drawn_by_their_probability():
    plan = torch.rand(5, 7, dtype=F64)
    plan[2] = plan[:, 3] = plan[0, 0] = plan[-1, -1] = 0
    plan /= plan.sum()
    n = 40_000
    i, j = ours.SinkhornPlanSampler().sample_map(3 * plan, n)  # of any sum
    assert i.dtype == j.dtype == torch.int64 and i.shape == j.shape == (n,)
    counts = torch.bincount(7 * i + j, minlength=35).reshape(5, 7)
    assert (counts[plan == 0] == 0).all()
    kept = plan > 0
    chi_square = ((counts - n * plan).square()[kept] / (n * plan)[kept]).sum()
    assert chi_square < 23 + 5 * math.sqrt(2 * 23)
    assert abs(counts.sum(1) / n - plan.sum(1)).max() < 0.02


@pytest.mark.parametrize("drawn", [0.0, 1 - 2.0**-53])
def test_the_ends_of_what_is_drawn_are_pairs_of_the_plan(drawn, monkeypatch):
    plan = torch.zeros(3, 4)
    plan[1, 1:3] = 0.7
    monkeypatch.setattr(torch, "rand", lambda n, **options: torch.full((n,), drawn, dtype=options["dtype"]))
    i, j = ours.SinkhornPlanSampler().sample_map(plan, 2)
    assert i.tolist() == [1, 1] and j.tolist() == [2 if drawn == 0 else 1] * 2


def test_without_replacement_every_pair_comes_once():
    plan = torch.rand(4, 5)
    plan[1] = 0
    i, j = ours.SinkhornPlanSampler().sample_map(plan / plan.sum(), 15, replace=False)
    assert set(zip(i.tolist(), j.tolist())) == set(itertools.product((0, 2, 3), range(5)))
    first = [
        ours.SinkhornPlanSampler().sample_map(torch.tensor([[0.7, 0.1, 0.2]]), 1, replace=False)[1] for _ in range(3000)
    ]
    share = torch.cat(first).bincount(minlength=3) / 3000
    assert abs(share - torch.tensor([0.7, 0.1, 0.2])).max() < 0.04


def test_a_generator_of_ones_own():
    x0, x1, _ = sample((9, 3))
    before = torch.get_rng_state()
    pairs = [
        ours.SinkhornPlanSampler(generator=torch.Generator().manual_seed(s)).sample_plan(x0, x1) for s in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert same(pairs[0], pairs[1]) and not torch.equal(pairs[0][0], pairs[2][0])
    numpy_state = numpy_words()
    ours.SinkhornPlanSampler().sample_plan(x0, x1)
    assert (numpy_words() == numpy_state).all() and not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("replace", [True, False])
def test_labels_go_with_their_samples(replace):
    x0, x1, _ = sample((9, 2, 2))
    xs, ys, y0, y1 = ours.SinkhornPlanSampler().sample_plan_with_labels(x0, x1, torch.arange(9), None, replace)
    assert torch.equal(xs, x0[y0]) and y1 is None and all((x1 == y).flatten(1).all(1).any() for y in ys)


@pytest.mark.parametrize(
    "cls", ["ExactOptimalTransportConditionalFlowMatcher", "SchrodingerBridgeConditionalFlowMatcher"]
)
def test_nothing_is_read_by_the_host(cls):
    """On tensors without values, where any read raises: whole batches of pairs from the plan."""
    x0, x1, t = (x.to("meta") for x in sample((9, 3)))
    matcher = getattr(ours, cls)(0.3, ot_sampler=ours.SinkhornPlanSampler(iterations=5))
    found = matcher.guided_sample_location_and_conditional_flow(x0, x1, y1=t, t=t)
    assert [None if x is None else (x.shape, x.device.type) for x in found] == [
        ((9,), "meta"), ((9, 3), "meta"), ((9, 3), "meta"), None, ((9,), "meta"),
    ]  # fmt: skip
    matcher.ot_sampler.sample_plan(x0, x1, replace=False)
    assert matcher.ot_sampler.marginal_error(matcher.ot_sampler.get_map(x0, x1)).device.type == "meta"


@pytest.mark.compiles
def test_sinkhorn_compiles_in_one_graph():
    x0, x1, _ = sample((9, 3))
    sampler = ours.SinkhornPlanSampler(iterations=6)
    compiled = torch.compile(sampler.sample_plan, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    pairs = compiled(x0, x1)
    torch.manual_seed(2)
    assert same(pairs, sampler.sample_plan(x0, x1))


X, PLAN = torch.randn(4, 3), ours.SinkhornPlanSampler()
ERRORS = [
    (lambda: ours.SinkhornPlanSampler(0.0), ValueError, "reg: expected a finite number above 0, got 0.0"),
    (lambda: ours.SinkhornPlanSampler("0"), TypeError, "reg: expected a real number, got str"),
    (lambda: ours.SinkhornPlanSampler(iterations=0), ValueError, "iterations: expected an int of at least 1, got 0"),
    (lambda: ours.SinkhornPlanSampler(iterations=2.0), TypeError, "iterations: expected an int, got float"),
    (lambda: ours.SinkhornPlanSampler(generator=1), TypeError, "generator: expected a torch.Generator, got int"),
    (lambda: PLAN.get_map(X.numpy(), X), TypeError, "x0: expected a torch.Tensor, got ndarray"),
    (lambda: PLAN.get_map(X, X.long()), TypeError, "x1: expected dtype float32.* got int64"),
    (lambda: PLAN.get_map(X[:0], X), ValueError, r"x0: expected samples \[B, …\], at least one, got shape"),
    (lambda: PLAN.get_map(X, X[:, :2]), ValueError, r"x1: expected samples of shape \[3\], got \[2\]"),
    (lambda: PLAN.get_map(X, X.to("meta")), ValueError, "x1: expected device cpu, that of x0, got meta"),
    (lambda: PLAN.sample_map(X.abs(), 13, False), ValueError, "batch_size: expected at most 12 pairs, got 13"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=range(len(ERRORS)))
def test_errors_of_the_device_plan(call, error, message):
    with pytest.raises(error, match=message):
        call()
