"""`solve`: many initial value problems at once, each with a step size of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from .. import _checks, _registration
from ._adaptive import AdaptiveSolve
from ._fixed import solve_fixed
from ._plan import plan, settings_tensor
from ._problem import Problem, Solution, Y, tolerance
from .tableaus import ADAPTIVE, FIXED

__all__ = ["PID", "Solution", "solve"]

GRADIENTS = ("autograd", "recorded", "adjoint")


@dataclass(frozen=True)
class PID:
    r"""Step control h ← h · clip(safety · r^(−(p+i+d)/q) · r₋₁^((p+2d)/q) · r₋₂^(−d/q), min_factor, max_factor).

    r is the error ratio of the step, r₋₁ and r₋₂ those of the accepted steps before it, q the method's error order.
    After a rejection the next step does not grow. (p, i, d) = (0, 1, 0) is the elementary controller; (0.4, 0.3, 0) is
    smoother.

    Source: Söderlind, "Digital filters in adaptive time-stepping", ACM TOMS 29 (2003).
    """

    p: float = 0.0
    i: float = 1.0
    d: float = 0.0
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0

    def __post_init__(self) -> None:
        for name in ("p", "i", "d"):
            _checks.number(name, getattr(self, name))
        _checks.number("safety", self.safety, 0.0, 1.0, open_low=True)
        _checks.number("min_factor", self.min_factor, 0.0, 1.0, open_low=True)
        _checks.number("max_factor", self.max_factor, 1.0)

    def exponents(self, q: int) -> dict[str, float]:
        return {"beta1": (self.p + self.i + self.d) / q, "beta2": -(self.p + 2 * self.d) / q, "beta3": self.d / q}


CONTROLLERS = {"I": PID(), "PI": PID(0.4, 0.3), "PID": PID(1 / 18, 1 / 9, 1 / 18)}


def solve(
    f: Callable[..., Any],
    y0: Y,
    t_span: torch.Tensor | Sequence[float | torch.Tensor] = (0.0, 1.0),
    t_eval: torch.Tensor | Sequence[float] | None = None,
    method: str = "dopri5",
    *,
    rtol: float | torch.Tensor = 1e-5,
    atol: float | torch.Tensor = 1e-5,
    controller: str | PID = "I",
    first_step: float | torch.Tensor | None = None,
    min_step: float = 0.0,
    max_step: float = math.inf,
    max_steps: int = 100_000,
    steps: int | None = None,
    step_size: float | None = None,
    gradient: str = "autograd",
    parameters: Sequence[torch.Tensor] | None = None,
    dense: bool = False,
    record_steps: bool = False,
    norm_columns: int | None = None,
    progress: bool = False,
    cuda_graph: bool = False,
) -> Solution[Y]:
    r"""Solve dy_b/dt = f(t, y)_b for every sample b of a batch, each with its own step size, times and end.

    An adaptive method takes a step of every unfinished row at once. Row b's step is accepted where
    RMS(err_b / (atol + rtol·max(\|y_b\|, \|y_b,new\|))) ≤ 1, over that row's numbers alone; its size follows
    ``controller``. A row at its end, or one that failed, stands still while the others go on; no row's values depend on
    another's, as long as f treats rows apart. Times are float64, those given to f float32 (float64 for float64 states).

    Args:
        f: f(t, y) → dy/dt with the structure, shape and dtype of y; t is ``[B]``.
        y0: ``[B, …]``, float32, float64, bfloat16, float16, complex64 or complex128, or a tuple of such tensors.
        t_span: (t₀, t₁), each a number or ``[B]``, or a tensor ``[2]`` or ``[B, 2]``; t₁ < t₀ integrates backward, row
            by row.
        t_eval: times to return the state at, ``[T]`` or ``[B, T]``, in the order of integration and within t_span; rows
            with fewer end in NaN.
        method: "dopri5", "tsit5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"; with ``steps`` or ``step_size``
            "euler", "midpoint", "heun2", "heun3", "ralston", "rk4", "rk4_38".
        rtol, atol: not negative; a number, ``[B]``, or anything that broadcasts to the shape of y0 (a single tensor).
        controller: "I", "PI", "PID" or a :class:`PID`.
        first_step: positive size of the first step, a number or ``[B]``; by Hairer's rule where None, for one call of
            f.
        min_step, max_step: bounds of the step size; a row that must go below min_step stops with status 2.
        max_steps: steps, accepted or not, after which a row stops with status 1.
        steps, step_size: for the fixed methods, the number of steps of every row, or a size that the longest row's
            steps do not exceed.
        gradient: "autograd" records every operation; "recorded" keeps one state a step and takes the accepted steps
            again in the backward, with equal gradients; "adjoint" integrates the adjoint equation backward in constant
            memory.
        parameters: what "recorded" and "adjoint" differentiate besides y0 and times, () for nothing; None takes those
            of f, a Module that has some.
        dense: let the result be called at any time (keeps every step's values of f).
        record_steps: return the times of the steps.
        norm_columns: how many of a row's leading numbers step control looks at, in errors and first steps; None takes
            all. The others, an integral along the solution for instance, then change nothing of the rest.
        progress: show a bar of finished rows (needs tqdm).
        cuda_graph: capture a step in a CUDA graph and replay it; f must be capturable (fixed shapes, no host reads).

    Returns: a :class:`Solution`. Without gradients nothing waits for a GPU within the loop; "autograd" reads a few
    flags a step.

    Raises: TypeError, ValueError naming the argument; a row's failure is its ``status``, not an exception.

    Source: Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", II.4–II.6; per-sample control as in
    Lienen and Günnemann, "torchode" (2022).
    """
    problem = Problem(f, y0, t_span, t_eval)
    check_options(method, gradient, min_step, max_step, max_steps, steps, step_size, dense, record_steps, cuda_graph)
    if gradient != "autograd" and _registration.transforming():
        raise ValueError(f"gradient: expected 'autograd' in forward mode and within torch.func, got {gradient!r}")
    columns = problem.state.columns // problem.state.components
    if norm_columns is not None:
        _checks.count("norm_columns", norm_columns, 1)
        if norm_columns > columns or method in FIXED:
            expected = "None for a fixed method" if method in FIXED else f"at most {columns}, the numbers of a row"
            raise ValueError(f"norm_columns: expected {expected}, got {norm_columns}")
        columns = norm_columns
    if method in FIXED:
        return solve_fixed(problem, FIXED[method], steps, step_size, gradient, parameters, progress)
    if not isinstance(controller, PID):
        _checks.choice("controller", controller, CONTROLLERS)
        controller = CONTROLLERS[controller]
    tableau = ADAPTIVE[method]
    settings = settings_tensor(
        problem.device, safety=controller.safety, min_factor=controller.min_factor, max_factor=controller.max_factor,
        accepted_floor=controller.min_factor, after_rejection_cap=1.0, min_step=min_step, max_step=max_step, clip=1.0,
        step_limit=max_steps, snap=1e-10, **controller.exponents(cast(int, tableau.error_order)),
    )  # fmt: skip
    tolerances = tolerance("rtol", rtol, problem), tolerance("atol", atol, problem)
    return AdaptiveSolve(
        problem, plan(tableau, problem.device), settings, tolerances, first_step, max_step, min_step, columns
    ).run(gradient, parameters, dense, record_steps, progress, cuda_graph)


def check_options(
    method: str,
    gradient: str,
    min_step: float,
    max_step: float,
    max_steps: int,
    steps: int | None,
    step_size: float | None,
    dense: bool,
    record_steps: bool,
    cuda_graph: bool,
) -> None:
    _checks.choice("method", method, {**ADAPTIVE, **FIXED})
    _checks.choice("gradient", gradient, GRADIENTS)
    _checks.number("min_step", min_step, 0.0)
    if max_step != math.inf:
        _checks.number("max_step", max_step, min_step, open_low=True)
    _checks.count("max_steps", max_steps, 1)
    if method in FIXED:
        if (steps is None) == (step_size is None):
            raise ValueError(
                f"steps: expected exactly one of steps and step_size for method {method!r}, got "
                + ("neither" if steps is None else "both")
            )
        if steps is not None:
            _checks.count("steps", steps, 1)
        else:
            _checks.number("step_size", step_size, 0.0, open_low=True)
        for name, wanted in (("dense", dense), ("record_steps", record_steps), ("cuda_graph", cuda_graph)):
            if wanted:
                raise ValueError(f"{name}: expected an adaptive method, got {method!r}")
    else:
        for name, value in (("steps", steps), ("step_size", step_size)):
            if value is not None:
                raise ValueError(f"{name}: expected None for the adaptive method {method!r}, got {value}")
