"""Forward mode, and torch.func, through `solve`, `odeint` and `log_prob`: never silently without a tangent."""

from __future__ import annotations

import pytest
import torch
from solving import F64, one_thread
from torch.autograd import forward_ad

from fmkernels import Exact, Hutchinson, MarginalField, log_prob, odeint, odeint_adjoint, solve
from fmkernels.schedules import CondOT
from fmkernels.solvers import _plan

__all__ = ["one_thread"]  # a fixture

METHODS = [{"method": m} for m in ("dopri5", "tsit5", "dopri8", "bosh3")]
METHODS += [{"method": "rk4", "steps": 4}, {"method": "midpoint", "step_size": 0.3}, {"method": "euler", "steps": 3}]
each_method = pytest.mark.parametrize("options", METHODS, ids=lambda options: options["method"])


def field(theta):
    return lambda t, y: torch.sin(theta * y) * (1 + t * t).reshape(-1, 1) + y.flip(-1)


THETA = torch.tensor([0.8, -0.4], dtype=F64)
Y0 = torch.tensor([[0.3, -0.5], [1.0, 0.7], [-0.2, 0.1]], dtype=F64)
T0, T1 = torch.tensor([0.1, 0.9, 0.0], dtype=F64), torch.tensor([0.63, 0.2, 1.0], dtype=F64)
TIMES = torch.tensor([0.0, 0.21, 0.5, 1.0], dtype=F64)


def dual(call, inputs, tangents):
    with forward_ad.dual_level():
        out = call(*(forward_ad.make_dual(x, v) for x, v in zip(inputs, tangents)))
        return forward_ad.unpack_dual(out).tangent


WAYS = {
    "dual numbers": dual,
    "dual numbers, no_grad": torch.no_grad()(dual),
    "jvp": lambda call, inputs, tangents: torch.func.jvp(call, inputs, tangents)[1],
}
each_way = pytest.mark.parametrize("way", WAYS)


def check(call, inputs, way):
    """The tangent is that of the Jacobian which backward() gives, of each input alone and of all together."""
    tangents = tuple(torch.randn_like(x) for x in inputs)
    jacobians = torch.autograd.functional.jacobian(call, inputs)
    each = [torch.tensordot(j, v, v.dim()) for j, v in zip(jacobians, tangents)]
    assert all(one.abs().max() > 1e-3 for one in each)
    torch.testing.assert_close(WAYS[way](call, inputs, tangents), sum(each), rtol=1e-9, atol=1e-12)
    for i, one in enumerate(each):

        def of_one(x, i=i):
            return call(*inputs[:i], x, *inputs[i + 1 :])

        found = WAYS[way](of_one, inputs[i : i + 1], tangents[i : i + 1])
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-12)


@each_way
@each_method
def test_the_end(options, way):
    def end(y0, t0, t1, theta):
        return solve(field(theta), y0, (t0, t1), **options).y

    check(end, (Y0, T0, T1, THETA), way)


@each_way
@each_method
def test_outputs(options, way):
    def outputs(y0, t_eval, theta):
        return solve(field(theta), y0, t_eval=t_eval, **options).y

    check(outputs, (Y0, torch.tensor([0.2, 0.45, 0.9], dtype=F64), THETA), way)


KINDS = [("dopri5", None), ("bosh3", None)]
KINDS += [(method, interp) for method in ("rk4", "midpoint", "euler") for interp in ("linear", "cubic")]


@each_way
@pytest.mark.parametrize(("method", "interp"), KINDS)
def test_odeint(method, interp, way):
    options = None if interp is None else {"step_size": 0.11, "interp": interp}

    def states(y0, t, theta):
        return odeint(field(theta), y0, t, method=method, options=options)[1:]

    check(states, (Y0, TIMES, THETA), way)


@each_method
def test_gradients_within_torch_func(options):
    def end(y0):
        return solve(field(THETA), y0, **options).y.square().sum()

    y0 = Y0.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(end)(Y0), torch.autograd.grad(end(y0), y0)[0])


def test_vmap():
    batch = torch.stack([Y0, 2 * Y0])

    def fixed(y0):
        return solve(field(THETA), y0, method="rk4", steps=5).y

    torch.testing.assert_close(torch.func.vmap(fixed)(batch), torch.stack([fixed(y0) for y0 in batch]))
    for call in (lambda y0: solve(field(THETA), y0).y, lambda y0: odeint(field(THETA), y0, TIMES)):
        with pytest.raises(RuntimeError, match="method: expected one of fixed steps under torch.vmap, got .*'dopri5'"):
            torch.func.vmap(call)(batch)
        scaled = torch.func.vmap(lambda p: p * call(Y0))(torch.ones(2))  # noqa: B023 (nothing mapped enters it)
        torch.testing.assert_close(scaled[1], call(Y0))
        jacobian = torch.autograd.functional.jacobian(call, Y0)
        torch.testing.assert_close(torch.func.jacfwd(call)(Y0), jacobian)
        torch.testing.assert_close(torch.func.jacrev(call)(Y0), jacobian)


@pytest.mark.parametrize("gradient", ["recorded", "adjoint"])
def test_gradients_that_forward_mode_does_not_know(gradient):
    def end(y0):
        return solve(field(THETA), y0, gradient=gradient, parameters=()).y

    for way in WAYS.values():
        with pytest.raises(ValueError, match=f"gradient: expected 'autograd' in forward mode.*got '{gradient}'"):
            way(end, (Y0,), (Y0,))


@pytest.mark.parametrize("first", ["inference mode", "jvp"])
@pytest.mark.parametrize("method", ["dopri5", "midpoint"])
def test_what_is_kept_of_a_method_outlives_its_first_solve(first, method):
    def end(y0, t=(0.0, 1.0)):
        return solve(field(THETA), y0, t, method=method, steps=3 if method == "midpoint" else None).y

    def states(t):
        return odeint(field(THETA), Y0, t, method=method)

    for call in (lambda: end(Y0), lambda: states(TIMES)):
        _plan.plan.cache_clear()
        if first == "jvp":
            torch.func.jvp(lambda _, call=call: call(), (Y0,), (Y0,))
        else:
            with torch.inference_mode():
                call()
        t = TIMES.clone().requires_grad_()
        y0 = Y0.clone().requires_grad_()
        assert torch.autograd.grad(states(t).sum(), t)[0].abs().sum() > 0
        assert torch.autograd.grad(end(y0, t[[0, -1]]).sum(), (y0, t))[0].abs().sum() > 0


def test_what_forward_mode_does_not_reach_says_so():
    for way in WAYS.values():
        with pytest.raises(ValueError, match="event_fn: expected None in forward mode"):
            way(lambda y0: odeint(field(THETA), y0, TIMES[:2], event_fn=lambda t, y: t - 0.5)[0], (Y0,), (Y0,))
        with pytest.raises(ValueError, match="func: expected odeint in forward mode"):
            way(lambda s: odeint_adjoint(field(s), Y0, TIMES, adjoint_params=(s,)), (THETA,), (THETA,))
        with pytest.raises(ValueError, match="dense: expected a solve without gradients .*got a transform"):
            way(lambda y0: solve(field(THETA), y0, dense=True).y, (Y0,), (Y0,))


ESTIMATORS = [Exact, lambda mode: Hutchinson(2, mode=mode)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["exact", "hutchinson"])
def test_log_prob(estimator):
    key = torch.tensor([3])

    def density(mode):
        return lambda x: log_prob(field(THETA), x, divergence=estimator(mode=mode), key=key).log_prob

    x = Y0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(density("forward")(x).sum(), x)
    tangent = torch.randn_like(Y0)
    for mode in ("forward", "auto"):
        found = torch.func.jvp(density(mode), (Y0,), (tangent,))[1]
        torch.testing.assert_close(found, (gradient * tangent).sum(1))
        torch.testing.assert_close(torch.func.grad(lambda x: density(mode)(x).sum())(Y0), gradient)  # noqa: B023

    def of_theta(theta):
        return log_prob(field(theta), Y0, divergence=estimator(mode="auto"), key=key).log_prob.sum()

    theta = THETA.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(of_theta)(THETA), torch.autograd.grad(of_theta(theta), theta)[0])

    def fixed(x):
        reverse = estimator(mode="reverse")
        return log_prob(field(THETA), x, divergence=reverse, key=key, method="rk4", steps=4).log_prob.sum()

    torch.testing.assert_close(torch.func.grad(fixed)(Y0), torch.autograd.grad(fixed(x), x)[0])
    for way in WAYS.values():
        with pytest.raises(RuntimeError, match="divergence: expected mode='forward' within torch.func"):
            way(density("reverse"), (Y0,), (tangent,))


@each_way
def test_log_prob_of_a_field_that_knows_its_divergence(way):
    exact = MarginalField(Y0, CondOT(0.3))
    x = (Y0 + 0.1).requires_grad_()
    tangent = torch.randn_like(x)

    def density(x):
        return log_prob(exact, x, divergence=Exact()).log_prob

    (gradient,) = torch.autograd.grad(density(x).sum(), x)
    found = WAYS[way](density, (x.detach(),), (tangent,))
    torch.testing.assert_close(found, (gradient * tangent).sum(1))
