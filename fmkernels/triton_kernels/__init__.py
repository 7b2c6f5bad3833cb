"""Triton kernels of the ops: a module an op, with the stems and function names of ``fmkernels.ops`` and ``csrc/math``.

Nothing here imports triton until a kernel is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from .. import _registration

KERNELS = {  # op -> module and function
    "noise": ("noise", "noise"),
    "sample_path": ("sample_path", "sample_path"),
    "matching_loss": ("matching_loss", "matching_loss"),
    "_matching_loss_forward": ("matching_loss", "matching_loss_forward"),
    "_scale_gradient": ("matching_loss", "scale_gradient"),
    "_scale_gradient_": ("matching_loss", "scale_gradient_"),
}


def register(device_type: str) -> None:
    """Let Triton answer every op on a device type: "cuda", or "cpu" under the interpreter."""
    for op, (module, function) in KERNELS.items():
        _registration.override(op, _lazily(module, function), device_type, "triton")


def _lazily(module: str, function: str) -> Callable:
    def kernel(*arguments):
        return getattr(import_module(f"{__name__}.{module}"), function)(*arguments)

    return kernel
