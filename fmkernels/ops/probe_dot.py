"""The inner products of probes with given vectors, in one pass: the probes are drawn again instead of read."""

from __future__ import annotations

import math

import torch

from .. import _checks, _registration
from .probe import PROBES, check

__all__ = ["probe_dot"]


def probe_dot(
    key: torch.Tensor,
    values: torch.Tensor,
    *,
    distribution: str = "rademacher",
    first_probe: int = 0,
    first_row: int = 0,
) -> torch.Tensor:
    r"""Σ_j z_ij·values_ij of every probe and row, z the probes that :func:`~fmkernels.ops.probe` gives.

    With values = J z or Jᵀz this is Hutchinson's estimate of tr J, a number a probe and row. Only ``values`` are read.

    Args:
        key: int64 ``[1]`` on the values' device, see :func:`~fmkernels.key`.
        values: ``[probes, rows, …]``, float32, float64, bfloat16 or float16, of any strides.
        distribution, first_probe, first_row: see :func:`~fmkernels.ops.probe`, as which z is drawn, in values' dtype.

    Returns: ``[probes, rows]``, float32 (float64 for float64 values), summed in that precision.

    Gradients flow to values: ∂/∂values = z times the incoming gradient, differentiable again; under transforms
    (vmap, jvp) and derivatives of any order too.

    Raises: TypeError, ValueError naming the argument.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990).
    """
    _checks.key("key", key)
    _checks.tensor("values", values)
    _checks.floating("values", values)
    if values.dim() < 2:
        raise ValueError(f"values: expected shape [probes, rows, ...], got {list(values.shape)}")
    _checks.same_device("key", key, "values", values)
    check(distribution, values.shape[0], first_probe, first_row, math.prod(values.shape[2:]))
    arguments = (key, values, PROBES[distribution], first_probe, first_row)
    if _registration.eager() and not _registration.requires_grad(values):
        with _registration.below_autograd():  # what the Autograd-key kernel would decide, without its cost
            return _op(*arguments)
    return _registration.ops.probe_dot(*arguments)


SCHEMA = "probe_dot(Tensor key, Tensor values, int distribution, SymInt first_probe, SymInt first_row) -> Tensor"


def compute_dtype(values: torch.Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def drawn(key, shape, distribution, first_probe, first_row, dtype) -> torch.Tensor:
    """The probes [probes, rows, …] of values of that shape and dtype."""
    probes, rows, *trailing = shape
    return _registration.ops.probe(
        key, rows, math.prod(trailing), distribution, probes, first_probe, first_row, dtype
    ).reshape(shape)


def probe_dot_reference(key, values, distribution, first_probe, first_row):
    compute = compute_dtype(values)
    z = drawn(key, values.shape, distribution, first_probe, first_row, values.dtype)
    return (z.to(compute) * values.to(compute)).flatten(2).sum(2) if values.dim() > 2 else z.to(compute) * values


def probe_dot_fake(key, values, distribution, first_probe, first_row):
    return values.new_empty(values.shape[:2], dtype=compute_dtype(values))


class ProbeDot(torch.autograd.Function):
    """The backward draws the probes a third time: nothing of the data's size is kept for it."""

    @staticmethod
    def forward(ctx, values, key, *rest):
        ctx.save_for_backward(key)
        ctx.shape, ctx.dtype, ctx.rest = values.shape, values.dtype, rest
        with _registration.below_autograd():
            return _op(key, values, *rest)

    @staticmethod
    def backward(ctx, gradient):
        (key,) = ctx.saved_tensors
        z = drawn(key, ctx.shape, *ctx.rest, ctx.dtype)
        scaled = z.to(gradient.dtype) * gradient.reshape(gradient.shape + (1,) * (z.dim() - 2))
        return (scaled.to(ctx.dtype), None) + (None,) * len(ctx.rest)


def probe_dot_autograd(key, values, *rest):
    if _registration.transforming():
        return probe_dot_reference(key, values, *rest)
    if _registration.requires_grad(values):
        return ProbeDot.apply(values, key, *rest)
    with _registration.below_autograd():
        return _registration.ops.probe_dot(key, values, *rest)


_registration.define(SCHEMA, probe_dot_reference, probe_dot_fake)
_registration.autograd("probe_dot", probe_dot_autograd)

_op = _registration.overload("probe_dot")
