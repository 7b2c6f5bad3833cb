"""A point of a conditional path and its velocity, in one pass, rounded as a program in plain PyTorch rounds them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _registration

__all__ = ["conditional_flow"]

FORMS = {"linear": 0, "target": 1, "bridge": 2, "trigonometric": 3, "affine": 4}
AFFINE = FORMS["affine"]  # the form without ε


def conditional_flow(
    x0: Tensor,
    x1: Tensor,
    noise: Tensor | None,
    coefficients: Tensor,
    form: str = "linear",
) -> tuple[Tensor, Tensor]:
    r"""x_t and u_t of a pair (x0, x1) with smoothing noise ε, from the coefficients (a, b, s, c) of its row.

    - ``"linear"``: x_t = (a·x1 + b·x0) + s·ε, u_t = x1 − x0;
    - ``"target"``: x_t = a·x1 + s·ε, u_t = (x1 − b·x_t)/c;
    - ``"bridge"``: μ = a·x1 + b·x0, x_t = μ + s·ε, u_t = (c·(x_t − μ) + x1) − x0;
    - ``"trigonometric"``: x_t = (a·x1 + b·x0) + s·ε, u_t = (π/2)·(b·x1 − a·x0);
    - ``"affine"``: x_t = a·x1 + b·x0, u_t = s·x1 + c·x0, without ε.

    On the CPU every operation is rounded as it stands: no multiplication is contracted with an addition, so that in
    float32 and float64 the results are those of the same formulas in PyTorch, to the bit.

    Args:
        x0, x1: ``[B, …]`` of one shape and dtype, float32, float64, bfloat16 or float16.
        noise: ε, likewise; None for ``"affine"``.
        coefficients: ``[B, 4]``, float32, for float64 data float64.
        form: which of the formulas.

    Returns: (x_t, u_t), contiguous, of x1's shape and dtype, computed in coefficients' dtype and rounded once.

    Gradients flow to x0, x1, noise and coefficients, by the reference formula.

    Raises: TypeError, ValueError naming the argument.

    Source: Tong et al., "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport"
    (2024), table 1; Albergo and Vanden-Eijnden, "Building Normalizing Flows with Stochastic Interpolants" (2023).
    """
    check(x0, x1, noise, coefficients, form)
    arguments = (x0, x1, noise, coefficients, FORMS[form])
    if _registration.eager() and not _registration.requires_grad(*arguments[:4]):
        with _registration.below_autograd():  # what the Autograd-key kernel would decide, without its cost
            return _op(*arguments)
    return _registration.ops.conditional_flow(*arguments)


def check(x0: Any, x1: Any, noise: Any, coefficients: Any, form: Any) -> None:
    _checks.choice("form", form, FORMS)
    _checks.tensor("x1", x1)
    _checks.floating("x1", x1)
    if x1.dim() == 0:
        raise ValueError("x1: expected at least one dimension, [B, …], got a scalar")
    if form == "affine":
        if noise is not None:
            raise TypeError(f"noise: expected None, form 'affine' has none, got {type(noise).__name__}")
        noise = x0
    for name, value in (("x0", x0), ("noise", noise)):
        _checks.tensor(name, value)
        _checks.same_dtype(name, value, "x1", x1)
        _checks.same_shape(name, value, "x1", x1)
        _checks.same_device(name, value, "x1", x1)
    _checks.tensor("coefficients", coefficients)
    compute = compute_dtype(x1)
    if coefficients.dtype != compute:
        expected, data, came = (str(dtype).removeprefix("torch.") for dtype in (compute, x1.dtype, coefficients.dtype))
        raise TypeError(f"coefficients: expected dtype {expected} for x1 of {data}, got {came}")
    if coefficients.shape != (x1.shape[0], 4):
        raise ValueError(f"coefficients: expected shape [{x1.shape[0]}, 4], got {list(coefficients.shape)}")
    _checks.same_device("coefficients", coefficients, "x1", x1)


SCHEMA = "conditional_flow(Tensor x0, Tensor x1, Tensor? noise, Tensor coefficients, int form) -> (Tensor, Tensor)"


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def conditional_flow_reference(
    x0: Tensor, x1: Tensor, noise: Tensor | None, coefficients: Tensor, form: int
) -> tuple[Tensor, Tensor]:
    dtype, compute = x1.dtype, coefficients.dtype
    a, b, s, c = (v.reshape(-1, *(1,) * (x1.dim() - 1)) for v in coefficients.unbind(-1))
    x0, x1 = x0.to(compute), x1.to(compute)
    mean = a * x1 if form == FORMS["target"] else a * x1 + b * x0
    x_t = mean if noise is None else mean + s * noise.to(compute)
    if form == FORMS["linear"]:
        u_t = x1 - x0
    elif form == FORMS["target"]:
        u_t = (x1 - b * x_t) / c
    elif form == FORMS["bridge"]:
        u_t = c * (x_t - mean) + x1 - x0
    elif form == FORMS["trigonometric"]:
        u_t = math.pi / 2 * (b * x1 - a * x0)
    else:
        u_t = s * x1 + c * x0
    return x_t.to(dtype).contiguous(), u_t.to(dtype).contiguous()


def conditional_flow_fake(
    x0: Tensor, x1: Tensor, noise: Tensor | None, coefficients: Tensor, form: int
) -> tuple[Tensor, Tensor]:
    return x1.new_empty(x1.shape), x1.new_empty(x1.shape)


def conditional_flow_autograd(
    x0: Tensor, x1: Tensor, noise: Tensor | None, coefficients: Tensor, form: int
) -> tuple[Tensor, Tensor]:
    arguments = (x0, x1, noise, coefficients, form)
    if _registration.transforming() or _registration.requires_grad(*arguments[:4]):
        return conditional_flow_reference(*arguments)
    with _registration.below_autograd():
        return _registration.ops.conditional_flow(*arguments)


_registration.define(SCHEMA, conditional_flow_reference, conditional_flow_fake)
_registration.autograd("conditional_flow", conditional_flow_autograd)

_op = _registration.overload("conditional_flow")
