"""An adaptive solve: how it starts, its loop, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .. import _registration
from ..ops.runge_kutta_stage import rowwise, state_time_dtype
from ..ops.runge_kutta_step import (
    ACCEPTED,
    CURSOR,
    DONE,
    NON_FINITE,
    REJECTED,
    RUNNING_STATUS,
    STATUS,
    T_NEXT,
    T,
)
from ._continuous import BackwardSolve, ContinuousAdjoint, shared_times
from ._gradients import Clock, Outputs, RecordedSteps, interpolate, solve_as_graph
from ._integrator import Integrator, Record, Watch, initial_step, progress_bar, refuse_vmap, set_running
from ._plan import Plan
from ._problem import Problem, Solution, parameters_of
from ._state import State


class AdaptiveSolve:
    """One adaptive solve."""

    def __init__(self, problem: Problem, plan: Plan, settings, tolerances, first_step, max_step, min_step, columns):
        self.problem, self.plan, self.settings, self.tolerances = problem, plan, settings, tolerances
        self.bounds = min_step, max_step
        self.first_step = first_step
        if first_step is not None:
            first_step = problem._time("first_step", first_step)
            if first_step.shape not in ((), (problem.rows,)) or bool((~(first_step > 0)).any()):
                raise ValueError(
                    f"first_step: expected positive numbers, one or [{problem.rows}], got {first_step.tolist()}"
                )
            self.first_step = first_step
        self.columns = columns
        self.segments = torch.tensor([[0, columns]], device=problem.device)
        self.t_eval = None if problem.t_eval is None else problem.t_eval.detach().contiguous()
        self.calls = 0

    def run(self, gradient, parameters, dense, record_steps, progress, cuda_graph) -> Solution:
        problem = self.problem
        if problem.rows == 0 or problem.y.numel() == 0:
            return self._empty(dense, record_steps)
        t0, t1 = problem.t0, problem.t1
        times_need = (
            t0.requires_grad or t1.requires_grad or (problem.t_eval is not None and problem.t_eval.requires_grad)
        )
        parameters = parameters_of(problem.f, parameters, gradient)
        if gradient == "adjoint" and not shared_times(problem):
            raise ValueError(
                "gradient: expected 'autograd' or 'recorded' where rows have outputs of their own, got 'adjoint'"
            )
        start = t0.to(state_time_dtype(problem.y))
        with torch.set_grad_enabled(torch.is_grad_enabled() and gradient == "autograd"):
            k_first = problem.field(start, problem.y)
        refuse_vmap(self.plan.tableau.name, problem.y, t0, t1, k_first)
        differentiate = _registration.transforming() or (
            torch.is_grad_enabled() and (times_need or any(x.requires_grad for x in (problem.y, k_first, *parameters)))
        )
        for name, value in (("dense", dense), ("cuda_graph", cuda_graph)):
            if value and differentiate:
                got = "a transform" if _registration.transforming() else "one that needs them"
                raise ValueError(
                    f"{name}: expected a solve without gradients (torch.no_grad(), outside of forward mode and of "
                    f"torch.func transforms), got {got}"
                )
        with torch.no_grad():
            self._start(k_first)
        integrator = self.integrator
        records: list[Record] = []
        timed = record_steps or dense
        y, failed = problem.y, None
        if differentiate:
            y, k_first, failed = self._set_aside(k_first, gradient)
        if not differentiate:
            with torch.no_grad():
                if timed:
                    self._loop(progress, lambda: records.append(integrator.recorded_step(keep_k=dense)))
                elif cuda_graph:
                    self._loop(progress, self._captured())
                else:
                    self._loop(progress, integrator.step)
            y, outputs = integrator.y, self.outputs
        elif gradient == "autograd":
            graph = None
            if problem.t_eval is not None:
                graph = Outputs(self.plan, problem.t_eval, problem.y, self.first_outputs)
            clock = Clock(t0, t1)
            watch = self._watch(progress)
            y, repeated = solve_as_graph(integrator, y, k_first, clock, graph, watch, records if timed else None)
            self.calls += repeated * self.plan.evaluations
            outputs = None if graph is None else graph.stacked()
        elif gradient == "recorded":
            y, outputs = RecordedSteps.apply(
                lambda: self._record(progress, records), self.plan, problem.field, self.first_outputs, Clock, problem.y,
                t0, t1, problem.t_eval, *parameters,
            )  # fmt: skip
            outputs = None if problem.t_eval is None else outputs
        else:
            backward = BackwardSolve(integrator, self.plan, self.settings, self.tolerances, problem.field)
            timed_records = records if timed else None
            y, outputs = ContinuousAdjoint.apply(
                lambda: self._run(progress, timed_records), backward, y, t0, t1, problem.t_eval, *parameters
            )
            outputs = None if problem.t_eval is None else outputs
        if failed is not None:
            y = torch.where(rowwise(failed, y), problem.y, y)
            integrator.control[T] = torch.where(failed, t0.detach(), integrator.control[T])
        steps = step_times(records, t0.detach()) if timed else None
        reached = integrator.control[T].clone()
        dense_output = DenseOutput(problem.state, self.plan, records, y, reached) if dense else None
        return self._solution(y, outputs, steps, dense_output)

    def _set_aside(self, k_first, gradient):
        """The start with the rows that failed at once in the place of one that runs, and which rows these are, or None.

        Nothing is returned of what they do there; but f is differentiated in them too, and 0 · NaN would spoil the
        gradients of what the rows share.
        """
        problem, integrator = self.problem, self.integrator
        status = integrator.counters[STATUS]
        failed = status == NON_FINITE
        if not bool(failed.any()):
            return problem.y, k_first, None
        with torch.no_grad():
            place = (status == RUNNING_STATUS).to(torch.int8).argmax(keepdim=True)
            for x in (integrator.y, integrator.k_first):
                x.copy_(torch.where(rowwise(failed, x), x[place], x))
            for row in (T, T_NEXT):
                integrator.control[row] = torch.where(failed, problem.t0[place], integrator.control[row])
        y = torch.where(rowwise(failed, problem.y), integrator.y, problem.y)
        if gradient == "autograd":
            k_first = problem.field(integrator.control[T].to(state_time_dtype(y)), y)
            self.calls += 1
        return y, k_first, failed

    def _solution(self, y, outputs, steps=None, dense=None) -> Solution:
        counters, control = self.integrator.counters, self.integrator.control
        accepted, rejected = counters[ACCEPTED].long(), counters[REJECTED].long()
        nfe = self.starting_calls + self.plan.evaluations * (accepted + rejected)
        return self.problem.solution(
            y, outputs, control[T].clone(), counters[STATUS], nfe, accepted, rejected, self.calls, steps, dense
        )

    def _empty(self, dense: bool, record_steps: bool) -> Solution:
        problem = self.problem
        zeros = torch.zeros(problem.rows, dtype=torch.int64, device=problem.device)
        outputs = None
        if problem.t_eval is not None:
            outputs = problem.y.unsqueeze(1).repeat_interleave(problem.t_eval.shape[-1], 1)
        t0, t1 = problem.t0.detach(), problem.t1.detach().clone()
        steps = step_times([], t0) if dense or record_steps else None
        dense_output = DenseOutput(problem.state, self.plan, [], problem.y, t1) if dense else None
        return problem.solution(problem.y, outputs, t1, zeros, zeros, zeros, zeros, 0, steps, dense_output)

    def _start(self, k_first) -> None:
        """First steps, statuses of rows that are done or hopeless, and the outputs at the start."""
        problem = self.problem
        t0, t1 = problem.t0.detach(), problem.t1.detach()
        y = problem.y.detach().clone(memory_format=torch.contiguous_format)
        k_first = k_first.detach().clone(memory_format=torch.contiguous_format)
        direction = torch.sign(t1 - t0)
        self.starting_calls = self.calls = 1
        if self.first_step is None:
            rtol, atol = (self._broadcast(x, y) for x in self.tolerances)
            h = initial_step(
                problem.field, t0, y, k_first, direction, self.plan.tableau.error_order, rtol, atol, self._norm,
                limit=(t1 - t0).abs(),
            )  # fmt: skip
            self.starting_calls = self.calls = 2
        else:
            h = self.first_step.detach().expand(problem.rows)
        low, high = self.bounds
        moves = 16 * torch.finfo(torch.float64).eps * torch.maximum(t0.abs(), t1.abs())  # less may not change t0
        h = h.detach()  # step sizes are constants, of forward mode too
        h = torch.minimum(h.nan_to_num(1e-6).clamp(low, high).maximum(moves), (t1 - t0).abs())
        M = 0 if self.t_eval is None else self.t_eval.shape[-1]
        self.outputs = None
        if self.t_eval is not None:
            self.outputs = y.new_full((problem.rows, M, *y.shape[1:]), torch.nan)
            reached = self.t_eval.expand(problem.rows, M) == t0.unsqueeze(-1)
            self.outputs = torch.where(
                reached.reshape(*reached.shape, *(1,) * (y.dim() - 1)), y.unsqueeze(1), self.outputs
            )
        self.integrator = integrator = Integrator(
            problem.field, y, k_first, self.plan, t0, t1, direction * h, self.settings, *self.tolerances, self.segments,
            problem.state.components, self.t_eval, self.outputs,
        )  # fmt: skip
        counters = integrator.counters
        finite = (y.isfinite() & k_first.isfinite()).reshape(problem.rows, -1).all(-1)
        counters[STATUS] = torch.where(direction == 0, DONE, torch.where(finite, RUNNING_STATUS, NON_FINITE))
        still = counters[STATUS] != RUNNING_STATUS
        integrator.control[T_NEXT] = torch.where(still, t0, integrator.control[T_NEXT])
        if self.t_eval is not None:
            counters[CURSOR] = reached.sum(-1)
        self.first_outputs = counters[CURSOR].clone()
        set_running(integrator)

    def _broadcast(self, tolerance, y):
        """A tolerance [1 or B, 1 or D] against the packed state, in its arithmetic."""
        if tolerance.shape == (1, 1):
            return tolerance[0, 0].to(state_time_dtype(y))
        if tolerance.shape[1] == 1:
            return rowwise(tolerance[:, 0], y).to(state_time_dtype(y))
        wide = tolerance.reshape(tolerance.shape[0], *self.problem.y0.shape[1:]).to(state_time_dtype(y))
        return wide.unsqueeze(-1) if self.problem.state.complex else wide

    def _norm(self, x):
        """RMS of each row's controlled numbers, complex ones by their absolute value."""
        x = x.reshape(self.problem.rows, -1)[:, : self.columns * self.problem.state.components]
        return (x.to(torch.float64).square().sum(-1) / self.columns).sqrt()

    def _watch(self, progress) -> Callable[[], int]:
        watch = Watch(self.integrator.counters)
        if not progress:
            return self._counted(watch.running)
        bar = progress_bar()(total=self.problem.rows, desc=f"solve {self.plan.tableau.name}", unit="row")

        def running() -> int:
            left = watch.running()
            bar.update(self.problem.rows - left - bar.n)
            if not left:
                bar.close()
            return left

        return self._counted(running)

    def _counted(self, running: Callable[[], int]) -> Callable[[], int]:
        def counted() -> int:
            left = running()
            if left:
                self.calls += self.plan.evaluations
            return left

        return counted

    def _loop(self, progress, step: Callable) -> None:
        running = self._watch(progress)
        while running():
            step()

    def _run(self, progress, records: list[Record] | None):
        if records is None:
            self._loop(progress, self.integrator.step)
        else:
            self._loop(progress, lambda: records.append(self.integrator.recorded_step()))
        return self.integrator.y, self.outputs

    def _record(self, progress, records: list[Record]):
        """The solve for :class:`RecordedSteps`: rows that every record leaves out cost nothing there."""
        self._loop(progress, lambda: records.append(self.integrator.recorded_step()))
        records[:] = [record for record in records if bool(record.accepted.any())]
        return self.integrator.y, self.outputs, records

    def _captured(self) -> Callable:
        """A step as a CUDA graph. The first steps run plainly, on a side stream, as capture wants it."""
        if self.problem.device.type != "cuda":
            raise ValueError(f"cuda_graph: expected y0 on a CUDA device, got {self.problem.device}")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.integrator.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.calls += 2 * self.plan.evaluations
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.integrator.step()
        return graph.replay


def step_times(records: Sequence[Record], t0: torch.Tensor) -> torch.Tensor:
    """[B, S]: the start and the ends of each row's accepted steps, packed to the left."""
    ends = torch.stack([t0, *(torch.where(r.accepted, r.times[1], torch.nan) for r in records)], 1)
    order = ends.isnan().to(torch.int8).sort(dim=1, stable=True).indices
    packed = ends.gather(1, order)
    return packed[:, : int((~packed.isnan()).any(0).sum())]


class DenseOutput:
    """The interpolants of all steps, found by time."""

    def __init__(self, state: State, plan: Plan, records: Sequence[Record], final, reached):
        self.state, self.plan, self.records, self.final, self.reached = state, plan, records, final, reached

    def __call__(self, t):
        final = self.final
        t = torch.as_tensor(t, dtype=torch.float64, device=final.device)
        if t.shape not in ((), (final.shape[0],)):
            raise ValueError(f"t: expected a number or shape [{final.shape[0]}], got {list(t.shape)}")
        t = t.expand(final.shape[0])
        result = torch.full_like(final, torch.nan)
        for record in self.records:
            low, high = torch.minimum(*record.times), torch.maximum(*record.times)
            inside = record.accepted & (t >= low) & (t <= high)
            value = interpolate(self.plan, record.y, record.k, record.times, t)
            result = torch.where(rowwise(inside, final), value, result)
        result = torch.where(rowwise(t == self.reached, final), final, result)
        return self.state.unpack(result)
