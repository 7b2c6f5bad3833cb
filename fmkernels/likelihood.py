"""The divergence of a field, and log-densities along its flow."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch

from . import _checks
from .distributions import Normal, StandardNormal
from .estimators import Deflated, Exact, Hutchinson, VelocityAndDivergence
from .ops.noise import key as draw_key
from .ops.noise import noise
from .ops.runge_kutta_stage import rowwise
from .solvers._problem import parameters_of, raise_for_status
from .solvers.solve import solve
from .solvers.tableaus import FIXED

__all__ = ["LogProb", "divergence", "log_prob", "sample_and_log_prob"]

SOLVER_OPTIONS = ("controller", "first_step", "min_step", "max_step", "max_steps", "steps", "step_size")
NORMS = ("state", "all")
ONE_PROBE, TRACE = Hutchinson(), Exact()


@dataclass(frozen=True)
class LogProb:
    """Log-densities along a flow; B rows, T = the length of ``t_eval``.

    Attributes:
        log_prob: [B], log p of the state at the upper end of ``t_span``; NaN where ``status`` is not 0.
        x0: [B, …], the state at the lower end, where the base density is taken.
        x1: [B, …], the state at the upper end.
        nfe: int64 [B], evaluations of f with its divergence.
        stderr: [B], standard error of ``log_prob`` over the probes; NaN for one probe, 0 for the exact trace.
        t_span: (lower end, upper end) as they were used.
        status: int8 [B], as of :class:`~fmkernels.Solution`.
        calls: evaluations for the batch.
        t, x_t, log_prob_t: with ``t_eval`` the times [T] or [B, T], the states there [B, T, …] and log p_t(x_t)
            [B, T], NaN where a row has no such time or did not reach it, or failed to reach its base; None without.
    """

    log_prob: torch.Tensor
    x0: torch.Tensor
    x1: torch.Tensor
    nfe: torch.Tensor
    stderr: torch.Tensor
    t_span: tuple[Any, Any]
    status: torch.Tensor
    calls: int
    t: torch.Tensor | None = None
    x_t: torch.Tensor | None = None
    log_prob_t: torch.Tensor | None = None

    def raise_for_status(self) -> LogProb:
        """This result, or a RuntimeError that says which rows did not reach their end and why."""
        raise_for_status(self.status)
        return self


@overload
def divergence(
    f: Callable[..., Any],
    t: float | torch.Tensor,
    x: torch.Tensor,
    estimator: Exact | Hutchinson | Deflated = ...,
    *,
    key: torch.Tensor | None = ...,
    generator: torch.Generator | None = ...,
    first_row: int = ...,
    return_stderr: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def divergence(
    f: Callable[..., Any],
    t: float | torch.Tensor,
    x: torch.Tensor,
    estimator: Exact | Hutchinson | Deflated = ...,
    *,
    key: torch.Tensor | None = ...,
    generator: torch.Generator | None = ...,
    first_row: int = ...,
    return_stderr: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def divergence(
    f: Callable[..., Any],
    t: float | torch.Tensor,
    x: torch.Tensor,
    estimator: Exact | Hutchinson | Deflated = ...,
    *,
    key: torch.Tensor | None = ...,
    generator: torch.Generator | None = ...,
    first_row: int = ...,
    return_stderr: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def divergence(
    f: Callable[..., Any],
    t: float | torch.Tensor,
    x: torch.Tensor,
    estimator: Exact | Hutchinson | Deflated = TRACE,
    *,
    key: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    first_row: int = 0,
    return_stderr: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""The divergence ∇·f(t, x) = tr ∂f/∂x of each row.

    Args:
        f: f(t, x) → a tensor like x; t is ``[B]``, and rows are treated apart.
        t: a number or ``[B]``.
        x: ``[B, …]``, float32 or float64.
        estimator: :class:`Exact`, :class:`Hutchinson` or :class:`Deflated`.
        key: int64 ``[1]`` of :func:`fmkernels.key` for the probes; None draws one with ``generator``.
        first_row: the global number of the first row, by which probes are drawn.
        return_stderr: also return the standard error over the probes: NaN for one, 0 for the exact trace.

    Returns: ``[B]`` in x's dtype, or (divergence, standard error). Gradients flow to x and to what f uses, where they
    are recorded.

    Raises: TypeError, ValueError naming the argument.

    Source: :class:`Hutchinson`.
    """
    check_sample("x", x)
    check_estimator("estimator", estimator)
    key = checked_key(x.device, key, generator, first_row)
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if t.shape not in ((), (x.shape[0],)):
        raise ValueError(f"t: expected a number or shape [{x.shape[0]}], got {list(t.shape)}")
    with as_recorded_outside():
        x = x.clone() if x.is_inference() else x
        _, estimates = VelocityAndDivergence(f, x, estimator, key, first_row)(t.expand(x.shape[0]), x)
    value = estimates.mean(1)
    if return_stderr:
        return value, estimator.standard_error(estimates.detach(), math.prod(x.shape[1:]))
    return value


def log_prob(
    f: Callable[..., Any],
    x1: torch.Tensor,
    base: Any = None,
    divergence: Exact | Hutchinson | Deflated = ONE_PROBE,
    *,
    t_span: torch.Tensor | Sequence[float | torch.Tensor] | None = None,
    t_eval: torch.Tensor | Sequence[float] | None = None,
    method: str = "dopri5",
    rtol: float | torch.Tensor = 1e-5,
    atol: float | torch.Tensor = 1e-5,
    norm: str = "state",
    gradient: str = "autograd",
    parameters: Sequence[torch.Tensor] | None = None,
    key: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    first_row: int = 0,
    progress: bool = False,
    **options: Any,
) -> LogProb:
    r"""Log-density of data under the flow of f: log p₁(x₁) = log p₀(x₀) − ∫ ∇·f(t, x_t) dt, along dx/dt = f(t, x).

    x and the m estimates of the integral are solved together from the upper end of ``t_span`` down to the lower, every
    row with its own steps. The estimator's vectors are drawn once for the whole solve, which is thus an ordinary one.

    Args:
        f: f(t, x) → dx/dt of x's shape and dtype; t is ``[B]``, and rows are treated apart.
        x1: ``[B, …]``, float32 or float64. The integral accumulates in this dtype: float32's seven digits are some 1e-3
            nats where log p is 1e4.
        base: the density p₀ at the lower end, anything with ``log_prob(x0)`` → ``[B]``; None takes ``f.base()`` where f
            has one, else the standard normal.
        divergence: :class:`Exact`, :class:`Hutchinson` or :class:`Deflated`.
        t_span: (end with the base, end with the data); None takes ``f.t_range`` where f has one, else (0, 1).
        t_eval: times ``[T]`` or ``[B, T]`` within t_span, in any order, to return x_t and log p_t(x_t) at.
        method, rtol, atol: as for :func:`~fmkernels.solve`, also the fixed methods.
        norm: what step control looks at: "state" x alone, so that x's steps do not depend on the probes, or "all".
        gradient, parameters: as for :func:`~fmkernels.solve`; all gradients are of the estimate.
        key: int64 ``[1]`` of :func:`fmkernels.key` for the probes; None draws one with ``generator``.
        first_row: the global number of the first row, by which probes are drawn: a batch split up has the probes of the
            whole.
        progress: show a bar of finished rows (needs tqdm).
        options: controller, first_step, min_step, max_step, max_steps, steps, step_size, as for
            :func:`~fmkernels.solve`.

    Returns: a :class:`LogProb`. Without gradients the memory does not depend on the number of steps.

    Raises: TypeError, ValueError naming the argument; a row's failure is its ``status`` and a log_prob of NaN.

    Source: Chen et al., "Neural ordinary differential equations" (2018); Grathwohl et al., "FFJORD" (2019).
    """
    check_sample("x1", x1)
    key = checked_key(x1.device, key, generator, first_row)
    solver = {"method": method, "rtol": rtol, "atol": atol, "gradient": gradient, "parameters": parameters}
    solver |= {"progress": progress} | checked_options(options)
    return follow(f, x1, False, base, divergence, t_span, t_eval, norm, key, first_row, solver)


def sample_and_log_prob(
    f: Callable[..., Any],
    x0: torch.Tensor | Sequence[int],
    base: Any = None,
    divergence: Exact | Hutchinson | Deflated = ONE_PROBE,
    *,
    t_span: torch.Tensor | Sequence[float | torch.Tensor] | None = None,
    t_eval: torch.Tensor | Sequence[float] | None = None,
    method: str = "dopri5",
    rtol: float | torch.Tensor = 1e-5,
    atol: float | torch.Tensor = 1e-5,
    norm: str = "state",
    gradient: str = "autograd",
    parameters: Sequence[torch.Tensor] | None = None,
    key: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    first_row: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    **options: Any,
) -> LogProb:
    r"""Samples x₁ of the flow and their log-densities, in one solve from the noise upward.

    Args:
        x0: noise ``[B, …]``, or a shape to draw it with from ``base``: a :class:`Normal` by ``key`` and ``first_row``,
            any other base by its ``sample``.
        device, dtype: of drawn noise; with a ``key`` the device is the key's.
        f, base, divergence, t_span, t_eval, method, rtol, atol, norm, gradient, parameters: as for :func:`log_prob`.
        key, generator, first_row, progress, options: as for :func:`log_prob`.

    Returns: a :class:`LogProb` with ``x1`` and ``log_prob`` = log p₁(x₁).

    Raises: TypeError, ValueError naming the argument.

    Source: as for :func:`log_prob`.
    """
    if isinstance(x0, torch.Tensor):
        key = checked_key(x0.device, key, generator, first_row)
    else:
        key = checked_key(getattr(key, "device", device), key, generator, first_row)
        x0 = drawn_noise(checked_base(f, base), x0, key, first_row, dtype)
    check_sample("x0", x0)
    solver = {"method": method, "rtol": rtol, "atol": atol, "gradient": gradient, "parameters": parameters}
    solver |= {"progress": progress} | checked_options(options)
    return follow(f, x0, True, base, divergence, t_span, t_eval, norm, key, first_row, solver)


def drawn_noise(base: Any, shape: Any, key: torch.Tensor, first_row: int, dtype: torch.dtype) -> torch.Tensor:
    if not isinstance(shape, (tuple, list)) or not all(isinstance(n, int) for n in shape):
        raise TypeError(f"x0: expected a tensor or a shape, got {type(shape).__name__}")
    if len(shape) < 2:
        raise ValueError(f"x0: expected shape [B, …] of at least two dimensions, got {list(shape)}")
    if isinstance(base, Normal):
        columns = math.prod(shape[1:])
        drawn = noise(key, shape[0], columns, stream="base", first_row=first_row, dtype=dtype)
        return drawn.reshape(shape) * base.scale
    if not callable(getattr(base, "sample", None)):
        raise TypeError(f"base: expected a distribution with sample(shape) to draw x0, got {type(base).__name__}")
    lead = len(shape)
    if isinstance(base, torch.distributions.Distribution):  # whose samples have its own shape besides
        lead -= len(base.batch_shape) + len(base.event_shape)
    x0 = base.sample(torch.Size(shape[: max(lead, 0)]))
    if x0.shape != torch.Size(shape):
        raise ValueError(f"base: expected samples of shape {list(shape)}, got {list(x0.shape)}; pass x0 itself")
    return x0.to(key.device, dtype)


def follow(
    f: Callable[..., Any],
    x: torch.Tensor,
    upward: bool,
    base: Any,
    estimator: Exact | Hutchinson | Deflated,
    t_span: Any,
    t_eval: Any,
    norm: str,
    key: torch.Tensor,
    first_row: int,
    solver: dict[str, Any],
) -> LogProb:
    """x and A(t), the integral of ∇·f from the end where x is, solved together to the other end."""
    check_estimator("divergence", estimator)
    _checks.choice("norm", norm, NORMS)
    base = checked_base(f, base)
    low, high = ends_of(f, t_span)
    start, end = (low, high) if upward else (high, low)
    with as_recorded_outside():
        B, D = x.shape[0], math.prod(x.shape[1:])
        field = VelocityAndDivergence(f, x, estimator, key, first_row)

        def augmented(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            value, traces = field(t, y[:, :D].contiguous().reshape(x.shape))
            return torch.cat([value.reshape(B, D), traces], 1)

        if solver["gradient"] != "autograd":
            solver["parameters"] = parameters_of(f, solver["parameters"], solver["gradient"])
        for name in ("rtol", "atol"):
            solver[name] = padded(name, solver[name], x, field.estimates)
        if norm == "state" and solver["method"] not in FIXED:
            solver["norm_columns"] = D
        times, place = (None, None) if t_eval is None else in_order(t_eval, start, end, x)
        y = torch.cat([x.reshape(B, D), x.new_zeros(B, field.estimates)], 1)
        solution = solve(augmented, y, (start, end), times, **solver)
        along: torch.Tensor | None = None
        y = solution.y
        if place is not None:
            y = y[torch.arange(B, device=x.device).unsqueeze(1), place]
            y, along = y[:, -1], y[:, :-1]
        done = solution.status == 0
        reached, integral = y[:, :D].reshape(x.shape), y[:, D:]
        # What a failed row's state is does not matter, but a base may refuse NaN, as torch.distributions does.
        x0 = x if upward else torch.where(rowwise(done, reached), reached, reached.detach().nan_to_num())
        at_base = log_density_of(base, x0)
        log_density = torch.where(done, at_base - integral.mean(1) if upward else at_base + integral.mean(1), torch.nan)
        reached = torch.where(rowwise(done, reached), reached, torch.nan)
        stderr = torch.where(done, estimator.standard_error(integral.detach(), D), torch.nan)
        t = x_t = log_prob_t = None
        if along is not None:
            t = torch.as_tensor(t_eval, dtype=None if isinstance(t_eval, torch.Tensor) else torch.float64)
            x_t = along[..., :D].reshape(*along.shape[:2], *x.shape[1:])
            at_start = at_base if upward else log_density  # log p where the integral begins
            log_prob_t = at_start.unsqueeze(1) - along[..., D:].mean(-1)
        x0, x1 = (x, reached) if upward else (reached, x)
        return LogProb(
            log_density, x0, x1, solution.nfe, stderr, (low, high), solution.status, solution.calls, t, x_t, log_prob_t
        )


def log_density_of(base: Any, x0: torch.Tensor) -> torch.Tensor:
    value = base.log_prob(x0)
    if not isinstance(value, torch.Tensor) or value.shape != x0.shape[:1]:
        got = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"base: expected log_prob(x0) of shape [{len(x0)}], one number a row, got {got}")
    return value


def in_order(t_eval: Any, start: Any, end: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The times and ``end`` in the order of integration, [T + 1] or [B, T + 1], and where each went, [B, T + 1].

    ``solve`` returns a state at t_eval or at the end, so the end becomes an output too, the last in ``place``.
    """
    try:
        narrow = isinstance(t_eval, torch.Tensor) and t_eval.is_floating_point()  # `solve` knows what it cannot hold
        t_eval = torch.as_tensor(t_eval, dtype=t_eval.dtype if narrow else torch.float64, device=x.device)
        start, end = (torch.as_tensor(t, dtype=torch.float64, device=x.device) for t in (start, end))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"t_eval: expected real numbers or a tensor of them, got {type(t_eval).__name__}") from error
    if t_eval.dim() not in (1, 2) or (t_eval.dim() == 2 and t_eval.shape[0] != x.shape[0]):
        raise ValueError(f"t_eval: expected shape [T] or [{x.shape[0]}, T], got {list(t_eval.shape)}")
    rows = (x.shape[0],) if t_eval.dim() == 2 or start.dim() or end.dim() else ()
    times = torch.cat([t_eval.expand(*rows, -1), end.to(t_eval.dtype).expand(rows).unsqueeze(-1)], -1)
    direction = torch.sign(end - start).detach().unsqueeze(-1)
    order = (times.detach() * direction).argsort(dim=-1, stable=True)  # NaN comes last
    return times.gather(-1, order), order.argsort(-1).expand(x.shape[0], -1)


def padded(name: str, tolerance: float | torch.Tensor, x: torch.Tensor, estimates: int) -> float | torch.Tensor:
    """A tolerance for x as one for the packed state, in which the integral's is only looked at with norm="all"."""
    if not isinstance(tolerance, torch.Tensor) or tolerance.shape in ((), x.shape[:1]):
        return tolerance
    try:
        wide = tolerance.broadcast_to(x.shape).reshape(x.shape[0], -1)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: expected shape [{x.shape[0]}] or one that broadcasts to {list(x.shape)}, got "
            f"{list(tolerance.shape)}"
        ) from error
    return torch.cat([wide, wide.amax(1, keepdim=True).expand(-1, estimates)], 1)


def checked_base(f: Callable[..., Any], base: Any) -> Any:
    if base is None:
        own = getattr(f, "base", None)
        base = own() if callable(own) else StandardNormal()
    if not callable(getattr(base, "log_prob", None)):
        raise TypeError(f"base: expected a distribution with log_prob(x0), got {type(base).__name__}")
    return base


def ends_of(f: Callable[..., Any], t_span: Any) -> tuple[Any, ...]:
    """The lower and the upper end; `solve` checks what they are."""
    if t_span is None:
        t_span = getattr(f, "t_range", (0.0, 1.0))
    if isinstance(t_span, torch.Tensor) and t_span.dim() and t_span.shape[-1] == 2:
        t_span = t_span.unbind(-1)
    if not isinstance(t_span, (tuple, list)) or len(t_span) != 2:
        got = f"{len(t_span)} values" if isinstance(t_span, (tuple, list)) else type(t_span).__name__
        raise ValueError(f"t_span: expected a pair (lower end, upper end), got {got}")
    return tuple(t_span)


def check_sample(name: str, x: torch.Tensor) -> None:
    _checks.tensor(name, x)
    if x.dtype not in (torch.float32, torch.float64):
        hint = "" if x.dtype.is_floating_point else " (fmkernels.dequantise turns integer levels into data)"
        raise TypeError(f"{name}: expected dtype float32 or float64, got {str(x.dtype).removeprefix('torch.')}{hint}")
    if x.dim() < 2 or 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected shape [B, …] with the numbers of each row, got {list(x.shape)}")


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    for option in options:
        if option not in SOLVER_OPTIONS:
            raise TypeError(f"{option}: expected one of the solver's options {', '.join(SOLVER_OPTIONS)}")
    return options


def check_estimator(name: str, estimator: Any) -> None:
    if not isinstance(estimator, (Exact, Hutchinson, Deflated)):
        got = estimator.__name__ if isinstance(estimator, type) else type(estimator).__name__
        raise TypeError(f"{name}: expected an Exact(…), a Hutchinson(…) or a Deflated(…), got {got}")


def checked_key(
    device: torch.device | str | None, key: torch.Tensor | None, generator: torch.Generator | None, first_row: int
) -> torch.Tensor:
    _checks.count("first_row", first_row)
    if key is None:
        return draw_key(device, generator)
    if generator is not None:
        raise ValueError("generator: expected None where key is given")
    _checks.key("key", key)
    if key.device != device:
        raise ValueError(f"key: expected device {device}, that of the data, got {key.device}")
    return key


@contextlib.contextmanager
def as_recorded_outside() -> Iterator[None]:
    """Lets f be differentiated under torch.inference_mode() too; gradients are recorded as outside of this."""
    enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield
