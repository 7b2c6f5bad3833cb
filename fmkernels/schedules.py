r"""Schedules: the coefficients of the conditional path and of its velocity.

    x_t = α(t)·x1 + σ(t)·x0 + γ(t)·z        u_t = α'(t)·x1 + σ'(t)·x0 + γ'(t)·z

Time runs from t = 0 (noise) to t = 1 (data). ``schedule.coefficients(t)`` evaluates (α, σ, γ, α', σ', γ') in torch, in
the dtype of t and differentiably; compiled kernels evaluate the same formulas from ``csrc/math/schedule.h`` by the
schedule's ``code`` and its two parameters. The names are those of Lipman et al., "Flow Matching for Generative
Modeling" (2023), Song et al., "Score-Based Generative Modeling through SDEs" (2021), Nichol and Dhariwal, "Improved
DDPM" (2021), and Tong et al., "Improving and Generalizing Flow-Based Generative Models" (2024).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import _checks, _registration
from .distributions import Normal, StandardNormal

__all__ = [
    "Coefficients",
    "ConstantNoise",
    "CondOT",
    "Cosine",
    "Custom",
    "LinearVP",
    "Polynomial",
    "Schedule",
    "SchrodingerBridge",
    "SubVP",
    "VE",
    "VP",
]

CUSTOM = 9  # code of a schedule whose coefficients reach the kernels as a table
EDGE = 1e-5  # distance kept from an end at which a derivative is infinite


class Coefficients(NamedTuple):
    """Coefficients of a path and their derivatives, one value per row."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    gamma: torch.Tensor
    d_alpha: torch.Tensor
    d_sigma: torch.Tensor
    d_gamma: torch.Tensor


class Schedule:
    """Base class of the schedules. A subclass implements :meth:`coefficients`; kernels read its values from a table.

    Attributes:
        t_range: (low, high); drawn times stay inside, given times are clamped to it before evaluation.
        bridge: whether γ is not identically zero, so that bridge noise z is drawn.
    """

    code: int = CUSTOM
    bridge: bool = False
    _default_range: tuple[float, float] = (0.0, 1.0)
    _parameters_: tuple[str, ...] = ()

    def __init__(self, *, t_range: tuple[float, float] | None = None) -> None:
        self.t_range = self._default_range if t_range is None else _checked_range(t_range)
        low, high = self._default_range
        if self.t_range[0] < low or self.t_range[1] > high:
            raise ValueError(
                f"t_range: expected a part of [{low:g}, {high:g}], outside which {type(self).__name__} has infinite "
                f"derivatives, got {self.t_range}"
            )

    @property
    def parameters_(self) -> tuple[float, float]:
        """The two numbers that kernels are given, in the order of ``csrc/math/schedule.h``."""
        values = [getattr(self, name) for name in self._parameters_]
        return tuple(values + [0.0] * (2 - len(values)))

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        """(α, σ, γ, α', σ', γ') at t, each of t's shape and dtype. t is not clamped here."""
        raise NotImplementedError(f"{type(self).__name__} must implement coefficients(t)")

    def base(self) -> Normal:
        """The distribution at t = 0: standard normal noise, unless the schedule scales it."""
        return StandardNormal()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and (self.parameters_, self.t_range) == (other.parameters_, other.t_range)

    def __hash__(self) -> int:
        return hash((type(self), self.parameters_, self.t_range))

    def __repr__(self) -> str:
        arguments = [f"{name}={getattr(self, name):g}" for name in self._parameters_]
        if self.t_range != self._default_range:
            arguments.append(f"t_range=({self.t_range[0]:g}, {self.t_range[1]:g})")
        return f"{type(self).__name__}({', '.join(arguments)})"


class CondOT(Schedule):
    """Conditional optimal transport: α = t, σ = 1 − (1 − σmin)·t.

    Args:
        sigma_min: standard deviation kept at t = 1, in [0, 1].
        t_range: times used, default (0, 1).

    Source: Lipman et al. (2023), section 4.1, example II; rectified flow for σmin = 0.
    """

    code = 0
    _parameters_ = ("sigma_min",)

    def __init__(self, sigma_min: float = 0.0, *, t_range: tuple[float, float] | None = None) -> None:
        self.sigma_min = _checks.number("sigma_min", sigma_min, 0.0, 1.0)
        super().__init__(t_range=t_range)

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        return Coefficients(t, 1 - (1 - self.sigma_min) * t, zero, one, one * (self.sigma_min - 1), zero)


class VP(Schedule):
    """Variance-preserving diffusion: α = e^(−T/2), σ = √(1 − e^(−T)) with s = 1 − t, T = s·βmin + ½s²(βmax − βmin).

    α' = ½βα and σ' = −½βα²/σ with β = βmin + s(βmax − βmin); σ' diverges at t = 1, so t ≤ 1 − 1e-5.

    Args:
        beta_min, beta_max: noise rates at the data and at the noise end, 0 < βmin ≤ βmax.
        t_range: times used, default (0, 1 − 1e-5).

    Source: Song et al. (2021), appendix B; Lipman et al. (2023), section 4.1, example I.
    """

    code = 1
    _default_range = (0.0, 1.0 - EDGE)
    _parameters_ = ("beta_min", "beta_max")

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, *, t_range: tuple[float, float] | None = None
    ) -> None:
        self.beta_min = _checks.number("beta_min", beta_min, 0.0, open_low=True)
        self.beta_max = _checks.number("beta_max", beta_max, self.beta_min)
        super().__init__(t_range=t_range)

    def _diffusion(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        s = 1 - t
        integral = s * self.beta_min + 0.5 * s * s * (self.beta_max - self.beta_min)
        beta = self.beta_min + s * (self.beta_max - self.beta_min)
        return torch.exp(-0.5 * integral), -torch.expm1(-integral), beta

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        alpha, variance, beta = self._diffusion(t)
        sigma, zero = variance.sqrt(), torch.zeros_like(t)
        return Coefficients(alpha, sigma, zero, 0.5 * beta * alpha, -0.5 * beta * alpha * alpha / sigma, zero)


class SubVP(VP):
    """Sub-variance-preserving diffusion: α = e^(−T/2), σ = 1 − e^(−T) with VP's T; σ' = −βα² is finite.

    Args:
        beta_min, beta_max: noise rates at the data and at the noise end, 0 < βmin ≤ βmax.
        t_range: times used, default (0, 1).

    Source: Song et al. (2021), section 3.4.
    """

    code = 5
    _default_range = (0.0, 1.0)

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        alpha, variance, beta = self._diffusion(t)
        zero = torch.zeros_like(t)
        return Coefficients(alpha, variance, zero, 0.5 * beta * alpha, -beta * alpha * alpha, zero)


class VE(Schedule):
    """Variance-exploding diffusion: α = 1, σ = σmin·(σmax/σmin)^(1 − t). The base is N(0, σmax²I).

    Args:
        sigma_min, sigma_max: standard deviations at t = 1 and t = 0, 0 < σmin < σmax.
        t_range: times used, default (0, 1).

    Source: Song et al. (2021), appendix B; Lipman et al. (2023), section 4.1, example I.
    """

    code = 2
    _parameters_ = ("sigma_min", "sigma_max")

    def __init__(
        self, sigma_min: float = 0.01, sigma_max: float = 50.0, *, t_range: tuple[float, float] | None = None
    ) -> None:
        self.sigma_min = _checks.number("sigma_min", sigma_min, 0.0, open_low=True)
        self.sigma_max = _checks.number("sigma_max", sigma_max, self.sigma_min, open_low=True)
        super().__init__(t_range=t_range)

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        log_ratio = math.log(self.sigma_max / self.sigma_min)
        sigma, zero = self.sigma_min * torch.exp((1 - t) * log_ratio), torch.zeros_like(t)
        return Coefficients(torch.ones_like(t), sigma, zero, zero, -log_ratio * sigma, zero)

    def base(self) -> Normal:
        return Normal(self.sigma_max)


class Cosine(Schedule):
    """Cosine path: α = sin(πt/2), σ = sin(π(1 − t)/2), the cosine written so that it is 0 at t = 1 in any precision.

    Source: Nichol and Dhariwal (2021); trigonometric interpolant of Albergo and Vanden-Eijnden (2023).
    """

    code = 3

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        half_pi, zero = math.pi / 2, torch.zeros_like(t)
        alpha, sigma = torch.sin(half_pi * t), torch.sin(half_pi * (1 - t))
        return Coefficients(alpha, sigma, zero, half_pi * sigma, -half_pi * alpha, zero)


class LinearVP(Schedule):
    """α = t, σ = √((1 − t)(1 + t)); σ' = −t/σ diverges at t = 1, so t ≤ 1 − 1e-5.

    Source: the variance-preserving path with linear signal, Ma et al., "SiT" (2024), and Lipman et al. (2024).
    """

    code = 4
    _default_range = (0.0, 1.0 - EDGE)

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        sigma, zero = ((1 - t) * (1 + t)).sqrt(), torch.zeros_like(t)
        return Coefficients(t, sigma, zero, torch.ones_like(t), -t / sigma, zero)


class Polynomial(Schedule):
    """α = tⁿ, σ = 1 − tⁿ. For n < 1 the slope is infinite at 0, so t ≥ 1e-5.

    Args:
        n: the exponent, finite and positive.
        t_range: times used, default (0, 1), for n < 1 (1e-5, 1).

    Source: Lipman et al., "Flow Matching Guide and Code" (2024).
    """

    code = 6
    _parameters_ = ("n",)

    def __init__(self, n: float, *, t_range: tuple[float, float] | None = None) -> None:
        self.n = _checks.number("n", n, 0.0, open_low=True)
        if self.n < 1:
            self._default_range = (EDGE, 1.0)
        super().__init__(t_range=t_range)

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        sigma = -torch.expm1(self.n * t.log())  # 1 − tⁿ without its cancellation near t = 1
        d_alpha, zero = self.n * t ** (self.n - 1), torch.zeros_like(t)
        return Coefficients(t**self.n, sigma, zero, d_alpha, -d_alpha, zero)


class ConstantNoise(Schedule):
    """α = t, σ = 1 − t, γ = s: independent and minibatch-OT conditional flow matching with Gaussian smoothing.

    Args:
        s: standard deviation of the bridge noise, at least 0.
        t_range: times used, default (0, 1).

    Source: Tong et al. (2024), section 3.2.
    """

    code = 7
    bridge = True
    _parameters_ = ("s",)

    def __init__(self, s: float, *, t_range: tuple[float, float] | None = None) -> None:
        self.s = _checks.number("s", s, 0.0)
        super().__init__(t_range=t_range)

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        return Coefficients(t, 1 - t, one * self.s, one, -one, zero)

    def base(self) -> Normal:
        return Normal(math.sqrt(1 + self.s**2))


class SchrodingerBridge(Schedule):
    """α = t, σ = 1 − t, γ = s√(t(1 − t)); γ' = s(1 − 2t)/(2√(t(1 − t))), defined as 0 at exactly t = 0 and t = 1.

    Args:
        s: diffusion of the bridge, at least 0.
        t_range: times used, default (0, 1).

    Source: Tong et al., "Simulation-Free Schrödinger Bridges via Score and Flow Matching" (2024).
    """

    code = 8
    bridge = True
    _parameters_ = ("s",)

    def __init__(self, s: float, *, t_range: tuple[float, float] | None = None) -> None:
        self.s = _checks.number("s", s, 0.0)
        super().__init__(t_range=t_range)

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        product = t * (1 - t)
        inside = product > 0
        root = torch.where(inside, product, 1.0).sqrt()  # keeps the gradient finite at the ends
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        gamma = torch.where(inside, self.s * root, 0.0)
        d_gamma = torch.where(inside, self.s * (1 - 2 * t) / (2 * root), 0.0)
        return Coefficients(t, 1 - t, gamma, one, -one, d_gamma + zero)


class Custom(Schedule, torch.nn.Module):
    """Any differentiable schedule, learnable too: ``fn(t)`` returns (α, σ), (α, σ, γ) or all six coefficients.

    Derivatives come from differentiation of ``fn``, which is elementwise in t, unless it returns them. Kernels read
    the coefficients from a per-row table; gradients flow through it to the parameters of ``fn`` when ``fn`` is an
    ``nn.Module`` or closes over tensors that require grad.

    Args:
        fn: callable from t (any shape, float32 or float64) to 2, 3 or 6 tensors of t's shape.
        t_range: times used, default (0, 1).
        bridge: whether γ may be non-zero; without it a third coefficient is refused.
    """

    def __init__(
        self, fn: Callable[..., Any], *, t_range: tuple[float, float] | None = None, bridge: bool = False
    ) -> None:
        torch.nn.Module.__init__(self)
        if not callable(fn):
            raise TypeError(f"fn: expected a callable t -> coefficients, got {type(fn).__name__}")
        self.fn = fn
        self.bridge = bool(bridge)
        Schedule.__init__(self, t_range=t_range)

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        values = self._evaluate(t)
        if len(values) == 6:
            return Coefficients(*values)
        derivatives = self._derivatives(t, len(values))
        if len(values) == 2:
            zero = torch.zeros_like(t)
            (alpha, sigma), (d_alpha, d_sigma) = values, derivatives
            return Coefficients(alpha, sigma, zero, d_alpha, d_sigma, zero)
        return Coefficients(*values, *derivatives)

    def _derivatives(self, t: torch.Tensor, count: int) -> list[torch.Tensor]:
        if _registration.transforming():  # forward mode does not nest in a caller's; each value is elementwise in t
            return [torch.func.grad(lambda s, i=i: self._evaluate(s)[i].sum())(t) for i in range(count)]
        _, tangents, *_ = torch.func.jvp(self._evaluate, (t,), (torch.ones_like(t),))
        return [tangent.to(t.dtype) for tangent in tangents]  # of a 0-dimensional t they come out in float64

    def _evaluate(self, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = tuple(self.fn(t))
        if len(values) not in (2, 3, 6):
            raise ValueError(f"fn: expected 2, 3 or 6 coefficients, got {len(values)}")
        if len(values) == 3 and not self.bridge:
            raise ValueError("fn: returned γ, which needs Custom(fn, bridge=True)")
        for value in values:
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"fn: expected tensors of t's shape, got {type(value).__name__}")
        return tuple(value.to(t.dtype).expand(t.shape) for value in values)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", None) or repr(self.fn)
        if inspect.isfunction(self.fn) and name == "<lambda>":
            name = "lambda t: …"
        return f"Custom({name}{', bridge=True' if self.bridge else ''})"


def _checked_range(t_range: Any) -> tuple[float, float]:
    if not isinstance(t_range, (tuple, list)) or len(t_range) != 2:
        raise TypeError(f"t_range: expected a pair (low, high), got {t_range!r}")
    low = _checks.number("t_range[0]", t_range[0], 0.0, 1.0)
    high = _checks.number("t_range[1]", t_range[1], 0.0, 1.0)
    if low >= high:
        raise ValueError(f"t_range: expected low < high, got ({low:g}, {high:g})")
    return low, high
