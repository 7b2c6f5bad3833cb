"""The loop of an adaptive solve: stages, the op that decides, and how the host learns that no row is left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import _registration
from ..ops.runge_kutta_stage import rowwise, state_time_dtype
from ..ops.runge_kutta_step import (
    ACCEPTED,
    CONTROL,
    COUNTERS,
    CURSOR,
    END,
    RUNNING,
    RUNNING_STATUS,
    STATUS,
    T_NEXT,
    T_PREVIOUS,
    T,
)
from ._plan import STAGE, STEP, Plan

RUN_AHEAD = 2  # steps that the host may be ahead of what it knows of the device


class Record(NamedTuple):
    """A step of all rows: where each began and was to end, and whether it did; rows [B] or one for all []."""

    y: torch.Tensor
    times: torch.Tensor  # [2] or [2, B]
    accepted: torch.Tensor  # bool
    first_output: torch.Tensor  # index of the first output in this step
    last_output: torch.Tensor  # and after the last
    k: tuple[torch.Tensor, ...] = ()


class Integrator:
    """An adaptive solve under way, without gradients.

    Args:
        field: f(t, packed state); t has the shape of ``t0``.
        y: the packed state; overwritten.
        k_first: f there; overwritten.
        plan: the method.
        t0, t1, h: float64 ``[]`` (one step size for all) or ``[B]``: start, end, first step with its sign.
        settings, rtol, atol, segments, components, t_eval, solution: as the op takes them.
    """

    def __init__(
        self, field: Callable, y, k_first, plan: Plan, t0, t1, h, settings, rtol, atol, segments, components,
        t_eval=None, solution=None,
    ):  # fmt: skip
        self.field, self.y, self.k_first, self.plan = field, y, k_first, plan
        self.control = torch.ones(CONTROL, *t0.shape, dtype=torch.float64, device=y.device)  # errors begin at 1
        self.control[T] = self.control[T_PREVIOUS] = t0
        self.control[T_NEXT] = t0 + h
        self.control[END] = t1
        self.counters = torch.zeros(COUNTERS, *t0.shape, dtype=torch.int32, device=y.device)
        self.counters[STATUS] = RUNNING_STATUS
        self.constants = plan.weights, settings, rtol, atol, segments, components
        self.outputs = t_eval, solution

    def stages(self) -> list[torch.Tensor]:
        """The values of f in a step."""
        y, control, field = self.y, self.control, self.field
        k = [self.k_first]
        for coefficients, used, nudge in self.plan.stages:
            with _registration.below_autograd():
                stage, t = STAGE(y, [k[j] for j in used], control, 0, coefficients, 0, nudge)
            k.append(field(t, stage))
        return k

    def finish(self, k: list[torch.Tensor], ratio: torch.Tensor | None = None) -> None:
        """Solution, error, decision, commit and outputs of a step."""
        used = [k[j] for j in self.plan.used]
        with _registration.below_autograd():
            STEP(self.y, self.k_first, used, self.control, self.counters, *self.constants, ratio, *self.outputs)

    def step(self) -> None:
        self.finish(self.stages())

    def recorded_step(self, keep_k: bool = False) -> Record:
        """A step, and what is needed to do it again."""
        y, times, before = self.y.clone(), self.control[T : T_NEXT + 1].clone(), self.counters.clone()
        k = self.stages()
        kept = (k[0].clone(), *k[1:]) if keep_k else ()
        self.finish(k)
        accepted = self.counters[ACCEPTED] > before[ACCEPTED]
        return Record(y, times, accepted, before[CURSOR], self.counters[CURSOR].clone(), kept)


class Watch:
    """How many rows still run, without waiting for the device.

    On the CPU the counter is read where it lies. On a GPU it is copied to pinned memory after each step, and the copy
    is polled, at most ``RUN_AHEAD`` steps later: a step or two at the end may find every row finished and change
    nothing.
    """

    def __init__(self, counters: torch.Tensor):
        self.count = counters.view(COUNTERS, -1)[RUNNING, :1]
        self.on_cpu = counters.device.type == "cpu"
        self.transformed = _registration.transforming()  # then it has no memory that could be looked at
        self.seen = self.count.numpy() if self.on_cpu and not self.transformed else None
        self.pending: deque = deque()

    def running(self) -> int:
        """Rows running after the step just queued, or after one of the two before it."""
        if self.seen is not None:
            return int(self.seen[0])
        if self.transformed:
            return int(self.count)
        host = torch.empty(1, dtype=torch.int32, pin_memory=True)
        host.copy_(self.count, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append((event, host.numpy()))
        running = 1
        while len(self.pending) > RUN_AHEAD or (self.pending and self.pending[0][0].query()):
            event, value = self.pending[0]
            if event.query():
                running = int(value[0])
                self.pending.popleft()
                if running == 0:
                    break
        return running


def set_running(integrator: Integrator) -> None:
    """Count the rows whose status says that they run, after the caller has set statuses."""
    status = integrator.counters[STATUS]
    integrator.counters.view(COUNTERS, -1)[RUNNING, 0] = (status == RUNNING_STATUS).sum()


def initial_step(
    field, t0, y, k_first, direction, q: int, rtol, atol, norm, magnitude: Callable = torch.abs, limit=None
) -> torch.Tensor:
    """|h| of a first step by Hairer's rule (Solving ODEs I, II.4), float64 with the shape of ``t0``; calls ``field``
    once.

    h₀ = 0.01 |y|/|f| (10⁻⁶ where either is small), f₁ = f(t₀ + h₀, y + h₀ f), h = min(100 h₀, h₁) with
    h₁ = (0.01 / max(|f|, |f₁ − f|/h₀))^(1/q), every norm being taken of what is divided by atol + rtol·|y|, |·| being
    ``magnitude``. With a ``limit`` on |h₀| the field is not evaluated beyond it, nor at a time that is not a number.
    """
    wide = y.to(state_time_dtype(y))  # in half precision what is divided by a tolerance overflows
    scale = atol + rtol * magnitude(wide)
    d0, d1 = norm(wide / scale), norm(k_first / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    if limit is not None:
        h0 = torch.minimum(h0.nan_to_num(1e-6), limit)
    times = torch.stack([t0, t0 + direction * h0.to(torch.float64)])
    h = (times[1] - times[0]).to(state_time_dtype(y))
    k = field(times[1].to(h.dtype), (y + rowwise(h, y) * k_first).to(y.dtype))
    d2 = norm((k - k_first) / scale) / h0
    largest = torch.maximum(d1, d2)
    h1 = torch.where(largest <= 1e-15, torch.maximum(torch.full_like(h0, 1e-6), h0 * 1e-3), (0.01 / largest) ** (1 / q))
    return torch.minimum(100 * h0, h1).to(torch.float64)


def refuse_vmap(method: str, *tensors: torch.Tensor) -> None:
    """An adaptive step is decided on numbers, which a batch that vmap hides does not show."""
    if any(map(_registration.batched, tensors)):
        raise RuntimeError(
            f"method: expected one of fixed steps under torch.vmap, got the adaptive {method!r}, which decides by "
            "numbers; make what vmap maps over rows of y0"
        )


def progress_bar() -> Callable:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress: expected tqdm to be installed (pip install tqdm), got none") from error
    return tqdm
