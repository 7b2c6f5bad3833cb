"""Gradients of `solve`: by autograd, through the recorded steps, and by the continuous adjoint."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from solving import F64, INF, MAX_STEPS, NAN, NON_FINITE, Counting, decay, one_thread
from torch.autograd import gradcheck, gradgradcheck

from fmkernels import solve

__all__ = ["one_thread"]  # a fixture

SAME = ("autograd", "recorded")
EVERY = (*SAME, "adjoint")
# Steps of a size that no error decides: the numerical derivative sees the steps that the gradient knows of.
EVEN = {"first_step": 0.125, "max_step": 0.125, "rtol": 1.0, "atol": 1.0}
METHODS = [{"method": m, **EVEN} for m in ("dopri5", "tsit5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")]
METHODS += [{"method": "rk4", "steps": 4}, {"method": "heun3", "step_size": 0.3}, {"method": "euler", "steps": 3}]
each_method = pytest.mark.parametrize("options", METHODS, ids=lambda options: options["method"])


def leaf(*values, dtype=F64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def field(theta):
    """Non-linear in y, t and two parameters."""

    def f(t, y):
        return torch.sin(theta[0] * y) * (1 + t * t).unsqueeze(-1) + theta[1] * y.flip(-1)

    return f


@pytest.mark.parametrize("gradient", SAME)
@each_method
def test_gradcheck_of_the_end(options, gradient):
    """In y0, both ends of the span, one row forward and one backward, and the parameters."""

    def end(y0, t0, t1, theta):
        return solve(field(theta), y0, (t0, t1), gradient=gradient, parameters=(theta,), **options).y

    inputs = leaf([0.3, -0.5], [1.0, 0.7]), leaf(0.1, 0.9), leaf(0.63, 0.2), leaf(0.8, -0.4)
    assert gradcheck(end, inputs, atol=1e-6, rtol=1e-5)

    def shared(t0, t1):
        return solve(field(inputs[3]), inputs[0], (t0, t1), gradient=gradient, parameters=(), **options).y

    assert gradcheck(shared, (leaf(0.1).squeeze(), leaf(0.63).squeeze()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gradient", SAME)
@each_method
def test_gradcheck_of_outputs(options, gradient):
    """In the times of output too: shared, and of each row with one missing."""
    inputs = leaf([0.3, -0.5], [1.0, 0.7]), leaf(0.1, 0.9), leaf(0.63, 0.2), leaf(0.8, -0.4)
    ragged = torch.tensor([[0.2, 0.41, 0.6], [0.8, 0.31, NAN]], dtype=F64)
    known = ~ragged.isnan()

    def outputs(y0, t0, t1, theta, times):
        t_eval = torch.full_like(ragged, NAN).masked_scatter(known, times)
        solution = solve(field(theta), y0, (t0, t1), t_eval, gradient=gradient, parameters=(theta,), **options)
        return solution.y[known]

    assert gradcheck(outputs, (*inputs, ragged[known].requires_grad_()), atol=1e-6, rtol=1e-5)

    def shared(y0, times):
        theta = inputs[3].detach()
        return solve(field(theta), y0, (0.1, 0.63), times, gradient=gradient, parameters=(), **options).y

    assert gradcheck(shared, (inputs[0], leaf(0.2, 0.3, 0.61)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{**EVEN, "max_step": 0.3}, {"method": "rk4", "steps": 2}], ids=["adaptive", "fixed"]
)
def test_second_derivatives(options):
    def end(y0, theta):
        return solve(field(theta), y0, (0.0, 0.5), **options).y

    assert gradgradcheck(end, (leaf([0.3, -0.5]), leaf(0.8, -0.4)), atol=1e-5, rtol=1e-4)
    y0 = leaf([0.3, -0.5])
    reached = solve(decay, y0, gradient="recorded", parameters=()).y
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad|differentiat"):
        (first,) = torch.autograd.grad(reached.sum(), y0, create_graph=True)
        first.sum().backward()


class Network(torch.nn.Module):
    def __init__(self, width=3, dtype=F64):
        super().__init__()
        self.inner = torch.nn.Linear(width + 1, 16, dtype=dtype)
        self.outer = torch.nn.Linear(16, width, dtype=dtype)
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=dtype))
        self.frozen = torch.nn.Parameter(torch.ones((), dtype=dtype), requires_grad=False)

    def forward(self, t, y):
        return self.frozen * self.outer(torch.tanh(self.inner(torch.cat([y, t.to(y.dtype).unsqueeze(-1)], -1))))


ROWS = {
    "t_span": (torch.tensor([0.0, 1.0, 0.5, 0.3]), torch.tensor([1.0, -0.5, 0.5, 0.4])),
    "t_eval": torch.tensor([[0.0, 0.1, 1.0], [0.9, -0.5, NAN], [0.5, 0.5, NAN], [NAN, NAN, NAN]], dtype=F64),
}
CASES = {
    "end": {},
    "rejections": {"rtol": 1e-4, "atol": 1e-4, "first_step": 12.0, "t_span": (0.0, 12.0)},
    "outputs": {"t_eval": torch.tensor([0.0, 0.0, 0.3, 0.31, 1.0], dtype=F64)},
    "rows": ROWS,
    "limit": {"max_steps": 3, "rtol": 1e-9, "atol": 1e-9, "t_eval": torch.tensor([0.01, 0.5, 1.0], dtype=F64)},
    "fixed": {"method": "rk4", "steps": 5},
    "fixed outputs": {"method": "heun3", "steps": 5, "t_eval": torch.tensor([0.0, 0.2, 0.333, 1.0], dtype=F64)},
    "fixed rows": {"method": "midpoint", "steps": 4, **ROWS},
}


def gradients(gradient, options, y0, network, weights=None):
    """Of y0 and the parameters, and the solution; the loss is a weighted sum of what is there."""
    y0 = y0.detach().clone().requires_grad_()
    solution = solve(network, y0, gradient=gradient, **options)
    y = solution.y.where(solution.y.detach().isfinite(), 0)
    weights = (
        torch.linspace(0.5, 1.5, y.numel(), dtype=F64).reshape(y.shape).to(y.dtype) if weights is None else weights
    )
    loss = (y * weights).sum()
    given = [y0, *(p for p in network.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss, given, allow_unused=True), solution


@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_give_the_gradients_of_autograd(case):
    network, y0 = Network(), torch.randn(4, 3, dtype=F64)
    plain, one = gradients("autograd", CASES[case], y0, network)
    recorded, two = gradients("recorded", CASES[case], y0, network)
    torch.testing.assert_close(one.y, two.y, rtol=1e-13, atol=1e-13, equal_nan=True)
    assert torch.equal(one.status, two.status) and torch.equal(one.nfe, two.nfe) and one.calls == two.calls
    if case == "rejections":
        assert one.rejected.max() > 0
    if case == "limit":
        assert (one.status == MAX_STEPS).all()
    assert plain[1] is None and recorded[1] is None  # the unused parameter comes first
    for a, b in zip(plain, recorded):
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        free = solve(network, y0, **CASES[case])
    torch.testing.assert_close(free.y, one.y, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("case", ["end", "outputs"])
def test_the_adjoint_comes_near(case):
    """Its gradients are those of the exact solution, up to the tolerance."""
    network, y0 = Network(), torch.randn(4, 3, dtype=F64)
    options = CASES[case] | {"rtol": 1e-9, "atol": 1e-9}
    plain, _ = gradients("autograd", options, y0, network)
    adjoint, _ = gradients("adjoint", options, y0, network)
    for a, b in zip(plain, adjoint):
        if a is None:
            assert b.abs().max() == 0
        else:
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"method": "rk4", "steps": 20}], ids=["adaptive", "fixed"])
def test_gradients_of_times_are_those_of_the_solution(options):
    """y = y0 e^{t0 − t1}: dy/dt1 = −y, dy/dt0 = y, and at an output dy/dt = −y."""
    tight = {"rtol": 1e-10, "atol": 1e-10} if not options else {}
    for gradient in EVERY if not options else SAME:
        t0, t1, times = leaf(0.2).squeeze(), leaf(1.1).squeeze(), leaf(0.4, 0.9)
        every = {"gradient": gradient, "parameters": (), **options, **tight}
        solution = solve(decay, torch.ones(2, 1, dtype=F64), (t0, t1), times, **every)
        given = torch.autograd.grad(solution.y[0, 0].sum(), (t0, times), allow_unused=True)
        value = math.exp(0.2 - 0.4)
        torch.testing.assert_close(given[0].item(), value, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(given[1], torch.tensor([-value, 0.0], dtype=F64), rtol=1e-6, atol=1e-7)
        end = solve(decay, torch.ones(1, 1, dtype=F64), (t0, t1), **every)
        given = torch.autograd.grad(end.y.sum(), (t0, t1))
        value = math.exp(0.2 - 1.1)
        torch.testing.assert_close(torch.stack(given), torch.tensor([value, -value], dtype=F64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gradient", EVERY)
@pytest.mark.parametrize("bad", ["state", "infinite state", "field", "first"])
def test_rows_that_fail_at_once_leave_the_others_alone(bad, gradient):
    """Their row of y0 is NaN, or f is there: the gradients of what rows share are those of the good rows."""
    network = Network()

    class Singular(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, t, y):
            return self.network(t, y) / (y[:, :1] - 5)  # infinite at 5, for its parameters too

    y0 = torch.randn(3, 3, dtype=F64)
    where = 0 if bad == "first" else 1
    spoilt = y0.clone()
    spoilt[where, 0] = {"state": NAN, "infinite state": INF}.get(bad, 5.0)
    keep = [row for row in range(3) if row != where]
    weights = torch.ones(3, 3, dtype=F64)
    weights[where] = 0
    for options in ({}, {"t_eval": torch.tensor([0.0, 0.4, 1.0], dtype=F64)}):
        shape = weights if not options else weights.unsqueeze(1).expand(3, 3, 3)
        got, solution = gradients(gradient, options, spoilt, Singular(), shape)
        want, alone = gradients(gradient, options, y0[keep], Singular(), shape[keep])
        assert solution.status.tolist() == [NON_FINITE if row == where else 0 for row in range(3)]
        torch.testing.assert_close(solution.y[keep], alone.y, rtol=1e-12, atol=1e-12)
        assert torch.equal(solution.nfe[keep], alone.nfe) and solution.t[where] == 0
        first = solution.y[where] if not options else solution.y[where, 0]
        assert torch.equal(first.nan_to_num(7), spoilt[where].nan_to_num(7))
        slack = {"rtol": 1e-4, "atol": 1e-5} if gradient == "adjoint" else {"rtol": 1e-9, "atol": 1e-10}
        torch.testing.assert_close(got[0][keep], want[0], **slack)
        for a, b in zip(got[1:], want[1:]):
            if b is not None:
                torch.testing.assert_close(a, b, **slack)


@pytest.mark.parametrize("gradient", SAME)
@pytest.mark.parametrize("t_eval", [None, [0.3, 1.5]], ids=["end", "outputs"])
def test_attempts_that_fail_leave_gradients_alone(gradient, t_eval):
    """One row's trial beyond the wall is NaN while the other's step is accepted."""
    theta = leaf(1.0)
    calls = Counting(lambda t, y: theta * (1 - y).sqrt())
    y0 = torch.tensor([[0.0], [-50.0]], dtype=F64, requires_grad=True)
    options = {"rtol": 1e-8, "atol": 1e-8, "gradient": gradient, "parameters": (theta,)}
    solution = solve(calls, y0, (0.0, 1.8), t_eval, first_step=torch.tensor([1.8, 0.01], dtype=F64), **options)
    assert solution.rejected[0] > 0 and (solution.status == 0).all()
    assert solution.calls == len(calls.times)
    total = solution.y.sum()
    times = torch.tensor([1.8] if t_eval is None else t_eval, dtype=F64)
    got = torch.autograd.grad(total, (y0, theta))
    # √(1 − y) falls by θt/2
    exact = (1 - ((1 - y0).sqrt() - theta * times / 2) ** 2).sum()
    for a, b in zip(got, torch.autograd.grad(exact, (y0, theta))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", EVERY)
def test_a_row_at_its_end_and_a_row_that_stops(gradient):
    """dy/dy0 is one for the first; the second's gradient is that of what it reached."""
    y0 = torch.tensor([[2.0], [1.0], [0.25]], dtype=F64, requires_grad=True)
    spans = torch.tensor([[1.0, 1.0], [0.0, 2.0], [0.0, 2.0]], dtype=F64)
    options = {"max_steps": 30, "rtol": 1e-6, "atol": 1e-6}
    solution = solve(lambda t, y: y * y, y0, spans, gradient=gradient, parameters=(), **options)
    assert solution.status.tolist() == [0, MAX_STEPS, 0]
    given = [torch.autograd.grad(solution.y[row].sum(), y0, retain_graph=True)[0] for row in range(3)]
    assert given[0].flatten().tolist() == [1.0, 0.0, 0.0]
    exact = 1 / (1 - solution.t[1] * 1.0) ** 2  # y = y0 / (1 − t y0)
    assert given[1][1].item() == pytest.approx(exact.item(), rel=1e-3) and given[1][2] == 0
    assert given[2][2].item() == pytest.approx(1 / (1 - 0.5) ** 2, rel=1e-4) and given[2][1] == 0


@pytest.mark.parametrize("gradient", EVERY)
def test_states_that_are_not_one_real_tensor(gradient):
    z0 = torch.tensor([[1 + 1j, 0.5]], dtype=torch.complex128, requires_grad=True)
    rate = torch.tensor(0.3 + 1j, dtype=torch.complex128, requires_grad=True)
    tight = {"rtol": 1e-10, "atol": 1e-10, "gradient": gradient}
    z = solve(lambda t, z: rate * z, z0, parameters=(rate,), **tight).y
    got = torch.autograd.grad(z.abs().square().sum() + z.real.sum(), (z0, rate))
    exact = z0 * torch.exp(rate)
    want = torch.autograd.grad(exact.abs().square().sum() + exact.real.sum(), (z0, rate))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)

    a, b = leaf([1.0, 2.0]), leaf(0.5)
    x, y = solve(lambda t, s: (-s[0] * s[1].unsqueeze(-1), -s[1]), (a, b), parameters=(), **tight).y
    got = torch.autograd.grad(x.sum() + y.sum(), (a, b))
    exact = a * torch.exp(-b * (1 - math.exp(-1)))
    want = torch.autograd.grad(exact.sum() + b * math.exp(-1), (a, b))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_in_low_precision(dtype):
    network, y0 = Network(dtype=dtype), torch.randn(4, 3, dtype=dtype)
    options = {"rtol": 1e-2, "atol": 1e-2}
    plain, _ = gradients("autograd", options, y0, network)
    recorded, _ = gradients("recorded", options, y0, network)
    assert plain[0].dtype == recorded[0].dtype == dtype
    for a, b in zip(plain, recorded):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("gradient", EVERY)
def test_only_what_is_asked_for(gradient):
    """Parameters without y0, y0 with frozen parameters, neither; a second backward needs the graph kept."""
    network, y0 = Network(), torch.randn(2, 3, dtype=F64)
    solve(network, y0, gradient=gradient).y.sum().backward()
    assert network.inner.weight.grad.abs().sum() > 0 and network.frozen.grad is None
    network.requires_grad_(False)
    assert not solve(network, y0, gradient=gradient).y.requires_grad
    start = y0.clone().requires_grad_()
    loss = solve(network, start, gradient=gradient).y.sum()
    loss.backward(retain_graph=True)
    first = start.grad.clone()
    loss.backward()
    torch.testing.assert_close(start.grad, 2 * first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_parameters_changed_before_the_backward_are_noticed():
    network, y0 = Network(), torch.randn(2, 3, dtype=F64)
    for gradient in EVERY:
        loss = solve(network, y0, gradient=gradient).y.sum()
        with torch.no_grad():
            network.inner.weight.add_(0.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def alive() -> int:
    """Bytes of all tensors that Python knows, and of those that their graphs keep."""
    gc.collect()
    seen = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_memory_of_recorded_steps(method):
    """One state for each step, whatever the number of stages; the adjoint keeps none."""
    y0 = torch.randn(64, 1000, dtype=F64)
    state = y0.numel() * 8
    theta = torch.ones((), dtype=F64, requires_grad=True)

    def kept(gradient, size):
        before = alive()
        solution = solve(
            lambda t, y: -theta * y, y0, method=method, gradient=gradient, parameters=(theta,), first_step=size,
            max_step=size, rtol=1.0, atol=1.0,
        )  # fmt: skip
        after = alive()
        assert solution.accepted.unique().tolist() == [round(1 / size)]
        solution.y.sum().backward()
        return (after - before) / state

    few, many = kept("recorded", 0.25), kept("recorded", 0.0625)
    assert many - few == pytest.approx(12, abs=0.1) and few < 4 + 4
    assert kept("adjoint", 0.0625) == pytest.approx(kept("adjoint", 0.25), abs=0.1)
