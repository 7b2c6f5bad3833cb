r"""flow_matching's names: import from here what a program imports from ``flow_matching.path``, ``.path.scheduler`` and
``.solver``, and ``ModelWrapper`` of ``.utils``.

The classes have the signatures, defaults, returned objects, dtypes and random numbers of flow_matching 1.0.10.
:meth:`AffineProbPath.sample` forms x_t and its velocity in one pass by :func:`fmkernels.ops.conditional_flow`, on the
CPU equal to the bit in float32 and float64; :class:`ODESolver` solves by :func:`fmkernels.odeint`, with the same
evaluations, and values equal to rounding. A schedule may be of any class that returns ``alpha_t``, ``sigma_t``,
``d_alpha_t`` and ``d_sigma_t``, flow_matching's own too, and where flow_matching is installed its classes take these.

A path is formed as there, operation by operation, where x_0, x_1, t or the schedule require a gradient, under
``torch.compile`` and ``torch.func`` transforms, and where x_0 and x_1 differ in shape, dtype or layout. Where x and t
are in half precision both, the fused pass computes in float32 and rounds once; flow_matching rounds every operation.

What differs: an exact divergence is taken for samples ``[B, …]`` of any shape, and Hutchinson's in float64, where
flow_matching raises IndexError and RuntimeError; the gradient of an adaptive solve takes the step sizes as constants;
where a model returns the same memory at each call, the first step is taken twice, the second time from copies. Absent
are the discrete and Riemannian parts: MixtureDiscreteProbPath, GeodesicProbPath, their solvers, losses and manifolds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _registration
from .._checks import FLOATING
from ..ops.conditional_flow import AFFINE, compute_dtype
from ._flow_matching_schedulers import (
    CondOTScheduler,
    ConvexScheduler,
    CosineScheduler,
    LinearVPScheduler,
    PolynomialConvexScheduler,
    Scheduler,
    SchedulerOutput,
    VPScheduler,
)
from ._flow_matching_solver import ModelWrapper, ODESolver, ScheduleTransformedModel, Solver

__all__ = [
    "AffineProbPath",
    "CondOTProbPath",
    "CondOTScheduler",
    "ConvexScheduler",
    "CosineScheduler",
    "LinearVPScheduler",
    "ModelWrapper",
    "ODESolver",
    "PathSample",
    "PolynomialConvexScheduler",
    "ProbPath",
    "ScheduleTransformedModel",
    "Scheduler",
    "SchedulerOutput",
    "Solver",
    "VPScheduler",
]

try:  # its own classes ask for schedulers of its own: MixtureDiscreteProbPath for a ConvexScheduler
    from flow_matching.path import scheduler as _original
except ImportError:
    pass
else:
    _original.Scheduler.register(Scheduler)
    _original.ConvexScheduler.register(ConvexScheduler)

ABSENT = (
    "DiscretePathSample",
    "GeodesicProbPath",
    "MixtureDiscreteEulerSolver",
    "MixtureDiscreteProbPath",
    "MixturePathGeneralizedKL",
    "RiemannianODESolver",
)


def __getattr__(name: str) -> Any:
    if name in ABSENT:
        raise ImportError(
            f"{name}: expected a name of the affine paths, got one of the discrete or Riemannian parts, "
            "which fmkernels does not have; import it from flow_matching"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass
class PathSample:
    """A point x_t of the path between x_0 and x_1 at time t, and the path's velocity dx_t there."""

    x_1: Tensor = field(metadata={"help": "target samples [B, …]"})
    x_0: Tensor = field(metadata={"help": "source samples [B, …]"})
    t: Tensor = field(metadata={"help": "times [B]"})
    x_t: Tensor = field(metadata={"help": "points of the path [B, …]"})
    dx_t: Tensor = field(metadata={"help": "velocities of the path [B, …]"})


class ProbPath(ABC):
    """A path of distributions from that of x_0, at t = 0, to that of x_1, at t = 1."""

    @abstractmethod
    def sample(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
        """Points of the paths between the pairs (x_0, x_1), ``[B, …]``, at their times t ``[B]``."""

    def assert_sample_shape(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> None:
        """AssertionError unless t is ``[B]`` and x_0 and x_1 are ``[B, …]``."""
        if t.ndim != 1:
            raise AssertionError(f"t: expected shape [B], got {list(t.shape)}")
        if not t.shape[0] == x_0.shape[0] == x_1.shape[0]:
            raise AssertionError(
                f"t: expected as many times as samples, got {t.shape[0]} for {x_0.shape[0]} of x_0 and "
                f"{x_1.shape[0]} of x_1"
            )


class AffineProbPath(ProbPath):
    """x_t = σ_t·x_0 + α_t·x_1, of velocity σ′_t·x_0 + α′_t·x_1.

    Args:
        scheduler: t → α, σ, α′, σ′, a :class:`Scheduler`.

    Source: Lipman et al., "Flow Matching Guide and Code" (2024), affine conditional flows.
    """

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def sample(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
        """x_t and dx_t of the pairs (x_0, x_1) at their times t.

        Args:
            x_0, x_1: source and target samples ``[B, …]``.
            t: ``[B]``.

        Returns: a :class:`PathSample`, x_t and dx_t in the dtype that x and t promote to.

        Gradients flow to x_0, x_1, t and what the schedule depends on.

        Raises: AssertionError where the batch sizes differ or the schedule is not of shape ``[B]``.
        """
        self.assert_sample_shape(x_0=x_0, x_1=x_1, t=t)
        schedule = self.scheduler(t)
        columns = schedule.alpha_t, schedule.sigma_t, schedule.d_alpha_t, schedule.d_sigma_t
        x_t, dx_t = _fused(x_0, x_1, columns) or _formed(x_0, x_1, columns)
        return PathSample(x_t=x_t, dx_t=dx_t, x_1=x_1, x_0=x_0, t=t)

    def target_to_velocity(self, x_1: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(σ′/σ)·x_t + ((α′σ − σ′α)/σ)·x_1; t is a scalar or broadcasts to x_t, as in the five below."""
        alpha, sigma, d_alpha, d_sigma = self._schedule(t)
        return d_sigma / sigma * x_t + (d_alpha * sigma - d_sigma * alpha) / sigma * x_1

    def epsilon_to_velocity(self, epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(α′/α)·x_t + ((σ′α − α′σ)/α)·ε, ε being x_0."""
        alpha, sigma, d_alpha, d_sigma = self._schedule(t)
        return d_alpha / alpha * x_t + (d_sigma * alpha - d_alpha * sigma) / alpha * epsilon

    def velocity_to_target(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(−σ′·x_t + σ·v)/(α′σ − σ′α)."""
        alpha, sigma, d_alpha, d_sigma = self._schedule(t)
        slope = d_alpha * sigma - d_sigma * alpha
        return -d_sigma / slope * x_t + sigma / slope * velocity

    def epsilon_to_target(self, epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(1/α)·x_t − (σ/α)·ε."""
        alpha, sigma, _, _ = self._schedule(t)
        return 1 / alpha * x_t + -sigma / alpha * epsilon

    def velocity_to_epsilon(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(−α′·x_t + α·v)/(σ′α − α′σ)."""
        alpha, sigma, d_alpha, d_sigma = self._schedule(t)
        slope = d_sigma * alpha - d_alpha * sigma
        return -d_alpha / slope * x_t + alpha / slope * velocity

    def target_to_epsilon(self, x_1: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(1/σ)·x_t − (α/σ)·x_1."""
        alpha, sigma, _, _ = self._schedule(t)
        return 1 / sigma * x_t + -alpha / sigma * x_1

    def _schedule(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        schedule = self.scheduler(t)
        return schedule.alpha_t, schedule.sigma_t, schedule.d_alpha_t, schedule.d_sigma_t


class CondOTProbPath(AffineProbPath):
    """x_t = (1 − t)·x_0 + t·x_1, of velocity x_1 − x_0: conditional optimal transport."""

    def __init__(self) -> None:
        super().__init__(CondOTScheduler())


Columns = tuple[Tensor, Tensor, Tensor, Tensor]
FLOW = _registration.overload("conditional_flow")


def _fused(x_0: Tensor, x_1: Tensor, columns: Columns) -> tuple[Tensor, Tensor] | None:
    """x_t and dx_t in one pass; None where that would not be what the formulas give."""
    for tensor in (x_0, x_1, *columns):
        if type(tensor) is not Tensor:
            return None
    if not _registration.eager() or _registration.requires_grad(x_0, x_1, *columns):
        return None
    alpha, sigma, d_alpha, d_sigma = columns
    dtype, table_dtype = x_1.dtype, alpha.dtype
    if not (
        x_0.dtype is dtype
        and sigma.dtype is d_alpha.dtype is d_sigma.dtype is table_dtype
        and dtype in FLOATING
        and table_dtype in FLOATING
        and alpha.shape == sigma.shape == d_alpha.shape == d_sigma.shape == x_1.shape[:1]
        and x_0.shape == x_1.shape
        and x_0.device == x_1.device == alpha.device
    ):
        return None
    channels_last = not (x_0.is_contiguous() and x_1.is_contiguous())
    if channels_last:
        if x_1.dim() < 3 or x_0.stride() != x_1.stride():
            return None
        x_0, x_1 = x_0.movedim(1, -1), x_1.movedim(1, -1)
        if not x_1.is_contiguous():
            return None
    table = torch.stack(columns, 1)
    if not dtype is table_dtype is torch.float32:  # what follows is exact, in the dtype that the formulas promote to
        dtype = torch.promote_types(dtype, table_dtype)
        x_0, x_1 = x_0.to(dtype), x_1.to(dtype)
        table = table.to(compute_dtype(x_1))
    with _registration.below_autograd():  # the op's checks and its Autograd-key kernel would find nothing more
        x_t, dx_t = FLOW(x_0, x_1, None, table, AFFINE)
    # .data: no views, which autograd would not let a program change in place as it may the original's tensors
    return (x_t.movedim(-1, 1).data, dx_t.movedim(-1, 1).data) if channels_last else (x_t, dx_t)


def _formed(x_0: Tensor, x_1: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """x_t and dx_t by the formulas."""
    alpha, sigma, d_alpha, d_sigma = (_expanded(column, x_1) for column in columns)
    return sigma * x_0 + alpha * x_1, d_sigma * x_0 + d_alpha * x_1


def _expanded(column: Tensor, x: Tensor) -> Tensor:
    """[B] in the shape of x, [B, …]; whole, for x_0 may have a shape that broadcasts to it."""
    if column.ndim != 1 or column.shape[0] != x.shape[0]:
        raise AssertionError(f"scheduler: expected values of shape [{x.shape[0]}], got {list(column.shape)}")
    return column.reshape(-1, *(1,) * (x.ndim - 1)).expand_as(x)
