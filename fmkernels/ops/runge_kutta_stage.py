"""A stage of an explicit Runge–Kutta step: where the vector field is evaluated next."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _checks, _registration

__all__ = ["runge_kutta_stage"]


def runge_kutta_stage(
    y: torch.Tensor,
    k: Sequence[torch.Tensor],
    times: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    step: int = 0,
    row: int = 0,
    nudge: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""y + h Σ_j a_j k_j and t₀ + c h with a step size for every sample, in one pass over memory.

    t₀ = times[step], t₁ = times[step + 1], h = t₁ − t₀ (of either sign); (c, a_1, …, a_m) = coefficients[row]. With c =
    1 the time is t₁ itself. h·a_j is formed in float64; the sum in float32, or float64 for float64 states; one rounding
    at the end.

    Args:
        y: the state ``[B, …]``, of any shape where h is shared; float32, float64, bfloat16 or float16.
        k: m values of the vector field, each with the shape and dtype of y.
        times: float64 ``[R]`` (one t₀, t₁ for all) or ``[R, B]``.
        coefficients: float64 ``[rows, 1 + m]``.
        step, row: indices into ``times`` and ``coefficients``.
        nudge: −1 rounds the time to the number before it, seen in the direction of h, +1 to the one after: the two
            sides of a discontinuity.

    Returns: the stage, with the shape and dtype of y, and its time, with the shape of ``times[0]``, in float32 (float64
    for float64 states). Differentiable in y, k and times, any number of times; ``nudge`` counts as constant.

    Raises: TypeError, ValueError naming the argument.

    Source: Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", II.1.
    """
    _checks.tensor("y", y)
    _checks.floating("y", y)
    for j, kj in enumerate(k):
        _checks.tensor(f"k[{j}]", kj)
        _checks.same_dtype(f"k[{j}]", kj, "y", y)
        _checks.same_shape(f"k[{j}]", kj, "y", y)
        _checks.same_device(f"k[{j}]", kj, "y", y)
    check_times("times", times, y)
    _checks.tensor("coefficients", coefficients)
    _checks.same_device("coefficients", coefficients, "y", y)
    if coefficients.dtype != torch.float64 or coefficients.dim() != 2 or coefficients.shape[1] != 1 + len(k):
        raise ValueError(
            f"coefficients: expected float64 of shape [rows, {1 + len(k)}], a node and a weight for each k, "
            f"got {coefficients.dtype} of shape {list(coefficients.shape)}"
        )
    _checks.count("step", step)
    _checks.count("row", row)
    if step + 1 >= times.shape[0]:
        raise ValueError(
            f"step: expected at most {times.shape[0] - 2}, times having {times.shape[0]} entries, got {step}"
        )
    if row >= coefficients.shape[0]:
        raise ValueError(f"row: expected below {coefficients.shape[0]}, the rows of coefficients, got {row}")
    if nudge not in (-1, 0, 1):
        raise ValueError(f"nudge: expected -1, 0 or 1, got {nudge!r}")
    return _registration.ops.runge_kutta_stage(y, list(k), times, step, coefficients, row, nudge)


def check_times(name: str, times, y: torch.Tensor) -> None:
    _checks.tensor(name, times)
    _checks.same_device(name, times, "y", y)
    rows = tuple(times.shape[1:])
    if times.dtype != torch.float64 or times.dim() not in (1, 2) or times.shape[0] < 2 or rows not in ((), y.shape[:1]):
        raise ValueError(
            f"{name}: expected float64 of shape [2 or more] or [2 or more, {y.shape[0] if y.dim() else 'B'}], "
            f"got {times.dtype} of shape {list(times.shape)}"
        )


SCHEMA = (
    "runge_kutta_stage(Tensor y, Tensor[] k, Tensor times, SymInt step, Tensor coefficients, int row, int nudge) "
    "-> (Tensor y, Tensor t)"
)


def state_time_dtype(y: torch.Tensor) -> torch.dtype:
    """The dtype of the times that go with a state, and of its arithmetic: never half precision."""
    return torch.float64 if y.dtype == torch.float64 else torch.float32


def rowwise(value: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A number, or one for each sample, shaped to multiply a state."""
    return value.reshape(value.shape + (1,) * (y.dim() - value.dim()))


def nudged(t: torch.Tensor, towards: torch.Tensor) -> torch.Tensor:
    """The next number from t in the direction of the sign of ``towards``, with the derivative of t."""
    plain = t.detach()
    return t + (torch.nextafter(plain, torch.copysign(torch.full_like(plain, torch.inf), towards.to(t.dtype))) - plain)


def stage_reference(y, k, times, step, coefficients, row, nudge):
    compute = state_time_dtype(y)
    t0, t1 = times[step], times[step + 1]
    h = t1 - t0
    node, *weights = coefficients[row].unbind()
    total = y.to(compute)
    for weight, k_j in zip(weights, k, strict=True):
        total = total + rowwise((h * weight).to(compute), y) * k_j.to(compute)
    t = torch.where(node == 1, t1, t0 + node * h).to(compute)
    if nudge:
        t = nudged(t, nudge * h.detach())
    return total.to(y.dtype).contiguous(), t.contiguous()


def stage_fake(y, k, times, step, coefficients, row, nudge):
    return y.new_empty(y.shape), times.new_empty(times.shape[1:], dtype=state_time_dtype(y))


class Stage(torch.autograd.Function):
    """The kernel with a gradient made of differentiable operations, so that it can be differentiated again."""

    @staticmethod
    def forward(ctx, step, coefficients, row, nudge, y, times, *k):
        with _registration.below_autograd():
            stage, t = _op(y, list(k), times, step, coefficients, row, nudge)
        ctx.save_for_backward(times, *(k if times.requires_grad else ()))
        ctx.arguments = step, coefficients, row
        ctx.mark_non_differentiable(*(() if times.requires_grad else (t,)))
        return stage, t

    @staticmethod
    def backward(ctx, gradient, gradient_t):
        times, *k = ctx.saved_tensors
        step, coefficients, row = ctx.arguments
        compute = state_time_dtype(gradient)
        gradient_y = gradient if ctx.needs_input_grad[4] else None
        h = times[step + 1] - times[step]
        weights = coefficients[row]
        wide = gradient.to(compute)
        gradient_k = [
            (rowwise((h * weights[j + 1]).to(compute), gradient) * wide).to(gradient.dtype) if needed else None
            for j, needed in enumerate(ctx.needs_input_grad[6:])
        ]
        gradient_times = None
        if ctx.needs_input_grad[5]:
            slope = sum((weights[j + 1] * k_j.to(torch.float64) for j, k_j in enumerate(k)), torch.zeros_like(h).sum())
            products = gradient.to(torch.float64) * slope
            by_h = products.sum(dim=tuple(range(h.dim(), products.dim()))) if products.dim() > h.dim() else products
            by_t = gradient_t.to(torch.float64)
            pair = torch.stack([(1 - weights[0]) * by_t - by_h, weights[0] * by_t + by_h])
            after = times.shape[0] - step - 2
            gradient_times = torch.cat([times.new_zeros(step, *h.shape), pair, times.new_zeros(after, *h.shape)])
        return None, None, None, None, gradient_y, gradient_times, *gradient_k


def stage_autograd(y, k, times, step, coefficients, row, nudge):
    if _registration.transforming():
        return stage_reference(y, k, times, step, coefficients, row, nudge)
    if _registration.requires_grad(y, times, *k):
        return Stage.apply(step, coefficients, row, nudge, y, times, *k)
    with _registration.below_autograd():
        return _op(y, k, times, step, coefficients, row, nudge)


_registration.define(SCHEMA, stage_reference, stage_fake)
_registration.autograd("runge_kutta_stage", stage_autograd)

_op = _registration.overload("runge_kutta_stage")
