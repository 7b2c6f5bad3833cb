"""Gradients of a solve: a step as a graph, the loop as a graph, and the adjoint through the recorded steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .. import _registration
from ..ops.runge_kutta_stage import rowwise, state_time_dtype
from ..ops.runge_kutta_step import ACCEPTED, CURSOR, RATIO, RUNNING_STATUS, STATUS, T_NEXT, T
from ._integrator import Integrator, Record
from ._plan import STAGE, Plan


def graph_step(plan: Plan, field: Callable, y, k_first, times) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A step as a graph: the solution at its end and the values of f in it."""
    k = [k_first]
    for coefficients, used, nudge in plan.stages:
        stage, t = STAGE(y, [k[j] for j in used], times, 0, coefficients, 0, nudge)
        k.append(field(t, stage))
    coefficients, used, nudge = plan.solution
    return STAGE(y, [k[j] for j in used], times, 0, coefficients, 0, nudge)[0], k


def interpolate(plan: Plan, y, k, times, t) -> torch.Tensor:
    """y + h Σ_j b_j(θ) k_j at time t, float64 with the shape of ``times[0]``."""
    compute = state_time_dtype(y)
    h = times[1] - times[0]
    theta = (t - times[0]) / torch.where(h == 0, 1.0, h)
    powers = torch.stack([theta**p for p in range(1, plan.interpolant.shape[1] + 1)], -1)
    weights = h.unsqueeze(-1) * (powers @ plan.interpolant.mT)
    value = y.to(compute)
    for j in (0, *plan.used):
        value = value + rowwise(weights[..., j].to(compute), y) * k[j].to(compute)
    return value.to(y.dtype)


class Clock:
    """The times of a solve as functions of its ends: all move with t₀, but the last, which is t₁."""

    def __init__(self, t0: torch.Tensor, t1: torch.Tensor):
        self.t0, self.t1 = t0, t1
        self.moves = t0.requires_grad or t1.requires_grad or _registration.transforming()

    def __call__(self, times: torch.Tensor) -> torch.Tensor:
        if not self.moves:
            return times
        return torch.where(times == self.t1.detach(), self.t1, self.t0 + (times - self.t0.detach()))


class Outputs:
    """The values at ``t_eval`` as a graph: ``values[m]`` is [B, …], or None where no row has reached it."""

    def __init__(self, plan: Plan, t_eval: torch.Tensor, start: torch.Tensor, cursor: torch.Tensor):
        self.plan, self.t_eval, self.start = plan, t_eval, start
        self.values: list[torch.Tensor] = [self._blank()] * t_eval.shape[-1]
        self.put(cursor.new_zeros(cursor.shape), cursor, lambda m: start)

    def _blank(self) -> torch.Tensor:
        return torch.full_like(self.start, torch.nan)

    def put(self, first: torch.Tensor, last: torch.Tensor, value: Callable[[int], torch.Tensor]) -> None:
        """``value(m)`` for the rows whose outputs ``first`` to ``last`` hold m."""
        lows, highs = first.reshape(-1).tolist(), last.reshape(-1).tolist()
        due = sorted({m for low, high in zip(lows, highs) for m in range(low, high)})
        for m in due:
            here = rowwise((first <= m) & (m < last), self.start)
            self.values[m] = torch.where(here, value(m), self.values[m])

    def step(self, record: Record, y, y1, k, times) -> None:
        def value(m: int) -> torch.Tensor:
            here = (record.first_output <= m) & (m < record.last_output)
            t = torch.where(
                here, self.t_eval[..., m], times[0].detach()
            )  # elsewhere it may be NaN, and so its gradient
            between = interpolate(self.plan, y, k, times, t)
            if t.requires_grad or times.requires_grad or _registration.transforming():
                return between
            return torch.where(rowwise(t == times[1], y), y1, between)

        self.put(record.first_output, record.last_output, value)

    def stacked(self) -> torch.Tensor:
        return torch.stack(self.values, dim=self.start.dim() and 1) if self.values else self.start.new_empty(0)


def solve_as_graph(
    integrator: Integrator, y, k_first, clock: Clock, outputs: Outputs | None, running: Callable, records: list | None
):
    """Run the loop with autograd recording it; ``integrator`` decides, on detached copies of the same numbers.

    Returns the state reached, and how many steps were evaluated twice; ``records`` receives the steps. A row that is
    not accepted takes no part in the graph of a step: where one was not finite the step is evaluated again with it
    standing still, or 0 · NaN would spoil the others' gradients.
    """
    plan, field = integrator.plan, integrator.field
    repeated = 0
    while running():
        control, counters = integrator.control, integrator.counters
        fixed_times, before = control[T : T_NEXT + 1].clone(), counters.clone()
        times = clock(fixed_times)
        y1, k = graph_step(plan, field, y, k_first, times)
        with torch.no_grad():
            integrator.finish([k_j.detach() for k_j in k])
            accepted = counters[ACCEPTED] > before[ACCEPTED]
            broken = (before[STATUS] == RUNNING_STATUS) & control[RATIO].isinf()
            flags = torch.stack([accepted.any(), accepted.all(), broken.any()]).tolist()
            record = Record(y, fixed_times, accepted, before[CURSOR], counters[CURSOR].clone())
        if records is not None:
            records.append(record)
        if not flags[0]:
            continue
        if flags[2]:
            times = torch.where(accepted, times, times[0])
            y1, k = graph_step(plan, field, y, k_first, times)
            repeated += 1
        if outputs is not None:
            outputs.step(record, y, y1, k, times)
        if flags[1]:
            y, k_first = y1, k[-1]
        else:
            y = torch.where(rowwise(accepted, y), y1, y)
            k_first = torch.where(rowwise(accepted, y), k[-1], k_first)
    return y, repeated


class RecordedSteps(torch.autograd.Function):
    """A solve whose backward takes its accepted steps again, one at a time, from the states recorded between them.

    ``run()`` makes the solve without a graph: (state reached, values at t_eval or None, records). The memory is one
    state a step, whatever the number of stages.
    """

    @staticmethod
    def forward(ctx, run, plan, field, start_outputs, clock, y0, t0, t1, t_eval, *parameters):
        y, values, records = run()
        ctx.save_for_backward(y0, t0, t1, t_eval, *parameters)
        ctx.arguments = plan, field, start_outputs, clock, records
        return y, values if values is not None else y.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, gradient_values):
        y0, t0, t1, t_eval, *parameters = ctx.saved_tensors
        plan, field, start_outputs, clock, records = ctx.arguments
        needs = ctx.needs_input_grad
        wanted_times = needs[6] or needs[7]
        totals: list[torch.Tensor | None] = [None] * (3 + len(parameters))  # t0, t1, t_eval, parameters
        for record in reversed(records):
            with torch.enable_grad():
                y = record.y.detach().requires_grad_()
                ends = [t0.detach().requires_grad_(wanted_times), t1.detach().requires_grad_(wanted_times)]
                t = None if t_eval is None else t_eval.detach().requires_grad_(needs[8])
                times = clock(*ends)(torch.where(record.accepted, record.times, record.times[0]))
                k_first = field(times[0].to(state_time_dtype(y)), y)
                y1, k = graph_step(plan, field, y, k_first, times)
                results, cotangents = [torch.where(rowwise(record.accepted, y), y1, y)], [gradient]
                if t is not None:
                    outputs = Outputs(plan, t, y, torch.zeros_like(record.first_output))
                    outputs.step(record, y, y1, k, times)
                    for m, value in enumerate(outputs.values):
                        if value.requires_grad:
                            mask = (record.first_output <= m) & (m < record.last_output)
                            results.append(value)
                            cotangents.append(torch.where(rowwise(mask, y), gradient_values[_at(m, y)], 0))
            inputs = [y, *(ends if wanted_times else ()), *((t,) if needs[8] else ()), *parameters]
            grads = list(torch.autograd.grad(results, inputs, cotangents, allow_unused=True))
            gradient = grads.pop(0)
            slots = [*((0, 1) if wanted_times else ()), *((2,) if needs[8] else ()), *range(3, len(totals))]
            for slot, one in zip(slots, grads, strict=True):
                if one is not None:
                    totals[slot] = one if totals[slot] is None else totals[slot] + one
        if t_eval is not None:
            for m in range(t_eval.shape[-1]):
                mask = rowwise(m < start_outputs, gradient)
                gradient = gradient + torch.where(mask, gradient_values[_at(m, gradient)], 0)
        return None, None, None, None, None, gradient, *totals


def _at(m: int, y: torch.Tensor):
    """The index of output m in the stacked values of a state."""
    return (slice(None), m) if y.dim() else (m,)
