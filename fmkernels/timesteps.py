r"""Timestep samplers: the distribution of t during training.

Every sampler is an inverse distribution function of one uniform number u per row, evaluated in float64:
t = F⁻¹(u), then shifted to t/(s − (s − 1)t). Time runs from noise (0) to data (1); libraries with noise at t = 1 mirror
every sampler. With ``stratified=True`` row i of N uses u = (π(i) + u_i)/N, where π is a permutation of the N rows keyed
by the seed: every stratum holds exactly one time, whatever the batch is split into.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from . import _checks

__all__ = ["Beta", "CosMap", "LogitNormal", "Mode", "TimestepSampler", "Uniform"]


class TimestepSampler:
    """Base class of the samplers. A subclass implements ``_inverse_cdf(u)``; its times are drawn in torch.

    Args:
        shift: s > 0; s > 1 moves times towards noise, as resolution-dependent shifting does.
        stratified: one time in each of N equal strata of the distribution.
    """

    code: int = -1  # of the kernels' own samplers, 0 and up
    _parameters_: tuple[str, ...] = ()

    def __init__(self, *, shift: float = 1.0, stratified: bool = False) -> None:
        self.shift = _checks.number("shift", shift, 0.0, open_low=True)
        if not isinstance(stratified, bool):
            raise TypeError(f"stratified: expected a bool, got {type(stratified).__name__}")
        self.stratified = stratified

    @property
    def parameters_(self) -> tuple[float, float]:
        """The two numbers that kernels are given, in the order of ``csrc/math/timestep.h``."""
        first, second = (getattr(self, name) if name else 0.0 for name in (*self._parameters_, "", "")[:2])
        return first, second

    def inverse_cdf(self, u: torch.Tensor) -> torch.Tensor:
        """t = F⁻¹(u), shifted; u in (0, 1), float64 (float32 is accepted and less exact)."""
        t = self._inverse_cdf(u)
        return t / (self.shift - (self.shift - 1) * t)

    def _inverse_cdf(self, u: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must implement _inverse_cdf(u)")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), tuple(vars(self).values())))

    def __repr__(self) -> str:
        arguments = [f"{name}={getattr(self, name):g}" for name in self._parameters_ if name]
        if self.shift != 1:
            arguments.append(f"shift={self.shift:g}")
        if self.stratified:
            arguments.append("stratified=True")
        return f"{type(self).__name__}({', '.join(arguments)})"


class Uniform(TimestepSampler):
    """Uniform on [lo, hi]: t = lo + (hi − lo)·u."""

    code = 0
    _parameters_ = ("lo", "hi")

    def __init__(self, lo: float = 0.0, hi: float = 1.0, **options: Any) -> None:
        self.lo = _checks.number("lo", lo, 0.0, 1.0)
        self.hi = _checks.number("hi", hi, self.lo, 1.0)
        super().__init__(**options)

    def _inverse_cdf(self, u: torch.Tensor) -> torch.Tensor:
        return self.lo + (self.hi - self.lo) * u


class LogitNormal(TimestepSampler):
    """t = sigmoid(mean + std·Φ⁻¹(u)). A positive mean favours data; Stable Diffusion 3 mirrors the sign.

    Source: Esser et al., "Scaling Rectified Flow Transformers" (2024), section 3.1.
    """

    code = 1
    _parameters_ = ("mean", "std")

    def __init__(self, mean: float = 0.0, std: float = 1.0, **options: Any) -> None:
        self.mean = _checks.number("mean", mean)
        self.std = _checks.number("std", std, 0.0, open_low=True)
        super().__init__(**options)

    def _inverse_cdf(self, u: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class Mode(TimestepSampler):
    """t = u − scale·(sin²(πu/2) − u): more weight at the middle for scale > 0; −1 ≤ scale ≤ 2/(π − 2).

    Source: Esser et al. (2024), section 3.1, mirrored.
    """

    code = 2
    _parameters_ = ("scale",)

    def __init__(self, scale: float = 1.29, **options: Any) -> None:
        limit = 2 / (math.pi - 2)
        if isinstance(scale, float) and limit < scale < limit + 1e-12:
            scale = limit
        self.scale = _checks.number("scale", scale, -1.0, limit)
        super().__init__(**options)

    def _inverse_cdf(self, u: torch.Tensor) -> torch.Tensor:
        return u - self.scale * (torch.sin(math.pi / 2 * u).square() - u)


class CosMap(TimestepSampler):
    """t = sin(πu/2)/(sin(πu/2) + cos(πu/2)): the density 2/(π(1 − 2t + 2t²)).

    Source: Esser et al. (2024), section 3.1.
    """

    code = 3

    def _inverse_cdf(self, u: torch.Tensor) -> torch.Tensor:
        sine = torch.sin(math.pi / 2 * u)
        return sine / (sine + torch.cos(math.pi / 2 * u))


class Beta(TimestepSampler):
    """t = scale·(1 − u^(1/a)): Beta(1, a), more weight at noise for a > 1; π0's sampler is ``Beta(1.5, scale=0.999)``.

    Source: Black et al., "π0: A Vision-Language-Action Flow Model" (2024), mirrored.
    """

    code = 4
    _parameters_ = ("scale", "a")

    def __init__(self, a: float = 1.5, scale: float = 1.0, **options: Any) -> None:
        self.a = _checks.number("a", a, 0.0, open_low=True)
        self.scale = _checks.number("scale", scale, 0.0, 1.0, open_low=True)
        super().__init__(**options)

    def _inverse_cdf(self, u: torch.Tensor) -> torch.Tensor:
        return -self.scale * torch.expm1(torch.log(u) / self.a)
