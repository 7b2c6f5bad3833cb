"""The stateless ops as modules, for the ``kernels`` library of Hugging Face, which borrows the ``forward`` of a layer.

A layer has no constructor, no state and no method but ``forward``, whose arguments are those of the op of the same name
in :mod:`fmkernels.ops`; ``has_backward`` and ``can_torch_compile`` tell ``kernelize`` where it may be used.
"""

from __future__ import annotations

import torch
from torch import nn

from .ops.conditional_flow import conditional_flow
from .ops.guided_euler import guided_euler
from .ops.marginal_field import PosteriorMoments, marginal_field
from .ops.matching_loss import matching_loss
from .ops.noise import noise
from .ops.probe import probe
from .ops.probe_dot import probe_dot
from .ops.sample_path import PathSample, sample_path

__all__ = [
    "ConditionalFlow",
    "GuidedEuler",
    "MarginalMoments",
    "MatchingLoss",
    "Noise",
    "Probe",
    "ProbeDot",
    "SamplePath",
]


class ConditionalFlow(nn.Module):
    """x_t and u_t of a conditional path: :func:`fmkernels.ops.conditional_flow`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(
        self,
        x0: torch.Tensor,
        x1: torch.Tensor,
        noise: torch.Tensor | None,
        coefficients: torch.Tensor,
        form: str = "linear",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return conditional_flow(x0, x1, noise, coefficients, form)


class GuidedEuler(nn.Module):
    """An Euler step under classifier-free guidance: :func:`fmkernels.ops.guided_euler`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(
        self,
        x: torch.Tensor,
        conditional: torch.Tensor,
        unconditional: torch.Tensor,
        h: float | torch.Tensor,
        scale: float | torch.Tensor,
        rescale: float = 0.0,
    ) -> torch.Tensor:
        return guided_euler(x, conditional, unconditional, h, scale, rescale)


class MarginalMoments(nn.Module):
    """Moments of a dataset's posterior: :func:`fmkernels.ops.marginal_field`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(
        self,
        x: torch.Tensor,
        alpha: torch.Tensor,
        sigma: torch.Tensor,
        data: torch.Tensor,
        log_weights: torch.Tensor | None = None,
    ) -> PosteriorMoments:
        return marginal_field(x, alpha, sigma, data, log_weights)


class MatchingLoss(nn.Module):
    """The loss of a prediction with its gradient: :func:`fmkernels.ops.matching_loss`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(
        self,
        prediction: torch.Tensor,
        x1: torch.Tensor,
        table: torch.Tensor,
        x0: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return matching_loss(prediction, x1, table, x0, z, key)


class Noise(nn.Module):
    """Normals from a key: :func:`fmkernels.ops.noise`."""

    has_backward: bool = False  # of what is drawn there is nothing to differentiate
    can_torch_compile: bool = True

    def forward(self, key: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return noise(key, rows, columns)


class Probe(nn.Module):
    """Probes of a divergence: :func:`fmkernels.ops.probe`."""

    has_backward: bool = False
    can_torch_compile: bool = True

    def forward(
        self, key: torch.Tensor, rows: int, columns: int, distribution: str = "rademacher", probes: int = 1
    ) -> torch.Tensor:
        return probe(key, rows, columns, distribution=distribution, probes=probes)


class ProbeDot(nn.Module):
    """Products of probes with values: :func:`fmkernels.ops.probe_dot`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(self, key: torch.Tensor, values: torch.Tensor, distribution: str = "rademacher") -> torch.Tensor:
        return probe_dot(key, values, distribution=distribution)


class SamplePath(nn.Module):
    """Times, noise and x_t of the optimal-transport path: :func:`fmkernels.ops.sample_path`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(
        self,
        x1: torch.Tensor,
        x0: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
    ) -> PathSample:
        return sample_path(x1, x0, t, key)
