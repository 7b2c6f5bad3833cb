"""What a solve is given, checked, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from .. import _checks, _registration
from ..ops.runge_kutta_step import DONE
from ._state import State

STATUSES = {-1: "running", 0: "done", 1: "reached max_steps", 2: "step size underflow", 3: "non-finite"}


Y = TypeVar("Y", bound=torch.Tensor | tuple[torch.Tensor, ...])  # a state


@dataclass(frozen=True)
class Solution(Generic[Y]):
    """What :func:`solve` returns; B rows, one for each sample.

    Attributes:
        y: the state at ``t``, [B, …]; with ``t_eval`` the states there, [B, T, …], NaN where a row has no such time or
            did not reach it. A tuple of them for a tuple of states.
        t: float64 [B], the time reached.
        status: int8 [B]: 0 done, 1 reached max_steps, 2 step size underflow, 3 non-finite.
        nfe, accepted, rejected: int64 [B]: calls of f while the row ran, and its steps.
        calls: calls of f for the batch.
        steps: float64 [B, S], the times at which a row's steps ended, from its start on, NaN after the last; None
            unless ``record_steps`` or ``dense``.
    """

    y: Y
    t: torch.Tensor
    status: torch.Tensor
    nfe: torch.Tensor
    accepted: torch.Tensor
    rejected: torch.Tensor
    calls: int
    steps: torch.Tensor | None = None
    _dense: Callable[..., Y] | None = field(default=None, repr=False)

    def __call__(self, t: float | torch.Tensor) -> Y:
        """The solution at time t, a number or [B], by the method's interpolant: [B, …]; NaN beyond what a row covered.

        Needs ``solve(..., dense=True)``.
        """
        if self._dense is None:
            raise ValueError("dense: expected solve(..., dense=True) for a solution that is called, got dense=False")
        return self._dense(t)

    def raise_for_status(self) -> Solution[Y]:
        """This solution, or a RuntimeError that says which rows did not reach their end and why."""
        raise_for_status(self.status)
        return self


def raise_for_status(status: torch.Tensor) -> None:
    if bool((status != DONE).any()):
        parts = []
        for code in range(1, 4):
            rows = torch.where(status == code)[0].tolist()
            if rows:
                shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
                parts.append(f"{len(rows)} {STATUSES[code]} (rows {shown})")
        raise RuntimeError(f"solve: {len(status)} rows, of which " + "; ".join(parts))


class Problem:
    """The checked arguments of a solve: packed state, times as float64 [B] and [T] or [B, T] on its device."""

    def __init__(self, f, y0, t_span, t_eval):
        if not callable(f):
            raise TypeError(f"f: expected a callable f(t, y), got {type(f).__name__}")
        self.f, self.y0 = f, y0
        self.state = State("y0", y0, 1)
        self.rows, self.device = self.state.rows, self.state.device
        self.field = self.state.field(f)
        y = self.state.pack(y0)
        # f may ask what it is given to require a gradient; forward mode's tangents would be lost.
        self.y = y if y.requires_grad or _registration.transforming() else y.detach()
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
        narrow = isinstance(t_eval, torch.Tensor) and t_eval.is_floating_point() and t_eval.dtype != torch.float64
        rounding = torch.finfo(t_eval.dtype).eps if narrow else 0.0
        t_eval = self._time("t_eval", t_eval)
        if t_eval.dim() not in (1, 2) or (t_eval.dim() == 2 and t_eval.shape[0] != self.rows) or not t_eval.shape[-1]:
            raise ValueError(
                f"t_eval: expected shape [T] or [{self.rows}, T] with at least one time, got {list(t_eval.shape)}"
            )
        given = t_eval.detach()
        if t_eval.dim() == 1 and self.rows and self.t0.stride() == self.t1.stride() == (0,):
            low, high = sorted(ends := (self.t0[0].tolist(), self.t1[0].tolist()))
            times = given.tolist()  # checked as numbers, which takes a tenth of the time
            if all(low <= t <= high for t in times) and times == sorted(times, reverse=ends[0] > ends[1]):
                return t_eval
        missing = given.isnan()
        if bool((missing[..., :-1] & ~missing[..., 1:]).any()):
            raise ValueError("t_eval: expected NaN only after a row's last time, got a number after NaN")
        direction = torch.sign(self.t1 - self.t0).detach().unsqueeze(-1)
        if bool(((given[..., 1:] - given[..., :-1]) * direction < 0).any()):
            raise ValueError(
                "t_eval: expected times in the order of integration, from t_span[0] to t_span[1], got others"
            )
        t0, t1 = self.t0.detach().unsqueeze(-1), self.t1.detach().unsqueeze(-1)
        if narrow:  # an end that this dtype cannot hold is meant by the number nearest to it
            snapped = given
            for end in (t0, t1):
                snapped = torch.where((snapped - end).abs() <= rounding * end.abs(), end, snapped)
            if t_eval.dim() == 1 and bool(((snapped == snapped[:1]) | missing).all()):
                snapped = snapped[0] if self.rows else given
            t_eval = t_eval + (snapped - given)
            given = t_eval.detach()
        outside = (given < torch.minimum(t0, t1)) | (given > torch.maximum(t0, t1))
        if bool(outside.any()):
            raise ValueError(
                f"t_eval: expected times within t_span, got {given.expand(outside.shape)[outside][0].tolist()}"
            )
        return t_eval

    def solution(self, y, outputs, t, status, nfe, accepted, rejected, calls, steps=None, dense=None) -> Solution:
        y = self.state.unpack(y if outputs is None else outputs)
        return Solution(y, t, status.to(torch.int8), nfe, accepted, rejected, calls, steps, dense)


def tolerance(name: str, value, problem: Problem) -> torch.Tensor:
    """float64 [1 or B, 1 or D]."""
    if not isinstance(value, torch.Tensor):
        return torch.full((1, 1), _checks.number(name, value, 0.0), dtype=torch.float64, device=problem.device)
    if value.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does")
    if value.is_complex():
        raise TypeError(f"{name}: expected real tolerances, got {value.dtype}")
    if value.device != problem.device and value.device.type != "cpu":
        raise ValueError(f"{name}: expected device {problem.device}, that of y0, or the CPU, got {value.device}")
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


def parameters_of(f, parameters, gradient) -> tuple[torch.Tensor, ...]:
    if parameters is not None:
        if isinstance(parameters, torch.Tensor) or not isinstance(parameters, Iterable):
            raise TypeError(f"parameters: expected a sequence of tensors, got {type(parameters).__name__}")
        parameters = tuple(parameters)
        for i, parameter in enumerate(parameters):
            _checks.tensor(f"parameters[{i}]", parameter)
        return tuple(p for p in parameters if p.requires_grad)
    if gradient == "autograd":
        return ()
    module = isinstance(f, torch.nn.Module)
    found = tuple(f.parameters()) if module else ()
    if not found and torch.is_grad_enabled():  # those that a function uses cannot be seen: they would get no gradient
        raise ValueError(
            f"parameters: expected the tensors that gradient={gradient!r} differentiates, or () for none, since f is "
            f"{'a torch.nn.Module without any' if module else 'not a torch.nn.Module'}; got None"
        )
    return tuple(p for p in found if p.requires_grad)
