"""`solve`: many initial value problems at once, each with a step size of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .. import _checks, _registration
from ..ops.runge_kutta_stage import rowwise, state_time_dtype
from ..ops.runge_kutta_step import ACCEPTED, CURSOR, DONE, MAX_STEPS, NON_FINITE, REJECTED, RUNNING_STATUS, STATUS, T
from ._fixed import solve_fixed
from ._gradients import Clock, Outputs, RecordedSteps, interpolate, solve_as_graph
from ._integrator import Integrator, Record, Watch, initial_step, progress_bar, set_running
from ._plan import Plan, plan, settings_tensor
from ._state import State
from .tableaus import ADAPTIVE, FIXED, hermite

STATUSES = {-1: "running", 0: "done", 1: "reached max_steps", 2: "step size underflow", 3: "non-finite"}
GRADIENTS = ("autograd", "recorded", "adjoint")


@dataclass(frozen=True)
class PID:
    r"""Step control h ← h · clip(safety · r^(−(p+i+d)/q) · r₋₁^((p+2d)/q) · r₋₂^(−d/q), min_factor, max_factor).

    r is the error ratio of the step, r₋₁ and r₋₂ those of the accepted steps before it, q the method's error order. After a
    rejection the next step does not grow. (p, i, d) = (0, 1, 0) is the elementary controller; (0.4, 0.3, 0) is smoother.

    Source: Söderlind, "Digital filters in adaptive time-stepping", ACM TOMS 29 (2003).
    """

    p: float = 0.0
    i: float = 1.0
    d: float = 0.0
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0

    def __post_init__(self):
        for name in ("p", "i", "d"):
            _checks.number(name, getattr(self, name))
        _checks.number("safety", self.safety, 0.0, 1.0, open_low=True)
        _checks.number("min_factor", self.min_factor, 0.0, 1.0, open_low=True)
        _checks.number("max_factor", self.max_factor, 1.0)

    def exponents(self, q: int) -> dict[str, float]:
        return {"beta1": (self.p + self.i + self.d) / q, "beta2": -(self.p + 2 * self.d) / q, "beta3": self.d / q}


CONTROLLERS = {"I": PID(), "PI": PID(0.4, 0.3), "PID": PID(1 / 18, 1 / 9, 1 / 18)}


@dataclass(frozen=True)
class Solution:
    """What :func:`solve` returns; B rows, one for each sample.

    Attributes:
        y: the state at ``t``, [B, …]; with ``t_eval`` the states there, [B, T, …], NaN where a row has no such time or did
            not reach it. A tuple of them for a tuple of states.
        t: float64 [B], the time reached.
        status: int8 [B]: 0 done, 1 reached max_steps, 2 step size underflow, 3 non-finite.
        nfe, accepted, rejected: int64 [B]: calls of f while the row ran, and its steps.
        calls: calls of f for the batch.
        steps: float64 [B, S], the times at which a row's steps ended, from its start on, NaN after the last; None unless
            ``record_steps`` or ``dense``.
    """

    y: torch.Tensor | tuple[torch.Tensor, ...]
    t: torch.Tensor
    status: torch.Tensor
    nfe: torch.Tensor
    accepted: torch.Tensor
    rejected: torch.Tensor
    calls: int
    steps: torch.Tensor | None = None
    _dense: Callable | None = field(default=None, repr=False)

    def __call__(self, t) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The solution at time t, a number or [B], by the method's interpolant: [B, …]; NaN beyond what a row covered.

        Needs ``solve(..., dense=True)``.
        """
        if self._dense is None:
            raise ValueError("dense: expected solve(..., dense=True) for a solution that is called, got dense=False")
        return self._dense(t)

    def raise_for_status(self) -> Solution:
        """This solution, or a RuntimeError that says which rows did not reach their end and why."""
        if bool((self.status != DONE).any()):
            parts = []
            for code in range(1, 4):
                rows = torch.where(self.status == code)[0].tolist()
                if rows:
                    shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
                    parts.append(f"{len(rows)} {STATUSES[code]} (rows {shown})")
            raise RuntimeError(f"solve: {len(self.status)} rows, of which " + "; ".join(parts))
        return self


def solve(
    f: Callable,
    y0: torch.Tensor | tuple[torch.Tensor, ...],
    t_span=(0.0, 1.0),
    t_eval=None,
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
    progress: bool = False,
    cuda_graph: bool = False,
) -> Solution:
    r"""Solve dy_b/dt = f(t, y)_b for every sample b of a batch, each with its own step size, times and end.

    An adaptive method takes a step of every unfinished row at once. Row b's step is accepted where
    RMS(err_b / (atol + rtol·max(\|y_b\|, \|y_b,new\|))) ≤ 1, over that row's numbers alone; its size follows ``controller``.
    A row at its end, or one that failed, stands still while the others go on; no row's values depend on another's, as long
    as f treats rows apart. Times are float64, those given to f float32 (float64 for float64 states).

    Args:
        f: f(t, y) → dy/dt with the structure, shape and dtype of y; t is ``[B]``.
        y0: ``[B, …]``, float32, float64, bfloat16, float16, complex64 or complex128, or a tuple of such tensors.
        t_span: (t₀, t₁), each a number or ``[B]``, or a tensor ``[2]`` or ``[B, 2]``; t₁ < t₀ integrates backward, row by row.
        t_eval: times to return the state at, ``[T]`` or ``[B, T]``, in the order of integration and within t_span; rows
            with fewer end in NaN.
        method: "dopri5", "tsit5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"; with ``steps`` or ``step_size`` "euler",
            "midpoint", "heun2", "heun3", "ralston", "rk4", "rk4_38".
        rtol, atol: not negative; a number, ``[B]``, or anything that broadcasts to the shape of y0 (a single tensor).
        controller: "I", "PI", "PID" or a :class:`PID`.
        first_step: positive size of the first step, a number or ``[B]``; by Hairer's rule where None, for one call of f.
        min_step, max_step: bounds of the step size; a row that must go below min_step stops with status 2.
        max_steps: steps, accepted or not, after which a row stops with status 1.
        steps, step_size: for the fixed methods, the number of steps of every row, or a size that the longest row's steps
            do not exceed.
        gradient: "autograd" records every operation; "recorded" keeps one state a step and takes the accepted steps again in
            the backward, with equal gradients; "adjoint" integrates the adjoint equation backward in constant memory.
        parameters: what "recorded" and "adjoint" differentiate besides y0 and times; those of f where f is a Module.
        dense: let the result be called at any time (keeps every step's values of f).
        record_steps: return the times of the steps.
        progress: show a bar of finished rows (needs tqdm).
        cuda_graph: capture a step in a CUDA graph and replay it; f must be capturable (fixed shapes, no host reads).

    Returns: a :class:`Solution`. Without gradients nothing waits for a GPU within the loop; "autograd" reads a few flags a step.

    Raises: TypeError, ValueError naming the argument; a row's failure is its ``status``, not an exception.

    Source: Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", II.4–II.6; per-sample control as in
    Lienen and Günnemann, "torchode" (2022).
    """
    problem = _Problem(f, y0, t_span, t_eval)
    _check_options(method, gradient, min_step, max_step, max_steps, steps, step_size, dense, record_steps, cuda_graph)
    if method in FIXED:
        return solve_fixed(problem, FIXED[method], steps, step_size, gradient, parameters, progress)
    if not isinstance(controller, PID):
        _checks.choice("controller", controller, CONTROLLERS)
        controller = CONTROLLERS[controller]
    tableau = ADAPTIVE[method]
    settings = settings_tensor(
        problem.device, safety=controller.safety, min_factor=controller.min_factor, max_factor=controller.max_factor,
        accepted_floor=controller.min_factor, after_rejection_cap=1.0, min_step=min_step, max_step=max_step, clip=1.0,
        step_limit=max_steps, snap=1e-10, **controller.exponents(tableau.error_order),
    )  # fmt: skip
    tolerances = _tolerance("rtol", rtol, problem), _tolerance("atol", atol, problem)
    return _Adaptive(problem, plan(tableau, problem.device), settings, tolerances, first_step, max_step, min_step).run(
        gradient, parameters, dense, record_steps, progress, cuda_graph
    )


class _Problem:
    """The checked arguments of a solve: packed state, times as float64 [B] and [T] or [B, T] on its device."""

    def __init__(self, f, y0, t_span, t_eval):
        if not callable(f):
            raise TypeError(f"f: expected a callable f(t, y), got {type(f).__name__}")
        self.f, self.y0 = f, y0
        self.state = State("y0", y0, 1)
        self.rows, self.device = self.state.rows, self.state.device
        self.field = self.state.field(f)
        self.y = self.state.pack(y0)
        self.t0, self.t1 = self._span(t_span)
        self.t_eval = None if t_eval is None else self._outputs(t_eval)

    def _time(self, name: str, value) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            if not value.is_floating_point() and value.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
            if value.device != self.device and value.device.type != "cpu":
                raise ValueError(f"{name}: expected device {self.device}, that of y0, or the CPU, got {value.device}")
            return value.to(self.device, torch.float64)
        try:
            return torch.as_tensor(value, dtype=torch.float64).to(self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: expected real numbers or a tensor of them, got {type(value).__name__}") from error

    def _span(self, t_span) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(t_span, torch.Tensor):
            if t_span.shape not in ((2,), (self.rows, 2)):
                raise ValueError(f"t_span: expected shape [2] or [{self.rows}, 2], got {list(t_span.shape)}")
            t_span = t_span.unbind(-1)
        if not isinstance(t_span, (tuple, list)) or len(t_span) != 2:
            got = f"{len(t_span)} values" if isinstance(t_span, (tuple, list)) else type(t_span).__name__
            raise ValueError(f"t_span: expected a pair (t0, t1), got {got}")
        ends = []
        for name, value in zip(("t_span[0]", "t_span[1]"), t_span, strict=True):
            end = self._time(name, value)
            if end.shape not in ((), (self.rows,)):
                raise ValueError(f"{name}: expected a number or shape [{self.rows}], got shape {list(end.shape)}")
            if not bool(end.isfinite().all()):
                raise ValueError(f"{name}: expected finite times, got {end.tolist()}")
            ends.append(end.expand(self.rows))
        return ends[0], ends[1]

    def _outputs(self, t_eval) -> torch.Tensor:
        t_eval = self._time("t_eval", t_eval)
        if t_eval.dim() not in (1, 2) or (t_eval.dim() == 2 and t_eval.shape[0] != self.rows) or not t_eval.shape[-1]:
            raise ValueError(
                f"t_eval: expected shape [T] or [{self.rows}, T] with at least one time, got {list(t_eval.shape)}"
            )
        given = t_eval.detach()
        missing = given.isnan()
        if bool((missing[..., :-1] & ~missing[..., 1:]).any()):
            raise ValueError("t_eval: expected NaN only after a row's last time, got a number after NaN")
        direction = torch.sign(self.t1 - self.t0).detach().unsqueeze(-1)
        if bool(((given[..., 1:] - given[..., :-1]) * direction < 0).any()):
            raise ValueError(
                "t_eval: expected times in the order of integration, from t_span[0] to t_span[1], got others"
            )
        outside = ((given - self.t0.detach().unsqueeze(-1)) * direction < 0) | (
            (given - self.t1.detach().unsqueeze(-1)) * direction > 0
        )
        if bool(outside.any()):
            raise ValueError(
                f"t_eval: expected times within t_span, got {given.expand(outside.shape)[outside][0].tolist()} outside it"
            )
        return t_eval

    def solution(self, y, outputs, t, status, nfe, accepted, rejected, calls, steps=None, dense=None) -> Solution:
        y = self.state.unpack(y if outputs is None else outputs)
        return Solution(y, t, status.to(torch.int8), nfe, accepted, rejected, calls, steps, dense)


def _check_options(method, gradient, min_step, max_step, max_steps, steps, step_size, dense, record_steps, cuda_graph):
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
        for name, value in (("dense", dense), ("record_steps", record_steps), ("cuda_graph", cuda_graph)):
            if value:
                raise ValueError(f"{name}: expected an adaptive method, got {method!r}")
    else:
        for name, value in (("steps", steps), ("step_size", step_size)):
            if value is not None:
                raise ValueError(f"{name}: expected None for the adaptive method {method!r}, got {value}")


def _tolerance(name: str, value, problem: _Problem) -> torch.Tensor:
    """float64 [1 or B, 1 or D]."""
    if not isinstance(value, torch.Tensor):
        return torch.full((1, 1), _checks.number(name, value, 0.0), dtype=torch.float64, device=problem.device)
    if value.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does")
    if bool((~(value >= 0)).any()):
        raise ValueError(f"{name}: expected no negative tolerance, got {value.min().tolist()}")
    value = value.to(problem.device, torch.float64)
    if value.dim() == 0:
        return value.reshape(1, 1)
    if value.shape == (problem.rows,):
        return value.reshape(-1, 1)
    if problem.state.is_tuple:
        raise ValueError(f"{name}: expected a number or shape [{problem.rows}] for a tuple y0, got {list(value.shape)}")
    try:
        wide = value.broadcast_to(problem.y0.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: expected shape [{problem.rows}] or one that broadcasts to {list(problem.y0.shape)}, that of y0, "
            f"got {list(value.shape)}"
        ) from error
    return wide.reshape(problem.rows, -1).contiguous()


class _Adaptive:
    """One adaptive solve."""

    def __init__(self, problem: _Problem, plan: Plan, settings, tolerances, first_step, max_step, min_step):
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
        state = problem.state
        columns = state.columns // state.components
        self.segments = torch.tensor([[0, columns]], device=problem.device)
        self.t_eval = None if problem.t_eval is None else problem.t_eval.detach().contiguous()
        self.calls = 0

    def run(self, gradient, parameters, dense, record_steps, progress, cuda_graph) -> Solution:
        problem = self.problem
        if problem.rows == 0 or problem.y.numel() == 0:
            return self._empty()
        t0, t1 = problem.t0, problem.t1
        times_need = (
            t0.requires_grad or t1.requires_grad or (problem.t_eval is not None and problem.t_eval.requires_grad)
        )
        parameters = _parameters(problem.f, parameters, gradient)
        start = t0.to(state_time_dtype(problem.y))
        with torch.set_grad_enabled(torch.is_grad_enabled() and gradient == "autograd"):
            k_first = problem.field(start, problem.y)
        differentiate = torch.is_grad_enabled() and (
            times_need or problem.y.requires_grad or k_first.requires_grad or any(p.requires_grad for p in parameters)
        )
        for name, value in (("dense", dense), ("cuda_graph", cuda_graph)):
            if value and differentiate:
                raise ValueError(
                    f"{name}: expected a solve without gradients (torch.no_grad()), got one that needs them"
                )
        with torch.no_grad():
            self._start(k_first)
        integrator = self.integrator
        records: list[Record] = []
        steps = None
        if not differentiate:
            with torch.no_grad():
                if dense or record_steps:
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
            y = solve_as_graph(integrator, problem.y, k_first, clock, graph, watch)
            outputs = None if graph is None else graph.stacked()
        elif gradient == "recorded":
            y, outputs = RecordedSteps.apply(
                lambda: self._record(progress, records), self.plan, problem.field, self.first_outputs, Clock, problem.y, t0, t1,
                problem.t_eval, *parameters,
            )  # fmt: skip
            outputs = None if problem.t_eval is None else outputs
        else:
            from ._continuous import solve_adjoint

            return solve_adjoint(self, parameters, progress)
        if record_steps and records or dense:
            steps = _step_times(records, t0.detach())
        dense_output = _Dense(problem.state, self.plan, records, integrator) if dense else None
        return self._solution(y, outputs, steps, dense_output)

    def _solution(self, y, outputs, steps=None, dense=None) -> Solution:
        counters, control = self.integrator.counters, self.integrator.control
        accepted, rejected = counters[ACCEPTED].long(), counters[REJECTED].long()
        nfe = self.starting_calls + self.plan.evaluations * (accepted + rejected)
        return self.problem.solution(
            y, outputs, control[T].clone(), counters[STATUS], nfe, accepted, rejected, self.calls, steps, dense
        )

    def _empty(self) -> Solution:
        problem = self.problem
        zeros = torch.zeros(problem.rows, dtype=torch.int64, device=problem.device)
        outputs = None
        if problem.t_eval is not None:
            outputs = problem.y.unsqueeze(1).repeat_interleave(problem.t_eval.shape[-1], 1)
        return problem.solution(problem.y, outputs, problem.t1, zeros, zeros, zeros, zeros, 0)

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
                problem.field, t0, y, k_first, direction, self.plan.tableau.error_order, rtol, atol, self._norm
            )
            self.starting_calls = self.calls = 2
        else:
            h = self.first_step.detach().expand(problem.rows)
        low, high = self.bounds
        h = torch.minimum(h.nan_to_num(1e-6).clamp(low, high), (t1 - t0).abs())
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
        integrator.control[1] = torch.where(still, t0, integrator.control[1])
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
        """RMS of each row, complex numbers by their absolute value."""
        columns = self.problem.state.columns // self.problem.state.components
        return (x.reshape(self.problem.rows, -1).to(torch.float64).square().sum(-1) / columns).sqrt()

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


def _parameters(f, parameters, gradient) -> tuple[torch.Tensor, ...]:
    if parameters is not None:
        parameters = tuple(parameters)
        for i, parameter in enumerate(parameters):
            _checks.tensor(f"parameters[{i}]", parameter)
        return tuple(p for p in parameters if p.requires_grad)
    if gradient == "autograd":
        return ()
    if isinstance(f, torch.nn.Module):
        return tuple(p for p in f.parameters() if p.requires_grad)
    if torch.is_grad_enabled():
        raise ValueError(
            f"parameters: expected the tensors that gradient={gradient!r} is to differentiate, or () for none, since f is "
            "not a torch.nn.Module; got None"
        )
    return ()


def _step_times(records: Sequence[Record], t0: torch.Tensor) -> torch.Tensor:
    """[B, S]: the start and the ends of each row's accepted steps, packed to the left."""
    ends = torch.stack([t0, *(torch.where(r.accepted, r.times[1], torch.nan) for r in records)], 1)
    order = ends.isnan().to(torch.int8).sort(dim=1, stable=True).indices
    packed = ends.gather(1, order)
    return packed[:, : int((~packed.isnan()).sum(1).max())]


class _Dense:
    """The interpolants of all steps, found by time."""

    def __init__(self, state: State, plan: Plan, records: Sequence[Record], integrator: Integrator):
        self.state, self.plan = state, plan
        self.final, self.reached = integrator.y, integrator.control[T].clone()
        self.records = records

    def __call__(self, t):
        final = self.final
        t = torch.as_tensor(t, dtype=torch.float64, device=final.device)
        if t.shape not in ((), (final.shape[0],)):
            raise ValueError(f"t: expected a number or shape [{final.shape[0]}], got {list(t.shape)}")
        t = t.expand(final.shape[0])
        result = torch.where(rowwise(t == self.reached, final), final, torch.nan)
        for record in self.records:
            low, high = torch.minimum(*record.times), torch.maximum(*record.times)
            inside = record.accepted & (t >= low) & (t <= high)
            value = interpolate(self.plan, record.y, record.k, record.times, t)
            result = torch.where(rowwise(inside, final), value, result)
        return self.state.unpack(result)


__all__ = ["MAX_STEPS", "PID", "Solution", "solve"]
