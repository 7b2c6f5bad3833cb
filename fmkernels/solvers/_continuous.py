"""The continuous adjoint of a solve: memory that does not grow with the number of steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from ..ops.runge_kutta_stage import rowwise, state_time_dtype
from ..ops.runge_kutta_step import DONE, MAX_STEP, MIN_STEP, STATUS, T
from ._integrator import Integrator, Watch, initial_step
from ._plan import Plan


class ContinuousAdjoint(torch.autograd.Function):
    r"""With a(t) = ∂L/∂y(t): da/dt = −aᵀ ∂f/∂y, ∂L/∂θ = ∫ aᵀ ∂f/∂θ dt, solved backward together with y.

    The rows share the step size of this solve, over s in [0, 1] with t_b = t₀ + s (t₁ − t₀)_b, since the parameters'
    gradients sum over rows at one s. Its error is measured in y and in a, not in the parameters' integrals, which feed
    back into nothing (Kidger, Chen and Lyons, "Hey, that's not an ODE", 2021).

    ``run()`` makes the solve: (state reached, values at t_eval or None).
    """

    @staticmethod
    def forward(ctx, run, backward, y0, t0, t1, t_eval, *parameters):
        y, values = run()
        ctx.backward_solve, ctx.has_values = backward, values is not None
        values = values if ctx.has_values else y.new_empty(0)
        ctx.save_for_backward(y0, t0, t1, t_eval, y, values, *parameters)
        return y, values

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, gradient_values):
        y0, t0, t1, t_eval, y, values, *parameters = ctx.saved_tensors
        return (
            None,
            None,
            *ctx.backward_solve(
                y0, t0, t1, t_eval, y, values, parameters, gradient, gradient_values, ctx.needs_input_grad[3:6]
            ),
        )


class BackwardSolve:
    """The backward of :class:`ContinuousAdjoint` for the solve that ``integrator`` made."""

    def __init__(self, integrator: Integrator, plan: Plan, settings, tolerances, field: Callable):
        self.integrator, self.plan, self.tolerances, self.field = integrator, plan, tolerances, field
        self.settings = settings.clone()  # the bounds of the step size are in t, the backward steps in s
        self.settings[MIN_STEP], self.settings[MAX_STEP] = 0.0, torch.inf

    def __call__(self, y0, t0, t1, t_eval, y, values, parameters, gradient, gradient_values, needs):
        shape, dtype = y.shape, y.dtype
        done = self.integrator.counters[STATUS] == DONE
        span = torch.where(done, t1 - t0, self.integrator.control[T] - t0)
        totals = [torch.zeros_like(p) for p in parameters]
        gradient_t0, gradient_t1 = torch.zeros_like(t0), torch.zeros_like(t1)
        gradient_outputs = None if t_eval is None else torch.zeros_like(t_eval)

        def speed(t, state, cotangent):  # cotangentᵀ f, a number a row: what moving a time by one does
            k = self.field(t.to(state_time_dtype(state)), state)
            return (cotangent * k).to(torch.float64).reshape(len(t0), -1).sum(-1)

        stops: list[tuple[float, torch.Tensor, torch.Tensor]] = [(1.0, y, gradient)]
        if t_eval is not None:
            shares = ((t_eval - t0[0]) / (t1[0] - t0[0])).tolist()
            for m, share in reversed(list(enumerate(shares))):
                reached = rowwise(~values[:, m].isnan().reshape(len(t0), -1).any(-1), y)
                cotangent = torch.where(reached, gradient_values[:, m], 0)
                stops.append((share, torch.where(reached, values[:, m], y), cotangent))
                if needs[2]:
                    gradient_outputs[m] = speed(t_eval[m].expand(len(t0)), stops[-1][1], cotangent).sum()
        if needs[1]:
            gradient_t1 = speed(t1, y, gradient)
        adjoint = torch.zeros_like(y)
        for i, (share, state, cotangent) in enumerate(stops):
            adjoint = adjoint + cotangent
            until = stops[i + 1][0] if i + 1 < len(stops) else 0.0
            if until < share:
                adjoint, totals = self._interval(share, until, t0, span, state, adjoint, parameters, totals)
        adjoint = adjoint.reshape(shape).to(dtype)
        if needs[0]:
            gradient_t0 = -speed(t0, y0, adjoint)
        return adjoint, gradient_t0, gradient_t1, gradient_outputs, *totals

    def _interval(self, start: float, end: float, t0, span, y, adjoint, parameters, totals):
        """The adjoint and the parameters' integrals carried from s = ``start`` back to ``end``."""
        n, like = y.numel(), y.to(state_time_dtype(y))
        compute = like.dtype

        def augmented(s, flat):
            state, a = flat[:n].reshape(y.shape).to(y.dtype), flat[n : 2 * n].reshape(y.shape)
            t = (t0 + s.to(torch.float64) * span).to(compute)
            with torch.enable_grad():
                state = state.detach().requires_grad_()
                k = self.field(t, state)
                pull = (a * rowwise(span, a).to(compute)).to(k.dtype)
                if k.requires_grad:
                    pulled = torch.autograd.grad(k, (state, *parameters), pull, allow_unused=True)
                else:
                    pulled = (None,) * (1 + len(parameters))
            parts = [k.detach().to(compute) * rowwise(span, k).to(compute)]
            for part, x in zip(pulled, (state, *parameters), strict=True):
                parts.append(torch.zeros_like(_real(x), dtype=compute) if part is None else -_real(part).to(compute))
            return torch.cat([part.reshape(-1) for part in parts])

        flat = torch.cat([_real(x).reshape(-1).to(compute) for x in (like, adjoint, *totals)])
        device = flat.device
        s0, s1 = (torch.tensor(s, dtype=torch.float64, device=device) for s in (start, end))
        rtol, atol = (self._tolerance(x, y, flat) for x in self.tolerances)
        k_first = augmented(s0.to(compute), flat)
        direction = torch.tensor(-1.0, dtype=torch.float64, device=device)

        def norm(x):
            return x[: 2 * n].to(torch.float64).square().reshape(2, n).mean(-1).amax().sqrt()

        wide = [x if x.numel() == 1 else x.reshape(-1) for x in (rtol, atol)]
        q = self.plan.tableau.error_order
        h = initial_step(augmented, s0, flat, k_first, direction, q, *(x.squeeze() for x in wide), norm)
        h = torch.minimum(h.nan_to_num(1e-6), s0 - s1)
        segments = torch.tensor([[0, n], [n, 2 * n]], device=device)
        integrator = Integrator(
            augmented, flat, k_first, self.plan, s0, s1, direction * h, self.settings, rtol, atol, segments, 1
        )
        integrator.counters[-1] = 1
        watch = Watch(integrator.counters)
        while watch.running():
            integrator.step()
        status = integrator.counters[STATUS]
        # A failed adjoint has no gradient to give: NaN says so without a read of the device.
        flat = torch.where(status == DONE, integrator.y, torch.nan)
        sizes = [n, n, *(_real(p).numel() for p in parameters)]
        _, adjoint, *totals = flat.split(sizes)
        totals = [x.reshape(_real(p).shape).to(_real(p).dtype) for x, p in zip(totals, parameters, strict=True)]
        totals = [torch.view_as_complex(x) if p.is_complex() else x for x, p in zip(totals, parameters, strict=True)]
        return adjoint.reshape(y.shape), totals

    @staticmethod
    def _tolerance(tolerance, y, flat):
        """[1, 1], or a tolerance for each number of the augmented state: the adjoint has the state's."""
        if tolerance.numel() == 1:
            return tolerance
        wide = tolerance.reshape(-1, *(1,) * (y.dim() - 1)) if tolerance.shape[1] == 1 else tolerance
        wide = wide.expand(y.shape) if tolerance.shape[1] == 1 else wide.expand(y.shape[0], -1)
        wide = wide.reshape(-1)
        rest = wide.new_ones(flat.numel() - 2 * wide.numel())
        return torch.cat([wide, wide, rest]).unsqueeze(0)


def _real(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def shared_times(problem) -> bool:
    """Whether every row has the outputs at the same share of its span, so that the rows can go back together."""
    if problem.t_eval is None:
        return True
    t0, t1 = problem.t0.detach(), problem.t1.detach()
    return problem.t_eval.dim() == 1 and bool(((t0 == t0[0]) & (t1 == t1[0])).all())
