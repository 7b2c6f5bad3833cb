"""Base distributions p0 of a flow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import _checks

__all__ = ["Normal", "StandardNormal"]


class Normal:
    r"""Isotropic normal distribution N(0, s²I).

    ``log_prob(x)`` is −‖x‖²/(2s²) − (D/2)·ln(2πs²) with D the number of elements in a row; x ``[B, …]`` of any
    floating dtype gives ``[B]``, in float32 (float64 for float64 input).

    Args:
        scale: the standard deviation s, finite and positive.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = _checks.number("scale", scale, 0.0, open_low=True)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        _checks.tensor("x", x)
        _checks.floating("x", x)
        if x.dim() == 0:
            raise ValueError("x: expected at least one dimension, [B, …], got a scalar")
        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        dims = math.prod(x.shape[1:])
        square = x.square().sum(dim=tuple(range(1, x.dim()))) if x.dim() > 1 else x.square()
        return -0.5 * square / self.scale**2 - 0.5 * dims * math.log(2 * math.pi * self.scale**2)

    def sample(
        self,
        shape: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Draw a tensor of the given shape by torch's generator."""
        return torch.randn(shape, device=device, dtype=dtype, generator=generator) * self.scale

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Normal) and self.scale == other.scale

    def __hash__(self) -> int:
        return hash((Normal, self.scale))

    def __repr__(self) -> str:
        return f"Normal(scale={self.scale:g})"


class StandardNormal(Normal):
    """The standard normal distribution N(0, I)."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def __repr__(self) -> str:
        return "StandardNormal()"
