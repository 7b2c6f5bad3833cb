"""flow_matching's models and solver: samples and likelihoods by this library's ``odeint``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..solvers.odeint import odeint
from ._flow_matching_schedulers import Scheduler

__all__ = ["ModelWrapper", "ODESolver", "ScheduleTransformedModel", "Solver"]

FORWARD = torch.tensor([0.0, 1.0])
BACKWARD = torch.tensor([1.0, 0.0])


class ModelWrapper(ABC, nn.Module):
    """A velocity model called with x and t; override ``forward`` to prepare them for the network within.

    Args:
        model: the network, kept as ``self.model``.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        """model(x=x, t=t, **extras)."""
        return self.model(x=x, t=t, **extras)


class ScheduleTransformedModel(ModelWrapper):
    r"""The velocity field that a model of one schedule means under another, for the same pairs of source and target.

    With r the new time, t the one at which the old schedule has the new one's α/σ, and s = σ_r/σ_t:

        u(r, x) = (s′/s)·x + s·t′·model(x/s, t).

    Args:
        velocity_model: called with x=, t= and what else the caller gives.
        original_scheduler: the model's schedule, with a method ``snr_inverse``; AssertionError without.
        new_scheduler: the schedule wanted.

    Source: Lipman et al., "Flow Matching Guide and Code" (2024), post-training change of scheduler.
    """

    def __init__(self, velocity_model: nn.Module, original_scheduler: Scheduler, new_scheduler: Scheduler):
        super().__init__(model=velocity_model)
        self.original_scheduler = original_scheduler
        self.new_scheduler = new_scheduler
        if not callable(getattr(original_scheduler, "snr_inverse", None)):
            raise AssertionError(
                "original_scheduler: expected a method snr_inverse, got a "
                f"{type(original_scheduler).__name__} without one"
            )

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        """u(r, x) at r = ``t``."""
        new = self.new_scheduler(t=t)
        old_t = self.original_scheduler.snr_inverse(new.alpha_t / new.sigma_t)
        old = self.original_scheduler(t=old_t)
        scale = new.sigma_t / old.sigma_t
        new_slope = new.sigma_t * new.d_alpha_t - new.alpha_t * new.d_sigma_t
        old_slope = old.sigma_t * old.d_alpha_t - old.alpha_t * old.d_sigma_t
        squared = old.sigma_t * old.sigma_t
        d_t = squared * new_slope / (new.sigma_t * new.sigma_t * old_slope)
        d_scale = (old.sigma_t * new.d_sigma_t - new.sigma_t * old.d_sigma_t * d_t) / squared
        velocity = self.model(x=x / scale, t=old_t, **extras)
        return d_scale * x / scale + d_t * scale * velocity


class Solver(ABC, nn.Module):
    """What turns source samples into target samples."""

    @abstractmethod
    def sample(self, x_0: Tensor | None = None) -> Tensor:
        """Target samples."""


class ODESolver(Solver):
    """Solves dx/dt = velocity_model(x=x, t=t), t being 0-d, with one step size for the batch.

    Methods, steps, evaluations and errors are those of :func:`fmkernels.odeint`, which are torchdiffeq's.

    Args:
        velocity_model: a :class:`ModelWrapper`, another module, or a function of (x, t, **extras).
    """

    def __init__(self, velocity_model: ModelWrapper | Callable[..., Tensor]):
        super().__init__()
        self.velocity_model = velocity_model

    def sample(  # type: ignore[override]  # the original's signatures are these
        self,
        x_init: Tensor,
        step_size: float | None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor = FORWARD,
        return_intermediates: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> Tensor | Sequence[Tensor]:
        """The solution from x_init at time_grid[0] to time_grid[-1].

        Args:
            x_init: ``[B, …]``, any dtype that :func:`fmkernels.odeint` takes.
            step_size: of the methods with fixed steps; None steps along ``time_grid``. None for adaptive methods.
            method: see :func:`fmkernels.odeint`.
            atol, rtol: tolerances of the adaptive methods.
            time_grid: ``[T]``, increasing or decreasing.
            return_intermediates: return the states at all of ``time_grid``.
            enable_grad: whether gradients flow to what the model depends on, and to x_init.
            **model_extras: passed on to the model.

        Returns: ``[B, …]``, or ``[T, B, …]`` with ``return_intermediates``.
        """
        time_grid = time_grid.to(x_init.device)
        model = self.velocity_model
        # torchdiffeq gives the time in the state's dtype, which a network in half precision relies on.
        half = x_init.dtype in (torch.bfloat16, torch.float16)

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            return model(x=x, t=t.to(x.dtype) if half else t, **model_extras)

        order = _order_in_memory(x_init)
        back = [order.index(i) for i in range(len(order))]

        def velocity_in_order(t: Tensor, x: Tensor) -> Tensor:
            x = x.permute(back)  # a network in channels-last gets channels-last at every step
            return velocity(t, x).expand(x.shape).permute(order)

        with torch.set_grad_enabled(enable_grad):
            if x_init.is_contiguous() or not x_init.permute(order).is_contiguous():
                solution = _solve(velocity, x_init, time_grid, step_size, method, atol, rtol)
            else:
                start = x_init.permute(order)
                solution = _solve(velocity_in_order, start, time_grid, step_size, method, atol, rtol)
                solution = solution.permute(0, *(i + 1 for i in back)).contiguous()
        return solution if return_intermediates else solution[-1]

    def compute_likelihood(
        self,
        x_1: Tensor,
        log_p0: Callable[[Tensor], Tensor],
        step_size: float | None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor = BACKWARD,
        return_intermediates: bool = False,
        exact_divergence: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> tuple[Tensor | Sequence[Tensor], Tensor]:
        r"""The source sample of x_1, and log p₁(x_1) = log p₀(x_0) − ∫₀¹ ∇·v dt.

        The divergence is Hutchinson's estimate zᵀ(∂v/∂x)z with one vector of signs z for the whole solve, taken from
        one ``torch.randn_like(x_1)``, or exact by D gradients of one evaluation. Neither carries gradients; what does,
        with ``enable_grad``, is x_1's way into the source sample and into log_p0.

        Args:
            x_1: ``[B, …]``.
            log_p0: log p₀ of ``[B, …]``, ``[B]``.
            step_size, method, atol, rtol: as of :meth:`sample`; the integral counts in the error of adaptive steps.
            time_grid: from 1.0 to 0.0; AssertionError otherwise.
            return_intermediates: return the states at all of ``time_grid``.
            exact_divergence: the exact divergence instead of an estimate.
            enable_grad: whether the solve records gradients.
            **model_extras: passed on to the model.

        Returns: (x_0 ``[B, …]`` or states ``[T, B, …]``, log p₁(x_1) ``[B]``), at least float32.
        """
        if not bool((time_grid[0] == 1.0) & (time_grid[-1] == 0.0)):
            raise AssertionError(f"time_grid: expected times from 1.0 to 0.0, got {time_grid.tolist()}")
        time_grid = time_grid.to(x_1.device)
        model = self.velocity_model
        log_det = torch.zeros(x_1.shape[0], device=x_1.device)
        if not exact_divergence:
            z = torch.where(torch.randn_like(x_1) < 0, 1.0, -1.0).to(torch.promote_types(x_1.dtype, log_det.dtype))

        def velocity_and_divergence(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x = state[0].detach().requires_grad_()
            with torch.enable_grad():
                velocity = model(x=x, t=t, **model_extras)
            divergence = _exact_divergence(velocity, x) if exact_divergence else _estimate(velocity, x, z)
            return velocity.detach(), divergence

        with torch.set_grad_enabled(enable_grad):
            states, log_det = _solve(velocity_and_divergence, (x_1, log_det), time_grid, step_size, method, atol, rtol)
        log_p1 = log_p0(states[-1]) + log_det[-1]
        return (states if return_intermediates else states[-1]), log_p1


def _order_in_memory(x: Tensor) -> list[int]:
    """The dimensions of x by falling stride."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda i: -strides[i])


def _solve(
    field: Callable[..., Any],
    y0: Any,
    time_grid: Tensor,
    step_size: float | None,
    method: str,
    atol: float,
    rtol: float,
) -> Any:
    options = {} if step_size is None else {"step_size": step_size}
    return odeint(field, y0, time_grid, method=method, options=options, atol=atol, rtol=rtol)


def _estimate(velocity: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """zᵀ(∂v/∂x)z of every row."""
    (product,) = torch.autograd.grad(velocity, x, z.to(velocity.dtype))
    return (product * z).flatten(1).sum(1)


def _exact_divergence(velocity: Tensor, x: Tensor) -> Tensor:
    """Σ_j ∂v_j/∂x_j of every row, a gradient a column: no batching rule is asked of what the model is made of."""
    total = x.new_zeros(x.shape[0])
    units = torch.zeros(x.shape[0], math.prod(x.shape[1:]), dtype=velocity.dtype, device=x.device)
    columns = units.shape[1]
    for j in range(columns):
        units[:, j - 1 : j] = 0
        units[:, j] = 1
        (row,) = torch.autograd.grad(velocity, x, units.view(velocity.shape), retain_graph=j + 1 < columns)
        total += row.flatten(1)[:, j]
    return total
