"""odeint's methods of fixed steps, on a grid of times known beforehand."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .. import _registration
from ..ops.runge_kutta_stage import nudged
from ._odeint_inputs import FixedOptions, Problem
from ._plan import STAGE, StagePlan, plan
from ._shared_step import copying, overwritten
from .tableaus import TORCHDIFFEQ

EVENT_STEPS = 20_000  # after which a solve stops looking for an event, as torchdiffeq does


class FixedGrid:
    """A solve whose steps are given; autograd records it where something requires a gradient."""

    def __init__(self, problem: Problem):
        self.problem, self.field = problem, problem.field
        self.options: FixedOptions = problem.options
        self.plan = plan(TORCHDIFFEQ[problem.method], problem.y.device, nudged=self.options.perturb)
        self.first = True

    def grid(self) -> torch.Tensor:
        problem, (step_size, constructor, *_) = self.problem, self.options
        t = problem.t
        if constructor is not None:
            layout = problem.layout
            grid = constructor(
                lambda t, y: layout.plain(self.field(t, layout.packed(y))), layout.plain(problem.y), t
            )  # fmt: skip
            if not (isinstance(grid, torch.Tensor) and grid.dim() == 1 and grid.numel()):
                raise TypeError(f"grid_constructor: expected it to return a tensor of times, got {type(grid).__name__}")
        elif step_size is not None:
            if not step_size > 0:
                raise ValueError(f"step_size: expected a positive number, got {step_size}")
            count = int(torch.ceil((t[-1] - t[0]).detach().abs() / step_size + 1))
            steps = torch.arange(count, dtype=t.dtype, device=t.device) * step_size
            grid = torch.cat([(t[0] + problem.direction * steps)[:-1], t[-1:]])
        else:
            grid = t
        if not bool((grid[0] == t[0]) & (grid[-1] == t[-1])):
            raise AssertionError(
                f"grid_constructor: expected a grid from t[0] = {t[0].tolist()} to t[-1] = {t[-1].tolist()}, "
                f"got one from {grid[0].tolist()} to {grid[-1].tolist()}"
            )
        return grid

    def run(self) -> torch.Tensor:
        """The packed solution at ``t``, [T, …]."""
        problem, direction = self.problem, self.problem.direction
        grid = self.grid()
        times, starts, ends = grid.to(torch.float64), self.starts(grid), grid.tolist()
        callback = problem.callbacks.get("callback_step")
        y, values = problem.y, [problem.y.clone()]  # func may overwrite what it is given
        for i, end in enumerate(ends[1:]):
            if callback is not None:
                callback(grid[i], y, (grid[i + 1] - grid[i]).abs())
            y1, k_first = self.step(y, times, i, starts[i])
            between = None
            while len(values) < len(problem.values) and (end - problem.values[len(values)]) * direction >= 0:
                between = between or self.interpolant(y, k_first, y1, times[i], times[i + 1])
                value = between(problem.t[len(values)].to(torch.float64))
                values.append(value.clone() if value is y or value is y1 else value)
            y = y1
        return torch.stack([value.to(problem.y.dtype) for value in values])

    def starts(self, grid: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The times given to f at the start of each step."""
        starts = grid.to(self.problem.time_dtype)
        if self.options.perturb:
            starts = nudged(starts, starts.new_full((), self.problem.direction))
        return starts.unbind()

    def step(self, y, times, i: int, start) -> tuple[torch.Tensor, torch.Tensor]:
        """y₁ and k₁ of the step from times[i] to times[i + 1]."""
        k = self.stages(y, times, i, start)
        if self.first and overwritten(k):
            self.field = copying(self.field)
            k = self.stages(y, times, i, start)
        self.first = False
        return _stage(self.plan.solution, y, k, times, i)[0], k[0]

    def stages(self, y, times, i: int, start) -> list[torch.Tensor]:
        k = [self.field(start, y)]
        for stage in self.plan.stages:
            y_stage, t = _stage(stage, y, k, times, i)
            k.append(self.field(t, y_stage))
        return k

    def interpolant(self, y, k_first, y1, t0, t1) -> Callable[[torch.Tensor], torch.Tensor]:
        """t, 0-d in float64 → the state there: on the chord, or on the cubic through the ends and their derivatives."""
        cubic = self.options.interp == "cubic"
        k_last = None

        def between(t: torch.Tensor) -> torch.Tensor:
            nonlocal k_last
            if not (cubic and (t.requires_grad or _registration.transforming())):
                if t == t0:
                    return y
                if t == t1:
                    return y1
            theta = (t - t0) / (t1 - t0)
            if not cubic:
                return y + theta.to(self.problem.time_dtype) * (y1 - y)
            if k_last is None:
                k_last = self.field(t1.to(self.problem.time_dtype), y1)
            rest, h = 1 - theta, t1 - t0
            weights = (1 + 2 * theta) * rest * rest, h * theta * rest * rest, theta * theta * (3 - 2 * theta)
            weights = (*weights, -h * theta * theta * rest)
            parts = zip(weights, (y, k_first, y1, k_last), strict=True)
            return sum(weight.to(self.problem.time_dtype) * part for weight, part in parts)

        return between


def _stage(stage: StagePlan, y, k, times, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    coefficients, used, nudge = stage
    used = [k[j] for j in used]
    for k_j in used:
        if k_j.dtype is not y.dtype:  # the state goes on in the wider one, as in torchdiffeq
            wide = functools.reduce(torch.promote_types, (x.dtype for x in (y, *used)))
            y, used = y.to(wide), [k_j.to(wide) for k_j in used]
            break
    if _registration.transforming() or _registration.requires_grad(y, times, *used):
        return STAGE(y, used, times, step, coefficients, 0, nudge)
    with _registration.below_autograd():
        return STAGE(y, used, times, step, coefficients, 0, nudge)
