r"""Objectives: what the network predicts, what the loss compares, and how rows are weighted.

Everything is linear, so one residual serves every objective: r = p·prediction + a·x1 + b·x0 + c·z, the loss w·ρ(r).
``Objective.table`` evaluates (p, a, b, c, w) per row in torch; kernels evaluate the same from
``csrc/math/objective.h``. With W = α'σ − ασ' (γ = 0, x0 independent standard normal noise):

| prediction | compare | p | a | b | c | w |
|---|---|---|---|---|---|---|
| velocity | itself | 1 | −α' | −σ' | −γ' | 1 |
| noise | itself (DDPM) | 1 | 0 | −1 | 0 | 1 |
| data | itself | 1 | −1 | 0 | 0 | 1 |
| score | itself, λ = σ² folded in (score matching) | σ | 0 | 1 | 0 | 1 |
| score, weight "likelihood" | ScoreFlow, λ = g² = 2σW/α | σ | 0 | 1 | 0 | 2W/(ασ) |
| data | velocity | k = W/max(σ, ε) | −k | 0 | 0 | 1 |
| noise | velocity | −W/α | 0 | W/α | 0 | 1 |
| score | velocity | Wσ/α | 0 | W/α | 0 | 1 |
| edm | raw network, R = √(σ² + α²σd²) | 1 | −σ/(σd·R) | ασd/R | 0 | 1 |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _checks
from .schedules import CUSTOM, Coefficients, Schedule

__all__ = ["MinSNR", "Objective", "PseudoHuber"]

PREDICTIONS = {"velocity": 0, "noise": 1, "data": 2, "score": 3, "edm": 4}
COMPARES = {"native": 0, "velocity": 1}
WEIGHTS = {"none": 0, "min_snr": 1, "sigma_sqrt": 2, "cosmap": 3, "likelihood": 4}
RHOS = {"square": 0, "absolute": 1, "pseudo_huber": 2}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
TERM_X1, TERM_X0, TERM_Z = 1, 2, 4  # bits of `terms`: which tensors the residual reads

SIGMA_FLOOR = 1e-5
NAMED = {
    "flow_matching": {"prediction": "velocity"},
    "ddpm": {"prediction": "noise"},
    "score_matching": {"prediction": "score"},
    "scoreflow": {"prediction": "score", "weight": "likelihood"},
}


@dataclass(frozen=True)
class MinSNR:
    """Min-SNR weighting with SNR = α²/σ²: noise min(SNR, k)/SNR, data min(SNR, k), velocity min(SNR, k)·σ²/W².

    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (2023).
    """

    k: float = 5.0

    def __post_init__(self) -> None:
        _checks.number("k", self.k, 0.0, open_low=True)


@dataclass(frozen=True)
class PseudoHuber:
    """ρ(r) = √(r² + k²) − k.

    Source: Song and Dhariwal, "Improved Techniques for Training Consistency Models" (2024).
    """

    k: float = 1.0

    def __post_init__(self) -> None:
        _checks.number("k", self.k, 0.0, open_low=True)


@dataclass(frozen=True)
class Objective:
    """A validated objective for a schedule; :class:`fmkernels.FlowMatching` builds one from its arguments.

    Args:
        schedule: the path.
        prediction: what the network gives: "velocity", "noise", "data", "score" or "edm".
        compare: None compares the prediction itself, "velocity" the velocity it implies.
        weight: None, "min_snr" or :class:`MinSNR`, "sigma_sqrt" (σ⁻², σ at least 1e-5), "cosmap"
            (2/(π(1 − 2σ + 2σ²))), "likelihood" (score and noise: 2W/(ασ)), or a callable t → weights.
        rho: "square", "absolute", "pseudo_huber" or :class:`PseudoHuber`.
        sigma_floor: ε of data prediction under a velocity loss, W/max(σ, ε).
        sigma_data: σd of EDM.
    """

    schedule: Schedule
    prediction: str = "velocity"
    compare: str | None = None
    weight: str | MinSNR | Callable[..., Any] | None = None
    rho: str | PseudoHuber = "square"
    sigma_floor: float = 0.05
    sigma_data: float = 0.5
    weight_fn: Callable[..., Any] | None = field(init=False, default=None, repr=False)
    weight_name: str = field(init=False, default="none", repr=False)
    weight_k: float = field(init=False, default=0.0, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule: expected a fmkernels schedule, got {type(self.schedule).__name__}")
        _checks.choice("prediction", self.prediction, PREDICTIONS)
        _checks.number("sigma_floor", self.sigma_floor, 0.0, open_low=True)
        _checks.number("sigma_data", self.sigma_data, 0.0, open_low=True)
        if self.compare is not None and self.compare not in ("velocity", self.prediction):
            raise ValueError(
                f"compare: expected None, 'velocity' or the prediction itself ({self.prediction!r}), "
                f"got {self.compare!r}"
            )
        if isinstance(self.rho, PseudoHuber):
            pass
        elif self.rho not in RHOS:
            raise ValueError(f"rho: expected {', '.join(map(repr, RHOS))} or PseudoHuber(k), got {self.rho!r}")
        self._parse_weight()
        self._check_schedule()

    def _parse_weight(self) -> None:
        weight, name, k, fn = self.weight, "none", 0.0, None
        if weight == "min_snr":
            weight = MinSNR()
        if isinstance(weight, MinSNR):
            name, k = "min_snr", float(weight.k)
        elif isinstance(weight, str):
            _checks.choice("weight", weight, [n for n in WEIGHTS if n != "none"])
            name = weight
        elif callable(weight):
            fn = weight
        elif weight is not None:
            raise TypeError(
                f"weight: expected None, a name ({', '.join(n for n in WEIGHTS if n != 'none')}), MinSNR(k) or a "
                f"callable t -> weights, got {type(weight).__name__}"
            )
        if name == "likelihood" and self.prediction not in ("score", "noise"):
            raise ValueError(f"weight: 'likelihood' needs prediction 'score' or 'noise', got {self.prediction!r}")
        if name == "likelihood" and self.compare_code:
            raise ValueError("weight: 'likelihood' weights the score itself, got compare='velocity'")
        if name == "min_snr" and (self.prediction not in ("noise", "data", "velocity") or self.compares_velocity):
            raise ValueError(
                "weight: 'min_snr' is defined for noise, data and velocity predictions compared themselves, got "
                f"prediction={self.prediction!r}, compare={self.compare!r}"
            )
        object.__setattr__(self, "weight_fn", fn)
        object.__setattr__(self, "weight_name", name)
        object.__setattr__(self, "weight_k", k)

    def _check_schedule(self) -> None:
        schedule = self.schedule
        if schedule.bridge and (self.prediction in ("noise", "score", "edm")):
            raise ValueError(
                f"prediction: {self.prediction!r} is not defined for {schedule!r}, whose bridge noise makes x_t depend "
                "on two noises; expected 'velocity' or 'data'"
            )
        if schedule.bridge and self.weight_name in ("min_snr", "likelihood"):
            raise ValueError(f"weight: {self.weight_name!r} is not defined for {schedule!r} with bridge noise")
        divides = self.weight_name == "likelihood" or (self.prediction in ("noise", "score") and self.compare_code)
        if divides and self.noise_end_alpha == 0:
            raise ValueError(
                f"schedule: {self.name} divides by α, which is 0 at t = {schedule.t_range[0]:g} of {schedule!r}: its "
                f"loss is not integrable; expected a t_range that starts above 0, as in "
                f"{type(schedule).__name__}(…, t_range=(1e-3, {schedule.t_range[1]:g}))"
            )

    @property
    def noise_end_alpha(self) -> float:
        """α at the lower end of the schedule's t range; 1 for a learnable schedule, which is not evaluated here."""
        if self.schedule.code == CUSTOM:
            return 1.0
        low = torch.tensor(self.schedule.t_range[0], dtype=torch.float64)
        return float(self.schedule.coefficients(low).alpha)

    @property
    def compares_velocity(self) -> bool:
        return self.compare == "velocity" and self.prediction != "velocity"

    @property
    def compare_code(self) -> int:
        return COMPARES["velocity" if self.compares_velocity and self.prediction != "edm" else "native"]

    @property
    def rho_name(self) -> str:
        return "pseudo_huber" if isinstance(self.rho, PseudoHuber) else self.rho

    @property
    def rho_k(self) -> float:
        return float(self.rho.k) if isinstance(self.rho, PseudoHuber) else 1.0

    @property
    def parameter(self) -> float:
        """The number that kernels are given as o0: ε of data prediction, σd of EDM."""
        return float(self.sigma_data if self.prediction == "edm" else self.sigma_floor)

    @property
    def terms(self) -> int:
        """Bits of the tensors whose coefficient is not identically zero."""
        if self.prediction == "velocity":
            return TERM_X1 | TERM_X0 | (TERM_Z if self.schedule.bridge else 0)
        return {"noise": TERM_X0, "data": TERM_X1, "score": TERM_X0, "edm": TERM_X1 | TERM_X0}[self.prediction]

    @property
    def name(self) -> str:
        parts = [f"prediction {self.prediction!r}"]
        if self.compares_velocity:
            parts.append("compared as velocity")
        if self.weight is not None:
            parts.append(f"weight {self.weight if isinstance(self.weight, (str, MinSNR)) else 'callable'!r}")
        return " ".join(parts)

    def table(self, t: torch.Tensor, v: Coefficients) -> tuple[torch.Tensor, torch.Tensor]:
        """The per-row table [..., 6] of (p, a, b, c, w, network time) and the scale of x_t, in torch."""
        return objective_table(
            t,
            v,
            PREDICTIONS[self.prediction],
            self.compare_code,
            self.parameter,
            WEIGHTS[self.weight_name],
            self.weight_k,
        )


def objective_weight(weight: int, k: float, prediction: int, v: Coefficients) -> torch.Tensor:
    """w of a row; mirrors ``objective_weight`` of csrc/math/objective.h."""
    sigma = v.sigma.clamp_min(SIGMA_FLOOR)
    w = v.d_alpha * v.sigma - v.alpha * v.d_sigma
    snr = v.alpha.square() / sigma.square()
    if weight == WEIGHTS["min_snr"]:
        if prediction == PREDICTIONS["data"]:
            return snr.clamp_max(k)
        if prediction == PREDICTIONS["noise"]:
            return torch.where(snr < k, 1.0, k / snr)
        divisor = torch.where(v.alpha == 0, 1.0, w)  # where α = 0, W may be 0 too, and the weight is 0
        return snr.clamp_max(k) * v.sigma.square() / divisor.square()
    if weight == WEIGHTS["sigma_sqrt"]:
        return 1 / sigma.square()
    if weight == WEIGHTS["cosmap"]:
        return 2 / (math.pi * (1 - 2 * v.sigma + 2 * v.sigma.square()))
    if weight == WEIGHTS["likelihood"]:
        return 2 * w / (v.alpha * sigma)
    return torch.ones_like(v.sigma)


def objective_table(
    t: torch.Tensor, v: Coefficients, prediction: int, compare: int | bool, o0: float, weight: int, k: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table of an objective; mirrors ``objective_row`` of csrc/math/objective.h."""
    w = v.d_alpha * v.sigma - v.alpha * v.d_sigma
    one, zero = torch.ones_like(v.sigma), torch.zeros_like(v.sigma)
    p, a, b, c, time, scale = one, zero, zero, zero, t, one
    if prediction == PREDICTIONS["velocity"]:
        a, b, c = -v.d_alpha, -v.d_sigma, -v.d_gamma
    elif prediction == PREDICTIONS["noise"]:
        p = -w / v.alpha if compare else one
        b = -p
    elif prediction == PREDICTIONS["data"]:
        p = w / v.sigma.clamp_min(o0) if compare else one
        a = -p
    elif prediction == PREDICTIONS["score"]:
        p = w * v.sigma / v.alpha if compare else v.sigma
        b = w / v.alpha if compare else one
    elif prediction == PREDICTIONS["edm"]:
        root = (v.sigma.square() + v.alpha.square() * o0**2).sqrt()
        a, b = -v.sigma / (o0 * root), v.alpha * o0 / root
        time = 0.25 * (v.sigma.clamp_min(1e-20) / v.alpha.clamp_min(1e-20)).log()
        scale = 1 / root
    rows = torch.stack([p, a, b, c, objective_weight(weight, k, prediction, v), time], dim=-1)
    return rows, scale


def velocity_from_prediction(
    prediction: str, v: Coefficients, sigma_data: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(f, g, scale) such that the velocity is f·x_t + g·prediction, the network being given scale·x_t.

    With bridge noise, σ stands for σe = √(σ² + γ²) and σ' for σe' = (σσ' + γγ')/σe. Source:
    Lipman et al. (2024), section 4.8, table 1.
    """
    one, zero = torch.ones_like(v.sigma), torch.zeros_like(v.sigma)
    if prediction == "velocity":
        return zero, one, one
    if prediction == "noise":
        return v.d_alpha / v.alpha, v.d_sigma - v.d_alpha * v.sigma / v.alpha, one
    if prediction == "score":
        return v.d_alpha / v.alpha, -v.sigma * (v.d_sigma - v.d_alpha * v.sigma / v.alpha), one
    if prediction == "data":
        sigma = (v.sigma.square() + v.gamma.square()).sqrt()
        d_sigma = (v.sigma * v.d_sigma + v.gamma * v.d_gamma) / sigma
        return d_sigma / sigma, v.d_alpha - d_sigma * v.alpha / sigma, one
    square = v.sigma.square() + v.alpha.square() * sigma_data**2
    w = v.d_alpha * v.sigma - v.alpha * v.d_sigma
    f = (v.sigma * v.d_sigma + v.alpha * v.d_alpha * sigma_data**2) / square
    return f, w * sigma_data / square.sqrt(), 1 / square.sqrt()
