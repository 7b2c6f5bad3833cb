"""Bad arguments of `solve`: each error names the argument, what was expected and what came."""

import math

import numpy as np
import pytest
import torch

from fmkernels import solve
from fmkernels.solvers import PID

NAN, INF = math.nan, math.inf
Y = torch.ones(3, 2)
META = torch.ones(3, device="meta")


def decay(t, y):
    return -y


def call(f=decay, y0=Y, *arguments, **options):
    return lambda: solve(f, y0, *arguments, **options)


def span(*ends):
    return call(decay, Y, ends)


def outputs(t_eval, t_span=(0, 1)):
    return call(decay, Y, t_span, t_eval)


def returning(f, y0=Y, **options):
    return call(lambda t, y: f(y), y0, **options)


MIXED = (torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0]))

CASES = [
    (call(3), TypeError, r"f: expected a callable f\(t, y\), got int"),
    (call(decay, [1.0]), TypeError, "y0: expected a torch.Tensor, got list"),
    (call(decay, np.ones(3)), TypeError, "y0: expected a torch.Tensor, got ndarray"),
    (call(decay, torch.ones(3, dtype=torch.int64)), TypeError, "y0: expected a floating or complex dtype, got torch.int64"),
    (call(decay, torch.ones(3, dtype=torch.bool)), TypeError, "y0: expected a floating or complex dtype, got torch.bool"),
    (call(decay, torch.tensor(1.0)), ValueError, r"y0: expected shape \[B, …\], got a scalar"),
    (call(decay, ()), ValueError, "y0: expected a tensor or a tuple of at least one tensor, got an empty tuple"),
    (call(decay, (Y, 1)), TypeError, r"y0\[1\]: expected a torch.Tensor, got int"),
    (call(decay, (Y, Y.double())), ValueError, r"y0\[1\]: expected dtype torch.float32, that of y0\[0\], got torch.float64"),
    (call(decay, (Y, Y[:2])), ValueError, r"y0\[1\]: expected leading size \[3\], that of y0\[0\], got \[2\]"),
    (call(decay, (Y, META)), ValueError, r"y0\[1\]: expected device cpu, that of y0\[0\], got meta"),
    # times
    (call(decay, Y, 1.0), ValueError, r"t_span: expected a pair \(t0, t1\), got float"),
    (call(decay, Y, None), ValueError, r"t_span: expected a pair \(t0, t1\), got NoneType"),
    (span(0, 1, 2), ValueError, r"t_span: expected a pair \(t0, t1\), got 3 values"),
    (span("a", 1), TypeError, r"t_span\[0\]: expected real numbers or a tensor of them, got str"),
    (span(0, 1j), TypeError, r"t_span\[1\]: expected real numbers or a tensor of them, got complex"),
    (span(0, torch.tensor(True)), TypeError, r"t_span\[1\]: expected real numbers, got torch.bool"),
    (call(decay, Y, torch.ones(2, 2)), ValueError, r"t_span: expected shape \[2\] or \[3, 2\], got \[2, 2\]"),
    (span(torch.ones(2), 1.0), ValueError, r"t_span\[0\]: expected a number or shape \[3\], got shape \[2\]"),
    (span(0.0, NAN), ValueError, r"t_span\[1\]: expected finite times, got nan"),
    (span(-INF, 0), ValueError, r"t_span\[0\]: expected finite times, got -inf"),
    (span(0, META), ValueError, r"t_span\[1\]: expected device cpu, that of y0, or the CPU, got meta"),
    (outputs([]), ValueError, r"t_eval: expected shape \[T\] or \[3, T\] with at least one time, got \[0\]"),
    (outputs(0.5), ValueError, r"t_eval: expected shape \[T\] or \[3, T\] with at least one time, got \[\]"),
    (outputs(torch.ones(3, 1, 1)), ValueError, r"t_eval: expected shape .* got \[3, 1, 1\]"),
    (outputs(torch.ones(2, 1)), ValueError, r"t_eval: expected shape .* got \[2, 1\]"),
    (outputs("x"), TypeError, "t_eval: expected real numbers or a tensor of them, got str"),
    (outputs([[0.0, 1.0], [1.0], [1.0]]), TypeError, "t_eval: expected real numbers or a tensor of them, got list"),
    (outputs(torch.tensor([1j])), TypeError, "t_eval: expected real numbers, got torch.complex64"),
    (outputs(torch.ones(1, device="meta")), ValueError, "t_eval: expected device cpu, that of y0, or the CPU, got meta"),
    (outputs([0.5, 0.2]), ValueError, r"t_eval: expected times in the order of integration, from t_span\[0\] to t_span\[1\]"),
    (outputs([0.2, 0.5], (1, 0)), ValueError, "t_eval: expected times in the order of integration"),
    (outputs([0.2, 0.3], MIXED), ValueError, "t_eval: expected times in the order of integration"),
    (outputs([0.5, 1.25]), ValueError, "t_eval: expected times within t_span, got 1.25"),
    (outputs([-0.125]), ValueError, "t_eval: expected times within t_span, got -0.125"),
    (outputs([INF]), ValueError, "t_eval: expected times within t_span, got inf"),
    (outputs([0.5, 1.0], (1.0, 1.0)), ValueError, "t_eval: expected times within t_span, got 0.5"),
    (outputs([0.5, 1.0], (torch.tensor([0.0, 0.0, 1.0]), 1.0)), ValueError, "t_eval: expected times within t_span, got 0.5"),
    (outputs([NAN, 0.5]), ValueError, "t_eval: expected NaN only after a row's last time, got a number after NaN"),
    # method and step control
    (call(method="rk45"), ValueError, "method: expected one of 'dopri5', .*, 'rk4_38', got 'rk45'"),
    (call(method=3), TypeError, "method: expected one of .* got int"),
    (call(rtol=-1.0), ValueError, "rtol: expected a finite number of at least 0, got -1"),
    (call(atol=NAN), ValueError, "atol: expected a finite number of at least 0, got nan"),
    (call(rtol=INF), ValueError, "rtol: expected a finite number of at least 0, got inf"),
    (call(rtol="x"), TypeError, "rtol: expected a real number, got str"),
    (call(atol=True), TypeError, "atol: expected a real number, got bool"),
    (call(atol=[1e-3] * 3), TypeError, "atol: expected a real number, got list"),
    (call(rtol=torch.ones(4)), ValueError, r"rtol: expected shape \[3\] or one that broadcasts to \[3, 2\], that of y0, got \[4\]"),
    (call(rtol=torch.tensor([1, 1, -1.0])), ValueError, "rtol: expected no negative tolerance, got -1"),
    (call(atol=torch.tensor(NAN)), ValueError, "atol: expected no negative tolerance, got nan"),
    (call(atol=torch.tensor(1e-3, requires_grad=True)), ValueError, "atol: expected a tensor that requires no gradient"),
    (call(atol=torch.tensor(1j)), TypeError, "atol: expected real tolerances, got torch.complex64"),
    (call(rtol=META), ValueError, "rtol: expected device cpu, that of y0, or the CPU, got meta"),
    (call(y0=(Y, Y), rtol=Y), ValueError, r"rtol: expected a number or shape \[3\] for a tuple y0, got \[3, 2\]"),
    (call(controller="P"), ValueError, "controller: expected one of 'I', 'PI', 'PID', got 'P'"),
    (call(controller=3), TypeError, "controller: expected one of .* got int"),
    (lambda: PID("x"), TypeError, "p: expected a real number, got str"),
    (lambda: PID(i=NAN), ValueError, "i: expected a finite number, got nan"),
    (lambda: PID(safety=0.0), ValueError, "safety: expected a finite number above 0 and at most 1, got 0"),
    (lambda: PID(min_factor=0.0), ValueError, "min_factor: expected a finite number above 0 and at most 1, got 0"),
    (lambda: PID(max_factor=0.5), ValueError, "max_factor: expected a finite number of at least 1, got 0.5"),
    (call(first_step=0.0), ValueError, r"first_step: expected positive numbers, one or \[3\], got 0.0"),
    (call(first_step=torch.tensor([1, NAN, 1])), ValueError, "first_step: expected positive numbers"),
    (call(first_step=torch.ones(2)), ValueError, r"first_step: expected positive numbers, one or \[3\], got \[1.0, 1.0\]"),
    (call(first_step="x"), TypeError, "first_step: expected real numbers or a tensor of them, got str"),
    (call(min_step=-1.0), ValueError, "min_step: expected a finite number of at least 0, got -1"),
    (call(min_step="x"), TypeError, "min_step: expected a real number, got str"),
    (call(max_step=0.0), ValueError, "max_step: expected a finite number above 0, got 0"),
    (call(max_step=NAN), ValueError, "max_step: expected a finite number above 0, got nan"),
    (call(min_step=0.1, max_step=0.05), ValueError, "max_step: expected a finite number above 0.1, got 0.05"),
    (call(max_steps=0), ValueError, "max_steps: expected an int of at least 1, got 0"),
    (call(max_steps=1.5), TypeError, "max_steps: expected an int, got float"),
    (call(steps=3), ValueError, "steps: expected None for the adaptive method 'dopri5', got 3"),
    (call(step_size=0.1), ValueError, "step_size: expected None for the adaptive method 'dopri5', got 0.1"),
    (call(method="euler"), ValueError, "steps: expected exactly one of steps and step_size for method 'euler', got neither"),
    (call(method="rk4", steps=3, step_size=0.1), ValueError, "steps: expected exactly one of .* got both"),
    (call(method="euler", steps=0), ValueError, "steps: expected an int of at least 1, got 0"),
    (call(method="euler", steps=2.5), TypeError, "steps: expected an int, got float"),
    (call(method="euler", step_size=0.0), ValueError, "step_size: expected a finite number above 0, got 0"),
    (call(method="euler", step_size=INF), ValueError, "step_size: expected a finite number above 0, got inf"),
    # gradients and extras
    (call(gradient="x"), ValueError, "gradient: expected one of 'autograd', 'recorded', 'adjoint', got 'x'"),
    (call(gradient="recorded"), ValueError, "parameters: expected the tensors that gradient='recorded' differentiates, or .* got None"),
    (call(gradient="adjoint"), ValueError, "parameters: expected the tensors that gradient='adjoint' differentiates"),
    (call(torch.nn.Identity(), gradient="adjoint"), ValueError, "parameters: .* or .* since f is a torch.nn.Module without any; got None"),
    (call(gradient="recorded", parameters=[3]), TypeError, r"parameters\[0\]: expected a torch.Tensor, got int"),
    (call(gradient="recorded", parameters=3), TypeError, "parameters: expected a sequence of tensors, got int"),
    (call(gradient="recorded", parameters=Y), TypeError, "parameters: expected a sequence of tensors, got Tensor"),
    (call(method="euler", steps=2, gradient="adjoint"), ValueError, "gradient: expected 'autograd' or 'recorded' for the fixed method"),
    (
        call(decay, Y, (0, 1), torch.tensor([[0.5]] * 3), gradient="adjoint", parameters=()),
        ValueError,
        "gradient: expected 'autograd' or 'recorded' where rows have outputs of their own, got 'adjoint'",
    ),
    (call(y0=torch.ones(3, 2, requires_grad=True), dense=True), ValueError, "dense: expected a solve without gradients"),
    (call(y0=torch.ones(3, 2, requires_grad=True), cuda_graph=True), ValueError, "cuda_graph: expected a solve without gradients"),
    (call(cuda_graph=True), ValueError, "cuda_graph: expected y0 on a CUDA device, got cpu"),
    (call(method="euler", steps=2, dense=True), ValueError, "dense: expected an adaptive method, got 'euler'"),
    (call(method="euler", steps=2, record_steps=True), ValueError, "record_steps: expected an adaptive method, got 'euler'"),
    (call(method="euler", steps=2, cuda_graph=True), ValueError, "cuda_graph: expected an adaptive method, got 'euler'"),
    # what f returns
    (returning(lambda y: y[:1]), ValueError, r"f: expected it to return shape \[3, 2\], that of y0, got \[1, 2\]"),
    (returning(lambda y: y[:1], method="rk4", steps=2), ValueError, r"f: expected it to return shape \[3, 2\]"),
    (returning(lambda y: y.double()), ValueError, "f: expected it to return torch.float32, the dtype of y0, got torch.float64"),
    (returning(lambda y: None), ValueError, "f: expected it to return a torch.Tensor, got NoneType"),
    (returning(lambda y: (y,)), ValueError, "f: expected it to return a torch.Tensor, got tuple"),
    (returning(lambda y: y.to("meta")), ValueError, "f: expected it to return a tensor on cpu, got meta"),
    (returning(lambda y: y.real, Y.to(torch.complex64)), ValueError, "f: expected it to return torch.complex64"),
    (returning(lambda y: y[0], (Y, Y)), ValueError, "f: expected it to return a tuple of 2 tensors like y0, got Tensor"),
    (returning(lambda y: y[:1], (Y, Y)), ValueError, "f: expected it to return a tuple of 2 tensors like y0, got a tuple of 1"),
    (returning(lambda y: (y[0], y[1].mT), (Y, Y)), ValueError, r"f: expected it to return shape \[3, 2\], that of y0 for y0\[1\]"),
    (returning(lambda y: (y[0], 1.0), (Y, Y)), ValueError, r"f: expected it to return a torch.Tensor for y0\[1\], got float"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "error", "message"), CASES, ids=[f"{i}-{c[2][:24]}" for i, c in enumerate(CASES)])
def test_bad_argument(function, error, message):
    with pytest.raises(error, match=message):
        function()


@pytest.mark.parametrize("options", [{}, {"method": "heun2", "steps": 3}], ids=str)
def test_a_later_call_is_checked_too(options):
    """What f returns is looked at every time; its own errors come through as they are."""
    calls = []

    def f(t, y):
        calls.append(t)
        if len(calls) == 4:
            return y.double()
        return -y

    with pytest.raises(ValueError, match="f: expected it to return torch.float32"):
        solve(f, Y, **options)

    def broken(t, y):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        solve(broken, Y, **options)
