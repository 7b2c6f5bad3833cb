"""The functional ops; each is also callable as ``torch.ops.fmkernels.<name>``."""

from . import runge_kutta_step  # noqa: F401 (registers a private op)
from .conditional_flow import conditional_flow
from .guided_euler import guided_euler
from .marginal_field import PosteriorMoments, marginal_field
from .matching_loss import matching_loss
from .noise import key, noise
from .probe import probe
from .probe_dot import probe_dot
from .runge_kutta_stage import runge_kutta_stage
from .sample_path import PathSample, sample_path

__all__ = [
    "PathSample",
    "PosteriorMoments",
    "conditional_flow",
    "guided_euler",
    "key",
    "marginal_field",
    "matching_loss",
    "noise",
    "probe",
    "probe_dot",
    "runge_kutta_stage",
    "sample_path",
]
