"""fmkernels: the arithmetic around the network in flow matching, as fused kernels with pure-PyTorch references."""

from . import layers, ops
from ._registration import choose_backends, load_compiled
from .dequantisation import BitsPerDim, bits_per_dim, dequantise, evaluate_bits_per_dim
from .distributions import Normal, StandardNormal
from .estimators import Deflated, Exact, Hutchinson
from .likelihood import LogProb, divergence, log_prob, sample_and_log_prob
from .marginal import MarginalField
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
    "BitsPerDim",
    "Coefficients",
    "CondOT",
    "ConstantNoise",
    "CosMap",
    "Cosine",
    "Custom",
    "Deflated",
    "Exact",
    "FlowMatching",
    "Hutchinson",
    "LinearVP",
    "LogProb",
    "LogitNormal",
    "MarginalField",
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
    "bits_per_dim",
    "dequantise",
    "divergence",
    "evaluate_bits_per_dim",
    "key",
    "layers",
    "log_prob",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "ops",
    "sample_and_log_prob",
    "solve",
]

load_compiled()
choose_backends()
