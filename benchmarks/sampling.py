"""The cases of the samplers: steps given the velocities of a network. N is one tensor of the state's size."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch

import fmkernels as fmk
from fmkernels import _registration
from fmkernels.ops.runge_kutta_step import (
    ACCEPTED,
    CONTROL,
    COUNTERS,
    END,
    RUNNING,
    RUNNING_STATUS,
    STATUS,
    T_NEXT,
    T,
)
from fmkernels.solvers._plan import STAGE, STEP, plan, settings_tensor
from fmkernels.solvers.tableaus import ADAPTIVE

from . import peers
from .head import DTYPES, SIZES, close
from .measure import Case, require

H, SCALE, RESCALE = 0.02, 7.5, 0.7


def guided_step(x, conditional, unconditional):
    return x + H * (unconditional + SCALE * (conditional - unconditional))


def rescaled_step(x, conditional, unconditional):
    """As published, with the names of the paper: std over all dimensions but the first."""
    v = unconditional + SCALE * (conditional - unconditional)
    factor = conditional.std(dim=1, keepdim=True) / v.std(dim=1, keepdim=True)
    return x + H * (RESCALE * (v * factor) + (1 - RESCALE) * v)


class GuidedEuler(Case):
    """The Euler step under guidance: read the state and two velocities, write the state."""

    op, kernel, passes, rescale = "guided_euler", "guided_euler", 4, 0.0
    formula = staticmethod(guided_step)

    def tensors(self):
        return SimpleNamespace(x=self.randn(), conditional=self.randn(), unconditional=self.randn())

    def ours(self, b):
        return fmk.ops.guided_euler(b.x, b.conditional, b.unconditional, H, SCALE, self.rescale)

    def peers(self):
        compiled = peers.compiled(self.formula)
        return {
            "eager": lambda b: self.formula(b.x, b.conditional, b.unconditional),
            "torch.compile": lambda b: compiled(b.x, b.conditional, b.unconditional),
        }

    def verify(self, b):
        expected = self.formula(b.x.double(), b.conditional.double(), b.unconditional.double())
        # Rows of two elements may have almost no spread: what the factor multiplies is then large and as uncertain.
        scale = 1 / expected.abs().amax(dim=1, keepdim=True).clamp_min(1)
        close(self.ours(b) * scale, expected * scale, self.dtype)


class GuidedEulerRescaled(GuidedEuler):
    """... rescaled: rows beyond a cache or a block are read twice, 6N."""

    op, rescale = "guided_euler_rescaled", RESCALE
    formula = staticmethod(rescaled_step)


def combination(y, k, h, weights):
    total = y
    for weight, k_j in zip(weights, k, strict=True):
        total = total + (h * weight)[:, None].to(y.dtype) * k_j
    return total


class RungeKuttaStage(Case):
    """The evaluation point of Dormand–Prince's last stage but one: read the state and five k's, write a state."""

    op, kernel, passes = "runge_kutta_stage", "runge_kutta_stage", 7

    def __post_init__(self):
        self.plan = plan(ADAPTIVE["dopri5"], self.device)
        self.coefficients, self.used, _ = self.plan.stages[4]
        self.weights = self.coefficients[0, 1:].tolist()

    def tensors(self):
        ends = torch.rand(2, self.rows, dtype=torch.float64, device=self.device)
        return SimpleNamespace(y=self.randn(), k=[self.randn() for _ in self.used], times=ends)

    def ours(self, b):
        with torch.no_grad(), _registration.below_autograd():
            return STAGE(b.y, b.k, b.times, 0, self.coefficients, 0, 0)

    def formula(self, y, k, times):
        return combination(y, k, times[1] - times[0], self.weights), times[1]

    def peers(self):
        compiled = peers.compiled(self.formula)
        return {
            "eager": lambda b: self.formula(b.y, b.k, b.times),
            "torch.compile": lambda b: compiled(b.y, b.k, b.times),
        }

    def verify(self, b):
        expected, _ = self.formula(b.y.double(), [k.double() for k in b.k], b.times)
        close(self.ours(b)[0], expected, self.dtype, 0.1)


class RungeKuttaStep(Case):
    """The end of a Dormand–Prince step, accepted by all: read the state and six k's, overwrite state and first k."""

    op, kernel, passes = "runge_kutta_step", "_runge_kutta_step_", 9

    def __post_init__(self):
        self.plan = plan(ADAPTIVE["dopri5"], self.device)
        self.b, self.e = self.plan.weights[:2].tolist()
        self.tolerance = torch.full((1, 1), 1e3, dtype=torch.float64, device=self.device)
        self.settings = settings_tensor(  # equal steps for ever
            self.device, safety=0.9, min_factor=1, max_factor=1, beta1=0.2, accepted_floor=1, after_rejection_cap=1,
            max_step=1, step_limit=2**40,
        )  # fmt: skip
        self.segments = torch.tensor([[0, self.columns]], device=self.device)

    def tensors(self):
        control = torch.ones(CONTROL, self.rows, dtype=torch.float64, device=self.device)
        control[T], control[T_NEXT], control[END] = 0.0, 1e-6, 1e9
        counters = torch.zeros(COUNTERS, self.rows, dtype=torch.int32, device=self.device)
        counters[STATUS] = RUNNING_STATUS
        counters[RUNNING, 0] = self.rows
        k = [self.randn() for _ in self.plan.used]
        return SimpleNamespace(y=self.randn(), k_first=self.randn(), k=k, control=control, counters=counters)

    def ours(self, b):
        with torch.no_grad(), _registration.below_autograd():
            STEP(
                b.y, b.k_first, b.k, b.control, b.counters, self.plan.weights, self.settings, self.tolerance,
                self.tolerance, self.segments, 1, None, None, None,
            )  # fmt: skip

    def formula(self, y, k_first, k, t, t_next):
        """A step that ends by its own error ratio and gives new tensors: (state, first k, t, next t)."""
        h, every = t_next - t, [k_first, *k]
        y1 = combination(y, every, h, self.b)
        e = combination(torch.zeros_like(y), every, h, self.e)
        ratio = (e / (1e3 + 1e3 * torch.maximum(y.abs(), y1.abs()))).square().mean(1).sqrt().double()
        accepted = ratio <= 1
        factor = (0.9 * ratio.clamp_min(1e-10) ** -0.2).clamp(1, 1)
        now = torch.where(accepted, t_next, t)
        moved = accepted[:, None]
        return torch.where(moved, y1, y), torch.where(moved, k[-1], k_first), now, now + h * factor

    def peers(self):
        compiled = peers.compiled(self.formula)
        return {
            "eager": lambda b: self.formula(b.y, b.k_first, b.k, b.control[T], b.control[T_NEXT]),
            "torch.compile": lambda b: compiled(b.y, b.k_first, b.k, b.control[T], b.control[T_NEXT]),
        }

    def verify(self, b):
        k = [k_j.double() for k_j in b.k]
        wide = b.y.double(), b.k_first.double(), k, b.control[T].clone(), b.control[T_NEXT].clone()
        y, k_first, t, t_next = self.formula(*wide)
        self.ours(b)
        close(b.y, y, self.dtype, 0.1)
        close(b.k_first, k_first, self.dtype)
        close(b.control[T], t, torch.float64)
        close(b.control[T_NEXT], t_next, torch.float64)
        require((b.counters[ACCEPTED] == 1).all(), "accepted: expected a step of every row")


OPS = {case.op: case for case in (GuidedEuler, GuidedEulerRescaled, RungeKuttaStage, RungeKuttaStep)}


def cases(device: torch.device, ops=None, sizes=None, dtypes=None) -> list[Case]:
    """The cases wanted; None takes all."""
    known = [op for op in OPS if ops is None or op in ops]
    wanted = itertools.product(known, sizes or SIZES, dtypes or DTYPES)
    return [OPS[op](rows, columns, dtype, device) for op, (rows, columns), dtype in wanted]
