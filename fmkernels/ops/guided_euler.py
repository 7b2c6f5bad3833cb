"""The guided Euler step: x + h·v with v guided from two velocities, in one pass over memory."""

from __future__ import annotations

import math

import torch

from .. import _checks, _registration

__all__ = ["guided_euler"]


def guided_euler(
    x: torch.Tensor,
    conditional: torch.Tensor,
    unconditional: torch.Tensor,
    h: float | torch.Tensor,
    scale: float | torch.Tensor,
    rescale: float = 0.0,
) -> torch.Tensor:
    r"""x + h·v with v = v_u + w·(v_c − v_u): an Euler step under classifier-free guidance, one launch.

    With ``rescale`` φ > 0 the spread of each row of v is drawn back to that of v_c, in two launches:
    v ← φ·v·std(v_c)/std(v) + (1 − φ)·v. std is taken over all dimensions but the first; it is the unbiased one of
    torch.std, as in the usual code, and its n − 1 cancels in the ratio. Where std(v) is 0, v stays as it is.

    Args:
        x: state ``[B, …]``, float32, float64, bfloat16 or float16.
        conditional, unconditional: velocities v_c and v_u of x's shape, both of one dtype, which may differ from x's.
        h: step, a number or a float32 or float64 tensor of shape ``[]`` or ``[B]``; negative to go back in time.
        scale: guidance w, likewise; 0 gives exactly v_u and 1 exactly v_c.
        rescale: φ in [0, 1]; above 0 it needs at least two elements a row.

    Returns: a new contiguous tensor of x's shape and dtype, computed in float32 (float64 where a tensor with elements
    is) and rounded once. On the CPU no multiplication is contracted with an addition: with the same velocity twice and
    scale 1 the result is that of x + h·v in PyTorch, in float32 and float64 to the bit.

    Gradients flow to x, both velocities, h and scale, by the reference formula.

    Raises: TypeError, ValueError naming the argument.

    Source: Ho and Salimans, "Classifier-free diffusion guidance" (2022); Lin et al., "Common diffusion noise schedules
    and sample steps are flawed" (2023), section 3.4.
    """
    check(x, conditional, unconditional)
    step, h_value = _coefficient("h", h, x)
    guidance, scale_value = _coefficient("scale", scale, x)
    if type(rescale) is not float or rescale != 0.0:
        rescale = _checks.number("rescale", rescale, 0.0, 1.0)
        if rescale and math.prod(x.shape[1:]) < 2:
            raise ValueError(
                f"rescale: expected at least 2 elements a row of x, whose std it takes, got shape {list(x.shape)}"
            )
    arguments = (x, conditional, unconditional, step, guidance, h_value, scale_value, rescale)
    if _registration.eager() and not _registration.requires_grad(*arguments[:5]):
        with _registration.below_autograd():  # what the Autograd-key kernel would decide, without its cost
            return _op(*arguments)
    return _registration.ops.guided_euler(*arguments)


def check(x, conditional, unconditional) -> None:
    if (
        isinstance(x, torch.Tensor)
        and isinstance(conditional, torch.Tensor)
        and isinstance(unconditional, torch.Tensor)
        and x.dtype in _checks.FLOATING
        and (dtype := conditional.dtype) in _checks.FLOATING
        and unconditional.dtype == dtype
        and (shape := x.shape) == conditional.shape
        and shape == unconditional.shape
        and (device := x.device) == conditional.device
        and device == unconditional.device
    ):
        return  # in one step where all is well: this stands before every launch
    _checks.tensor("x", x)
    _checks.floating("x", x)
    for name, value in (("conditional", conditional), ("unconditional", unconditional)):
        _checks.tensor(name, value)
        _checks.floating(name, value)
        _checks.same_shape(name, value, "x", x)
        _checks.same_device(name, value, "x", x)
    _checks.same_dtype("unconditional", unconditional, "conditional", conditional)


def _coefficient(name: str, value, x: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """A coefficient as the op takes it: a tensor and 0, or None and a number, which spares making a tensor of it."""
    if not isinstance(value, torch.Tensor):
        if torch.compiler.is_compiling() and isinstance(value, (int, float)) and not isinstance(value, bool):
            # A number in a schema is a constant of the graph, compiled anew for each step size; a sum with one is not.
            return torch.zeros((), dtype=torch.float64, device=x.device) + value, 0.0
        return None, _checks.number(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: expected a number, or a tensor of dtype float32 or float64, "
            f"got {str(value.dtype).removeprefix('torch.')}"
        )
    if value.dim() and value.shape != x.shape[:1]:
        raise ValueError(f"{name}: expected shape [] or {list(x.shape[:1])}, one a row of x, got {list(value.shape)}")
    _checks.same_device(name, value, "x", x)
    return value, 0.0


# A coefficient is a tensor or, where that is None, a number: half of a small step's cost would be making tensors.
SCHEMA = (
    "guided_euler(Tensor x, Tensor conditional, Tensor unconditional, Tensor? h, Tensor? scale, float h_value, "
    "float scale_value, float rescale) -> Tensor"
)


def compute_dtype(x: torch.Tensor, velocity: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, velocity.dtype) else torch.float32


def guided_euler_reference(x, conditional, unconditional, h, scale, h_value, scale_value, rescale):
    compute = compute_dtype(x, conditional)

    def rowwise(coefficient, value):
        if coefficient is None:
            return value
        return coefficient.to(compute).reshape(coefficient.shape + (1,) * (x.dim() - coefficient.dim()))

    c, u = conditional.to(compute), unconditional.to(compute)
    v = torch.lerp(u, c, rowwise(scale, scale_value))  # u + w·(c − u), from c's side where w ≥ ½
    if rescale and x.numel():  # torch.std warns of an empty batch
        v = v * rescale_factor(rescale, c, v)
    return (x.to(compute) + rowwise(h, h_value) * v).to(x.dtype).contiguous()


def rescale_factor(phi: float, c: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """φ·std(c)/std(v) + 1 − φ of each row; 1 where v is constant."""
    std_c, std_v = (value.std(dim=tuple(range(1, value.dim())), keepdim=True) for value in (c, v))
    constant = std_v == 0
    return torch.where(constant, 1.0, phi * std_c / std_v.masked_fill(constant, 1.0) + (1.0 - phi))


def guided_euler_fake(x, *arguments):
    return x.new_empty(x.shape)


def guided_euler_autograd(x, conditional, unconditional, h, scale, *rest):
    arguments = (x, conditional, unconditional, h, scale, *rest)
    if _registration.transforming() or _registration.requires_grad(*arguments[:5]):
        return guided_euler_reference(*arguments)
    with _registration.below_autograd():
        return _registration.ops.guided_euler(*arguments)


_registration.define(SCHEMA, guided_euler_reference, guided_euler_fake)
_registration.autograd("guided_euler", guided_euler_autograd)

_op = _registration.overload("guided_euler")
