"""The tableaus satisfy their order conditions, and converge as they promise; the test problems' solutions are right."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from problems import ARENSTORF_PERIOD, PROBLEMS, spiral

from fmkernels.solvers.tableaus import ADAPTIVE, FIXED, TORCHDIFFEQ, Tableau, hermite, linear

HERMITE = {name: hermite(tableau) for name, tableau in FIXED.items()}
GROUPS = {"adaptive": ADAPTIVE, "fixed": FIXED, "hermite": HERMITE, "torchdiffeq": TORCHDIFFEQ}
EVERY = [pytest.param(t, id=f"{group}-{name}") for group, members in GROUPS.items() for name, t in members.items()]
PAIRS = [param for param in EVERY if param.values[0].error is not None]
SMOOTH = [pytest.param(t, id=f"{g}-{n}") for g in ("adaptive", "hermite") for n, t in GROUPS[g].items()]

# The order of each interpolant, where it is not that of the chord (1) or of the cubic (3 at most).
DENSE = {"dopri5": 4, "tsit5": 4, "dopri8": 5, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}
# torchdiffeq's values at half a step do not satisfy Σ b_j(1/2) c_j = 1/8, except in its dopri5 and dopri8.
DENSE_TORCHDIFFEQ = {"dopri5": 4, "dopri8": 4}


def partitions(nodes: int, largest: int):
    if nodes == 0:
        yield ()
    for first in range(min(nodes, largest), 0, -1):
        for rest in partitions(nodes - first, first):
            yield first, *rest


@functools.cache
def trees(nodes: int) -> tuple:
    """Rooted trees, each the tuple of the subtrees at its root."""
    found = set()
    for sizes in partitions(nodes - 1, nodes - 1):
        for subtrees in itertools.product(*map(trees, sizes)):
            found.add(tuple(sorted(subtrees)))
    return tuple(sorted(found))


def dot(weights, values) -> float:
    return math.fsum(w * v for w, v in zip(weights, values))


def size(tree) -> int:
    return 1 + sum(map(size, tree))


def density(tree) -> int:
    return size(tree) * math.prod(map(density, tree))


def elementary_weights(tree, tableau: Tableau) -> list[float]:
    """Φ_j of the tree, for every stage j."""
    inner = [elementary_weights(subtree, tableau) for subtree in tree]
    return [math.prod(dot(row, weights) for weights in inner) for row in tableau.a]


def residual(tableau: Tableau, weights, nodes: int, theta: float = 1.0) -> float:
    """By how much the weights miss the conditions of the trees of so many nodes."""
    return max(
        abs(dot(weights, elementary_weights(tree, tableau)) - theta**nodes / density(tree)) for tree in trees(nodes)
    )


def weights_at(tableau: Tableau, theta: float, derivative: bool = False) -> list[float]:
    """b_j(θ), or b_j′(θ)."""
    if derivative:
        return [sum(p * x * theta ** (p - 1) for p, x in enumerate(row, 1)) for row in tableau.interpolant]
    return [sum(x * theta**p for p, x in enumerate(row, 1)) for row in tableau.interpolant]


def unit(stages: int, index: int) -> list[float]:
    return [float(j == index % stages) for j in range(stages)]


def test_trees():
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@pytest.mark.parametrize("tableau", EVERY)
def test_shapes_and_row_sums(tableau):
    stages = len(tableau.c)
    assert [len(row) for row in tableau.a] == list(range(stages))
    assert len(tableau.b) == len(tableau.interpolant) == stages
    assert len({len(row) for row in tableau.interpolant}) == 1
    assert all(type(x) is float for row in (tableau.c, tableau.b, *tableau.a, *tableau.interpolant) for x in row)
    assert [sum(row) for row in tableau.a] == pytest.approx(tableau.c, abs=2e-15)


@pytest.mark.parametrize("tableau", EVERY)
def test_order(tableau):
    for nodes in range(1, tableau.order + 1):
        assert residual(tableau, tableau.b, nodes) < 2e-14
    assert residual(tableau, tableau.b, tableau.order + 1) > 1e-7


@pytest.mark.parametrize("tableau", PAIRS)
def test_error_estimate(tableau):
    lower = [weight - error for weight, error in zip(tableau.b, tableau.error)]
    assert len(tableau.error) == len(tableau.c)
    assert sum(tableau.error) == pytest.approx(0, abs=1e-15)
    for nodes in range(1, tableau.error_order):
        assert residual(tableau, lower, nodes) < 2e-14
    assert residual(tableau, lower, tableau.error_order) > 1e-5


def test_last_stage_is_reused():
    for tableau in (*ADAPTIVE.values(), *HERMITE.values()):
        assert tableau.fsal, tableau.name
    assert {name for name, tableau in TORCHDIFFEQ.items() if tableau.fsal} == {"dopri5", "dopri8", "bosh3"}
    assert not any(tableau.fsal for tableau in FIXED.values())
    assert all(tableau.error is None and tableau.error_order is None for tableau in FIXED.values())


@pytest.mark.parametrize("tableau", EVERY)
def test_interpolant_at_the_ends(tableau):
    stages = len(tableau.c)
    assert weights_at(tableau, 1.0) == pytest.approx(tableau.b, abs=1e-13)
    if len(tableau.interpolant[0]) == 1:
        assert weights_at(tableau, 0.0, derivative=True) == list(tableau.b)
    else:
        assert weights_at(tableau, 0.0, derivative=True) == unit(stages, 0)
        assert weights_at(tableau, 1.0, derivative=True) == pytest.approx(unit(stages, -1), abs=1e-13)


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, members in GROUPS.items() for n in members])
def test_order_of_the_interpolant(group, name):
    tableau = GROUPS[group][name]
    order = {
        "adaptive": lambda: DENSE[name],
        "fixed": lambda: 1,
        "hermite": lambda: min(tableau.order, 3),
        "torchdiffeq": lambda: DENSE_TORCHDIFFEQ.get(name, 1),
    }[group]()
    for theta in (0.2, 0.5, 0.9):
        for nodes in range(1, order + 1):
            assert residual(tableau, weights_at(tableau, theta), nodes, theta) < 1e-13
    assert max(residual(tableau, weights_at(tableau, theta), order + 1, theta) for theta in (0.3, 0.5)) > 1e-6


def test_known_interpolants():
    """Hairer's dense output of DOPRI5 is Shampine's quartic; Tsitouras's weights as the paper factors them."""
    ours, theirs = ADAPTIVE["dopri5"].interpolant, TORCHDIFFEQ["dopri5"].interpolant
    assert torch.tensor(ours).sub(torch.tensor(theirs)).abs().max() < 1e-14
    x = 0.37
    assert weights_at(ADAPTIVE["tsit5"], x) == pytest.approx(
        [
            -1.0530884977290216 * x * (x - 1.3299890189751412) * (x * x - 1.4364028541716351 * x + 0.7139816917074209),
            0.1017 * x * x * (x * x - 2.1966568338249754 * x + 1.2949852507374631),
            2.490627285651252793 * x * x * (x * x - 2.38535645472061657 * x + 1.57803468208092486),
            -16.54810288924490272 * (x - 1.21712927295533244) * (x - 0.61620406037800089) * x * x,
            47.37952196281928122 * (x - 1.203071208372362603) * (x - 0.658047292653547382) * x * x,
            -34.87065786149660974 * (x - 1.2) * (x - 2 / 3) * x * x,
            2.5 * (x - 1) * (x - 0.6) * x * x,
        ],
        abs=1e-13,
    )


def test_dopri8_interpolates_with_bounded_weights():
    """Σ|b_j(θ)| says by how much rounding errors of the stages grow: no more within the step than at its end."""
    tableau = ADAPTIVE["dopri8"]
    at_the_end = sum(map(abs, tableau.b))
    assert max(sum(map(abs, weights_at(tableau, i / 50))) for i in range(51)) < 1.01 * at_the_end


def test_exchanging_the_interpolant():
    rk4 = FIXED["rk4"]
    extended = hermite(rk4)
    assert (len(extended.c), extended.a[-1], extended.b) == (5, rk4.b, (*rk4.b, 0.0))
    assert hermite(extended).c == extended.c  # f(t + h, y1) is there already
    assert linear(extended).interpolant == tuple((weight,) for weight in extended.b)
    pair = hermite(TORCHDIFFEQ["fehlberg2"])
    assert (len(pair.c), pair.error) == (4, (*TORCHDIFFEQ["fehlberg2"].error, 0.0))


# ---------------------------------------------------------------------------------------------------- torchdiffeq


def torchdiffeq_solver(name: str):
    odeint = pytest.importorskip("torchdiffeq._impl.odeint")
    return odeint.SOLVERS[name]


@pytest.mark.parametrize("name", ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"])
def test_torchdiffeq_coefficients(name):
    theirs, ours = torchdiffeq_solver(name), TORCHDIFFEQ[name]
    assert ours.c == (0.0, *theirs.tableau.alpha.tolist())
    assert ours.a == ((), *(tuple(row.tolist()) for row in theirs.tableau.beta))
    assert ours.b == tuple(theirs.tableau.c_sol.tolist())
    assert ours.error == tuple(theirs.tableau.c_error.tolist())
    assert ours.order == ours.error_order == theirs.order


@pytest.mark.parametrize("name", ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"])
def test_torchdiffeq_quartic(name):
    theirs, ours = torchdiffeq_solver(name), TORCHDIFFEQ[name]
    interp = pytest.importorskip("torchdiffeq._impl.interp")
    y0 = torch.randn(7, dtype=torch.float64)
    k = torch.randn(7, len(ours.c), dtype=torch.float64)
    h = torch.tensor(0.7, dtype=torch.float64)
    y1, middle = (y0 + h * k @ weights.to(k) for weights in (theirs.tableau.c_sol, theirs.mid))
    coefficients = interp._interp_fit(y0, y1, middle, k[:, 0], k[:, -1], h)
    for theta in (0.0, 0.1, 0.5, 0.83, 1.0):
        expected = interp._interp_evaluate(coefficients, h * 0, h, h * theta)
        actual = y0 + h * k @ torch.tensor(weights_at(ours, theta), dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("name", ["euler", "midpoint", "heun2", "heun3", "rk4"])
def test_torchdiffeq_fixed_steps(name, interp):
    theirs, tableau = torchdiffeq_solver(name), TORCHDIFFEQ[name]
    assert tableau.order == theirs.order
    problem = spiral()
    t = torch.tensor([0.0, 0.04, 0.1, 0.2, 0.27, 0.4], dtype=torch.float64)
    solver = pytest.importorskip("torchdiffeq")
    options = {"step_size": 0.1, "interp": interp}
    expected = solver.odeint(problem.f, problem.y0, t, method=name, options=options)
    if interp == "cubic":
        tableau = hermite(tableau)
    y, time, actual = problem.y0, t[0], [problem.y0]
    for left in range(4):
        y1, k = step(tableau, problem.f, time, y, 0.1)
        for output in t[(t > 0.1 * left + 1e-9) & (t < 0.1 * (left + 1) + 1e-9)].tolist():
            actual.append(y + 0.1 * torch.tensor(weights_at(tableau, 10 * output - left), dtype=y.dtype) @ k)
        y, time = y1, time + 0.1
    torch.testing.assert_close(torch.stack(actual), expected, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------------------------------- convergence


def step(tableau: Tableau, f, t, y, h):
    """One step by the definition: the solution at its end, and the stages [s, ...]."""
    stages = []
    for c, row in zip(tableau.c, tableau.a):
        stages.append(f(t + c * h, y + h * sum(a * k for a, k in zip(row, stages))))
    k = torch.stack(stages)
    return y + h * torch.tensor(tableau.b, dtype=y.dtype) @ k, k


def error(tableau: Tableau, steps: int) -> float:
    """Root mean square, over so many equal steps, of the error on DETEST's pursuit curve."""
    problem = PROBLEMS["E5"]
    start, end = problem.t_span
    t = torch.linspace(start, end, steps + 1, dtype=torch.float64)
    states = [problem.y0]
    for time in t[:-1]:
        states.append(step(tableau, problem.f, time, states[-1], (end - start) / steps)[0])
    return float((torch.stack(states) - problem.solution(t)).square().sum(-1).mean().sqrt())


STEPS = {1: 128, 2: 96, 3: 64, 4: 64, 5: 48, 8: 8}


@pytest.mark.parametrize("tableau", [param for param in EVERY if "hermite" not in param.id])
def test_convergence_of_the_solution(tableau):
    steps = STEPS[tableau.order]
    coarse, fine = error(tableau, steps), error(tableau, 2 * steps)
    assert fine > 1e-12  # else rounding is what is measured
    assert math.log2(coarse / fine) == pytest.approx(tableau.order, abs=0.2)


@pytest.mark.parametrize("tableau", SMOOTH)
def test_convergence_of_the_interpolant(tableau):
    """Within one step from an exact value the error is O(h^(p+1)) for an interpolant of order p."""
    problem = spiral()
    order = DENSE.get(tableau.name, min(tableau.order, 3))
    t = torch.tensor(0.5, dtype=torch.float64)
    y = problem.solution(t)
    errors = []
    for h in (0.1, 0.05):
        _, k = step(tableau, problem.f, t, y, h)
        theta = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        weights = torch.tensor([weights_at(tableau, x) for x in theta.tolist()], dtype=torch.float64)
        errors.append(float((y + h * weights @ k - problem.solution(t + theta * h)).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.2)


# ------------------------------------------------------------------------------------------------------- problems


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem(name):
    """A closed form solves the equation; the field is the same for one row, many rows, one time and many."""
    problem = PROBLEMS[name]
    start, end = problem.t_span
    t = start + (end - start) * torch.tensor([0.05, 0.3, 0.31], dtype=torch.float64)
    y = problem.batch(3) * torch.tensor([[1.0], [1.01], [1.02]], dtype=torch.float64)
    rows = torch.stack([problem.f(time, state) for time, state in zip(t, y)])
    torch.testing.assert_close(problem.f(t, y), rows, rtol=1e-14, atol=1e-14)
    same = torch.stack([problem.f(t[0], state) for state in y])
    torch.testing.assert_close(problem.f(t[0], y), same, rtol=1e-14, atol=1e-14)
    assert problem.f(t.float(), y.float()).dtype == torch.float32
    torch.testing.assert_close(problem.solution(start), problem.y0, rtol=0, atol=1e-15)
    if problem.exact is None:
        assert problem.solution(t[:1]).shape == (1, len(problem.initial))
    else:
        y, slope = torch.func.jvp(problem.exact, (t,), (torch.ones_like(t),)) if name != "B5" else central(problem, t)
        torch.testing.assert_close(slope, problem.f(t, y), rtol=1e-7, atol=1e-7)


def central(problem, t, h=1e-4):
    return problem.solution(t), (problem.solution(t + h) - problem.solution(t - h)) / (2 * h)


# At t = 20, from W. H. Enright & J. D. Pryce, Two FORTRAN packages for assessing initial value methods, ACM TOMS 13(1).
PUBLISHED = {
    "A5": (-7.887826688964196e-01,),
    "B1": (6.761876008576667e-01, 1.860816099640036e-01),
    "B3": (2.061153488557776e-09, 5.257228022048349e-02, 9.474277177183630e-01),
    "B4": (9.826950928005993e-01, 2.198447081694832e00, 9.129452507276399e-01),
    "B5": (-9.396570798729192e-01, -3.421177754000779e-01, 7.414126596199957e-01),
    "C3": (2.948119211022058e-03, 5.635380154844266e-03, 7.829072515926013e-03),
    "C5": (-4.792730224323733e00, -2.420550725448973e00, -9.212509306014886e-01, -4.217310404035213e00),
    "D5": (-1.295266250987574e00, 4.003938963792321e-01, -6.775390924707566e-01, -1.270838154278686e-01),
    "E1": (1.456723600728308e-01, -9.883500195574063e-02),
    "E2": (2.008149762174948e00, -4.250887527320057e-02),
    "E3": (-1.004178858647128e-01, 2.411400132095954e-01),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_solutions(name):
    expected = torch.tensor(PUBLISHED[name], dtype=torch.float64)
    actual = PROBLEMS[name].solution(20.0)[: len(expected)]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-15)


def test_reference_solutions():
    """SciPy's states return to the start of the Arenstorf orbit, and keep what Lotka and Volterra's model keeps."""
    orbit = PROBLEMS["Arenstorf"]
    torch.testing.assert_close(orbit.solution(ARENSTORF_PERIOD), orbit.y0, rtol=0, atol=1e-6)

    prey, predators = PROBLEMS["Lotka-Volterra"].solution([0.0, 10.0]).unbind(-1)
    kept = prey - 3 * prey.log() + predators - 1.5 * predators.log()
    torch.testing.assert_close(kept[1], kept[0], rtol=1e-12, atol=0)
