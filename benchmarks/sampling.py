"""The cases of the samplers: steps given the velocities of a network. N is one tensor of the state's size."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch

import fmkernels as fmk

from . import peers
from .head import DTYPES, SIZES, close
from .measure import Case

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


OPS = {case.op: case for case in (GuidedEuler, GuidedEulerRescaled)}


def cases(device: torch.device, ops=None, sizes=None, dtypes=None) -> list[Case]:
    """The cases wanted; None takes all."""
    known = [op for op in OPS if ops is None or op in ops]
    wanted = itertools.product(known, sizes or SIZES, dtypes or DTYPES)
    return [OPS[op](rows, columns, dtype, device) for op, (rows, columns), dtype in wanted]
