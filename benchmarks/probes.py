"""The cases of probes: Rademacher signs drawn, and their inner products with a tensor. N is one tensor of its size.

Eager code keeps the probe of a solve, so that its dot reads two tensors; ours draws the signs again.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch

import fmkernels as fmk
from fmkernels import _registration
from fmkernels.ops.probe import PROBES

from . import peers
from .head import CHECKED_ROWS, DTYPES, SIZES, close
from .measure import Case, require


class Probe(Case):
    """Signs alone: write N. Results are kept for a round of the sets, or else each would be written into a cache."""

    op, kernel, passes = "probe", "probe", 1

    def tensors(self):
        return SimpleNamespace(key=fmk.key(self.device), z=None)

    def ours(self, b):
        b.z = fmk.ops.probe(b.key, self.rows, self.columns, dtype=self.dtype)

    def by_integers(self):
        return 2 * torch.randint(2, (self.rows, self.columns), dtype=self.dtype, device=self.device) - 1

    def by_bernoulli(self):
        half = torch.empty(self.rows, self.columns, dtype=self.dtype, device=self.device).bernoulli_()
        return half.mul_(2).sub_(1)

    def peers(self):
        def kept(draw):
            def call(b):
                b.z = draw()

            return call

        return {
            "eager, randint": kept(self.by_integers),
            "eager, bernoulli_": kept(self.by_bernoulli),
            "torch.compile": kept(peers.compiled(self.by_integers)),
        }

    def verify(self, b):
        """Some rows at each end: the reference is slow."""
        self.ours(b)
        count = min(CHECKED_ROWS, self.rows)
        for first in {0, self.rows - count}:
            size = (count, self.columns, PROBES["rademacher"], 1, 0, first)
            (expected,) = _registration.references["probe"](b.key, *size, self.dtype)
            require(torch.equal(b.z[0, first : first + count], expected), "signs: other than the reference's")


def dot(z, values):
    return (z * values).sum(1)


class ProbeDot(Case):
    """Σ z·values of every row with z drawn again: read N."""

    op, kernel, passes = "probe_dot", "probe_dot", 1

    def tensors(self):
        key, values = fmk.key(self.device), self.randn()
        z = fmk.ops.probe(key, self.rows, self.columns, dtype=self.dtype)[0]
        return SimpleNamespace(key=key, values=values, z=z)

    def ours(self, b):
        return fmk.ops.probe_dot(b.key, b.values[None])

    def peers(self):
        compiled = peers.compiled(dot)
        return {
            "eager": lambda b: dot(b.z, b.values),
            "eager, vecdot": lambda b: torch.linalg.vecdot(b.z, b.values),
            "torch.compile": lambda b: compiled(b.z, b.values),
        }

    def verify(self, b):
        (sums,) = self.ours(b)
        close(sums, dot(b.z.double(), b.values.double()), sums.dtype, self.columns**-0.5)


OPS = {case.op: case for case in (Probe, ProbeDot)}


def cases(device: torch.device, ops=None, sizes=None, dtypes=None) -> list[Case]:
    """The cases wanted; None takes all."""
    known = [op for op in OPS if ops is None or op in ops]
    wanted = itertools.product(known, sizes or SIZES, dtypes or DTYPES)
    return [OPS[op](rows, columns, dtype, device) for op, (rows, columns), dtype in wanted]
