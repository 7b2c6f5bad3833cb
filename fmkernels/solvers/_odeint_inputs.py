"""What torchdiffeq's interface accepts, checked and brought to the form that the loops work on."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..ops.runge_kutta_stage import state_time_dtype
from ._state import DTYPES
from .tableaus import TORCHDIFFEQ

# The names of torchdiffeq's solver classes, which its warnings show.
SOLVERS = {
    "dopri8": "Dopri8Solver",
    "dopri5": "Dopri5Solver",
    "bosh3": "Bosh3Solver",
    "fehlberg2": "Fehlberg2",
    "adaptive_heun": "AdaptiveHeunSolver",
    "euler": "Euler",
    "midpoint": "Midpoint",
    "heun2": "Heun2",
    "heun3": "Heun3",
    "rk4": "RK4",
}
HANDED_OVER = ("explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver")
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


class Layout:
    """How a state lies in the one real tensor that the ops work on.

    A real tensor is itself; the components of a tuple are flattened and concatenated; a complex state, tuple or not,
    gets a last dimension of two. The *plain* form is the state before that: one tensor, real or complex.
    """

    def __init__(self, y0):
        self.is_tuple = not isinstance(y0, torch.Tensor)
        if self.is_tuple and not isinstance(y0, tuple):
            raise AssertionError(f"y0: expected a torch.Tensor or a tuple of them, got {type(y0).__name__}")
        parts = y0 if self.is_tuple else (y0,)
        for i, part in enumerate(parts):
            if not isinstance(part, torch.Tensor):
                raise TypeError(f"y0[{i}]: expected a torch.Tensor, got {type(part).__name__}")
        if not parts:
            raise ValueError("y0: expected a tuple of at least one tensor, got an empty one")
        self.dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        if self.dtype not in DTYPES:
            raise TypeError(f"y0: expected a floating or complex dtype, got {self.dtype}")
        self.complex = self.dtype.is_complex
        self.components = 2 if self.complex else 1
        self.shapes = [part.shape for part in parts]
        self.sizes = [part.numel() for part in parts]
        self.shape = torch.Size([sum(self.sizes)]) if self.is_tuple else y0.shape

    def plain(self, packed: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(packed) if self.complex else packed

    def packed(self, plain: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(plain.resolve_conj()) if self.complex else plain

    def pack(self, y) -> torch.Tensor:
        return self.packed(torch.cat([part.reshape(-1) for part in y]) if self.is_tuple else y)

    def split(self, plain: torch.Tensor):
        """The user's form of a plain state, whose leading dimensions may have become more."""
        if not self.is_tuple:
            return plain
        lead = plain.shape[:-1]
        return tuple(x.reshape(lead + shape) for x, shape in zip(plain.split(self.sizes, -1), self.shapes, strict=True))

    def unpack(self, packed: torch.Tensor):
        return self.split(self.plain(packed))

    def field(self, func: Callable, widens: bool = False) -> Callable:
        """func on the packed state. What it returns need only broadcast and convert to it, as in torchdiffeq; where
        that ``widens`` the state, it stays in a wider dtype of its own."""
        shape, dtype = self.shape, self.dtype

        def coerced(k):
            if not isinstance(k, torch.Tensor):
                raise TypeError(f"func: expected it to return a torch.Tensor like y0, got {type(k).__name__}")
            if k.is_complex() and not dtype.is_complex:
                raise RuntimeError(f"func: expected it to return {dtype}, the dtype of y0, got {k.dtype}")
            try:
                return k.to(torch.promote_types(k.dtype, dtype) if widens else dtype).expand(shape)
            except RuntimeError as error:
                raise RuntimeError(
                    f"func: expected it to return shape {list(shape)}, that of y0, got {list(k.shape)}"
                ) from error

        if not self.is_tuple and not self.complex:

            def field(t, y):
                k = func(t, y)
                return k if isinstance(k, torch.Tensor) and k.shape == shape and k.dtype == dtype else coerced(k)

            return field

        def packed_field(t, y):
            k = func(t, self.unpack(y))
            if self.is_tuple:
                k = torch.cat([part.reshape(-1) for part in k])
            return self.packed(k if k.shape == shape and k.dtype == dtype else coerced(k))

        return packed_field


class AdaptiveOptions(NamedTuple):
    """The options of the adaptive methods, under torchdiffeq's names and with its defaults."""

    min_step: float = 0.0
    max_step: float = math.inf
    first_step: float | None = None
    step_t: torch.Tensor | None = None
    jump_t: torch.Tensor | None = None
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    max_num_steps: int = 2**31 - 1
    dtype: torch.dtype = torch.float64


class FixedOptions(NamedTuple):
    """The options of the methods with fixed steps."""

    step_size: float | torch.Tensor | None = None
    grid_constructor: Callable | None = None
    interp: str = "linear"
    perturb: bool = False


class Problem:
    """One initial value problem.

    Attributes:
        func, layout, field: the user's function, the state's form, and the function on the packed state.
        y: the packed state at the start.
        t: the times asked for, in their own dtype, on the state's device; ``values`` are the same on the host.
        direction: 1.0 or −1.0.
        rtol, atol: float64 [1, 1 or D].
        norm: of a plain tensor; None for the largest RMS over ``segments``.
        segments: (first, last but one) of the plain tensor's parts that have a norm of their own.
        callbacks: name → callback(t, y in the user's form, dt).
        options: AdaptiveOptions or FixedOptions.
    """

    def __init__(self, func, layout: Layout, field, y, t, rtol, atol, method, norm, segments, callbacks, options):
        self.func, self.layout, self.field, self.y = func, layout, field, y
        self.t, self.method, self.norm, self.segments, self.callbacks = t, method, norm, segments, callbacks
        self.values = t.detach().to(torch.float64).tolist()
        self.direction = -1.0 if len(self.values) > 1 and self.values[0] > self.values[1] else 1.0
        self.rtol, self.atol, self.options = rtol, atol, options
        self.adaptive = isinstance(options, AdaptiveOptions)
        self.time_dtype = state_time_dtype(y)

    def segment_tensor(self) -> torch.Tensor:
        segments = [(first, last) for first, last in self.segments if last > first]
        return torch.tensor(segments, dtype=torch.int64, device=self.y.device)

    def packed_tolerance(self, tolerance: torch.Tensor) -> torch.Tensor:
        """A tolerance [1, 1 or D] against the packed state, in its arithmetic."""
        if tolerance.shape == (1, 1):
            return tolerance[0, 0].to(self.time_dtype)
        wide = tolerance.reshape(self.layout.shape).to(self.time_dtype)
        return wide.unsqueeze(-1) if self.layout.complex else wide

    def magnitude(self, packed: torch.Tensor) -> torch.Tensor:
        """Absolute values, of complex numbers as such."""
        if self.layout.complex:
            return torch.linalg.vector_norm(packed, dim=-1, keepdim=True)
        return packed.abs()

    def packed_norm(self, packed: torch.Tensor) -> torch.Tensor:
        """The norm of something like the packed state, 0-d."""
        if self.norm is not None:
            return torch.as_tensor(self.norm(self.layout.plain(packed)), device=packed.device).abs()
        flat = packed.reshape(-1, self.layout.components)
        if len(self.segments) == 1:
            return torch.linalg.vector_norm(flat) / math.sqrt(flat.shape[0])
        parts = [(flat[first:last], last - first) for first, last in self.segments if last > first]
        return torch.stack([torch.linalg.vector_norm(x) / math.sqrt(size) for x, size in parts]).amax()


def problem(func, y0, t, rtol, atol, method, options) -> Problem:
    """The arguments of ``odeint``, checked in torchdiffeq's order and with its types of exception."""
    if not callable(func):
        raise TypeError(f"func: expected a callable func(t, y), got {type(func).__name__}")
    layout = Layout(y0)
    rtol, atol = (
        tolerance(*given, layout, (y0[0] if layout.is_tuple else y0).device)
        for given in (("rtol", rtol), ("atol", atol))
    )
    method = check_method(method)
    options = {} if options is None else dict(options)
    norm = options.pop("norm", None)
    if norm is not None and layout.is_tuple:
        norm = _of_tuple(norm, layout)
    y = layout.pack(y0)
    t = check_times(t, y.device)
    callbacks = {name: getattr(func, name) for name in CALLBACKS if callable(getattr(func, name, None))}
    allowed = CALLBACKS if method in ADAPTIVE else CALLBACKS[:1]
    if invalid := set(callbacks) - set(allowed):
        warnings.warn(f"Solver '{method}' does not support callbacks {invalid}", stacklevel=3)
    callbacks = {name: _on_packed(callback, layout) for name, callback in callbacks.items() if name in allowed}
    ends = [sum(layout.sizes[: i + 1]) for i in range(len(layout.sizes))]
    segments = list(zip([0, *ends], ends))
    return Problem(
        func,
        layout,
        layout.field(func, widens=method not in ADAPTIVE),
        y,
        t,
        rtol,
        atol,
        method,
        norm,
        segments,
        callbacks,
        parse_options(method, options),
    )


ADAPTIVE = tuple(name for name, tableau in TORCHDIFFEQ.items() if tableau.error is not None)


def check_method(method) -> str:
    method = "dopri5" if method is None else method
    if method not in SOLVERS and method not in HANDED_OVER:
        names = '", "'.join([*SOLVERS, *HANDED_OVER])
        raise ValueError(f'method: Invalid method "{method}". Must be one of {{"{names}"}}.')
    return method


def check_times(t, device: torch.device) -> torch.Tensor:
    if not isinstance(t, torch.Tensor):
        raise AssertionError(f"t: expected a torch.Tensor, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"t: expected a floating dtype, got {t.dtype}")
    if t.dim() != 1:
        raise AssertionError(f"t: expected one dimension, got shape {list(t.shape)}")
    values = t.tolist()
    if not values:
        raise IndexError("t: expected at least one time, got none")
    pairs = list(zip(values, values[1:]))
    if not (all(a < b for a, b in pairs) or all(a > b for a, b in pairs)):
        raise AssertionError(f"t: expected strictly increasing or decreasing times, got {values}")
    if t.device != device:
        warnings.warn("t is not on the same device as y0. Coercing to y0.device.", stacklevel=4)
        t = t.to(device)
    return t


def _is_iterable(value) -> bool:
    return isinstance(value, (tuple, list)) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def tolerance(name: str, value, layout: Layout, device) -> torch.Tensor:
    """float64 [1, 1 or D]."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise AssertionError(f"{name}: expected a tensor that requires no gradient, got one that does")
    each = layout.is_tuple and _is_iterable(value)
    if each and len(value) != len(layout.shapes):
        raise AssertionError(
            f"{name}: expected one number, or one for each of {len(layout.shapes)} parts, got {len(value)}"
        )
    try:
        if each:
            given = [torch.as_tensor(one, dtype=torch.float64, device=device) for one in value]
            return torch.cat([one.expand(size) for one, size in zip(given, layout.sizes, strict=True)]).unsqueeze(0)
        value = torch.as_tensor(value, dtype=torch.float64, device=device)
        return value.reshape(1, -1) if value.dim() == 0 else value.expand(layout.shape).reshape(1, -1).contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(
            f"{name}: expected a number or a tensor that expands to shape {list(layout.shape)}: {error}"
        ) from error


def parse_options(method: str, given: dict):
    kind = AdaptiveOptions if method in ADAPTIVE else FixedOptions
    unused = {name: value for name, value in given.items() if name not in kind._fields}
    if unused:
        warnings.warn(f"{SOLVERS[method]}: Unexpected arguments {unused}", stacklevel=4)
    options = kind(**{name: value for name, value in given.items() if name in kind._fields})
    if kind is FixedOptions:
        if options.step_size is not None and options.grid_constructor is not None:
            raise ValueError(
                "step_size: expected None with a grid_constructor, the two are mutually exclusive; got both"
            )
        if options.interp not in ("linear", "cubic"):
            raise ValueError(f"interp: expected 'linear' or 'cubic', got {options.interp!r}")
        return options
    if not isinstance(options.dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(options.dtype).__name__}")
    numbers = {}
    for name in ("min_step", "max_step", "first_step", "safety", "ifactor", "dfactor"):
        value = getattr(options, name)
        try:
            numbers[name] = None if value is None and name == "first_step" else float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}: expected a number, got {value!r}") from error
    return options._replace(**numbers, max_num_steps=int(options.max_num_steps))


def _of_tuple(norm: Callable, layout: Layout) -> Callable:
    return lambda plain: norm(layout.split(plain))


def _on_packed(callback: Callable, layout: Layout) -> Callable:
    return lambda t, y, dt: callback(t, layout.unpack(y), dt)


def torchdiffeq_function(name: str, method: str) -> Callable:
    """torchdiffeq's own function, for the methods that this library leaves to it."""
    try:
        import torchdiffeq
    except ImportError as error:
        raise ImportError(
            f"method: {method!r} is torchdiffeq's own and expected to find it installed (pip install torchdiffeq); "
            f"without it choose one of {', '.join(SOLVERS)}"
        ) from error
    return getattr(torchdiffeq, name)
