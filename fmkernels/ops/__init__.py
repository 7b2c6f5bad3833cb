"""The functional ops; each is also callable as ``torch.ops.fmkernels.<name>``."""

from .matching_loss import matching_loss
from .noise import key, noise
from .sample_path import PathSample, sample_path

__all__ = ["PathSample", "key", "matching_loss", "noise", "sample_path"]
