"""The functional ops; each is also callable as ``torch.ops.fmkernels.<name>``."""

from .matching_loss import matching_loss
from .noise import key, noise
from . import runge_kutta_step  # noqa: F401 (registers a private op)
from .runge_kutta_stage import runge_kutta_stage
from .sample_path import PathSample, sample_path

__all__ = ["PathSample", "key", "matching_loss", "noise", "runge_kutta_stage", "sample_path"]
