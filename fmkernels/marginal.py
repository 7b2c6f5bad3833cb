"""The exact marginal field of a dataset: velocity, score, density and divergence in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from . import _checks, _registration
from .distributions import Normal
from .ops.marginal_field import call as call_moments
from .ops.marginal_field import measure
from .schedules import CUSTOM, EDGE, CondOT, Schedule

__all__ = ["MarginalField"]

CHUNK = 2**22  # products that the search for neighbours holds at once
FEW_DIMS = 64  # up to which it takes products in float64: in few dimensions many points are almost equally near
SPARE = 32  # candidates beyond k, whose distances are taken exactly: equal points may differ by rounding before


class MarginalField(torch.nn.Module):
    r"""u_t of a dataset: the field that flow matching converges to with that many parameters and that much time.

    With data x_i of weights q_i, λ_i = softmax_i(ln q_i − ‖x − αx_i‖²/(2σ²)), m = Σ λ_i x_i and κ = Σ λ_i ‖x_i − m‖²:

        u_t(x) = (σ'/σ)(x − αm) + α'm                     ∇·u_t(x) = Dσ'/σ + (α' − ασ'/σ)(α/σ²)κ
        ∇ln p_t(x) = (αm − x)/σ²                          ln p_t(x) = ln Σ q_i N(x; αx_i, σ²I)

    with σe = √(σ² + γ²) for σ where the schedule has bridge noise. ``field(t, x)`` is u_t(x): it goes wherever a
    model's velocity goes, such as :func:`fmkernels.solve` and :func:`fmkernels.log_prob`.

    Args:
        data: points ``[N, …]``, at least two-dimensional, floating and finite; half precision is kept as float32.
            It moves with the module; it is no parameter and not part of its state dict.
        schedule: the path; default :class:`CondOT`.
        weights: q_i, ``[N]``, non-negative, finite, summing to 1; None is 1/N each.

    Every method takes t, a number or a floating tensor of shape ``[]`` or ``[B]``, and x ``[B, …]`` of rows like the
    data's. Results are in x's dtype (half precision: computed in float32, the velocity, mean and score rounded at the
    end, a row's number left in float32). t is taken as it is, in float64, and clamped to ``t_range``: the schedule's,
    without its last 1e-5 where σe = 0 at its end, and without its first 1e-5 where a bridge's γ is 0 there. The density
    does not exist where σe = 0: ``score``, ``log_prob`` and ``divergence`` refuse a t beyond ``t_range`` that is a
    number or lies on the CPU; on a GPU nothing is read, and t is clamped.

    Gradients: to x by one more pass over the data; to t, twice, under transforms and compiled by the reference formula,
    which holds B × N × D differences (see :func:`fmkernels.ops.marginal_field`).

    Raises: TypeError, ValueError naming the argument.

    Source: Lipman et al. (2023), equations 6 and 8.
    """

    points: torch.Tensor
    log_weights: torch.Tensor | None
    centre: torch.Tensor
    half_squares: torch.Tensor

    def __init__(
        self, data: torch.Tensor, schedule: Schedule | None = None, weights: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        _checks.tensor("data", data)
        _checks.floating("data", data)
        if data.dim() < 2 or data.shape[0] == 0:
            raise ValueError(f"data: expected at least two dimensions, [N, …] with N ≥ 1, got {list(data.shape)}")
        schedule = CondOT() if schedule is None else schedule
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a fmkernels schedule, got {type(schedule).__name__}")
        self.schedule = schedule
        self.t_range = density_range(schedule)
        self.shape = data.shape[1:]
        self.register_buffer("points", data.detach().reshape(data.shape[0], -1), persistent=False)
        self.register_buffer("log_weights", checked_weights(weights, data), persistent=False)
        self.register_buffer("centre", None, persistent=False)
        self.register_buffer("half_squares", None, persistent=False)
        self._prepare()
        if not self.half_squares.sum().isfinite():
            raise ValueError("data: expected finite numbers, got some that are not")

    def _prepare(self) -> None:
        if self.points.dtype not in (torch.float32, torch.float64):
            self.points = self.points.float()
        self.centre, self.half_squares = measure(self.points)
        if self.log_weights is not None:
            self.log_weights = self.log_weights.double()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MarginalField:
        super()._apply(fn, recurse)  # .half() and the like would take the sums of squares along
        self._prepare()
        return self

    def base(self) -> Normal:
        """The schedule's distribution at t = 0. The exact marginal at the lower end of ``t_range`` may differ a little:
        where α is not 0 there, as in VP, it is a mixture about the points αx_i."""
        return self.schedule.base()

    def forward(self, t: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The velocity u_t(x)."""
        return self._velocity(self._posterior(t, x))

    def posterior_mean(self, t: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """m = E[x1 | x_t = x], ``[B, …]``: what an ideal denoiser gives."""
        p = self._posterior(t, x)
        return p.shaped(p.mean)

    def score(self, t: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """∇ ln p_t(x) = (αm − x)/σ², ``[B, …]``."""
        p = self._posterior(t, x, density=True)
        return p.shaped(-p.residual / p.column(p.sigma.square()))

    def log_prob(self, t: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """ln p_t(x), ``[B]``."""
        p = self._posterior(t, x, density=True)
        return p.number(p.log_sum - 0.5 * p.dims * (2 * math.pi * p.sigma.square()).log())

    def divergence(self, t: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """∇·u_t(x), ``[B]``: the exact trace, at the cost of one evaluation."""
        return self._divergence(self._posterior(t, x, density=True))

    def velocity_and_divergence(self, t: float | torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(u_t(x), ∇·u_t(x)) of one pass over the data; t is clamped, as for the velocity."""
        p = self._posterior(t, x)
        return self._velocity(p), self._divergence(p)

    def nearest(self, t: float | torch.Tensor, x: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """The k points for which ‖x − αx_i‖² is smallest, whatever their weights: (squared distances ``[B, k]``, in
        order; indices ``[B, k]``, int64, of equal distances the lower index first)."""
        _checks.count("k", k, 1)
        if k > self.points.shape[0]:
            raise ValueError(f"k: expected at most {self.points.shape[0]}, the number of points, got {k}")
        rows, points, t = self._inputs(t, x)
        alpha = self.schedule.coefficients(t).alpha
        squares, index = nearest_points(rows.detach(), alpha.detach(), points, self.centre, self.half_squares, k)
        return squares.to(rows.dtype), index

    def _inputs(
        self, t: float | torch.Tensor, x: torch.Tensor, density: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _checks.tensor("x", x)
        _checks.floating("x", x)
        _checks.same_device("x", x, "data", self.points)
        if x.dim() == 0 or x.shape[1:] != self.shape:
            shape = ", ".join(["B", *map(str, self.shape)])
            raise ValueError(f"x: expected shape [{shape}], rows like those of data, got {list(x.shape)}")
        if not isinstance(t, torch.Tensor):
            t = _checks.number("t", t)
            if density:
                self._check_density(t)
            t = torch.full((), t, dtype=torch.float64, device=x.device)
        elif not t.is_floating_point():
            raise TypeError(f"t: expected a floating tensor, got {str(t.dtype).removeprefix('torch.')}")
        elif density and t.device.type == "cpu" and t.numel() and _registration.eager():
            self._check_density(float(t.detach().max()))
        if t.dim() > 1 or (t.dim() == 1 and t.shape[0] not in (1, x.shape[0])):
            raise ValueError(f"t: expected a number, or a tensor of shape [] or [{x.shape[0]}], got {list(t.shape)}")
        t = _registration.clamp_time(t.to(x.device, torch.float64).expand(x.shape[0]), *self.t_range)
        wide = torch.float64 if torch.float64 in (x.dtype, self.points.dtype) else torch.float32
        return x.reshape(x.shape[0], self.points.shape[1]).to(wide), self.points.to(wide), t

    def _check_density(self, t: float) -> None:
        if t > self.t_range[1] + 1e-7 and self.t_range[1] < self.schedule.t_range[1] + EDGE / 2:
            raise ValueError(
                f"t: expected at most {self.t_range[1]:g}, the end of t_range, beyond which {self.schedule!r} leaves "
                f"no noise and p_t is no density, got {t:g}"
            )

    def _posterior(self, t: float | torch.Tensor, x: torch.Tensor, density: bool = False) -> Posterior:
        rows, points, t = self._inputs(t, x, density)
        alpha, sigma, d_alpha, slope = effective_coefficients(self.schedule, t)
        moments = call_moments(
            rows, alpha, sigma, points, self.log_weights, self.centre.to(rows.dtype), self.half_squares
        )
        return Posterior(x, alpha, sigma, d_alpha, slope, *moments)

    def _velocity(self, p: Posterior) -> torch.Tensor:
        return p.shaped(p.column(p.slope) * p.residual + p.column(p.d_alpha) * p.mean)

    def _divergence(self, p: Posterior) -> torch.Tensor:
        return p.number(p.dims * p.slope + (p.d_alpha - p.alpha * p.slope) * p.alpha / p.sigma.square() * p.kappa)

    def extra_repr(self) -> str:
        low, high = self.t_range
        weighted = ", weighted" if self.log_weights is not None else ""
        shape = [self.points.shape[0], *self.shape]
        return f"data={shape}, schedule={self.schedule!r}{weighted}, t_range=({low:g}, {high:g})"


class Posterior:
    """The moments at x with the coefficients there, α, σe, α' and σe'/σe, all ``[B]`` in float64."""

    def __init__(
        self,
        x: torch.Tensor,
        alpha: torch.Tensor,
        sigma: torch.Tensor,
        d_alpha: torch.Tensor,
        slope: torch.Tensor,
        mean: torch.Tensor,
        residual: torch.Tensor,
        log_sum: torch.Tensor,
        kappa: torch.Tensor,
    ) -> None:
        self.x, self.alpha, self.sigma, self.d_alpha, self.slope = x, alpha, sigma, d_alpha, slope
        self.mean, self.residual, self.log_sum, self.kappa = mean, residual, log_sum, kappa
        self.dims = mean.shape[1]

    def column(self, coefficient: torch.Tensor) -> torch.Tensor:
        return coefficient[:, None].to(self.mean.dtype)

    def shaped(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(self.x.shape).to(self.x.dtype)

    def number(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.mean.dtype)


def effective_coefficients(schedule: Schedule, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """α, σe, α', σe'/σe with σe = √(σ² + γ²): all noise of the path is one Gaussian."""
    v = schedule.coefficients(t)
    if not schedule.bridge:
        return v.alpha, v.sigma, v.d_alpha, v.d_sigma / v.sigma
    square = v.sigma.square() + v.gamma.square()
    return v.alpha, square.sqrt(), v.d_alpha, (v.sigma * v.d_sigma + v.gamma * v.d_gamma) / square


def density_range(schedule: Schedule) -> tuple[float, float]:
    """The schedule's t range without the ends at which σe, or a bridge's γ, is 0; a Custom one is not evaluated."""
    low, high = schedule.t_range
    if schedule.code == CUSTOM:
        return (max(low, EDGE) if schedule.bridge else low), min(high, 1.0 - EDGE)
    v = schedule.coefficients(torch.tensor([low, high], dtype=torch.float64))
    gamma, noise = v.gamma.tolist(), (v.sigma.square() + v.gamma.square()).tolist()
    if schedule.bridge and gamma[0] == 0:
        low = max(low, EDGE)  # γγ' has a limit there that γ' = 0 misses
    return low, high - EDGE if noise[1] == 0 else high


def checked_weights(weights: torch.Tensor | None, data: torch.Tensor) -> torch.Tensor | None:
    """ln q_i in float64."""
    if weights is None:
        return None
    _checks.tensor("weights", weights)
    _checks.floating("weights", weights)
    if weights.shape != data.shape[:1]:
        raise ValueError(f"weights: expected shape [{data.shape[0]}], one a point, got {list(weights.shape)}")
    _checks.same_device("weights", weights, "data", data)
    weights = weights.detach().double()
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("weights: expected finite, non-negative numbers, got others")
    total = float(weights.sum())
    if abs(total - 1) > 1e-3:
        raise ValueError(f"weights: expected a sum of 1, got {total:g}; divide by it")
    return (weights / total).log()


def nearest_points(
    x: torch.Tensor, alpha: torch.Tensor, data: torch.Tensor, centre: torch.Tensor, half_squares: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest ‖x − αx_i‖² of each row: candidates by products over parts of the data, their distances and
    order by differences in float64. Nothing of size B × N is held, nor B × (k + SPARE) × D."""
    rows, points = x.shape[0], data.shape[0]
    count = min(points, k + SPARE)
    part = max(count, CHUNK // max(rows, 1))
    scale = alpha[:, None]
    wide = torch.float64 if data.shape[1] <= FEW_DIMS else x.dtype
    with torch.no_grad():
        scaled = (scale * (x.double() - scale * centre.double())).to(wide)
        keys: Any = None
        best: Any = None
        for first in range(0, points, part):
            tile = data[first : first + part].to(wide)
            halves = half_squares[first : first + part].to(wide) * scale.square().to(wide)
            score = torch.addmm(halves, scaled, tile.T, alpha=-1)  # half the squared distance, up to the row's own
            if best is None:
                best = score.amin(1, keepdim=True)
            found = search_keys((score - best).float(), first)
            keys = found if keys is None else torch.cat([keys, found], 1)
            keys = keys.topk(min(count, keys.shape[1]), 1, largest=False).values
        index = (keys & (2**32 - 1)).sort(1).values
        wide_x = x.double()
        distances = [(wide_x - scale * data[column].double()).square().sum(1) for column in index.unbind(1)]
        squares, order = torch.stack(distances, 1).sort(dim=1, stable=True)
        return squares[:, :k], index.gather(1, order)[:, :k]


def search_keys(values: torch.Tensor, first: int) -> torch.Tensor:
    """Integers in the order of float32 values, and of equal ones in that of their indices."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | torch.arange(first, first + values.shape[1], device=values.device)
