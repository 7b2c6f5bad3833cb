"""FlowMatching: the training head (sample, loss) and the sampling field (velocity) of one model description."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import _checks, _registration
from .distributions import Normal
from .objectives import (
    NAMED,
    REDUCTIONS,
    RHOS,
    TERM_X0,
    TERM_Z,
    MinSNR,
    Objective,
    PseudoHuber,
    velocity_from_prediction,
)
from .ops.marginal_field import call as call_moments
from .ops.matching_loss import call as call_loss
from .ops.matching_loss import check_prediction
from .ops.noise import key as draw_key
from .ops.sample_path import STORE_X0, STORE_Z, PathArguments
from .ops.sample_path import call as call_path
from .ops.sample_path import check as check_path
from .schedules import EDGE, CondOT, Schedule
from .timesteps import TimestepSampler, Uniform

__all__ = ["Batch", "FlowMatching"]

NOISE_MODES = ("auto", "recompute", "store")
# What "auto" means, by device type: on the CPU a normal costs many times its copy (benchmarks/results).
AUTO_NOISE = {"cpu": "store"}


@dataclass(eq=False)
class Batch:
    """A training batch: what the network is given and what the loss needs again.

    Attributes:
        x_t: the interpolant, as the network is given it (scaled by 1/R for EDM).
        t: the time, as the network is given it (¼ ln(σ/α) for EDM), float32 or float64.
        key: int64 ``[1]``, from which everything random was drawn.
        x1, x0, z: data, noise and bridge noise; x0 and z are None where the loss draws them again.
        table: ``[*t.shape, 6]`` with the row coefficients of the loss.
        time: the path's own t; the same tensor as ``t`` except for EDM.
        first_row: global index of the batch's first row.
        coupled: whether x0 was given, and may depend on x1.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    key: torch.Tensor
    x1: torch.Tensor
    x0: torch.Tensor | None
    z: torch.Tensor | None
    table: torch.Tensor
    time: torch.Tensor
    first_row: int
    coupled: bool = False

    def __repr__(self) -> str:
        def shown(value: torch.Tensor | None) -> str:
            if value is None:
                return "drawn again"
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"

        fields = ", ".join(f"{name}={shown(getattr(self, name))}" for name in ("x_t", "t", "x1", "x0"))
        return f"Batch({fields}, device={self.x1.device})"


class FlowMatching(torch.nn.Module):
    r"""The arithmetic around the network: x_t = α·x1 + σ·x0 + γ·z, the target of an objective, and the loss.

    ::

        fm = FlowMatching(CondOT())
        batch = fm.sample(x1)
        loss = fm.loss(model(batch.x_t, batch.t), batch)
        field = fm.velocity(model)

    Args:
        schedule: the path; default :class:`CondOT`.
        prediction: what the network gives: "velocity", "noise", "data", "score" or "edm".
        compare: None compares the prediction itself, "velocity" the velocity it implies.
        weight: None, "min_snr" or ``MinSNR(k)``, "sigma_sqrt", "cosmap", "likelihood", or a callable t → weights.
        rho: "square", "absolute", "pseudo_huber" or ``PseudoHuber(k)``.
        timesteps: distribution of t; default :class:`Uniform`.
        noise: "recompute" draws x0 again in the loss (least memory), "store" keeps it, "auto" takes the faster one
            for the device. All give the same numbers.
        sigma_floor: ε in W/max(σ, ε), for data prediction compared as velocity.
        sigma_data: standard deviation of the data, for EDM.

    It is an ``nn.Module`` so that a learnable schedule's parameters are found; it has no state of its own.

    Raises: TypeError, ValueError naming the argument.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        prediction: str = "velocity",
        compare: str | None = None,
        weight: str | MinSNR | Callable[..., Any] | None = None,
        rho: str | PseudoHuber = "square",
        timesteps: TimestepSampler | None = None,
        noise: str = "auto",
        *,
        sigma_floor: float = 0.05,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        self.schedule = CondOT() if schedule is None else schedule
        self.objective = Objective(self.schedule, prediction, compare, weight, rho, sigma_floor, sigma_data)
        self.timesteps = Uniform() if timesteps is None else timesteps
        if not isinstance(self.timesteps, TimestepSampler):
            raise TypeError(f"timesteps: expected a fmkernels timestep sampler, got {type(timesteps).__name__}")
        _checks.choice("noise", noise, NOISE_MODES)
        self.noise = noise
        self._arguments = PathArguments.of(self.objective, self.timesteps)
        self._terms = self.objective.terms
        self._storable = (STORE_X0 if self._terms & TERM_X0 else 0) | (STORE_Z if self._terms & TERM_Z else 0)
        self._rho = (RHOS[self.objective.rho_name], self.objective.rho_k)

    @classmethod
    def named(cls, name: str, schedule: Schedule | None = None, **options: Any) -> FlowMatching:
        """An objective by ``name``: "flow_matching", "ddpm", "score_matching" or "scoreflow"; ``schedule`` and options
        are those of the class."""
        _checks.choice("name", name, NAMED)
        return cls(schedule, **{**NAMED[name], **options})

    def sample(
        self,
        x1: torch.Tensor,
        x0: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        t_dims: int = 1,
        first_row: int = 0,
        total_rows: int | None = None,
    ) -> Batch:
        """Draw what is not given and form x_t, in one launch (two with the key).

        Args:
            x1: data ``[B, …]``, float32, float64, bfloat16 or float16.
            x0: source samples of x1's shape and dtype; None draws standard normal noise.
            t: times, float32 or float64, of a shape that is a prefix of x1's; None draws them.
            key: int64 ``[1]`` of :func:`fmkernels.key`; None draws one with ``generator``.
            t_dims: leading dimensions that drawn times span: 1 a time a sample, 2 one a token or frame.
            first_row, total_rows: the batch's place in a larger one, in samples: parts drawn with one key and these
                offsets equal the whole. Processes seeded alike must pass them, or they draw the same noise.

        Returns: a :class:`Batch`.

        Raises: TypeError, ValueError naming the argument.
        """
        check_path(x1, x0, t, key, t_dims, first_row, total_rows)
        if key is None:
            key = draw_key(x1.device, generator)
        elif generator is not None:
            raise ValueError("generator: expected None where key is given")
        bits = 0
        if self._noise_mode(x1) == "store":
            bits = self._storable
        x_t, t, table, drawn, z = call_path(
            x1, x0, t, key, self.schedule, self.timesteps, self._arguments, t_dims, first_row, total_rows, bits
        )
        network_t = table[..., 5] if self.objective.prediction == "edm" else t
        row = first_row * math.prod(t.shape[1:]) if t.dim() > 1 else first_row
        return Batch(x_t, network_t, key, x1, drawn if x0 is None else x0, z, table, t, row, x0 is not None)

    def _noise_mode(self, x1: torch.Tensor) -> str:
        if self.noise != "auto":
            return self.noise
        return AUTO_NOISE.get(x1.device.type, "recompute")

    def loss(
        self,
        prediction: torch.Tensor,
        batch: Batch,
        *,
        weight: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        reduction: str = "mean",
        reference: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of a prediction and its gradient, in two launches.

        With ``reference`` the target is its expectation given x_t, over data drawn from these points with equal
        weights: x1, x0 and z in the residual become E[x1|x_t] = m, E[x0|x_t] = σ(x_t − αm)/σe² and γ(x_t − αm)/σe².
        The gradient then has less variance and, where the points are the whole dataset, the same mean.

        Args:
            prediction: the network's output, of x1's shape; any floating dtype.
            batch: what :meth:`sample` returned.
            weight: per-row weights broadcastable to t's shape, multiplied with the objective's own.
            mask: bool, broadcastable to the prediction; elements where it is False are left out.
            reduction: "mean" Σwmρ/Σm, "sum" Σwmρ, or "none" w·Σmρ/Σm of each row.
            reference: ``[M, …]`` of x1's dtype and trailing shape, best with the batch's own x1 among them, and in full
                precision: rounding x_t is noise that the posterior does not know of. Needs one t a sample, and noise
                that was drawn. No gradient flows to it.

        Returns: float32 (float64 for float64 inputs), scalar, or t's shape for "none".

        Raises: TypeError, ValueError naming the argument.

        Source: for ``reference``, Xu et al., "Stable Target Field for Reduced Variance Score Estimation in Diffusion
        Models" (2023).
        """
        if not isinstance(batch, Batch):
            raise TypeError(f"batch: expected the Batch that sample() returned, got {type(batch).__name__}")
        check_prediction(prediction, batch.x1)
        if reduction not in REDUCTIONS:
            _checks.choice("reduction", reduction, REDUCTIONS)
        if self.objective.weight_fn is not None:
            own = self.objective.weight_fn(batch.time)
            _checks.tensor("weight(t)", own)
            weight = own if weight is None else own * weight
        x1, x0, z = batch.x1, batch.x0, batch.z
        if reference is not None:
            x1, x0, z = expected_terms(batch, reference, self.schedule, self.objective)
        return call_loss(
            prediction, x1, batch.table, x0, z, batch.key, self._terms, weight, mask,
            REDUCTIONS[reduction], *self._rho, batch.first_row,
        )  # fmt: skip

    def velocity(self, model: Callable[..., Any]) -> VelocityField:
        """The velocity field v(t, x) that ``model`` implies, for an ODE solver: see :class:`VelocityField`."""
        if not callable(model):
            raise TypeError(f"model: expected a callable model(x, t, **extras), got {type(model).__name__}")
        return VelocityField(self, model)

    def extra_repr(self) -> str:
        objective = self.objective
        lines = [f"schedule={self.schedule!r}"] if not isinstance(self.schedule, torch.nn.Module) else []
        lines.append(f"prediction={objective.prediction!r}")
        lines += [f"{name}={getattr(objective, name)!r}" for name in ("compare", "weight") if getattr(objective, name)]
        if objective.rho != "square":
            lines.append(f"rho={objective.rho!r}")
        return ", ".join([*lines, f"timesteps={self.timesteps!r}", f"noise={self.noise!r}"])


def expected_terms(
    batch: Batch, reference: torch.Tensor, schedule: Schedule, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """E[x1|x_t], E[x0|x_t] and E[z|x_t] over data from ``reference``, in at least float32."""
    x1, x_t, t = batch.x1, batch.x_t, batch.time
    _checks.tensor("reference", reference)
    _checks.same_dtype("reference", reference, "x1", x1)
    _checks.same_device("reference", reference, "x1", x1)
    if batch.coupled:
        raise ValueError("reference: expected a batch whose x0 was drawn; this one's was given, and may depend on x1")
    if t.dim() != 1:
        raise ValueError(f"reference: expected a batch with one time a sample, t of shape [B], got {list(t.shape)}")
    if reference.dim() != x1.dim() or reference.shape[1:] != x1.shape[1:] or reference.shape[0] == 0:
        shape = ", ".join(["M", *map(str, x1.shape[1:])])
        raise ValueError(f"reference: expected shape [{shape}], rows like those of x1, got {list(reference.shape)}")
    wide = torch.float64 if x1.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        v = schedule.coefficients(t.double().clamp(*schedule.t_range))
        rows = x_t.reshape(t.shape[0], -1)
        if objective.prediction == "edm":  # the network's input is x_t/R
            rows = rows * (v.sigma.square() + v.alpha.square() * objective.sigma_data**2).sqrt()[:, None]
        noise = (v.sigma.square() + v.gamma.square()).sqrt().clamp_min(EDGE)
        points = reference.reshape(reference.shape[0], -1)
        mean, residual, *_ = call_moments(rows.to(wide), v.alpha, noise, points.to(wide), None)
        x0, z = (
            (residual * (amplitude / noise.square())[:, None].to(wide)).reshape(x1.shape) if terms else None
            for amplitude, terms in ((v.sigma, objective.terms & TERM_X0), (v.gamma, objective.terms & TERM_Z))
        )
    return mean.reshape(x1.shape), x0, z


class VelocityField(torch.nn.Module):
    """f(t, x, **extras): the velocity that a model's prediction implies, v = f·x + g·model(scale·x, t).

    t is a scalar or ``[B]``, expanded to ``[B]`` in at least float32, and clamped to ``t_range``: data models say
    nothing where σ = 0, noise and score models where α = 0.
    """

    def __init__(self, fm: FlowMatching, model: Callable[..., Any]) -> None:
        super().__init__()
        self.fm = fm
        self.model = model
        low, high = fm.schedule.t_range
        prediction = fm.objective.prediction
        if prediction in ("noise", "score") and fm.objective.noise_end_alpha == 0:
            low = max(low, EDGE)
        if prediction == "data":
            high = min(high, 1.0 - EDGE)
        self.t_range = (low, high)

    def forward(self, t: torch.Tensor, x: torch.Tensor, **extras: Any) -> torch.Tensor:
        _checks.tensor("x", x)
        _checks.floating("x", x)
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        if not (isinstance(t, torch.Tensor) and t.dtype is dtype and t.shape == x.shape[:1] and t.device == x.device):
            t = torch.as_tensor(t, device=x.device)
            dtype = torch.promote_types(t.dtype if t.is_floating_point() else dtype, dtype)
            if t.dim() > 1 or (t.dim() == 1 and t.shape[0] not in (1, x.shape[0])):
                raise ValueError(f"t: expected a scalar or shape [{x.shape[0]}], got {list(t.shape)}")
            t = t.to(dtype).expand(x.shape[0])
        t = _registration.clamp_time(t, *self.t_range)
        objective = self.fm.objective
        if objective.prediction == "velocity":
            return self.model(x, t, **extras)
        coefficients = self.fm.schedule.coefficients(t)
        f, g, scale = velocity_from_prediction(objective.prediction, coefficients, objective.sigma_data)
        network_t = objective.table(t, coefficients)[0][..., 5] if objective.prediction == "edm" else t

        def rowwise(c: torch.Tensor) -> torch.Tensor:
            return c.reshape(-1, *(1,) * (x.dim() - 1))

        inputs = x if objective.prediction != "edm" else (rowwise(scale) * x).to(x.dtype)
        return (rowwise(f) * x + rowwise(g) * self.model(inputs, network_t, **extras)).to(x.dtype)

    def base(self) -> Normal:
        """The distribution at the lower end of ``t_range``, that of the schedule's noise."""
        return self.fm.schedule.base()

    def extra_repr(self) -> str:
        return f"t_range=({self.t_range[0]:g}, {self.t_range[1]:g})"
