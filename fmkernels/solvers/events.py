"""Where a solve ends at an event: a zero of a function of time and state, found by bisection on the interpolant."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from ._fixed_grid import EVENT_STEPS, FixedGrid
from ._odeint_inputs import Layout, Problem
from ._shared_step import SharedStep, value_at

Event = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def combined(event_fn: Callable, t0: torch.Tensor, y0, layout: Layout) -> Event:
    """(t, packed state) → 0-d: the least of the event functions, each with the sign that makes it positive at t0."""
    if not callable(event_fn):
        raise TypeError(f"event_fn: expected a callable event_fn(t, y), got {type(event_fn).__name__}")
    with torch.no_grad():
        signs = torch.sign(event_fn(t0, y0))
    return lambda t, y: torch.min(event_fn(t, layout.unpack(y)) * signs)


def bisect(event: Event, value: Callable, sign: float, t0: float, t1: float, tolerance: float, like: torch.Tensor):
    """The time in [t0, t1] at which ``event`` loses its sign, 0-d, to within the tolerance."""
    spacing = 2.0**-53 * max(abs(t0), abs(t1))
    halvings = math.log2(abs(t1 - t0) / max(tolerance, spacing)) if t1 != t0 else 0
    with torch.no_grad():
        for _ in range(math.ceil(halvings)):
            middle = (t0 + t1) / 2
            t = like.new_full((), middle)
            if _sign(event(t, value(t))) == sign:
                t0 = middle
            else:
                t1 = middle
    return like.new_full((), (t0 + t1) / 2)


def _sign(value: torch.Tensor) -> float:
    return float(torch.sign(value.detach()))


def until_event(problem: Problem, event: Event) -> tuple[torch.Tensor, torch.Tensor]:
    """The time of the event, 0-d in the dtype of t, and the packed states [2, …] at the start and there."""
    t, y = (_adaptive if problem.adaptive else _fixed)(problem, event, problem.atol.min().tolist())
    return t.to(problem.t.dtype), torch.stack([problem.y, y])


def _adaptive(problem: Problem, event: Event, tolerance: float):
    dtype = torch.promote_types(problem.options.dtype, problem.time_dtype)
    solver = SharedStep(problem, open_ended=True)
    t = solver.t.detach().to(dtype)[0]
    sign = _sign(event(t, problem.y))
    if sign == 0:
        return t, problem.y
    limit, n = problem.options.max_num_steps, 0
    while True:
        if n >= limit:
            raise AssertionError(f"max_num_steps exceeded ({n}>={limit})")
        n += 1
        if solver.attempt() and _sign(event(t.new_full((), solver.last.t_next), solver.y)) != sign:
            break
    step = solver.last

    def value(t: torch.Tensor) -> torch.Tensor:
        return value_at(solver.plan, step, t.to(torch.float64))

    t = bisect(event, value, sign, step.t, step.t_next, tolerance, t)
    return t, value(t)


def _fixed(problem: Problem, event: Event, tolerance: float):
    size = problem.options.step_size
    if size is None:
        raise AssertionError("step_size: expected a step size in the options, as fixed steps towards an event need it")
    solver = FixedGrid(problem)
    t0, y = problem.t[0].to(torch.float64), problem.y
    like = t0.detach()
    sign = _sign(event(like, y))
    for i in range(EVENT_STEPS):
        times = t0 + problem.direction * size * torch.arange(i, i + 2, dtype=torch.float64, device=t0.device)
        start, end = times.detach().tolist()
        y1, k_first = solver.step(y, times, 0, solver.starts(times)[0])
        if _sign(event(like.new_full((), end), y1)) != sign:
            value = solver.interpolant(y, k_first, y1, *times)
            t = bisect(event, value, sign, start, end, tolerance, like)
            return t, value(t)
        y = y1
    raise RuntimeError(f"event_fn: expected it to change its sign within {EVENT_STEPS} steps, up to t = {end}")


class EventGradient(torch.autograd.Function):
    """The time t* and state y* of an event as functions of the state that was solved for, at fixed t*.

    With c(t*, y*) = 0 and f the field, a change dy of that state moves the event by
    dt* = −⟨∂c/∂y, dy⟩ / (∂c/∂t + ⟨∂c/∂y, f⟩) and y* by dy + f dt*.

    Source: Chen, Amos and Nickel, "Learning Neural Event Functions for ODEs" (2021).
    """

    @staticmethod
    def forward(ctx, field, event, t, y):
        ctx.field, ctx.event = field, event
        ctx.save_for_backward(t, y)
        return t.clone(), y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_t, gradient_y):
        t, y = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            c = ctx.event(t, y)
            by_t, by_y = torch.autograd.grad(c, (t, y), allow_unused=True) if c.requires_grad else (None, None)
        k = ctx.field(t.detach(), y.detach())
        by_t = torch.zeros_like(t) if by_t is None else by_t
        by_y = torch.zeros_like(y) if by_y is None else by_y
        rate = by_t + (by_y * k).sum()
        rate = torch.where(rate == 0, 1e-12, rate)  # touched, not crossed: finite, as torchdiffeq has it
        total = gradient_t + (gradient_y * k).sum()
        return None, None, None, gradient_y - by_y * (total / rate).to(y.dtype)
