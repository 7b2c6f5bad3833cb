"""Solves with a number of steps known beforehand: a grid of times for each row, and no decision."""

from __future__ import annotations

import math

import torch

from .. import _registration
from ..ops.runge_kutta_stage import rowwise, state_time_dtype
from ..ops.runge_kutta_step import DONE, NON_FINITE
from ._gradients import Clock, RecordedSteps, interpolate
from ._integrator import Record, progress_bar
from ._plan import STAGE, Plan, plan
from ._problem import parameters_of
from .tableaus import Tableau, hermite

ON_GRID = 1e-9  # in steps: an output as near as this to the end of a step is taken there


class Grid(Clock):
    """The times of evenly spaced steps as functions of both ends."""

    def __call__(self, times: torch.Tensor) -> torch.Tensor:
        if not self.moves:
            return times
        t0, t1 = self.t0.detach(), self.t1.detach()
        share = torch.where(t1 == t0, 0.0, (times - t0) / (t1 - t0))
        return torch.where(times == t1, self.t1, self.t0 + share * (self.t1 - self.t0))


def grid_of(t0: torch.Tensor, t1: torch.Tensor, steps: int) -> torch.Tensor:
    """float64 [steps + 1, B], evenly from t₀ to t₁ exactly."""
    share = torch.arange(steps + 1, dtype=torch.float64, device=t0.device).unsqueeze(-1) / steps
    return torch.where(share == 1, t1, t0 + share * (t1 - t0))


class FixedOutputs:
    """The values at ``t_eval``: which step yields which, and the values so far."""

    def __init__(self, problem, tableau: Tableau, steps: int):
        t0, t1 = problem.t0.detach().unsqueeze(-1), problem.t1.detach().unsqueeze(-1)
        self.t_eval = problem.t_eval
        given = self.t_eval.detach().expand(problem.rows, self.t_eval.shape[-1])
        position = torch.where(t0 == t1, 0.0, (given - t0) / (t1 - t0)) * steps
        whole = (position - position.round()).abs() <= ON_GRID
        position = torch.where(whole, position.round(), position).where(~given.isnan(), torch.nan)
        self.at_start = position == 0
        self.index = (position.ceil() - 1).nan_to_num(-1).long().where(~self.at_start, -1)
        self.exact = bool((whole | given.isnan()).all()) and not self._moving(problem)
        self.plan = plan(tableau if self.exact else hermite(tableau), problem.device)
        shared = bool(
            (self.index == self.index[:1]).all() & (position.nan_to_num(-1) == position.nan_to_num(-1)[:1]).all()
        )
        M = self.index.shape[1]
        rows = self.index[:1] if shared else self.index
        due = (rows * M + torch.arange(M, device=rows.device))[rows >= 0].unique().tolist()
        self.due: dict[int, list[int]] = {}
        for code in due:
            self.due.setdefault(code // M, []).append(code % M)
        self.shared, self.coefficients = shared, None
        if shared and not self.exact and not self._moving(problem):
            theta = (position[0] - self.index[0]).nan_to_num(0)
            powers = torch.stack([theta**p for p in range(1, self.plan.interpolant.shape[1] + 1)], -1)
            weights = torch.where((theta == 1).unsqueeze(-1), self.plan.weights[0], powers @ self.plan.weights[2:])
            self.coefficients = torch.cat([theta.unsqueeze(-1), weights], -1)
        blank = torch.full_like(problem.y, torch.nan)
        self.values = [torch.where(rowwise(self.at_start[:, m], blank), problem.y, blank) for m in range(M)]

    @staticmethod
    def _moving(problem) -> bool:
        times = problem.t0, problem.t1, problem.t_eval
        return _registration.transforming() or (torch.is_grad_enabled() and any(t.requires_grad for t in times))

    def step(self, n: int, y, y1, k, times, grid=None) -> None:
        """Fill in the outputs of step n; ``times`` are its ends, or step n of ``grid``."""
        for m in self.due.get(n, ()):
            here = self.index[:, m] == n
            if self.exact:
                value = y1
            elif self.coefficients is not None and grid is not None:
                value = STAGE(y, [k[j] for j in (0, *self.plan.used)], grid, n, self.coefficients, m, 0)[0]
            else:
                ends = times if grid is None else grid[n : n + 2]
                t = torch.where(
                    here, self.t_eval[..., m], ends[0].detach()
                )  # elsewhere it may be NaN, and its gradient
                value = interpolate(self.plan, y, k, ends, t)
            self.values[m] = value if self.shared else torch.where(rowwise(here, y), value, self.values[m])

    def stacked(self) -> torch.Tensor:
        return torch.stack(self.values, 1)


def solve_fixed(problem, tableau: Tableau, steps, step_size, gradient, parameters, progress):
    """``steps`` equal steps of every row; outputs between their ends by the cubic Hermite interpolant."""
    if gradient == "adjoint":
        raise ValueError(
            f"gradient: expected 'autograd' or 'recorded' for the fixed method {tableau.name!r}, got 'adjoint'"
        )
    t0, t1 = problem.t0, problem.t1
    if steps is None:
        longest = float((t1 - t0).detach().abs().max()) if problem.rows else 0.0
        steps = max(1, math.ceil(longest / step_size * (1 - ON_GRID)))
    parameters = parameters_of(problem.f, parameters, gradient)
    outputs = None if problem.t_eval is None else FixedOutputs(problem, tableau, steps)
    method = plan(tableau, problem.device) if outputs is None else outputs.plan
    numbers = _progress(range(steps), progress, tableau.name)
    grid = grid_of(t0.detach(), t1.detach(), steps)
    if problem.y.numel() == 0:
        numbers, calls = (), 0
    else:
        calls = steps * (len(method.tableau.b) - method.tableau.fsal) + method.tableau.fsal
    ran = (t0 != t1).detach()
    everywhere = bool(ran.all())
    y, values = problem.y, None
    if calls and gradient == "recorded" and torch.is_grad_enabled():

        def run():
            records = []
            state, _ = _march(problem, method, grid, numbers, outputs, records)
            return state, None if outputs is None else outputs.stacked(), records

        first = torch.zeros(problem.rows, dtype=torch.int64, device=problem.device)
        first = first if outputs is None else outputs.at_start.sum(-1)
        t_eval = None if outputs is None else outputs.t_eval
        y, values = RecordedSteps.apply(
            run, method, problem.field, first, Grid, problem.y, t0, t1, t_eval, *parameters
        )  # fmt: skip
        values = None if outputs is None else values
    else:
        clock = Grid(t0, t1)
        moving = clock.moves and (torch.is_grad_enabled() or _registration.transforming())
        y, _ = _march(problem, method, clock(grid) if moving else grid, numbers, outputs, None)
        values = None if outputs is None else outputs.stacked()
    if not everywhere:  # what f says of a row that is at its end already, NaN perhaps, does not matter
        y = torch.where(rowwise(ran, y), y, problem.y)
    finite = y.detach().isfinite().reshape(problem.rows, -1).all(-1) if problem.y.numel() else ran.new_ones(ran.shape)
    status = torch.where(finite, DONE, NON_FINITE)
    count = torch.where(ran, steps, 0)
    nfe = torch.where(ran, calls, 0)
    return problem.solution(y, values, t1.detach().clone(), status, nfe, count, torch.zeros_like(count), calls)


def _march(problem, method: Plan, grid, numbers, outputs: FixedOutputs | None, records: list | None):
    """The steps: by the ops alone where no graph is wanted, since each is one call there."""
    y, field = problem.y, problem.field
    starts = grid.to(state_time_dtype(y)).unbind(0)
    k_next = None
    accepted = torch.ones(problem.rows, dtype=torch.bool, device=problem.device) if records is not None else None
    graph = torch.is_grad_enabled() or _registration.transforming()
    bare = _registration.nothing if graph else _registration.below_autograd
    for n in numbers:
        k = [field(starts[n], y) if k_next is None else k_next]
        for coefficients, used, nudge in method.stages:
            with bare():
                stage, t = STAGE(y, [k[j] for j in used], grid, n, coefficients, 0, nudge)
            k.append(field(t, stage))
        if method.tableau.fsal:
            y1, k_next = stage, k[-1]
        else:
            coefficients, used, nudge = method.solution
            with bare():
                y1 = STAGE(y, [k[j] for j in used], grid, n, coefficients, 0, nudge)[0]
        first = None
        if outputs is not None:
            outputs.step(n, y, y1, k, None, grid)
        if records is not None:
            first, last = _outputs_of(outputs, n, accepted)
            records.append(Record(y, grid[n : n + 2], accepted, first, last))
        y = y1
    return y, k_next


def _outputs_of(outputs: FixedOutputs | None, n: int, accepted):
    """For each row the first output in step n, and the one after the last."""
    if outputs is None:
        zeros = torch.zeros_like(accepted, dtype=torch.int64)
        return zeros, zeros
    before = outputs.at_start.sum(-1) + ((outputs.index >= 0) & (outputs.index < n)).sum(-1)
    return before, before + (outputs.index == n).sum(-1)


def _progress(numbers, progress, name):
    if not progress:
        return numbers
    return progress_bar()(numbers, desc=f"solve {name}", unit="step")
