"""`odeint_adjoint`: gradients of a solve by integrating the adjoint equation backward, in constant memory."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .. import _registration
from . import _odeint_inputs
from ._odeint_inputs import (
    CALLBACKS,
    HANDED_OVER,
    Layout,
    Problem,
    check_method,
    parse_options,
    tolerance,
    torchdiffeq_function,
)
from .events import Event, combined, until_event
from .odeint import State, Tolerance, integrate

__all__ = ["odeint_adjoint"]


def odeint_adjoint(
    func: Callable[..., Any],
    y0: State,
    t: torch.Tensor,
    *,
    rtol: Tolerance = 1e-7,
    atol: Tolerance = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., torch.Tensor] | None = None,
    adjoint_rtol: Tolerance | None = None,
    adjoint_atol: Tolerance | None = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[torch.Tensor] | None = None,
) -> Any:
    r"""``odeint`` whose gradients come from the adjoint equation: torchdiffeq's ``odeint_adjoint``.

    With a = ∂L/∂y the backward pass solves dy/dt = f, da/dt = −a·∂f/∂y, together with dL/dθ = −∫ a·∂f/∂θ dt, from each
    time in ``t`` to the one before, starting from the stored y there: the memory does not grow with the number of
    steps, and the gradients are those of the equation, to within the adjoint's own tolerances, not of the steps taken.

    Args:
        func, y0, t, rtol, atol, method, options, event_fn: as of :func:`~fmkernels.odeint`.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: of the backward solve; where None, those of the
            forward one. ``adjoint_options["norm"]`` is a function of the tuple (t, y, a, \*parameters), for a tuple y0
            of (t, \*y, \*a, \*parameters), or "seminorm", which leaves the parameters out; by default the largest of
            \|t\|, the forward norms of y and of a, and each parameter's RMS.
        adjoint_params: what to differentiate besides y0 and t; the parameters of func where it is a Module.

    Attributes ``callback_step_adjoint`` … of func are called around the steps of the backward solve, with
    (t, (∂L/∂t, y, a, \*∂L/∂θ), dt).

    Returns: as :func:`~fmkernels.odeint`; differentiable once, in y0, t (with ``event_fn`` only in t[0]) and the
    parameters.

    Raises: what :func:`~fmkernels.odeint` raises; ValueError where the parameters or ``adjoint_options`` cannot be
    inferred.

    Source: Chen, Rubanova, Bettencourt and Duvenaud, "Neural Ordinary Differential Equations" (2018); Kidger, Chen and
    Lyons, '"Hey, that's not an ODE": Faster ODE Adjoints via Seminorms' (2021).
    """
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError(
            "adjoint_params: expected the tensors to differentiate, or () for none, since func is not a "
            "torch.nn.Module; got None"
        )
    backward_method = method if adjoint_method is None else adjoint_method
    if backward_method != method and options is not None and adjoint_options is None:
        raise ValueError(
            f"adjoint_options: expected options for adjoint_method {backward_method!r}, since those given for method "
            f"{method!r} may not fit it; got None"
        )
    if not {check_method(method), check_method(backward_method)}.isdisjoint(HANDED_OVER):
        return torchdiffeq_function("odeint_adjoint", method)(
            func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn,
            adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol, adjoint_method=adjoint_method,
            adjoint_options=adjoint_options, adjoint_params=adjoint_params,
        )  # fmt: skip
    if _registration.transforming():
        raise ValueError("func: expected odeint in forward mode and within torch.func transforms, got odeint_adjoint")
    if adjoint_options is None:
        adjoint_options = {name: value for name, value in (options or {}).items() if name != "norm"}
    given = tuple(_parameters(func) if adjoint_params is None else adjoint_params)
    parameters = tuple(p for p in given if p.requires_grad)
    if len(parameters) < len(given) and callable(adjoint_options.get("norm")):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will be "
            "excluded from the adjoint pass, and will not appear as a tensor in the adjoint norm.",
            stacklevel=2,
        )
    if event_fn is not None and len(t) != 2:
        raise ValueError(f"t: expected two times with event_fn, of which the second gives the direction, got {len(t)}")
    forward = _odeint_inputs.problem(func, y0, t, rtol, atol, method, options)
    event = None if event_fn is None else combined(event_fn, t[0], y0, forward.layout)
    backward = Backward(
        rtol if adjoint_rtol is None else adjoint_rtol,
        atol if adjoint_atol is None else adjoint_atol,
        check_method(backward_method),
        adjoint_options,
    )
    event_t, solution = Adjoint.apply(forward, event, backward, forward.y, forward.t, *parameters)
    solution = forward.layout.unpack(solution)
    return solution if event is None else (event_t.to(t), solution)


class Backward(NamedTuple):
    """How the backward solve is made."""

    rtol: Tolerance
    atol: Tolerance
    method: str
    options: dict[str, Any]


def _parameters(module: nn.Module) -> list[torch.Tensor]:
    if not getattr(module, "_is_replica", False):
        return list(module.parameters())
    # A replica of DataParallel holds its parameters as plain attributes.
    values = [value for part in module.modules() for value in vars(part).values()]
    return [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]


class Adjoint(torch.autograd.Function):
    """The packed solution, and the time of the event (empty without)."""

    @staticmethod
    def forward(ctx, problem: Problem, event: Event | None, backward: Backward, y, t, *parameters):
        if event is None:
            event_t, solution = t.new_empty(0), integrate(problem)
        else:
            event_t, solution = until_event(problem, event)
        ctx.save_for_backward(t, solution, event_t, *parameters)
        ctx.arguments = problem, event is not None, backward
        ctx.mark_non_differentiable(event_t)
        return event_t, solution

    @staticmethod
    @once_differentiable
    def backward(ctx, _, gradient):
        t, solution, event_t, *parameters = ctx.saved_tensors
        problem, is_event, backward = ctx.arguments
        needs_t = ctx.needs_input_grad[4]
        times = torch.stack([t[0], event_t]) if is_event else t
        system = AdjointSystem(problem, backward, parameters)
        plain, gradient = problem.layout.plain(solution), problem.layout.plain(gradient)
        last = len(times) - 1
        state = system.start(plain[last], gradient[last])
        by_times = torch.zeros_like(t)
        for i in range(last, 0, -1):
            if needs_t:
                # Moving t[i] alone moves y[i] along f.
                k = problem.layout.plain(
                    problem.field(times[i].to(problem.time_dtype), problem.layout.packed(plain[i]))
                )
                moved = torch.linalg.vecdot(gradient[i].reshape(-1), k.reshape(-1)).real
                by_times[i] = 0 if is_event else moved
                state[0] -= moved
            state = system.solve(state, times[i], times[i - 1])
            system.set(state, plain[i - 1], gradient[i - 1])
        by_times[0] = state[0].real
        _, _, gradient_y, *by_parameters = system.layout.split(state)
        by_parameters = [
            (g if p.is_complex() else g.real if g.is_complex() else g).to(p.dtype)
            for g, p in zip(by_parameters, parameters, strict=True)
        ]
        gradient_y = problem.layout.packed(gradient_y.to(problem.layout.dtype))
        return None, None, None, gradient_y, by_times if needs_t else None, *by_parameters


class AdjointSystem:
    """The equation of (∂L/∂t, y, a, ∂L/∂θ), as one flat plain tensor, solved from one time to the one before.

    The gradient of a complex state is autograd's, so that a·∂f/∂y is a vector–Jacobian product of the same convention.
    """

    def __init__(self, problem: Problem, backward: Backward, parameters: Sequence[torch.Tensor]):
        self.problem, self.method, self.parameters = problem, backward.method, tuple(parameters)
        plain = problem.layout.plain(problem.y)
        parts = (
            torch.empty((), dtype=plain.real.dtype, device=plain.device),
            plain.detach(),
            plain.detach(),
            *parameters,
        )
        self.parts = parts
        self.layout = layout = Layout(parts)
        self.flat = Layout(torch.empty(layout.shape, dtype=layout.dtype, device="meta"))
        given = ("adjoint_rtol", backward.rtol), ("adjoint_atol", backward.atol)
        self.tolerances = [tolerance(name, value, layout, plain.device) for name, value in given]
        options = dict(backward.options)
        self.norm, self.segments = self._norm(options.pop("norm", None))
        self.options = parse_options(self.method, options)
        self.callbacks = {}
        for name in CALLBACKS:
            callback = getattr(problem.func, f"{name}_adjoint", None)
            if callable(callback):
                self.callbacks[name] = functools.partial(self._call, callback)

    def _call(self, callback, t, y, dt):
        return callback(t, self.layout.split(self.flat.plain(y)), dt)

    def _norm(self, norm) -> tuple[Callable | None, list[tuple[int, int]]]:
        """A norm of the flat state, or the segments whose largest RMS is it."""
        problem, sizes = self.problem, self.layout.sizes
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        parts = list(zip([0, *ends], ends))
        if callable(norm):

            def users(flat):
                t, y, a, *parameters = self.layout.split(flat)
                y, a = ((problem.layout.split(x) if problem.layout.is_tuple else (x,)) for x in (y, a))
                return norm((t, *y, *a, *parameters))

            return users, parts
        if norm not in (None, "seminorm"):
            raise ValueError(f"adjoint_options['norm']: expected a callable or 'seminorm', got {norm!r}")
        counted = parts[:3] if norm == "seminorm" else parts
        if problem.norm is None:
            inner = [(first + low, first + high) for first, _ in parts[1:3] for low, high in problem.segments]
            return None, [parts[0], *inner, *counted[3:]]

        def forwards(flat):
            t, y, a, *parameters = self.layout.split(flat)
            values = [t.abs(), problem.norm(y), problem.norm(a)]
            if norm is None:
                values += [torch.linalg.vector_norm(p) / math.sqrt(p.numel()) for p in parameters if p.numel()]
            return torch.stack([torch.as_tensor(value, device=flat.device).abs() for value in values]).amax()

        return forwards, parts

    def start(self, y, gradient) -> torch.Tensor:
        zeros = [torch.zeros_like(parameter).reshape(-1) for parameter in self.parameters]
        state = [self.parts[0].new_zeros(1), y.reshape(-1), gradient.reshape(-1), *zeros]
        return torch.cat(state).to(self.layout.dtype)

    def set(self, state, y, gradient) -> None:
        """The stored state for the one integrated back, and the gradient that comes in at this time."""
        size = self.layout.sizes[1]
        state[1 : 1 + size] = y.reshape(-1)
        state[1 + size : 1 + 2 * size] += gradient.reshape(-1)

    def solve(self, state: torch.Tensor, t1: torch.Tensor, t0: torch.Tensor) -> torch.Tensor:
        flat = self.flat
        problem = Problem(
            self, flat, self.dynamics, flat.packed(state), torch.stack([t1, t0]), *self.tolerances, self.method,
            self.norm, self.segments, self.callbacks, self.options,
        )  # fmt: skip
        return flat.plain(integrate(problem)[1]).clone()

    def dynamics(self, t: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        problem, layout = self.problem, self.problem.layout
        state = self.flat.plain(packed)
        size = self.layout.sizes[1]
        parts = state[1 : 1 + 2 * size].to(layout.dtype)
        y, a = parts[:size].reshape(layout.shape), layout.packed(parts[size:].reshape(layout.shape))
        with torch.enable_grad():
            y = layout.packed(y).detach().requires_grad_()
            t = t.detach().requires_grad_()  # ∂L/∂t takes part in the step control, wanted or not, as in torchdiffeq
            k = problem.field(t, y)
            inputs = (t, y, *self.parameters)
            grads = (None,) * len(inputs)
            if k.requires_grad:
                grads = torch.autograd.grad(k, inputs, -a, allow_unused=True)
        by_t, by_y, *by_parameters = grads
        values = [by_t, layout.plain(k.detach()), None if by_y is None else layout.plain(by_y), *by_parameters]
        values = [
            torch.zeros_like(like) if value is None else value for value, like in zip(values, self.parts, strict=True)
        ]
        return self.flat.packed(torch.cat([value.reshape(-1) for value in values]).to(self.layout.dtype))
