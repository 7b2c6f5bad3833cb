"""Adaptive solves with one step size for the whole state: torchdiffeq's arithmetic on this library's kernels."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .. import _registration
from ..ops.runge_kutta_stage import nudged
from ..ops.runge_kutta_step import CURSOR, DONE, NON_FINITE, RATIO, RUNNING_STATUS, STATUS, T_NEXT, T
from ._gradients import graph_step, interpolate
from ._integrator import Integrator, Watch, initial_step, refuse_vmap, set_running
from ._odeint_inputs import AdaptiveOptions, Problem
from ._plan import STAGE, Plan, plan, settings_tensor
from .tableaus import TORCHDIFFEQ

FAR = 1e12  # an end that an open-ended solve does not reach


class Step(NamedTuple):
    """An accepted step: the state and the values of f in it, its times as a tensor [2] and on the host."""

    y: torch.Tensor
    k: list[torch.Tensor]
    times: torch.Tensor
    t: float
    t_next: float


def value_at(plan: Plan, step: Step, t: torch.Tensor) -> torch.Tensor:
    """The method's interpolant within a step, at a 0-d t in float64."""
    if t.requires_grad or step.times.requires_grad or _registration.transforming():
        return interpolate(plan, step.y, step.k, step.times, t)
    h = step.t_next - step.t
    theta = (t - step.t) / h if h else torch.zeros_like(t)
    powers = theta ** torch.arange(1, plan.interpolant.shape[1] + 1, device=t.device)
    used = [0, *plan.used]
    weights = torch.cat([t.new_zeros(1), (plan.interpolant @ powers)[used]]).unsqueeze(0)
    return STAGE(step.y, [step.k[j] for j in used], step.times, 0, weights, 0, 0)[0]


def overwritten(k: Sequence[torch.Tensor]) -> bool:
    """Whether f returns the same memory at every call, so that a value must be copied before the next."""
    if _registration.transforming():  # tensors without memory of their own
        return False
    pointers = [k_j.data_ptr() for k_j in k]
    return len(set(pointers)) < len(pointers)


def copying(field: Callable) -> Callable:
    return lambda t, y: field(t, y).clone()


class SharedStep:
    """An adaptive solve under way.

    Without gradients and without options that need the host, ``run`` leaves the whole loop to :class:`Integrator`. Else
    ``attempt`` takes one step after the other, on tensors that autograd may record, and the integrator only decides.
    """

    def __init__(self, problem: Problem, open_ended: bool = False):
        options: AdaptiveOptions = problem.options
        self.problem, self.options, self.field = problem, options, problem.field
        self.plan = plan(TORCHDIFFEQ[problem.method], problem.y.device, nudged=True)
        y, t = problem.y, problem.t
        self.t = t.to(torch.float64)
        t0 = self.t.detach()[0]
        self.solution = None if open_ended else y.new_empty(len(problem.values), *y.shape)
        if self.solution is not None:
            self.solution[0] = y.detach()  # before f, which may overwrite what it is given
        self.f0 = self.field(t[0].to(problem.time_dtype), y)
        refuse_vmap(problem.method, y, t, self.f0)
        k_first = self.f0.detach().clone(memory_format=torch.contiguous_format)
        with_graph = _registration.transforming() or _registration.requires_grad(y, t, self.f0)
        start = y.detach().clone(memory_format=torch.contiguous_format)
        size = self._first_size(t0, start, k_first)
        first, last = problem.values[0], problem.values[-1]
        end = first + problem.direction * FAR * max(1.0, abs(first)) if open_ended else last
        settings = settings_tensor(
            y.device, safety=options.safety, min_factor=options.dfactor, max_factor=options.ifactor, accepted_floor=1.0,
            after_rejection_cap=options.ifactor, beta1=1 / self.plan.tableau.error_order, min_step=options.min_step,
            max_step=options.max_step, step_limit=math.inf, accept_at_min_step=1.0,
        )  # fmt: skip
        self.integrator = Integrator(
            self.field, start, k_first, self.plan, t0, torch.full_like(t0, end), problem.direction * size, settings,
            problem.rtol, problem.atol, problem.segment_tensor(), problem.layout.components,
            None if open_ended else self.t.detach(), self.solution,
        )  # fmt: skip
        set_running(self.integrator)
        if first + problem.direction * size == first:
            self._fail(size)
        self.with_graph = with_graph
        # What `attempt` works on: tensors that are never overwritten.
        self.y, self.k_first = (y, self.f0) if with_graph else (start.clone(), k_first.clone())
        # All times move with t[0], up to the first that is prescribed.
        self.shift = self.t[0] - t0 if with_graph else None
        self.last: Step | None = None
        self.first_attempt = True
        self.stops = self._stops()

    def _first_size(self, t0, y, k_first) -> float:
        problem, options = self.problem, self.options
        size = options.first_step
        if size is None:
            rtol, atol = problem.packed_tolerance(problem.rtol), problem.packed_tolerance(problem.atol)
            size = initial_step(
                lambda t, y: self.field(t, y).detach(), t0, y, k_first, problem.direction,
                self.plan.tableau.error_order, rtol, atol, problem.packed_norm, problem.magnitude,
            ).tolist()  # fmt: skip
        return min(max(size if math.isfinite(size) else options.min_step, options.min_step), options.max_step)

    def _stops(self) -> tuple[list[float], frozenset[float]]:
        """Times in the order of integration that steps end at, and those among them where f jumps."""
        start, direction = self.problem.values[0], self.problem.direction
        kinds = []
        for given in (self.options.step_t, self.options.jump_t):
            times = [] if given is None else torch.as_tensor(given, dtype=torch.float64).reshape(-1).tolist()
            kinds.append([t for t in times if (t - start) * direction >= 0])
        both = [*kinds[0], *kinds[1]]
        if len(set(both)) < len(both):
            raise ValueError(
                f"step_t, jump_t: expected no repeated elements in and between them, got {kinds[0]}, {kinds[1]}"
            )
        return sorted(direction * t for t in both), frozenset(kinds[1])

    @property
    def plain_loop(self) -> bool:
        """Whether nothing needs the host between steps."""
        problem = self.problem
        return not (
            self.with_graph
            or problem.callbacks
            or problem.norm is not None
            or self.stops[0]
            or self.options.max_num_steps < AdaptiveOptions._field_defaults["max_num_steps"]
        )

    def run(self) -> torch.Tensor:
        """The packed solution at ``t``, [T, …]."""
        values = [self.problem.y if self.with_graph else self.solution[0]]
        if self.plain_loop:
            self.integrator.counters[CURSOR] = 1
            if self._loop():
                return self.solution
            # f has begun to depend on something that requires a gradient: go on from here as a graph.
            values += self.solution[1 : int(self.integrator.counters[CURSOR])].unbind()
            self.y, self.k_first = self.integrator.y.clone(), self.integrator.k_first.clone()
            self.with_graph = True
        for m in range(len(values), len(self.problem.values)):
            self.advance(self.problem.values[m])
            values.append(value_at(self.plan, self.last, self.t[m]))
        return torch.stack(values)

    def _loop(self) -> bool:
        """The loop without the host, from the first step; False where a value of f requires a gradient."""
        integrator = self.integrator
        stages, finish, running = integrator.stages, integrator.finish, Watch(integrator.counters).running
        may_require = torch.is_grad_enabled()
        k = stages()
        if overwritten([self.f0, *k[1:]]):
            self.field = integrator.field = copying(self.field)
            k = stages()
        self.first_attempt = False
        self.f0 = None
        while True:
            if may_require and any(k_j.requires_grad for k_j in k):
                return False
            finish(k)
            if not running():
                break
            k = stages()
        if int(integrator.counters[STATUS]) != DONE:
            self._fail()
        return True

    def advance(self, t: float) -> None:
        """Steps until one ends at t or beyond."""
        limit, n = self.options.max_num_steps, 0
        while (t - self.reached()) * self.problem.direction > 0:
            if n >= limit:
                raise AssertionError(f"max_num_steps exceeded ({n}>={limit})")
            self.attempt()
            n += 1

    def reached(self) -> float:
        return self.problem.values[0] if self.last is None else self.last.t_next

    def attempt(self) -> bool:
        """One step, on tensors that autograd records where it is asked to; whether it was accepted."""
        integrator, problem = self.integrator, self.problem
        control = integrator.control
        if int(integrator.counters[STATUS]) != RUNNING_STATUS:
            self._fail()
        t, t_next = control[: T_NEXT + 1].tolist()
        callback = problem.callbacks.get("callback_step")
        if callback is not None:
            callback(*self._seen(t, t_next))
        stop = self._stop_within(t, t_next)
        if stop is not None:
            t_next = stop
            control[T_NEXT] = stop
        times = control[: T_NEXT + 1].clone()
        if self.shift is not None:
            times = torch.stack([times[0] + self.shift, times[1] + (0.0 if stop is not None else self.shift)])
        y1, k = self._graph_step(times)
        values = [k_j.detach() for k_j in k]
        integrator.finish(values, None if problem.norm is None else self._ratio(values, y1.detach()))
        accepted = control[T].tolist() != t
        callback = problem.callbacks.get("callback_accept_step" if accepted else "callback_reject_step")
        if callback is not None:
            callback(*self._seen(t, t_next))
        if accepted:
            self.last = Step(self.y, k, times, t, t_next)
            self.y, self.k_first = y1, k[-1]
            if stop is not None:
                self.shift = None
            if stop in self.stops[1]:
                self._jump(times[1])
        return accepted

    def _graph_step(self, times):
        y1, k = graph_step(self.plan, self.field, self.y, self.k_first, times)
        if self.first_attempt and overwritten([self.f0, *k[1:]]):
            self.field = copying(self.field)
            y1, k = graph_step(self.plan, self.field, self.y, self.k_first, times)
        self.first_attempt, self.f0 = False, None
        return y1, k

    def _seen(self, t: float, t_next: float):
        """What callbacks are shown."""
        dtype = torch.promote_types(self.options.dtype, self.problem.time_dtype)
        t, dt = torch.tensor([t, abs(t_next - t)], dtype=dtype, device=self.y.device)
        return t, self.y, dt

    def _stop_within(self, t: float, t_next: float) -> float | None:
        """The first of the prescribed times in a step, its end included."""
        order, _ = self.stops
        direction = self.problem.direction
        i = bisect.bisect_right(order, direction * t)
        return direction * order[i] if i < len(order) and order[i] <= direction * t_next else None

    def _jump(self, t: torch.Tensor) -> None:
        """f jumps here: take its value on the far side."""
        direction = t.new_full((), self.problem.direction)
        self.k_first = self.field(nudged(t.to(self.problem.time_dtype), direction), self.y)
        self.integrator.k_first.copy_(self.k_first.detach())

    def _ratio(self, k: list[torch.Tensor], y1: torch.Tensor) -> torch.Tensor:
        """The error ratio by the user's norm."""
        problem, integrator = self.problem, self.integrator
        weights, used = self._error_weights()
        with _registration.below_autograd():
            zero = torch.zeros_like(y1)
            error = STAGE(zero, [k[j] for j in used], integrator.control, 0, weights, 0, 0)[0]
        largest = torch.maximum(problem.magnitude(integrator.y), problem.magnitude(y1))
        tolerance = problem.packed_tolerance(problem.atol) + problem.packed_tolerance(problem.rtol) * largest
        return problem.packed_norm(error / tolerance).detach().to(torch.float64)

    def _error_weights(self) -> tuple[torch.Tensor, list[int]]:
        used = [0, *self.plan.used]
        error = self.plan.weights[1]
        return torch.cat([error.new_zeros(1), error]).unsqueeze(0), used

    def _fail(self, size: float | None = None) -> None:
        """Raise what torchdiffeq raises where a solve cannot go on."""
        integrator = self.integrator
        y, status = integrator.y, int(integrator.counters[STATUS])
        t, ratio = (integrator.control[i].tolist() for i in (T, RATIO))
        if status == DONE:
            raise RuntimeError(f"event_fn: expected it to change its sign, but it has not up to t = {t}")
        if not bool(y.isfinite().all()):
            raise AssertionError(f"non-finite values in state `y`: {self.problem.layout.unpack(y)}")
        if status == NON_FINITE or not bool(integrator.k_first.isfinite().all()):
            raise AssertionError(
                f"non-finite values in state `y`: func or the step from t = {t} gives them, however short"
            )
        size = "" if size is None else f" {size}"
        raise AssertionError(
            f"underflow in dt{size}: no step from t = {t} is short enough, the last error ratio is {ratio}"
        )
