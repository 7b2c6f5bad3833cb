"""The functional ops; each is also callable as ``torch.ops.fmkernels.<name>``."""

from . import runge_kutta_step  # noqa: F401 (registers a private op)
from .guided_euler import guided_euler
from .matching_loss import matching_loss
from .noise import key, noise
from .runge_kutta_stage import runge_kutta_stage
from .sample_path import PathSample, sample_path

__all__ = ["PathSample", "guided_euler", "key", "matching_loss", "noise", "runge_kutta_stage", "sample_path"]
