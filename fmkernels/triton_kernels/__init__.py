"""Triton kernels of the ops: a module an op, with the stems and function names of ``fmkernels.ops`` and ``csrc/math``.

Nothing here imports triton until a kernel is first called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module

from .. import _registration

KERNELS = {  # op -> module and function
    "noise": ("noise", "noise"),
    "sample_path": ("sample_path", "sample_path"),
    "matching_loss": ("matching_loss", "matching_loss"),
    "_matching_loss_forward": ("matching_loss", "matching_loss_forward"),
    "_scale_gradient": ("matching_loss", "scale_gradient"),
    "_scale_gradient_": ("matching_loss", "scale_gradient_"),
    "conditional_flow": ("conditional_flow", "conditional_flow"),
    "guided_euler": ("guided_euler", "guided_euler"),
    "marginal_field": ("marginal_field", "marginal_field"),
    "probe": ("probe", "probe"),
    "probe_dot": ("probe_dot", "probe_dot"),
    "runge_kutta_stage": ("runge_kutta_stage", "runge_kutta_stage"),
    "_runge_kutta_step_": ("runge_kutta_step", "runge_kutta_step_"),
}


# On a GPU Triton alone serves these.
WITHOUT_CUDA = (
    "conditional_flow", "guided_euler", "marginal_field", "probe", "probe_dot", "runge_kutta_stage",
    "_runge_kutta_step_",
)  # fmt: skip


def register(device_type: str, ops: Iterable[str] = tuple(KERNELS)) -> None:
    """Let Triton answer ops on a device type: "cuda", or "cpu" under the interpreter."""
    for op in ops:
        module, function = KERNELS[op]
        _registration.override(op, _lazily(module, function), device_type, "triton")


def _lazily(module: str, function: str) -> Callable:
    def kernel(*arguments):
        return getattr(import_module(f"{__name__}.{module}"), function)(*arguments)

    return kernel
