"""fmkernels: the arithmetic around the network in flow matching, as fused kernels with pure-PyTorch references."""

from . import ops
from ._registration import choose_backends, load_compiled
from .distributions import Normal, StandardNormal
from .matching import Batch, FlowMatching
from .objectives import MinSNR, Objective, PseudoHuber
from .ops.noise import key
from .schedules import (
    VE,
    VP,
    Coefficients,
    CondOT,
    ConstantNoise,
    Cosine,
    Custom,
    LinearVP,
    Polynomial,
    Schedule,
    SchrodingerBridge,
    SubVP,
)
from .solvers import PID, Solution, odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from .timesteps import Beta, CosMap, LogitNormal, Mode, TimestepSampler, Uniform

__version__ = "0.1.0"

__all__ = [
    "VE",
    "VP",
    "Batch",
    "Beta",
    "Coefficients",
    "CondOT",
    "ConstantNoise",
    "CosMap",
    "Cosine",
    "Custom",
    "FlowMatching",
    "LinearVP",
    "LogitNormal",
    "MinSNR",
    "Mode",
    "Normal",
    "Objective",
    "PID",
    "Polynomial",
    "PseudoHuber",
    "Schedule",
    "SchrodingerBridge",
    "Solution",
    "StandardNormal",
    "SubVP",
    "TimestepSampler",
    "Uniform",
    "key",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "ops",
    "solve",
]

load_compiled()
choose_backends()
