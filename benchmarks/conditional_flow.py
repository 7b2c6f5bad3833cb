"""The cases of a path's point and its velocity, given noise and times: what the drop-ins of other libraries run.

N is one tensor of the data's size. Coefficients are formed from the times in every candidate.
"""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace

import torch

from fmkernels.integrations.torchcfm import fused
from fmkernels.ops import conditional_flow

from . import peers
from .head import DTYPES, SIZES, close
from .measure import Case

SIGMA = 0.1


class ConditionalFlow(Case):
    """torchcfm's path with smoothing noise: read x0, x1 and ε, write x_t and u_t."""

    op, kernel, passes = "conditional_flow", "conditional_flow", 5
    matcher, form = "ConditionalFlowMatcher", "linear"

    def tensors(self):
        t = 0.05 + 0.9 * torch.rand(self.rows, device=self.device)
        return SimpleNamespace(x0=self.randn(), x1=self.randn(), noise=self.randn(), t=t.to(self.dtype))

    def ours(self, b):
        return fused(self.form, SIGMA, b.x0, b.x1, b.t, b.noise)

    @staticmethod
    def eager(x0, x1, noise, t):
        t = t[:, None]
        return t * x1 + (1 - t) * x0 + SIGMA * noise, x1 - x0

    def theirs(self):
        import torchcfm.conditional_flow_matching as torchcfm

        matcher = getattr(torchcfm, self.matcher)(SIGMA)

        def call(x0, x1, noise, t):
            x_t = matcher.sample_xt(x0, x1, t, noise)
            return x_t, matcher.compute_conditional_flow(x0, x1, t, x_t)

        return call

    def peers(self):
        candidates = {"eager": self.eager, "torch.compile": peers.compiled(self.eager)}
        if self.matcher:
            with contextlib.suppress(ImportError):  # not installed
                candidates["torchcfm"] = self.theirs()
        return {
            name: lambda b, call=call: call(b.x0, b.x1, b.noise, b.t) for name, call in candidates.items()
        }  # fmt: skip

    def verify(self, b):
        wide = (tensor.double() for tensor in (b.x0, b.x1, b.noise, b.t))
        for value, expected in zip(self.ours(b), self.eager(*wide), strict=True):
            close(value, expected, self.dtype, 0.1)


class ConditionalFlowBridge(ConditionalFlow):
    """torchcfm's Schrödinger bridge, the longest of its formulas: also 5N."""

    op = "conditional_flow_bridge"
    matcher, form = "SchrodingerBridgeConditionalFlowMatcher", "bridge"

    @staticmethod
    def eager(x0, x1, noise, t):
        t = t[:, None]
        mean = t * x1 + (1 - t) * x0
        x_t = mean + SIGMA * torch.sqrt(t * (1 - t)) * noise
        return x_t, (1 - 2 * t) / (2 * t * (1 - t) + 1e-8) * (x_t - mean) + x1 - x0


class ConditionalFlowAffine(ConditionalFlow):
    """flow_matching's affine path: read x0 and x1, write x_t and its velocity."""

    op, passes, matcher = "conditional_flow_affine", 4, None

    def ours(self, b):
        t = b.t.float()
        ones = torch.ones_like(t)
        return conditional_flow(b.x0, b.x1, None, torch.stack([t, 1 - t, ones, -ones], -1), "affine")

    @staticmethod
    def eager(x0, x1, noise, t):
        t = t[:, None]
        return t * x1 + (1 - t) * x0, x1 - x0

    def peers(self):
        try:
            from flow_matching.path import CondOTProbPath
        except ImportError:  # not installed
            return super().peers()
        path = CondOTProbPath()
        return super().peers() | {"flow_matching": lambda b: path.sample(t=b.t, x_0=b.x0, x_1=b.x1)}


OPS = {case.op: case for case in (ConditionalFlow, ConditionalFlowBridge, ConditionalFlowAffine)}


def cases(device: torch.device, ops=None, sizes=None, dtypes=None) -> list[Case]:
    """The cases wanted; None takes all."""
    known = [op for op in OPS if ops is None or op in ops]
    wanted = itertools.product(known, sizes or SIZES, dtypes or DTYPES)
    return [OPS[op](rows, columns, dtype, device) for op, (rows, columns), dtype in wanted]
