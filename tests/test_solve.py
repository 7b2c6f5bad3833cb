"""`solve`: rows that do not know of each other, times and outputs, step control."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import spiral, van_der_pol
from solving import (
    DONE,
    F64,
    INF,
    MAX_STEPS,
    NAN,
    NON_FINITE,
    OUTPUTS,
    RATES,
    SPANS,
    STARTS,
    UNDERFLOW,
    Counting,
    decay,
    elementwise,
    one_thread,
)

from fmkernels import _registration, solve
from fmkernels.solvers import PID
from fmkernels.solvers.tableaus import ADAPTIVE, FIXED

__all__ = ["one_thread"]  # a fixture


REFERENCE = _registration.answering("_runge_kutta_step_", "cpu") == "reference"

# Rows.


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "bosh3", "rk4"])
@pytest.mark.parametrize("controller", ["I", "PID"])
def test_every_row_is_what_it_is_alone(method, dtype, controller):
    """NaN at the start and on the way, 100 times the steps, at its end already, backward: values, status, counts."""
    fixed = method in FIXED
    crash = torch.arange(8) == 7
    y0 = STARTS.to(dtype)
    t_eval = OUTPUTS if controller == "I" else None

    def run(rows):
        options = {"steps": 40} if fixed else {"rtol": 1e-4 * (1 + rows), "atol": 1e-4, "controller": controller}
        options |= {"max_steps": 60} if method == "bosh3" else {}
        outputs = None if t_eval is None else t_eval[rows]
        return solve(elementwise(RATES[rows], crash[rows]), y0[rows], SPANS[rows], outputs, method, **options)

    together = run(torch.arange(8))
    for row in range(8):
        alone = run(torch.tensor([row]))
        for name in ("y", "t", "status", "nfe", "accepted", "rejected"):
            got, want = getattr(together, name)[row : row + 1], getattr(alone, name)
            if (fixed or REFERENCE) and t_eval is not None and name in ("y", "nfe"):
                # Outputs that all rows share are interpolated by an op; those on the grid need no f at the last end.
                # The reference interpolates by a matrix product, whose sums follow the batch.
                slack = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 0} if name == "y" else {"rtol": 0, "atol": fixed}
                torch.testing.assert_close(got, want, equal_nan=True, **slack)
            else:
                assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), (row, name, got, want)
    status = together.status.tolist()
    assert status[:3] == [0, 0, NON_FINITE] and status[4:7] == [0, 0, NON_FINITE] and together.t[4] == 1
    if not fixed:
        assert status[3] in (DONE, MAX_STEPS if method == "bosh3" else DONE)
        assert status[7] in (MAX_STEPS, UNDERFLOW, NON_FINITE)
        assert together.t[2] == 0 and (0.49 < together.t[7] < 0.5001 or method == "bosh3")
        assert together.accepted[2] == together.accepted[4] == together.accepted[6] == 0
        assert (together.nfe <= together.calls).all() and together.nfe.max() == together.calls
    if t_eval is not None:
        assert together.y[4, :2].tolist() == [[2, 2, 2]] * 2 and together.y[4, 2].isnan().all()


def test_one_row_needs_a_hundred_times_the_steps():
    rates = torch.tensor([1.0, 200.0], dtype=F64)

    def f(t, y):
        return rates.unsqueeze(-1) * torch.stack([-y[:, 1], y[:, 0]], -1)

    y0 = torch.tensor([[1.0, 0.0]] * 2, dtype=F64)
    field = Counting(f)
    solution = solve(field, y0, (0.0, 3.0), rtol=1e-6, atol=1e-6)
    assert solution.accepted[1] > 100 * solution.accepted[0]
    assert solution.nfe[1] == solution.calls == len(field.times) > 50 * solution.nfe[0]
    assert (solution.y[:, 0] - (3 * rates).cos()).abs().max() < 1e-3
    reached = torch.stack(field.times)[:, 0]
    assert (reached[solution.nfe[0] :] == 3).all()  # where a finished row waits


@pytest.mark.parametrize("f", [lambda t, y: y @ MIX.to(y), lambda t, y: torch.tanh(y @ MIX.to(y)).cumsum(-1)])
def test_rows_of_a_matrix_product(f):
    """Where the batch size may change the product's rounding, a few of it are all that may change."""
    y0 = torch.randn(16, 8)
    together = solve(f, y0, rtol=1e-5)
    for row in (0, 7, 15):
        alone = solve(f, y0[row : row + 1], rtol=1e-5)
        torch.testing.assert_close(together.y[row], alone.y[0], rtol=1e-5, atol=1e-5)
        assert together.status[row] == 0 and abs(together.accepted[row] - alone.accepted[0]) <= 1


MIX = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))


def test_the_same_bits_twice():
    problem = van_der_pol()
    one, two = (solve(problem.f, torch.randn(64, 2, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    assert torch.equal(one.y, two.y) and torch.equal(one.nfe, two.nfe) and one.calls == two.calls


# Times.


def test_time_spans():
    """Numbers, tensors, one or [B], forward and backward at once, of any dtype."""
    y0 = torch.full((3, 1), 2.0, dtype=F64)
    ends = torch.tensor([1.0, -1.0, 0.5], dtype=F64)
    starts = torch.tensor([0.0, 1.0, 0.5], dtype=F64)
    for t_span, a, b in (
        ((0, 1), 0, 1),
        ([0.25, -1.0], 0.25, -1),
        (torch.tensor([0.0, 2.0]), 0, 2),
        (torch.tensor([3, 2]), 3, 2),
        ((0.0, ends), 0, ends),
        ((starts, ends), starts, ends),
        (torch.stack([starts, ends], -1).float(), starts, ends),
        ((np.float64(0.5), ends.numpy()), 0.5, ends),
        ((starts.tolist(), 1), starts, 1),
    ):
        solution = solve(decay, y0, t_span, rtol=1e-9, atol=1e-9)
        exact = 2 * torch.exp(torch.as_tensor(a - b, dtype=F64)).expand(3)
        torch.testing.assert_close(solution.y.squeeze(-1), exact, rtol=1e-8, atol=0)
        assert (solution.t == torch.as_tensor(b)).all()


METHODS = [{"method": m, "rtol": 1e-9, "atol": 1e-9} for m in ("dopri5", "tsit5", "dopri8")]
METHODS += [{"method": "rk4", "steps": 200}, {"method": "heun3", "step_size": 1 / 400}]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: options["method"])
def test_outputs(options):
    """Shared, of each row, ragged, at the start, the end, twice, between; NaN stays NaN."""
    problem = spiral()
    y0 = problem.batch(3)
    shared = [0.0, 0.0, 0.015, 1.0, 1.0, 2.99, 3.0, 3.0]
    solution = solve(problem.f, y0, problem.t_span, shared, **options)
    assert solution.y.shape == (3, 8, 2) and torch.equal(solution.y[:, 0], y0) and torch.equal(solution.y[:, 1], y0)
    assert torch.equal(solution.y[:, 3], solution.y[:, 4]) and torch.equal(solution.y[:, 6], solution.y[:, 7])
    torch.testing.assert_close(solution.y[0], problem.solution(shared), rtol=1e-6, atol=1e-6)
    assert torch.equal(solution.y[:, -1], solve(problem.f, y0, problem.t_span, **options).y)

    starts = torch.tensor([0.0, 3.0, 1.0], dtype=F64)
    ends = torch.tensor([3.0, 0.5, 1.0], dtype=F64)
    own = torch.tensor([[0.1, 2.0, 3.0, NAN], [3.0, 2.9, 0.6, 0.5], [1.0, NAN, NAN, NAN]], dtype=F64)
    y0 = problem.solution(starts)
    solution = solve(problem.f, y0, (starts, ends), own, **options)
    assert torch.equal(solution.y.isnan().all(-1), own.isnan()) and torch.equal(solution.y[2, 0], y0[2])
    known = ~own.isnan()
    torch.testing.assert_close(solution.y[known], problem.solution(own[known]), rtol=3e-4, atol=3e-6)
    nothing = solve(problem.f, y0, (starts, ends), own[:, 3:].where(torch.tensor(False), NAN), **options)
    assert nothing.y.isnan().all() and (nothing.status == 0).all()


def test_outputs_cost_no_evaluation():
    problem = spiral()
    times = torch.linspace(0, 3, 200, dtype=F64)
    with_outputs, without = (solve(problem.f, problem.batch(2), problem.t_span, t) for t in (times, None))
    assert with_outputs.calls == without.calls and torch.equal(with_outputs.nfe, without.nfe)


def test_outputs_of_a_row_that_stops():
    """What it reached is there, the rest is NaN."""

    def f(t, y):  # y = 1 / (1 - t)
        return y * y

    times = torch.tensor([0.0, 0.5, 0.9, 1.5, 2.0], dtype=F64)
    y0 = torch.tensor([[1.0], [-1.0]], dtype=F64)
    solution = solve(f, y0, (0.0, 2.0), times, rtol=1e-8, atol=1e-8)
    exact = 1 / (1 / y0 - times)
    torch.testing.assert_close(solution.y[0, :3, 0], exact[0, :3], rtol=1e-6, atol=0)
    torch.testing.assert_close(solution.y[1, :, 0], exact[1], rtol=1e-6, atol=0)
    assert solution.y[0, 3:].isnan().all() and solution.status[0] in (UNDERFLOW, NON_FINITE)
    assert solution.status[1] == DONE and solution.t[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_dense_output(method):
    problem = spiral()
    starts, ends = torch.tensor([0.0, 3.0, 2.0], dtype=F64), torch.tensor([3.0, 1.0, 2.0], dtype=F64)
    y0 = problem.solution(starts)
    times = torch.stack([starts + (ends - starts) * share for share in (0.0, 0.3, 0.77, 1.0)], 1)
    options = {"method": method, "rtol": 1e-5, "atol": 1e-5}
    plain = solve(problem.f, y0, (starts, ends), times, **options)
    dense = solve(problem.f, y0, (starts, ends), dense=True, **options)
    for m in range(4):
        torch.testing.assert_close(dense(times[:, m]), plain.y[:, m], rtol=1e-13, atol=1e-13)
    assert torch.equal(dense(1.5).isnan().all(-1), torch.tensor([False, False, True]))
    assert torch.equal(dense(ends), dense.y) and torch.equal(dense(starts), y0)
    assert dense(3.1).isnan().all() and dense(-1e-9).isnan().all() and dense(NAN).isnan().all()
    assert dense.steps.shape[1] == dense.accepted.max() + 1
    with pytest.raises(ValueError, match=r"t: expected a number or shape \[3\], got \[2\]"):
        dense([1.0, 2.0])
    with pytest.raises(ValueError, match="dense: expected solve"):
        plain(0.5)


def test_dense_output_of_tuples_and_complex():
    y0 = (torch.ones(2, 3, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64))
    solution = solve(lambda t, y: (1j * y[0], -y[1]), y0, dense=True)
    a, b = solution(0.5)
    assert a.shape == (2, 3) and b.shape == (2,)
    torch.testing.assert_close(a, y0[0] * torch.exp(torch.tensor(0.5j)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b, y0[1] * math.exp(-0.5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", [None, "autograd", "recorded", "adjoint"])
def test_recorded_steps(gradient):
    y0 = torch.tensor([[1.0], [30.0], [NAN], [1.0]], dtype=F64, requires_grad=gradient is not None)
    spans = torch.tensor([[0, 1], [1, -3], [0, 1], [2, 2]], dtype=F64)
    solution = solve(decay, y0, spans, record_steps=True, gradient=gradient or "autograd", parameters=())
    steps = solution.steps
    assert steps.shape == (4, solution.accepted.max() + 1) and torch.equal(steps[:, 0], spans[:, 0])
    assert torch.equal((~steps.isnan()).sum(1), solution.accepted + 1)
    for row in range(4):
        known = steps[row][~steps[row].isnan()]
        assert known[-1] == solution.t[row] and (known.diff() * (spans[row, 1] - spans[row, 0]) > 0).all()
    assert solve(decay, y0.detach(), spans).steps is None
    assert solve(decay, y0.detach()[3:], (1.0, 1.0), record_steps=True).steps.tolist() == [[1.0]]


# Step control.


def test_controllers_take_different_steps():
    problem = van_der_pol(mu=5.0)
    counts = {}
    for controller in ("I", "PI", "PID", PID(0.2, 0.5), PID(safety=0.8), PID(max_factor=1.5), PID(min_factor=0.9)):
        solution = solve(problem.f, problem.batch(1), problem.t_span, rtol=1e-6, atol=1e-6, controller=controller)
        assert (solution.y[0] - problem_end(5.0)).abs().max() < 1e-3
        counts[str(controller)] = solution.accepted.item(), solution.rejected.item()
    assert len(set(counts.values())) == len(counts)
    assert counts["PI"][1] < counts["I"][1]  # what it is for


def problem_end(mu):
    problem = van_der_pol(mu=mu)
    return problem.solution(problem.t_span[1])


def sizes(solution):
    return solution.steps.diff(dim=1).abs()


def test_step_sizes_keep_their_bounds():
    problem = van_der_pol()
    y0 = problem.batch(2)
    spans = torch.tensor([[0.0, 10.0], [0.0, -3.0]], dtype=F64)
    run = lambda **options: solve(problem.f, y0, spans, record_steps=True, rtol=1e-4, atol=1e-4, **options)  # noqa: E731
    free = sizes(run())
    longest = sizes(run(max_step=0.125))
    assert free.nan_to_num(0).max() > 0.2 and longest.nan_to_num(0).max() <= 0.125 * (1 + 1e-9)
    first = sizes(run(first_step=torch.tensor([0.01, 0.02], dtype=F64)))[:, 0]
    torch.testing.assert_close(first, torch.tensor([0.01, 0.02], dtype=F64), rtol=1e-12, atol=0)
    still = solve(lambda t, y: 0 * y, y0, spans, record_steps=True, first_step=100.0, max_step=0.1)
    assert still.steps[:, 1].abs().max() <= 0.1 + 1e-12
    grown = sizes(run(first_step=1e-6))
    ratios = grown[:, 1:] / grown[:, :-1]
    assert ratios[:, :3].max() <= 10 * (1 + 1e-6) and ratios[0, 0] > 9  # max_factor
    slow = sizes(run(first_step=1e-6, controller=PID(max_factor=2.0)))
    assert (slow[:, 1:] / slow[:, :-1]).nan_to_num(0).max() <= 2 * (1 + 1e-6)
    bounded = run(min_step=0.02)
    inner = sizes(bounded)[0][: bounded.accepted[0] - 1]
    assert inner.min() >= 0.02 * (1 - 1e-9)


def test_no_step_for_a_crumb():
    """Where ten steps of the largest size all but reach the end, the tenth reaches it."""
    size = (1 - 5e-12) / 10
    solution = solve(decay, torch.ones(1, 1, dtype=F64), rtol=1e-2, first_step=size, max_step=size)
    assert solution.accepted.item() == 10 and solution.t.item() == 1


def test_a_first_step_that_fails_is_taken_again():
    field = Counting(lambda t, y: -20 * y)
    solution = solve(field, torch.ones(1, 1, dtype=F64), first_step=1.0, rtol=1e-6, atol=1e-6)
    assert solution.rejected > 0 and solution.status == DONE and abs(solution.y.item() - math.exp(-20)) < 1e-5
    attempts = (solution.accepted + solution.rejected).item()
    assert solution.nfe.item() == solution.calls == len(field.times) == 1 + 6 * attempts


@pytest.mark.parametrize("controller", ["I", "PI", "PID", PID(0.49, 0.34, 0.10)], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun"])
def test_a_rejected_step_is_not_taken_again_as_it_was(method, controller):
    """Errors of zero before a kink let a PID controller ask for growth in the face of a rejection."""
    kinks = torch.linspace(0.1, 0.9, 200, dtype=F64).unsqueeze(-1)
    solution = solve(
        lambda t, y: 50 * torch.relu(t.unsqueeze(-1) - kinks) ** 2, torch.zeros(200, 1, dtype=F64), method=method,
        controller=controller, max_steps=2000,
    ).raise_for_status()  # fmt: skip
    torch.testing.assert_close(solution.y, 50 / 3 * (1 - kinks) ** 3, rtol=0, atol=1e-2)


def test_min_step_stops_a_row():
    """With the status of underflow, where it must go below."""
    stiff = torch.tensor([[1.0], [1e4]], dtype=F64)
    solution = solve(lambda t, y: -stiff * y, torch.ones(2, 1, dtype=F64), min_step=0.01, rtol=1e-8, atol=1e-8)
    assert solution.status.tolist() == [DONE, UNDERFLOW] and solution.t[1] < 1
    assert solution.accepted[0] <= 101


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_max_steps(limit):
    """A row that reaches the limit keeps what it computed."""
    rates = torch.tensor([1.0, 500.0], dtype=F64)

    def f(t, y):
        return rates.unsqueeze(-1) * torch.stack([-y[:, 1], y[:, 0]], -1)

    y0 = torch.tensor([[1.0, 0.0]] * 2, dtype=F64)
    solution = solve(f, y0, (0.0, 10.0), [0.0, 1e-5, 10.0], max_steps=limit, rtol=1e-6, atol=1e-6)
    attempts = solution.accepted + solution.rejected
    assert (attempts <= limit).all() and attempts[1] == limit
    assert solution.status[1] == MAX_STEPS and solution.status[0] == (DONE if limit == 1000 else MAX_STEPS)
    again = solve(f, y0, (0.0, 10.0), max_steps=limit, rtol=1e-6, atol=1e-6)
    stopped = again.status == MAX_STEPS
    phase = rates * again.t
    assert (again.y[:, 0] - phase.cos()).abs().max() < 1e-2 and (again.t[stopped] < 10).all()
    assert torch.equal(solution.y[stopped, 2].isnan().all(-1), torch.ones(int(stopped.sum()), dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"solve: 2 rows, of which \d reached max_steps \(rows .*1\)"):
        again.raise_for_status()


def test_finite_time_blow_up():
    """y' = y² leaves every number at t = 1: that row stops there, soon, and the others reach their end."""
    y0 = torch.tensor([[1.0], [0.25], [-1.0]], dtype=F64)
    solution = solve(lambda t, y: y * y, y0, (0.0, 2.0), rtol=1e-8, atol=1e-8)
    assert solution.status.tolist()[1:] == [DONE, DONE] and solution.status[0] in (UNDERFLOW, NON_FINITE)
    assert solution.t[0] == pytest.approx(1, abs=1e-6) and solution.y[0].isfinite().all() and solution.calls < 6000
    torch.testing.assert_close(solution.y[1:, 0], torch.tensor([0.5, -1 / 3], dtype=F64), rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match=r"3 rows, of which 1 (step size underflow|non-finite) \(rows 0\)"):
        solution.raise_for_status()


def test_a_wall_is_approached_and_not_crossed():
    """f is NaN beyond y = 1: attempts beyond are rejected; what is within the wall is solved."""

    def f(t, y):
        return (1 - y).sqrt()  # y = 1 - (1 - t/2)²

    y0 = torch.zeros(2, 1, dtype=F64)
    ends = torch.tensor([1.9, 3.0], dtype=F64)
    solution = solve(f, y0, (0.0, ends), rtol=1e-8, atol=1e-8, first_step=1.9)
    assert solution.status[0] == DONE and solution.y[0].item() == pytest.approx(1 - 0.05**2, abs=1e-6)
    assert solution.y.isfinite().all() and solution.rejected.min() > 0


def test_the_first_step_far_from_zero():
    """A first step below the spacing of float64 times would not move at all."""
    for f, exact in ((lambda t, y: 0 * y, 1.0), (lambda t, y: -y, math.exp(-10))):
        ends = torch.tensor([1.7e12 + 10, 1.7e12 - 0.5], dtype=F64)
        solution = solve(f, torch.ones(2, 1, dtype=F64), (1.7e12, ends))
        assert solution.status.tolist() == [DONE, DONE] and torch.equal(solution.t, ends)
        assert solution.y[0].item() == pytest.approx(exact, abs=1e-4) and solution.calls < 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_first_step_of_half_precision(dtype):
    """A state over its tolerance is a number that float16 does not have."""
    options = {"rtol": 0.0, "atol": 1e-6, "record_steps": True}
    first = [solve(lambda t, y: torch.ones_like(y), torch.ones(1, 2, dtype=d), **options).steps for d in (dtype, F64)]
    torch.testing.assert_close(first[0][:, 1], first[1][:, 1], rtol=0.02, atol=0)


def test_tolerances_of_rows_and_elements():
    problem = spiral()
    y0 = problem.batch(2)

    def run(rtol, atol):
        return solve(problem.f, y0, problem.t_span, rtol=rtol, atol=atol)

    one = run(1e-6, 1e-7)
    for rtol in (torch.tensor(1e-6, dtype=F64), torch.full((2,), 1e-6, dtype=F64), torch.full((2, 2), 1e-6, dtype=F64)):
        for atol in (torch.full((1, 2), 1e-7, dtype=F64), torch.full((2, 1), 1e-7, dtype=F64), 1e-7):
            assert torch.equal(run(rtol, atol).y, one.y)
    loose = run(torch.tensor([1e-6, 1e-3], dtype=F64), torch.tensor([1e-7, 1e-3], dtype=F64))
    assert torch.equal(loose.y[0], one.y[0]) and loose.accepted[1] < one.accepted[1]
    careless = run(0.0, torch.tensor([[1e-7, INF]], dtype=F64))  # the second component's error does not count
    assert (careless.accepted < run(0.0, 1e-7).accepted).all()


@pytest.mark.parametrize("end", [0.1, 0.7, torch.tensor([0.1, 0.7, 0.1], dtype=F64)], ids=["0.1", "0.7", "rows"])
def test_float32_outputs_reach_an_end_that_float32_cannot_hold(end):
    """torch.linspace(0, 0.1, n) ends beyond 0.1, and torch.linspace(0, 0.7, n) before 0.7."""
    last = torch.as_tensor(end, dtype=torch.float32).expand(3)
    t_eval = torch.stack([last / 2, last], -1) if isinstance(end, torch.Tensor) else torch.tensor([end / 2, end])
    solution = solve(lambda t, y: -y, torch.ones(3, 1, dtype=F64), (0.0, end), t_eval, rtol=1e-8, atol=1e-8)
    assert torch.equal(solution.t, torch.as_tensor(end, dtype=F64).expand(3))
    torch.testing.assert_close(solution.y[:, 1, 0], torch.exp(-solution.t), rtol=1e-7, atol=0.0)
