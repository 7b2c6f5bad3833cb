"""The schedulers of flow_matching: α and σ of t with their derivatives, in plain PyTorch, rounded as there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = [
    "CondOTScheduler",
    "ConvexScheduler",
    "CosineScheduler",
    "LinearVPScheduler",
    "PolynomialConvexScheduler",
    "Scheduler",
    "SchedulerOutput",
    "VPScheduler",
]


@dataclass
class SchedulerOutput:
    """α, σ and their derivatives at t, each of t's shape."""

    alpha_t: Tensor = field(metadata={"help": "α at t, the weight of the target x_1"})
    sigma_t: Tensor = field(metadata={"help": "σ at t, the weight of the source x_0"})
    d_alpha_t: Tensor = field(metadata={"help": "dα/dt at t"})
    d_sigma_t: Tensor = field(metadata={"help": "dσ/dt at t"})


class Scheduler(ABC):
    """A schedule to derive from: what it returns may be any function of t, with gradients or without."""

    @abstractmethod
    def __call__(self, t: Tensor) -> SchedulerOutput:
        """α, σ, α′ and σ′ at times t of any shape."""

    @abstractmethod
    def snr_inverse(self, snr: Tensor) -> Tensor:
        """The times t at which α/σ is ``snr``."""


class ConvexScheduler(Scheduler):
    """A schedule with α = κ and σ = 1 − κ, which says where κ takes a value."""

    @abstractmethod
    def __call__(self, t: Tensor) -> SchedulerOutput:
        """κ, 1 − κ, κ′ and −κ′ at times t."""

    @abstractmethod
    def kappa_inverse(self, kappa: Tensor) -> Tensor:
        """The times t at which κ is ``kappa``."""

    def snr_inverse(self, snr: Tensor) -> Tensor:
        """κ⁻¹(snr/(1 + snr))."""
        return self.kappa_inverse(kappa=snr / (1.0 + snr))


class CondOTScheduler(ConvexScheduler):
    """α = t, σ = 1 − t: conditional optimal transport."""

    def __call__(self, t: Tensor) -> SchedulerOutput:
        one = torch.ones_like(t)
        return SchedulerOutput(alpha_t=t, sigma_t=1 - t, d_alpha_t=one, d_sigma_t=-one)

    def kappa_inverse(self, kappa: Tensor) -> Tensor:
        return kappa


class PolynomialConvexScheduler(ConvexScheduler):
    """α = tⁿ, σ = 1 − tⁿ.

    Args:
        n: a number above 0; AssertionError otherwise.
    """

    def __init__(self, n: float | int) -> None:
        if not isinstance(n, (float, int)):
            raise AssertionError(f"n: expected a float or an int, got {type(n).__name__}")
        if not n > 0:
            raise AssertionError(f"n: expected a positive number, got {n}")
        self.n = n

    def __call__(self, t: Tensor) -> SchedulerOutput:
        n = self.n
        power, lower = t**n, t ** (n - 1)
        return SchedulerOutput(alpha_t=power, sigma_t=1 - power, d_alpha_t=n * lower, d_sigma_t=-n * lower)

    def kappa_inverse(self, kappa: Tensor) -> Tensor:
        return torch.pow(kappa, 1.0 / self.n)


class VPScheduler(Scheduler):
    """α = exp(−T/2), σ = √(1 − exp(−T)), T = ½(1 − t)²(β_max − β_min) + (1 − t)β_min: variance preserving.

    At t = 1 σ is 0 and σ′ infinite, and next to it σ loses digits as in the original; :class:`fmkernels.VP` does not.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min = beta_min
        self.beta_max = beta_max
        super().__init__()

    def __call__(self, t: Tensor) -> SchedulerOutput:
        slope, rest = self.beta_max - self.beta_min, 1 - t
        T = 0.5 * rest**2 * slope + rest * self.beta_min
        dT = -rest * slope - self.beta_min
        alpha, kept = torch.exp(-0.5 * T), torch.exp(-T)
        sigma = torch.sqrt(1 - kept)
        return SchedulerOutput(
            alpha_t=alpha, sigma_t=sigma, d_alpha_t=-0.5 * dT * alpha, d_sigma_t=0.5 * dT * kept / sigma
        )

    def snr_inverse(self, snr: Tensor) -> Tensor:
        T = -torch.log(snr**2 / (snr**2 + 1))
        low, slope = self.beta_min, self.beta_max - self.beta_min
        return 1 - ((-low + torch.sqrt(low**2 + 2 * slope * T)) / slope)


class LinearVPScheduler(Scheduler):
    """α = t, σ = √(1 − t²)."""

    def __call__(self, t: Tensor) -> SchedulerOutput:
        sigma = (1 - t**2) ** 0.5
        return SchedulerOutput(alpha_t=t, sigma_t=sigma, d_alpha_t=torch.ones_like(t), d_sigma_t=-t / sigma)

    def snr_inverse(self, snr: Tensor) -> Tensor:
        squared = snr**2
        return torch.sqrt(squared / (1 + squared))


class CosineScheduler(Scheduler):
    """α = sin(πt/2), σ = cos(πt/2)."""

    def __call__(self, t: Tensor) -> SchedulerOutput:
        quarter = math.pi / 2
        angle = quarter * t
        alpha, sigma = torch.sin(angle), torch.cos(angle)
        return SchedulerOutput(alpha_t=alpha, sigma_t=sigma, d_alpha_t=quarter * sigma, d_sigma_t=-quarter * alpha)

    def snr_inverse(self, snr: Tensor) -> Tensor:
        return 2.0 * torch.atan(snr) / math.pi
