"""The posterior moments of a dataset: 50,000 points, and as many queries at times drawn uniformly, in float32.

The work is 4·B·N·D operations where every point weighs something, so that the copy's bandwidth is no measure of it; the
bytes counted are the data once, the queries and two results. The peers are what one writes in PyTorch, softmax averages
of a chunk of queries at a time, in chunks of several sizes.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch

import fmkernels as fmk
from fmkernels.ops.marginal_field import measure as centre_and_squares
from fmkernels.ops.marginal_field import posterior_moments

from . import peers
from .measure import Case, require

POINTS = 50_000
SIZES = ((1024, 64), (1024, 3072))
DTYPES = (torch.float32,)
CHUNKS = (64, 256, 1024)


def by_products(x, alpha, sigma, data, half_squares):
    """The posterior mean from the products of queries and points; squared norms of the queries cancel."""
    alpha, sigma = alpha[:, None], sigma[:, None]
    logits = (alpha * (x @ data.T) - alpha.square() * half_squares) / sigma.square()
    return torch.softmax(logits, 1) @ data


def by_distances(x, alpha, sigma, data, half_squares):
    """... from torch.cdist, as ‖x − αx_i‖ = α‖x/α − x_i‖."""
    alpha, sigma = alpha[:, None].clamp_min(1e-6), sigma[:, None]
    logits = torch.cdist(x / alpha, data).square() * (-0.5 * (alpha / sigma).square())
    return torch.softmax(logits, 1) @ data


def in_chunks(formula, rows: int):
    def run(b):
        parts = zip(*(value.split(rows) for value in (b.x, b.alpha32, b.sigma32)))
        return torch.cat([formula(*part, b.data, b.half_squares) for part in parts])

    return run


class MarginalField(Case):
    op, kernel = "marginal_field", "marginal_field"

    @property
    def bytes(self) -> int:
        return (POINTS + 3 * self.rows) * self.columns * self.dtype.itemsize

    def tensors(self):
        data = torch.randn(POINTS, self.columns, device=self.device).to(self.dtype)
        alpha = torch.rand(self.rows, dtype=torch.float64, device=self.device)
        sigma = (1 - alpha).clamp_min(1e-5)
        source = data[torch.randint(POINTS, (self.rows,), device=self.device)]
        x = (alpha[:, None] * source + sigma[:, None] * self.randn()).to(self.dtype)
        centre, squares = centre_and_squares(data)
        return SimpleNamespace(
            x=x, alpha=alpha, sigma=sigma, data=data, centre=centre, squares=squares,
            alpha32=alpha.to(self.dtype), sigma32=sigma.to(self.dtype), half_squares=0.5 * data.square().sum(1),
        )  # fmt: skip

    def ours(self, b):
        return fmk.ops.marginal_field(b.x, b.alpha, b.sigma, b.data, None, b.centre, b.squares)

    def peers(self):
        chunks = [rows for rows in CHUNKS if self.columns <= 64 or rows == 256]
        found = {f"eager, products, {rows}": in_chunks(by_products, rows) for rows in chunks}
        found |= {f"eager, cdist, {rows}": in_chunks(by_distances, rows) for rows in chunks}
        compiled = peers.compiled(by_products)
        return found | {f"torch.compile, {rows}": in_chunks(compiled, rows) for rows in chunks}

    def verify(self, b):
        """A few queries against float64, each result relative to its size; every query's mean against the peer's."""
        chosen = torch.linspace(0, self.rows - 1, 4, device=self.device).long()
        mean, residual, log_sum, _ = (value[chosen] for value in self.ours(b))
        for i, row in enumerate(chosen.split(1)):  # a row at a time: differences are B × N × D
            want = posterior_moments(b.x[row].double(), b.alpha[row], b.sigma[row], b.data.double(), None)
            for value, wanted in zip((mean, residual, log_sum), want):
                error = (value[i].double() - wanted[0]).norm() / wanted[0].norm()
                require(error < 1e-5, f"an error of {error:.1e}")
        peer = in_chunks(by_products, 256)(b)
        torch.testing.assert_close(self.ours(b).mean, peer, rtol=0, atol=1e-2)


OPS = {case.op: case for case in (MarginalField,)}


def cases(device: torch.device, ops=None, sizes=None, dtypes=None) -> list[Case]:
    """The cases wanted; None takes all. Half precision is not an op's here."""
    known = [op for op in OPS if ops is None or op in ops]
    wanted = [dtype for dtype in dtypes or DTYPES if dtype in (torch.float32, torch.float64)]
    return [OPS[op](*size, dtype, device) for op, size, dtype in itertools.product(known, sizes or SIZES, wanted)]
