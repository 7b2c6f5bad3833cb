"""Derivatives of every differentiable op in :mod:`contract`, by autograd, forward mode and functorch transforms."""

import pytest
import torch
from contract import FORWARD, OPS, cases, forward_oracle, loss_call
from contract_op import INTERPRETED, eps, rows_of
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fmkernels as fmk
from fmkernels import _registration
from fmkernels.ops.matching_loss import gradient_factor

CPU = torch.device("cpu")
FUNCTIONS = [(op, f.name) for op in OPS for f in op.functions(CPU)][:: 8 if INTERPRETED else 1]
each_function = pytest.mark.parametrize(("op", "name"), FUNCTIONS, ids=[f"{op.name}-{name}" for op, name in FUNCTIONS])


def function_of(op, name, device):
    """The function and fresh leaves that require grad."""
    (found,) = [f for f in op.functions(device) if f.name == name]
    return found.call, tuple(value.detach().clone().requires_grad_() for value in found.inputs)


def scalar(call):
    """A function's outputs summed with fixed weights, so that no derivative cancels by symmetry."""

    def weighted(*inputs):
        outputs = call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((output * ramp(output)).sum() for output in outputs)

    def ramp(like):
        return torch.linspace(0.5, 1.5, like.numel(), dtype=like.dtype, device=like.device).reshape(like.shape)

    return weighted


@each_function
def test_gradients(op, name, device):
    """Reverse and forward mode, and both batched, against finite differences."""
    call, inputs = function_of(op, name, device)
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(call, inputs, atol=1e-6, **modes)


@each_function
def test_second_gradients(op, name, device):
    call, inputs = function_of(op, name, device)
    assert gradgradcheck(call, inputs, atol=1e-5, check_fwd_over_rev=True)


@each_function
def test_transforms_agree_with_autograd(op, name, device):
    """Forward-mode tangents are the true ones, not silently zero; grad, jacrev, jacfwd, vmap and hessian too."""
    call, inputs = function_of(op, name, device)
    call = scalar(call)
    indices = tuple(range(len(inputs)))
    plain = tuple(value.detach() for value in inputs)
    tangents = tuple(torch.randn_like(value) for value in plain)
    gradients = torch.autograd.grad(call(*inputs), inputs, create_graph=True)
    slope = sum((g * v).sum() for g, v in zip(gradients, tangents))
    assert slope.abs() > 1e-3  # a zero tangent would not go unnoticed
    close = torch.testing.assert_close

    close(torch.func.jvp(call, plain, tangents)[1], slope)
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, plain, tangents)
        close(forward_ad.unpack_dual(call(*duals)).tangent, slope)
    close(torch.func.grad(call, indices)(*plain), gradients)
    close(torch.func.vjp(call, *plain)[1](torch.ones_like(slope)), gradients)
    close(torch.func.jacrev(call, indices)(*plain), gradients)
    close(torch.func.jacfwd(call, indices)(*plain), gradients)
    stacked = tuple(torch.stack([value, 0.9 * value]) for value in plain)
    batched = torch.vmap(torch.func.grad(call, indices))(*stacked)
    for i, (pair, gradient) in enumerate(zip(batched, gradients)):
        close(pair[0], gradient)
        close(pair[1], torch.func.grad(call, i)(*(0.9 * value for value in plain)))

    products = [torch.zeros_like(value) for value in plain]  # unless the function is linear
    if slope.requires_grad:
        products = torch.autograd.grad(slope, inputs, allow_unused=True, materialize_grads=True)
    blocks = torch.func.hessian(call, indices)(*plain)
    for row, product in zip(blocks, products):
        rows = [torch.tensordot(block, v, v.dim()) for block, v in zip(row, tangents)]
        close(sum(rows), product)


FORWARD_CASES = [pytest.param(labels, id=name) for op, labels, name in cases() if op is FORWARD]


@pytest.mark.parametrize("labels", FORWARD_CASES)
def test_fused_gradient_equals_autograd_of_the_reference(labels, device):
    """In every dtype: the gradient that backward() leaves, within twice the error of the reference's."""
    levels = FORWARD.levels(labels, gradient=True)
    loss = loss_call(levels, device)()
    (prediction,) = [v for v in loss.grad_fn.saved_tensors if v is not None and v.requires_grad]
    scale = torch.rand(loss.shape, dtype=loss.dtype, device=device) + 0.5
    (fused,) = torch.autograd.grad(loss, prediction, scale)

    arguments = FORWARD.make(levels, device)
    leaf = arguments[0].detach().clone().requires_grad_()
    reference = _registration.references["matching_loss"](leaf, *arguments[1:-1])
    (expected,) = torch.autograd.grad(reference, leaf, scale)

    _, stored, divisor = forward_oracle(arguments, (loss.detach(), None, None))
    factor = scale.double() / (1.0 if divisor is None else divisor.value)
    dtype = prediction.dtype
    factor = rows_of(factor * gradient_factor(arguments[0], arguments[4], arguments[6], arguments[-2]), fused.dim())
    exact, slack = stored.value * factor, stored.slack * factor
    tiny = torch.finfo(dtype).smallest_normal * eps(dtype)
    # Two roundings to the prediction's dtype: of the stored gradient and of the scaled one.
    allowed = 2 * (expected.double() - exact).abs() + 2 * eps(dtype) * exact.abs() + 2 * slack + tiny
    assert fused.dtype == dtype and fused.shape == prediction.shape
    assert ((fused.double() - exact).abs() <= allowed).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(7,), (5, 2), (5, 3), (4, 101), (3, 5000)], ids=str)
@pytest.mark.parametrize("noise", ["store", "recompute"])
def test_the_plain_loss_and_its_gradient(noise, shape, device):
    """The commonest head, which kernels treat apart, against its closed form: no mask, weight or bridge."""
    if INTERPRETED and shape[-1] == 5000:
        shape = (3, 600)
    x1, prediction = torch.randn(shape, device=device), torch.randn(shape, device=device, requires_grad=True)
    fm, key = fmk.FlowMatching(noise=noise), torch.tensor([11], device=device)
    x0 = fmk.FlowMatching(noise="store").sample(x1, key=key).x0
    loss = fm.loss(prediction, fm.sample(x1, key=key))
    loss.backward()
    residual = prediction.detach() - (x1 - x0)
    torch.testing.assert_close(loss.detach(), residual.square().mean())
    torch.testing.assert_close(prediction.grad, 2 * residual / residual.numel())
