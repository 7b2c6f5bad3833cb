"""`solve` meets exact solutions: order of the fixed methods, error against tolerance, dtypes, long times, states."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DETEST, PROBLEMS, linear, logistic, spiral
from solving import F64, one_thread

from fmkernels import solve
from fmkernels.solvers.tableaus import ADAPTIVE, FIXED

__all__ = ["one_thread"]  # a fixture


def worst(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """For each row the largest error, relative where the solution is above one."""
    return ((got - exact).abs() / exact.abs().amax(-1, keepdim=True).clamp_min(1)).flatten(1).amax(1)


@pytest.mark.parametrize("output", [None, "grid", "between"])
@pytest.mark.parametrize("method", FIXED)
def test_order_of_fixed_methods(method, output):
    """Halving the step divides the error by 2^order; between steps a cubic interpolates, of order four at most."""
    problem, order = spiral(), FIXED[method].order
    share = {None: 1.0, "grid": 1.0, "between": 0.9 + 1 / 300}[output]
    time = problem.t_span[1] * share
    errors = []
    for steps in (100, 200, 400):
        solution = solve(
            problem.f, problem.batch(1), problem.t_span, None if output is None else [time], method, steps=steps
        )
        reached = solution.y if output is None else solution.y[:, 0]
        errors.append((reached - problem.solution(time)).norm().item())
        assert solution.accepted.item() == steps
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
    assert slopes[-1] == pytest.approx(order, abs=0.2), slopes


def test_step_size_is_not_exceeded():
    spans = torch.tensor([[0.0, 1.0], [0.0, -0.35]], dtype=F64)
    solution = solve(lambda t, y: -y, torch.ones(2, 1, dtype=F64), spans, method="rk4", step_size=0.3)
    assert solution.accepted.tolist() == [4, 4]  # ⌈1 / 0.3⌉
    assert solve(lambda t, y: -y, torch.ones(1, 1), (0.0, 0.3), method="rk4", step_size=0.1).accepted.item() == 3
    torch.testing.assert_close(solution.y.squeeze(-1), (-spans[:, 1]).exp(), rtol=2e-4, atol=0)


# Error over tolerance on the damped rotation, and the share of its time that the second-order methods can afford.
TRACKS = {"dopri5": (20, 1), "tsit5": (20, 1), "dopri8": (5, 1), "bosh3": (50, 0.2), "fehlberg2": (500, 0.02)}
TRACKS["adaptive_heun"] = (10, 0.004)


@pytest.mark.parametrize("controller", ["I", "PI", "PID"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_error_follows_tolerance(method, controller):
    """From 1e-3 to 1e-10, each row by a tolerance of its own."""
    problem = linear()
    limit, share = TRACKS[method]
    tolerance = 10.0 ** -torch.arange(3, 11, dtype=F64)
    end = problem.t_span[1] * share
    if controller != "I":
        tolerance, end = tolerance[:4], end / 2
    solution = solve(
        problem.f, problem.batch(len(tolerance)), (0.0, end), method=method, rtol=tolerance, atol=tolerance,
        controller=controller,
    ).raise_for_status()  # fmt: skip
    errors = worst(solution.y, problem.solution(end).expand_as(solution.y))
    assert (errors < limit * tolerance).all(), errors / tolerance
    assert (errors[1:] < errors[:-1]).all(), errors
    assert (errors[-1] > 1e-5 * tolerance[-1]) and (solution.accepted.diff() >= 0).all()


# Where an error grows along the solution: of the orbits, and of the sensitive among the others.
GROWTH = {"Arenstorf": 5e4, **{f"D{i}": 2e4 for i in range(1, 6)}, "B1": 400, "B4": 200, "E3": 500}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name):
    """Every problem, DETEST's classes A to E among them, at three tolerances: three rows of one solve."""
    problem = PROBLEMS[name]
    tolerance = torch.tensor([1e-4, 1e-6, 1e-8], dtype=F64)
    exact = problem.solution(problem.t_span[1])
    for method in ("dopri5", "tsit5", "dopri8"):
        solution = solve(problem.f, problem.batch(3), problem.t_span, None, method, rtol=tolerance, atol=tolerance)
        errors = worst(solution.raise_for_status().y, exact.expand(3, -1))
        assert (errors < GROWTH.get(name, 60) * tolerance).all(), (method, errors / tolerance)
        assert (errors[1:] < errors[:-1]).all(), (method, errors)
        assert (solution.t == problem.t_span[1]).all()


@pytest.mark.parametrize("name", ["A5", "B2", "C1", "E1"])
def test_problems_of_second_order_methods(name):
    problem = DETEST[name]
    tolerance = torch.tensor([1e-3, 1e-5], dtype=F64)
    for method, limit in (("bosh3", 150), ("fehlberg2", 5e3), ("adaptive_heun", 60)):
        solution = solve(problem.f, problem.batch(2), problem.t_span, None, method, rtol=tolerance, atol=tolerance)
        errors = worst(solution.raise_for_status().y, problem.solution(problem.t_span[1]).expand(2, -1))
        assert (errors < limit * tolerance).all(), (method, errors / tolerance)
        assert errors[1] < errors[0]


@pytest.mark.parametrize("method", ADAPTIVE)
def test_outputs_are_as_exact_as_the_steps(method):
    """Dense output at times between steps: forward with shared times, and back again with times of each row."""
    problem = spiral()
    times = torch.linspace(0, 3, 41, dtype=F64)
    rtol = {"fehlberg2": 1e-5, "adaptive_heun": 1e-5}.get(method, 1e-7)
    there = solve(problem.f, problem.batch(2), problem.t_span, times, method, rtol=rtol, atol=rtol)
    exact = problem.solution(times)
    limit = {"fehlberg2": 1500}.get(method, 20) * rtol  # its steps are no more exact, their error being underestimated
    assert (there.y - exact).abs().max() < limit
    assert torch.equal(there.y[:, 0], problem.batch(2)) and there.accepted.max() < (41 if method == "dopri8" else 10**6)
    starts = torch.tensor([3.0, 2.0], dtype=F64)
    own = torch.stack([times.flip(0), 2 - times * 2 / 3])
    back = solve(problem.f, problem.solution(starts), (starts, 0.0), own, method, rtol=rtol, atol=rtol)
    assert (back.y - problem.solution(own)).abs().max() < 30 * limit  # what is attracting was repelling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_dtypes(method, dtype):
    """A state keeps its dtype, its times stay float32 or better, and its error is a few of its roundings."""
    seen = set()

    def f(t, y):
        seen.add((t.dtype, y.dtype))
        return -y * (1 + t.to(y.dtype).unsqueeze(-1))

    eps = torch.finfo(dtype).eps
    y0 = torch.tensor([[1.0, 2.0], [0.5, 300.0]], dtype=dtype)
    steps = {"steps": 16} if method == "rk4" else {"rtol": 4 * eps, "atol": 4 * eps}
    solution = solve(f, y0, (0.0, 1.0), [0.5, 1.0], method, **steps)
    assert solution.y.dtype == dtype and solution.t.dtype == F64 and seen == {(torch.float32, dtype)}
    assert solution.status.tolist() == [0, 0]
    times = torch.tensor([0.5, 1.0], dtype=F64)
    exact = y0.double().unsqueeze(1) * (-(times + times**2 / 2)).exp().unsqueeze(-1)
    torch.testing.assert_close(solution.y.double(), exact, rtol=(200 if method == "bosh3" else 20) * eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_times_far_from_zero(dtype):
    """10⁶ to 10⁶ + 10 and half a turn back: float32 times would be 0.03 off."""

    def rotation(t, y):
        return torch.stack([-y[:, 1], y[:, 0]], -1)

    y0 = torch.tensor([[1.0, 0.0]] * 2, dtype=dtype)
    spans = torch.tensor([[1e6, 1e6 + 10], [1e6, 1e6 - 3.14159]], dtype=F64)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-11
    solution = solve(rotation, y0, spans, rtol=tolerance, atol=tolerance)
    angle = spans[:, 1] - spans[:, 0]
    exact = torch.stack([angle.cos(), angle.sin()], -1)
    assert (solution.y.double() - exact).abs().max() < 30 * tolerance
    assert torch.equal(solution.t, spans[:, 1])


def test_many_small_steps_in_float32():
    """0 to 10⁴ in 2000 steps: the end is met, and the state's error stays that of its own roundings."""
    ends = torch.tensor([1e4, -1e4], dtype=F64)

    def f(t, y):
        return torch.zeros_like(y) + 1e-3

    solution = solve(f, torch.zeros(2, 3), (0.0, ends), max_step=5.0)
    assert torch.equal(solution.t, ends) and 2000 <= solution.accepted.min() < 2020
    torch.testing.assert_close(solution.y[:, 0].double(), ends * 1e-3, rtol=3e-4, atol=0)
    fixed = solve(f, torch.zeros(2, 3), (0.0, ends), method="euler", steps=3_000)
    assert torch.equal(fixed.t, ends)


def test_rounding_of_many_steps_does_not_drift_the_end():
    """The time of a step is not the sum of those before in float32: a phase is right to 10⁻⁹ after thousands."""

    def f(t, y):  # the solution is sin(100 t) / 100 only where every step is where it says
        return (100 * t).cos().unsqueeze(-1)

    for method, options in (("rk4", {"steps": 2000}), ("dopri5", {"max_step": 5e-4, "rtol": 1e-3})):
        solution = solve(f, torch.zeros(1, 1, dtype=F64), (0.0, 0.5), method=method, **options)
        assert abs(solution.y.item() - math.sin(50) / 100) < 1e-11


# States that are not one real tensor.


def rotation(t, y):  # y' = i y (1 + t)
    return 1j * y * (1 + t).reshape(-1, *(1,) * (y.dim() - 1)).to(y.dtype)


@pytest.mark.parametrize("options", [{"method": "dopri5"}, {"method": "rk4", "steps": 50}], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_states(dtype, options):
    y0 = torch.tensor([[1 + 0j, 0.5j], [2 - 1j, 3.0]], dtype=dtype)
    tolerance = 1e-5 if dtype == torch.complex64 else 1e-9
    if "steps" not in options:
        options = options | {"rtol": tolerance, "atol": tolerance}
    for start in (y0, y0.conj().resolve_conj().conj(), y0.mT.contiguous().mT):
        solution = solve(rotation, start, (0.0, 1.0), [0.25, 1.0], **options)
        times = torch.tensor([0.25, 1.0], dtype=F64)
        exact = y0.unsqueeze(1) * torch.exp(1j * (times + times**2 / 2)).unsqueeze(-1)
        assert solution.y.dtype == dtype and solution.y.shape == (2, 2, 2)
        assert (solution.y - exact).abs().max() < (30 * tolerance if "rtol" in options else 2e-6)


def test_complex_equals_the_real_system():
    """Of twice the size: the same steps where the norms agree, |z| being what a complex error is measured by."""
    z0 = torch.tensor([[1 + 1j, 1 - 1j], [3 + 3j, 3 - 3j]], dtype=torch.complex128)  # equal parts: equal norms

    def real(t, y):
        return torch.view_as_real(1j * torch.view_as_complex(y))

    first = {"first_step": 0.1, "rtol": 0.0, "atol": 1e-7}
    with torch.no_grad():
        one = solve(lambda t, z: 1j * z, z0, **first)
        # |e|² = a² + b² over n numbers is twice the mean of 2n squares
        two = solve(real, torch.view_as_real(z0), first_step=0.1, rtol=0.0, atol=1e-7 / math.sqrt(2))
    assert torch.equal(one.accepted, two.accepted)
    torch.testing.assert_close(torch.view_as_real(one.y), two.y, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [F64, torch.complex128, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"method": "midpoint", "steps": 7}], ids=["adaptive", "fixed"])
def test_tuples_equal_the_concatenated_state(dtype, options):
    parts = tuple(torch.randn(3, *shape, dtype=dtype) for shape in ((2,), (), (1, 2), (0, 4)))

    def f(t, y):
        a, b, c, d = y
        assert [p.shape for p in y] == [p.shape for p in parts] and {p.dtype for p in y} == {dtype}
        return -b.unsqueeze(-1) * a, a.sum(-1) * 0.1, c.flip(-1) * t.reshape(-1, 1, 1).to(dtype), d

    def flat(t, y):
        a, b, c = y[:, :2], y[:, 2], y[:, 3:].unsqueeze(1)
        da, db, dc, _ = f(t, (a, b, c, parts[3]))
        return torch.cat([da, db.unsqueeze(-1), dc.squeeze(1)], -1)

    times = torch.tensor([0.1, 0.7], dtype=F64)
    whole = torch.cat([parts[0], parts[1].unsqueeze(-1), parts[2].squeeze(1)], -1)
    several, one = solve(f, parts, t_eval=times, **options), solve(flat, whole, t_eval=times, **options)
    assert isinstance(several.y, tuple) and several.y[3].shape == (3, 2, 0, 4)
    joined = torch.cat([several.y[0], several.y[1].unsqueeze(-1), several.y[2].squeeze(2)], -1)
    assert torch.equal(joined, one.y) and torch.equal(several.nfe, one.nfe)
    assert solve(f, parts, **options).y[2].shape == (3, 1, 2)


def test_one_number_a_row():
    problem = logistic()
    y0 = torch.tensor([0.1, 0.5, 2.0], dtype=F64)
    ends = torch.tensor([8.0, 3.0, 1.0], dtype=F64)
    exact = 1 / (1 + (1 / y0 - 1) * (-ends).exp())
    for options in ({"rtol": 1e-9, "atol": 1e-9}, {"method": "rk4", "steps": 400}):
        solution = solve(lambda t, y: problem.f(t, y), y0, (0.0, ends), **options)
        assert solution.y.shape == (3,)
        torch.testing.assert_close(solution.y, exact, rtol=2e-8, atol=0)
    outputs = solve(lambda t, y: problem.f(t, y), y0, (0.0, 1.0), [0.5, 1.0])
    assert outputs.y.shape == (3, 2)


@pytest.mark.parametrize("shape", [(0, 3), (0,), (2, 0), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"method": "rk4", "steps": 3}, {"dense": True}], ids=str)
def test_empty_states(shape, options):
    y0 = torch.ones(shape)
    solution = solve(lambda t, y: -y, y0, **options)
    rows = shape[0]
    assert solution.y.shape == shape and solution.y.dtype == y0.dtype
    assert [len(x) for x in (solution.t, solution.status, solution.nfe, solution.accepted)] == [rows] * 4
    assert (solution.status == 0).all() and (solution.t == 1).all() and solution.calls == 0
    assert solve(lambda t, y: -y, y0, t_eval=[0.0, 0.5], **options).y.shape == (rows, 2, *shape[1:])
    if "dense" in options:
        assert solution(0.5).shape == shape and solution.steps.shape[0] == rows


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(["dopri5", "tsit5", "dopri8", "bosh3"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(3, 9),
    st.integers(0, 2**31),
    st.sampled_from(["I", "PI", "PID"]),
)
def test_random_linear_systems(method, rows, dimension, digits, seed, controller):
    """Any matrix of norm about one, span, direction and tolerance: within C · tolerance of the matrix exponential."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    tolerance = 10.0 ** -(digits if method != "bosh3" else digits * 0.7)
    matrix = random(rows, dimension, dimension) / math.sqrt(dimension)
    y0, t0, span = random(rows, dimension), 10 * random(rows), 2 * random(rows)
    shares = torch.rand(rows, 5, generator=generator, dtype=F64).sort(-1).values
    times = t0.unsqueeze(-1) + span.unsqueeze(-1) * shares

    def f(t, y):
        return (matrix @ y.unsqueeze(-1)).squeeze(-1)

    solution = solve(
        f, y0, (t0, t0 + span), times, method, rtol=tolerance, atol=tolerance, controller=controller
    ).raise_for_status()
    flow = torch.linalg.matrix_exp((times - t0.unsqueeze(-1))[..., None, None] * matrix.unsqueeze(1))
    exact = (flow @ y0[:, None, :, None]).squeeze(-1)
    # A local error grows with the flow between any two times: by exp of the norm times the span.
    growth = torch.exp(torch.linalg.matrix_norm(matrix, 2) * span.abs()) * (1 + span.abs())
    error = (solution.y - exact).abs().flatten(1).amax(1) / exact.abs().flatten(1).amax(1).clamp_min(1)
    assert (error <= 30 * growth * tolerance).all(), error / growth / tolerance
