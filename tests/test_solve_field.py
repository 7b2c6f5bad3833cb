"""What f may do in `solve`, how often and when it is called, and which ops a step is made of."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from problems import spiral
from solving import F64, NAN, RATES, STARTS, Counting, decay, elementwise, one_thread
from torch.utils._python_dispatch import TorchDispatchMode

from fmkernels import solve
from fmkernels.solvers.tableaus import ADAPTIVE, FIXED, hermite

__all__ = ["one_thread"]  # a fixture


@pytest.mark.parametrize("method", ADAPTIVE)
def test_calls_are_counted_exactly(method):
    evaluations = len(ADAPTIVE[method].b) - 1
    field = Counting(elementwise(RATES[[0, 1, 7]], torch.tensor([False, False, True])))
    y0 = STARTS[[0, 1, 7]].double()
    solution = solve(field, y0, (0.0, 1.0), method=method, rtol=1e-3, atol=1e-3)
    assert solution.calls == len(field.times)
    assert torch.equal(solution.nfe, 2 + evaluations * (solution.accepted + solution.rejected))
    assert solution.nfe.max() == solution.calls and len(solution.nfe.unique()) > 1
    field = Counting(decay)
    given = solve(field, y0, method=method, first_step=0.1, rtol=1e-3, atol=1e-3)
    assert torch.equal(given.nfe, 1 + evaluations * (given.accepted + given.rejected))
    assert given.calls == len(field.times)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("outputs", [None, [1.0], [0.3]])
def test_calls_of_fixed_methods(method, outputs):
    """Stages times steps; one more for outputs between steps, whose interpolant needs f at the end of a step."""
    field = Counting(decay)
    solution = solve(field, torch.ones(2, 1), (torch.tensor([0.0, 1.0]), 1.0), None, method, steps=5)
    stages = len(FIXED[method].b)
    assert solution.calls == len(field.times) == 5 * stages and solution.nfe.tolist() == [5 * stages, 0]
    field = Counting(decay)
    solution = solve(field, torch.ones(2, 1), (0.0, 1.0), outputs, method, steps=5)
    dense = outputs == [0.3]
    assert solution.calls == len(field.times) == 5 * (len(hermite(FIXED[method]).b) - 1 if dense else stages) + dense


@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4", "heun3", "midpoint"])
def test_f_stays_within_the_span(method):
    """Also for the first step's trial, however slow f is, and for rows that are NaN, backward or done."""
    starts = torch.tensor([0.0, 1.0, 0.0, 5.0, 0.0, 0.0], dtype=F64)
    ends = torch.tensor([1.0, 0.25, 1e-7, 5.0, 1.0, 0.1], dtype=F64)
    speed = torch.tensor([[1e-4], [1.0], [0.0], [1.0], [1.0], [30.0]], dtype=F64)
    y0 = torch.tensor([[1.0], [1], [1], [1], [NAN], [1]], dtype=F64)
    field = Counting(lambda t, y: speed * y)
    options = {"steps": 7} if method in FIXED else {"rtol": 1e-3}
    solve(field, y0, (starts, ends), method=method, **options)
    times = torch.stack(field.times)
    assert (times >= torch.minimum(starts, ends)).all() and (times <= torch.maximum(starts, ends)).all()


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_last_time_is_the_end(method):
    """To the bit, where t0 + (t1 - t0) is not."""
    spans = torch.randn(200, 2, dtype=F64)
    assert (spans[:, 0] + (spans[:, 1] - spans[:, 0]) != spans[:, 1]).any()
    field = Counting(lambda t, y: torch.ones_like(y))
    options = {"steps": 3} if method == "rk4" else {}
    solution = solve(field, spans[:, :1], spans, method=method, **options)
    assert torch.equal(field.times[-1], spans[:, 1]) and torch.equal(solution.t, spans[:, 1])
    torch.testing.assert_close(solution.y, spans[:, 1:], rtol=0, atol=1e-14)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "bosh3"])
@pytest.mark.parametrize("outputs", [None, torch.linspace(0, 1, 30)], ids=["end", "outputs"])
def test_ops_of_a_step(method, outputs):
    """On the CPU a step is one op for each stage and one to end it: nothing else in Python but f."""
    constant, y0 = torch.ones(3, 2), torch.zeros(3, 2)
    solve(lambda t, y: constant, y0, t_eval=outputs, method=method)  # makes the method's tensors
    with Ops() as short:
        few = solve(lambda t, y: constant, y0, t_eval=outputs, method=method, max_step=0.1, first_step=0.1)
    with Ops() as long:
        many = solve(lambda t, y: constant, y0, t_eval=outputs, method=method, max_step=0.05, first_step=0.05)
    taken = (many.accepted - few.accepted)[0].item()
    stages = len(ADAPTIVE[method].b) - 1
    assert taken == 10 and few.rejected.max() == many.rejected.max() == 0
    more = {name: long.names.count(name) - short.names.count(name) for name in set(long.names)}
    # f gives the same tensor each time, which is copied lest it be a buffer
    assert {name: n for name, n in more.items() if n} == {
        "fmkernels::runge_kutta_stage": stages * taken,
        "fmkernels::_runge_kutta_step_": taken,
        "aten::clone": stages * taken,
    }
    with Ops() as fresh:
        solution = solve(lambda t, y: -y, torch.ones(3, 2), method=method)
    steps = solution.accepted.max() + solution.rejected.max()
    assert fresh.names.count("fmkernels::runge_kutta_stage") == stages * steps
    assert fresh.names.count("fmkernels::_runge_kutta_step_") == steps and fresh.names.count("aten::clone") < 10


def test_what_f_keeps_stays_as_it_was():
    """No state that f was given is overwritten later; y0, times and tolerances are not either."""
    problem = spiral()
    y0, spans = problem.batch(3), torch.tensor([[0.0, 3.0], [0.0, 1.0], [1.0, 1.0]], dtype=F64)
    rtol, outputs = torch.tensor([1e-4, 1e-5, 1e-6], dtype=F64), torch.tensor([[0.0, 1.0], [0.5, 1.0], [1.0, NAN]])
    inputs = [y0, spans, rtol, outputs]
    copies = [x.clone() for x in inputs]
    for options in ({"rtol": rtol}, {"method": "rk4", "steps": 5}, {"method": "euler", "steps": 5}, {"dense": True}):
        field = Counting(problem.f)
        solution = solve(field, y0, spans, outputs.double(), **options)
        assert all(torch.equal(given, before) for given, before in field.states)
        assert all(torch.equal(x, copy) or x.isnan().any() for x, copy in zip(inputs, copies))
        assert solution.y.data_ptr() != y0.data_ptr()
        end = solve(field, y0, spans, **options)
        end.y.zero_()
        assert all(torch.equal(given, before) for given, before in field.states[:-1]) and torch.equal(y0, copies[0])


FIFTY = {"method": "rk4", "steps": 50}
RETURNS = {
    "its argument": (lambda y, buffer: y, lambda y0: y0 * math.e),
    "a view of it": (lambda y, buffer: y.flip(-1).flip(-1).mT.mT, lambda y0: y0 * math.e),
    "an expanded tensor": (lambda y, buffer: y.new_ones(()).expand(y.shape), lambda y0: y0 + 1),
    "a transposed one": (lambda y, buffer: (-y).mT.contiguous().mT, lambda y0: y0 / math.e),
    "a part": (lambda y, buffer: torch.stack([-y, y], -1)[..., 0], lambda y0: y0 / math.e),
    "a constant": (lambda y, buffer: buffer.fill_(2.0), lambda y0: y0 + 2),
    "a buffer": (lambda y, buffer: torch.mul(y, -1.0, out=buffer), lambda y0: y0 / math.e),
}


@pytest.mark.parametrize("what", RETURNS)
@pytest.mark.parametrize("options", [{}, {"first_step": 0.01}, FIFTY, {"dense": True}], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_f_may_return(what, options, dtype):
    returned, exact = RETURNS[what]
    y0 = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.25]], dtype=dtype)
    buffer = torch.zeros_like(y0)
    solution = solve(lambda t, y: returned(y, buffer), y0, rtol=1e-8, atol=1e-8, **options)
    torch.testing.assert_close(solution.y, exact(y0), rtol=3e-6, atol=1e-12)
    if "dense" in options:
        torch.testing.assert_close(solution(1.0 - 1e-9), solution.y, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided", "negated"])
@pytest.mark.parametrize("options", [{}, {"method": "rk4", "steps": 20}], ids=str)
def test_layouts_of_y0(layout, options):
    y0 = {
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "transposed": torch.randn(2, 3).mT,
        "strided": torch.randn(6, 4)[::2, ::2],
        "negated": torch.randn(3, 2, dtype=torch.complex64).conj().imag,
    }[layout]
    solution = solve(decay, y0, t_eval=[0.0, 0.4, 1.0], **options)
    plain = y0.contiguous().resolve_neg().clone()
    assert torch.equal(solution.y, solve(decay, plain, t_eval=[0.0, 0.4, 1.0], **options).y)
    torch.testing.assert_close(solution.y[:, 2], y0 / math.e, rtol=1e-4, atol=1e-4)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, t, y):
        return torch.tanh(self.layer(y)) * t.unsqueeze(-1)


@pytest.mark.parametrize("options", [{}, {"method": "rk4", "steps": 5}, {"gradient": "recorded"}], ids=str)
def test_without_gradients(options):
    """A module with parameters under no_grad and inference_mode gives the same numbers, and no graph."""
    f, y0 = Network(), torch.randn(3, 2, requires_grad=True)
    plain = solve(f, y0, **options)
    assert plain.y.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            solution = solve(f, y0, t_eval=[0.5, 1.0], **options)
            assert not solution.y.requires_grad
            torch.testing.assert_close(solution.y[:, 1], plain.y)
            assert solve(f, y0.detach().clone(), **options).y.shape == (3, 2)
    assert not solve(decay, y0.detach(), parameters=(), **options).y.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("options", [{}, FIFTY, {"first_step": 0.1, "t_eval": [0.5, 1.0]}], ids=str)
def test_f_may_differentiate_an_energy(options, mode):
    """f turns gradients on for itself, and asks its argument to require one: y0 does not notice."""

    def f(t, y):
        with torch.inference_mode(False), torch.enable_grad():
            x = y.clone().requires_grad_() if mode is torch.inference_mode else y.requires_grad_()
            return -torch.autograd.grad((x**2).sum() / 2, x)[0]

    y0 = torch.ones(2, 3)
    with mode():
        solution = solve(f, y0, **options)
    last = solution.y[:, -1] if "t_eval" in options else solution.y
    torch.testing.assert_close(last.detach(), y0 / math.e, rtol=1e-4, atol=1e-4)
    assert not y0.requires_grad


def test_progress_bar(capsys):
    solve(decay, torch.ones(3, 1), progress=True)
    solve(decay, torch.ones(3, 1), method="rk4", steps=4, progress=True)
    shown = capsys.readouterr().err
    assert "solve dopri5: 100%" in shown and "3/3" in shown and "solve rk4: 100%" in shown and "4/4" in shown


def test_default_dtype_and_warnings():
    """Nothing depends on torch's default dtype, and nothing warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = solve(decay, torch.ones(2, 2), t_eval=torch.linspace(0, 1, 3)).y
        torch.set_default_dtype(F64)
        try:
            after = solve(decay, torch.ones(2, 2, dtype=torch.float32), t_eval=torch.linspace(0, 1, 3)).y
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(before, after)


@pytest.mark.parametrize("options", [{}, {"method": "rk4", "steps": 3}, {"method": "euler", "step_size": 0.5}], ids=str)
def test_what_f_says_of_a_row_at_its_end_does_not_matter(options):
    starts = torch.tensor([0.0, 1.0], dtype=F64)
    bad = torch.tensor([[False], [True]])
    y0 = torch.ones(2, 2, dtype=F64)
    solution = solve(lambda t, y: torch.where(bad, NAN, -y), y0, (starts, 1.0), [[0.5, 1.0], [1.0, NAN]], **options)
    assert solution.status.tolist() == [0, 0] and torch.equal(solution.y[1, 0], y0[1])
    end = solve(lambda t, y: torch.where(bad, NAN, -y), y0, (starts, 1.0), **options)
    assert end.status.tolist() == [0, 0] and torch.equal(end.y[1], y0[1]) and end.y.isfinite().all()
