"""`odeint` and what belongs to it: torchdiffeq's interface on this library's kernels."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from .. import _registration
from . import _odeint_inputs
from ._fixed_grid import FixedGrid
from ._odeint_inputs import HANDED_OVER, Layout, Problem, check_method, torchdiffeq_function
from ._plan import Plan
from ._shared_step import SharedStep, Step, value_at
from .events import EventGradient, combined, until_event

__all__ = ["odeint", "odeint_dense", "odeint_event"]

State = torch.Tensor | tuple[torch.Tensor, ...]
Tolerance = float | torch.Tensor | Sequence[float | torch.Tensor]


def odeint(
    func: Callable[..., Any],
    y0: State,
    t: torch.Tensor,
    *,
    rtol: Tolerance = 1e-7,
    atol: Tolerance = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., torch.Tensor] | None = None,
) -> Any:
    r"""Solve dy/dt = func(t, y), y(t[0]) = y0, with one step size for the whole state: torchdiffeq's ``odeint``.

    A call means what it means there, with the same steps and the same evaluations. Where :func:`~fmkernels.solve` gives
    every sample its own step size, here the error of all is one number: the RMS of err / (atol + rtol·max(\|y\|,
    \|y_new\|)), for a tuple the largest of its components' RMS. Times are float64; func is given float32 ones, and
    float64 ones for float64 states.

    Args:
        func: func(t, y) → dy/dt, t being 0-d; its value need only broadcast and convert to y. Its attributes
            ``callback_step``, ``callback_accept_step`` and ``callback_reject_step``, where it has them, are called with
            (t, y, dt) around every step.
        y0: a tensor of any shape, real (float32, float64, bfloat16, float16) or complex, or a tuple of them.
        t: ``[T]``, floating, strictly increasing or decreasing.
        rtol, atol: a number or what expands to y0; for a tuple also one for each component.
        method: "dopri5" (default), "dopri8", "bosh3", "fehlberg2", "adaptive_heun"; in fixed steps "euler", "midpoint",
            "heun2", "heun3", "rk4" (the 3/8 rule). "explicit_adams", "implicit_adams", "fixed_adams" and "scipy_solver"
            are handed to torchdiffeq.
        options: of the adaptive methods ``first_step``, ``min_step`` (a step as short is accepted whatever its error),
            ``max_step``, ``safety``, ``ifactor``, ``dfactor``, ``max_num_steps`` (between two outputs), ``norm`` (a
            function of the state as the user has it), ``step_t`` (times that a step must end at), ``jump_t`` (such
            times at which func jumps: it is evaluated on both sides), ``dtype`` (of the times that callbacks and
            event_fn see). Of the others ``step_size``, ``grid_constructor`` (func, y0, t) → times, ``interp`` ("linear"
            or "cubic"), ``perturb`` (evaluate just inside the ends of a step).
        event_fn: event_fn(t, y) → tensor; the solve ends where one of its elements crosses zero, found to within atol.
            Of t, two times, only the first and the direction matter.

    Returns: ``[T, …]`` in the dtype of y0, or a tuple of them; with ``event_fn`` (time of the event, states ``[2, …]``
    at the start and there, of fixed steps in func's dtype where that is wider). Differentiable, any number of times, in
    y0, t and whatever func depends on, through the accepted steps, their sizes being constants.

    Raises: AssertionError where the solve fails (non-finite values, a step size below the spacing of float64 numbers,
    ``max_num_steps``), and for bad arguments what torchdiffeq raises. Unused options warn.

    Source: R. T. Q. Chen, "torchdiffeq" (2018), github.com/rtqichen/torchdiffeq.
    """
    if (name := check_method(method)) in HANDED_OVER:
        return torchdiffeq_function("odeint", name)(
            func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn
        )
    if event_fn is not None and len(t) != 2:
        raise ValueError(f"t: expected two times with event_fn, of which the second gives the direction, got {len(t)}")
    if event_fn is not None and _registration.transforming():  # the time of an event would be a constant
        raise ValueError("event_fn: expected None in forward mode and within torch.func transforms, got one")
    problem = _odeint_inputs.problem(func, y0, t, rtol, atol, method, options)
    if event_fn is None:
        return problem.layout.unpack(integrate(problem))
    event_t, solution = until_event(problem, combined(event_fn, t[0], y0, problem.layout))
    return event_t.to(t), problem.layout.unpack(solution)


def integrate(problem: Problem) -> torch.Tensor:
    """The packed solution at t, [T, …]."""
    if len(problem.values) == 1 or problem.y.numel() == 0:
        return problem.y.unsqueeze(0).repeat_interleave(len(problem.values), 0)
    return (SharedStep if problem.adaptive else FixedGrid)(problem).run()


def odeint_event(
    func: Callable[..., Any],
    y0: State,
    t0: torch.Tensor,
    *,
    event_fn: Callable[..., torch.Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[torch.Tensor, State]:
    """Solve from t0 until ``event_fn`` crosses zero, the event's time being differentiable: torchdiffeq's function.

    Args:
        func, y0, event_fn: as of :func:`odeint`.
        t0: where to start, a tensor of one element.
        reverse_time: whether to go backward in time.
        odeint_interface: :func:`odeint` or :func:`odeint_adjoint`, given ``kwargs`` too.

    Returns: (time of the event, states ``[2, …]`` at the start and there), differentiable in y0, t0 and what func
    depends on, the time by the implicit function theorem (:class:`~fmkernels.solvers.events.EventGradient`).
    """
    if not isinstance(t0, torch.Tensor):
        raise TypeError(f"t0: expected a torch.Tensor of one element, got {type(t0).__name__}")
    start = t0.reshape(-1)
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    event_t, solution = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    layout = Layout(y0)
    event = combined(event_fn, t[0], y0, layout)
    state = layout.pack(tuple(part[-1] for part in solution) if layout.is_tuple else solution[-1])
    event_t, state = EventGradient.apply(layout.field(func), event, event_t, state)
    state = layout.unpack(state)
    if not layout.is_tuple:
        return event_t, torch.cat([solution[:-1], state.unsqueeze(0)])
    return event_t, tuple(torch.cat([s[:-1], last.unsqueeze(0)]) for s, last in zip(solution, state, strict=True))


def odeint_dense(
    func: Callable[..., Any],
    y0: torch.Tensor,
    t0: float | torch.Tensor,
    t1: float | torch.Tensor,
    *,
    rtol: Tolerance = 1e-7,
    atol: Tolerance = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> DenseSolution:
    """The solution as a function of time: torchdiffeq's ``odeint_dense``, for every adaptive method.

    Args:
        func, y0, rtol, atol, method, options: as of :func:`odeint`, y0 a tensor.
        t0, t1: the ends, tensors of one element or numbers.

    Returns: solution(t), t being a number or a tensor of times within [t0, t1], of shape [*t.shape, *y0.shape];
    differentiable as :func:`odeint` is.

    Raises: AssertionError where t lies outside, where y0 is no tensor, or for a method of fixed steps.
    """
    if not isinstance(y0, torch.Tensor):
        raise AssertionError(f"y0: expected a torch.Tensor, got {type(y0).__name__}")
    like = t0 if isinstance(t0, torch.Tensor) else torch.empty((), dtype=torch.float64)
    t = torch.stack([torch.as_tensor(end, dtype=like.dtype, device=like.device).reshape(()) for end in (t0, t1)])
    problem = _odeint_inputs.problem(func, y0, t, rtol, atol, method, options)
    if not problem.adaptive:
        raise AssertionError(f"method: expected an adaptive method for a dense solution, got {method!r}")
    solver = SharedStep(problem)
    steps: list[Step] = []
    while (problem.values[1] - solver.reached()) * problem.direction > 0:
        if len(steps) >= problem.options.max_num_steps:
            raise AssertionError(f"max_num_steps exceeded ({len(steps)}>={problem.options.max_num_steps})")
        if solver.attempt():
            steps.append(cast(Step, solver.last))
    return DenseSolution(problem, solver.plan, steps)


class DenseSolution:
    """The interpolants of a solve's steps, found by time."""

    def __init__(self, problem: Problem, plan: Plan, steps: list[Step]) -> None:
        self.problem, self.plan, self.steps = problem, plan, steps
        self.ends = [problem.direction * step.t_next for step in steps]

    def __call__(self, t: float | torch.Tensor) -> torch.Tensor:
        problem = self.problem
        t = torch.as_tensor(t, dtype=torch.float64, device=problem.y.device)
        values = [self._at(one) for one in t.reshape(-1).unbind()]
        packed = torch.stack(values).reshape(*t.shape, *problem.y.shape) if values else problem.y.new_empty(0)
        return problem.layout.unpack(packed)

    def _at(self, t: torch.Tensor) -> torch.Tensor:
        problem = self.problem
        time = float(t)
        i = bisect.bisect_left(self.ends, problem.direction * time)
        if i == len(self.steps) or (time - problem.values[0]) * problem.direction < 0:
            raise AssertionError(f"t: expected a time from {problem.values[0]} to {problem.values[-1]}, got {time}")
        return value_at(self.plan, self.steps[i], t)
