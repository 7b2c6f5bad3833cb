"""Gradients of log-densities: by autograd, through the recorded steps, by the adjoint, against finite differences."""

import math

import pytest
import torch
from flows import F64, Linear, Net
from solving import one_thread  # noqa: F401 (an autouse fixture)

import fmkernels as fmk

KEY = torch.tensor([17])
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
ESTIMATORS = (fmk.Exact(), fmk.Exact("forward", chunk=2), fmk.Hutchinson(), fmk.Hutchinson(2, mode="forward"))


def finite_difference(value, tensors, step=1e-5):
    """The derivative of value() along a random direction of all the tensors, and these directions."""
    directions = [torch.randn_like(tensor) for tensor in tensors]
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor.add_(direction, alpha=sign * step)
            ends.append(value())
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor.sub_(direction, alpha=sign * step)
    return float(ends[0] - ends[1]) / (2 * step), directions


@pytest.mark.parametrize("gradient", ["autograd", "recorded"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_gradcheck_of_fixed_steps(estimator, gradient):
    f, x1 = Net(3, width=4), torch.randn(2, 3, dtype=F64, requires_grad=True)
    parameters = list(f.parameters())

    def value(x1, *_):
        how = {"gradient": gradient, "parameters": parameters, "method": "midpoint", "steps": 2}
        result = fmk.log_prob(f, x1, divergence=estimator, key=KEY, t_eval=[0.3], **how)
        return result.log_prob, result.log_prob_t, result.x_t

    assert torch.autograd.gradcheck(value, (x1, *parameters), fast_mode=True)


@pytest.mark.parametrize("upward", [False, True])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, fmk.Deflated(torch.eye(3)[:1], 2)], ids=repr)
def test_the_three_gradients_agree_with_finite_differences(estimator, upward):
    f, x = Net(3), torch.randn(4, 3, dtype=F64, requires_grad=True)
    follow = fmk.sample_and_log_prob if upward else fmk.log_prob
    tensors = [x, *f.parameters()]

    def value(gradient="autograd"):
        result = follow(f, x, divergence=estimator, key=KEY, gradient=gradient, t_eval=[0.5, 0.25], **TIGHT)
        return result.log_prob.sum() + (result.log_prob_t * torch.tensor([1.0, -2.0])).sum() + result.x0.sum()

    expected, directions = finite_difference(value, tensors)
    for gradient, tolerance in (("autograd", 1e-6), ("recorded", 1e-6), ("adjoint", 1e-4)):
        grads = torch.autograd.grad(value(gradient), tensors)
        along = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
        assert along == pytest.approx(expected, rel=tolerance), gradient
        if gradient == "autograd":
            first = grads
        else:
            for one, other in zip(grads, first, strict=True):
                torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("gradient", ["autograd", "recorded", "adjoint"])
def test_frozen_and_missing_parameters(gradient):
    x1 = torch.randn(3, 4, dtype=F64)
    for f in (Net(4).requires_grad_(False), Linear(torch.eye(4))):
        how = {} if gradient == "autograd" or isinstance(f, torch.nn.Module) else {"parameters": ()}
        result = fmk.log_prob(f, x1, gradient=gradient, key=KEY, **how)
        assert not result.log_prob.requires_grad, "nothing requires a gradient"
        x = x1.clone().requires_grad_()
        (to_x,) = torch.autograd.grad(fmk.log_prob(f, x, gradient=gradient, key=KEY, **how).log_prob.sum(), x)
        assert to_x.isfinite().all() and to_x.abs().sum() > 0
    f = Net(4)
    f.inner.requires_grad_(False)
    fmk.log_prob(f, x1, gradient=gradient, key=KEY).log_prob.sum().backward()
    assert f.inner.weight.grad is None and f.outer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_gradients_to_what_a_closure_holds(mode):
    rate = torch.tensor(-0.7, dtype=F64, requires_grad=True)
    x1 = torch.randn(3, 2, dtype=F64)
    result = fmk.log_prob(lambda t, x: rate * x, x1, divergence=fmk.Hutchinson(mode=mode), **TIGHT)
    (slope,) = torch.autograd.grad(result.log_prob.sum(), rate)
    expected = (x1.square() * math.exp(1.4)).sum() - 6  # of log N(x1 e^(−r)) − 2r
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)


def test_gradients_to_the_base():
    class Learned:
        def __init__(self):
            self.mean = torch.zeros(2, dtype=F64, requires_grad=True)

        def log_prob(self, x):
            return -0.5 * (x - self.mean).square().sum(1)

    base, x1 = Learned(), torch.randn(3, 2, dtype=F64)
    with torch.no_grad():
        x0 = fmk.log_prob(Linear(torch.eye(2)), x1, base).x0
    fmk.log_prob(Linear(torch.eye(2)), x1, base).log_prob.sum().backward()
    torch.testing.assert_close(base.mean.grad, x0.sum(0))


@pytest.mark.parametrize("times", [None, [0.9, 0.2]], ids=str)
@pytest.mark.parametrize("gradient", ["autograd", "recorded"])
def test_rows_that_fail_leave_no_nan_in_shared_gradients(gradient, times):
    class Breaking(Net):
        def forward(self, t, x):
            broken = (x[:, :1] > 5) & (t < 0.5).unsqueeze(1)
            return torch.where(broken, math.nan, super().forward(t, x))

    f = Breaking(2)
    x1 = torch.tensor([[1.0, 2.0], [9.0, 1.0], [math.nan, 0.0]], dtype=F64)
    grads = []
    for rows in (x1, x1[:1]):
        result = fmk.log_prob(f, rows, gradient=gradient, key=KEY, t_eval=times)
        assert result.status[1:].tolist() == [3, 3][: len(rows) - 1]
        done = result.status == 0
        grads.append(torch.autograd.grad(result.log_prob[done].sum(), list(f.parameters())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gradient", ["autograd", "recorded"])
def test_maximum_likelihood_training(gradient):
    torch.manual_seed(0)
    f = Net(2, width=32, dtype=torch.float32)
    data = torch.randn(64, 2) * torch.tensor([0.3, 1.5]) + torch.tensor([1.0, -1.0])
    optimiser = torch.optim.Adam(f.parameters(), 2e-2)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = -fmk.log_prob(f, data, method="rk4", steps=2, gradient=gradient).log_prob.mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    entropy = math.log(2 * math.pi * math.e) + math.log(0.3 * 1.5)
    assert losses[0] > entropy + 1.0 and losses[-1] < entropy + 0.3


def test_no_graph_without_gradients():
    f, x1 = Net(3), torch.randn(2, 3, dtype=F64)
    with torch.no_grad():
        for mode in ("forward", "reverse"):
            result = fmk.log_prob(f, x1, divergence=fmk.Hutchinson(mode=mode), t_eval=[0.5])
            for value in (result.log_prob, result.x0, result.stderr, result.x_t, result.log_prob_t):
                assert not value.requires_grad
    assert not fmk.log_prob(f, x1, divergence=fmk.Hutchinson(2)).stderr.requires_grad
    assert all(p.grad is None for p in f.parameters())
