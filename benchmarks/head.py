"""The cases of the training head: the whole of it, and each of its ops. N in the comments is one data-sized tensor."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch

import fmkernels as fmk
from fmkernels import _registration
from fmkernels.ops.matching_loss import TERM_X0, TERM_X1

from . import peers
from .measure import Case, require

SIZES = ((256, 2), (256, 784), (128, 12288), (32, 196608))
DTYPES = (torch.float32, torch.bfloat16)
CHECKED_ROWS = 2  # of drawn noise, at each end: the reference of `noise` is slow


def close(actual, expected, dtype, scale=1.0) -> None:
    """Equal to rounding in ``dtype``, after both are multiplied by ``scale``."""
    rtol = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(actual.double() * scale, expected.double() * scale, rtol=rtol, atol=rtol)


def check_noise(x0, key) -> None:
    """Some rows of drawn noise against the reference of `noise`."""
    rows, columns = x0.shape
    for first in {0, max(rows - CHECKED_ROWS, 0)}:
        count = min(CHECKED_ROWS, rows)
        expected = _registration.references["noise"](key, count, columns, first, 0, 0, 0, x0.dtype)
        close(x0[first : first + count], expected, x0.dtype)


def loss_and_gradient(prediction, x1, x0):
    """Mean squared error against x1 − x0 in fp64, and its gradient times the number of elements."""
    residual = prediction.detach().double() - (x1.double() - x0.double())
    return residual.square().mean(), 2 * residual


class Head(Case):
    """Draw t and noise, form x_t, and take loss and gradient of a given prediction.

    The baseline is an empty backward: a leaf scalar, one view of it, and ``backward`` through autograd's engine, the
    cheapest graph there is.
    """

    op, kernel, noise, passes = "head", "sample_path", "auto", 5

    def __post_init__(self):
        self.matching = fmk.FlowMatching(noise=self.noise)
        self.leaf = torch.zeros((), device=self.device, requires_grad=True)
        if self.matching._noise_mode(self.randn()) == "store":
            self.passes = 7

    def tensors(self):
        return SimpleNamespace(x1=self.randn(), prediction=self.randn().requires_grad_())

    def ours(self, b):
        b.prediction.grad = None
        batch = self.matching.sample(b.x1)
        self.matching.loss(b.prediction, batch).backward()

    def peers(self):
        def step(head):
            def call(b):
                b.prediction.grad = None
                _, loss = head(b.x1, b.prediction)
                loss.backward()

            return call

        return {name: step(head) for name, head in peers.heads().items()}

    def baseline(self, b):
        self.leaf.grad = None
        self.leaf.view(()).backward()

    def verify(self, b):
        batch = self.matching.sample(b.x1)
        x0 = batch.x0
        if x0 is None:
            x0 = fmk.ops.noise(batch.key, self.rows, self.columns, dtype=self.dtype)
        check_noise(x0, batch.key)
        require(0 <= batch.t.min() and batch.t.max() <= 1, "t: outside [0, 1]")
        t = batch.t.double()[:, None]
        close(batch.x_t, (1 - t) * x0.double() + t * b.x1.double(), self.dtype)
        loss = self.matching.loss(b.prediction, batch)
        loss.backward()
        expected, gradient = loss_and_gradient(b.prediction, b.x1, x0)
        close(loss, expected, torch.float32)
        close(b.prediction.grad.double() * b.x1.numel(), gradient, self.dtype)


class HeadRecompute(Head):
    """The head that holds the least memory: the loss draws the noise again."""

    op, noise = "head_recompute", "recompute"


class Noise(Case):
    """Normals alone: write N."""

    op, kernel, passes = "noise", "noise", 1

    def tensors(self):
        return SimpleNamespace(key=fmk.key(self.device))

    def ours(self, b):
        return fmk.ops.noise(b.key, self.rows, self.columns, dtype=self.dtype)

    def peers(self):
        return {"torch.randn": lambda b: torch.randn(self.rows, self.columns, dtype=self.dtype, device=self.device)}

    def verify(self, b):
        check_noise(self.ours(b), b.key)


class Path(Case):
    """x_t with t and noise drawn: read x1, write x_t."""

    op, kernel, passes, store = "sample_path", "sample_path", 2, False

    def tensors(self):
        return SimpleNamespace(x1=self.randn())

    def ours(self, b):
        return fmk.ops.sample_path(b.x1, store=self.store)

    def peers(self):
        def eager(x1):
            x0 = torch.randn_like(x1)
            return x0, peers.draw_path(x1, x0, torch.rand(x1.shape[0], dtype=x1.dtype, device=x1.device))

        compiled = peers.compiled(eager)
        return {"eager": lambda b: eager(b.x1), "torch.compile": lambda b: compiled(b.x1)}

    def verify(self, b):
        key = fmk.key(self.device)
        path = fmk.ops.sample_path(b.x1, key=key, store=self.store)
        x0 = path.x0 if self.store else fmk.ops.noise(key, self.rows, self.columns, dtype=self.dtype)
        check_noise(x0, key)
        close(path.x_t, peers.draw_path(b.x1.double(), x0.double(), path.t.double()), self.dtype)


class PathStore(Path):
    """... and the noise written too."""

    op, passes, store = "sample_path_store", 3, True


class PathOneCore(Path):
    """Normals and x_t on one core, against torch.randn alone."""

    op, threads = "sample_path_one_core", 1

    def peers(self):
        return {"torch.randn": lambda b: torch.randn(self.rows, self.columns, dtype=self.dtype, device=self.device)}


class PathGiven(Case):
    """x_t with t and noise given: read x1 and x0, write x_t."""

    op, kernel, passes = "sample_path_given", "sample_path", 3

    def tensors(self):
        return SimpleNamespace(x1=self.randn(), x0=self.randn(), t=torch.rand(self.rows, device=self.device))

    def ours(self, b):
        return fmk.ops.sample_path(b.x1, b.x0, b.t)

    def peers(self):
        compiled = peers.compiled(peers.draw_path)
        return {
            "eager": lambda b: peers.draw_path(b.x1, b.x0, b.t),
            "torch.compile": lambda b: compiled(b.x1, b.x0, b.t),
        }

    def verify(self, b):
        close(self.ours(b).x_t, peers.draw_path(b.x1.double(), b.x0.double(), b.t.double()), self.dtype)


class Loss(Case):
    """The loss and its gradient, noise stored: read prediction, x1, x0, write the gradient."""

    op, kernel, passes, stored, gradient = "matching_loss", "_matching_loss_forward", 4, True, True

    def tensors(self):
        x1, key = self.randn(), fmk.key(self.device)
        table = fmk.ops.sample_path(x1, key=key).table
        x0 = fmk.ops.noise(key, self.rows, self.columns, dtype=self.dtype)
        prediction = self.randn().requires_grad_(self.gradient)
        return SimpleNamespace(x1=x1, x0=x0, key=key, table=table, prediction=prediction)

    def ours(self, b):
        b.prediction.grad = None
        x0 = b.x0 if self.stored else None
        loss = fmk.ops.matching_loss(b.prediction, b.x1, b.table, x0, key=b.key, terms=TERM_X1 | TERM_X0)
        if self.gradient:
            loss.backward()
        return loss

    def peers(self):
        def step(loss):
            def call(b):
                b.prediction.grad = None
                value = loss(b.prediction, b.x1, b.x0)
                if self.gradient:
                    value.backward()

            return call

        return {"eager": step(peers.velocity_loss), "torch.compile": step(peers.compiled(peers.velocity_loss))}

    def verify(self, b):
        loss = self.ours(b)
        expected, gradient = loss_and_gradient(b.prediction, b.x1, b.x0)
        close(loss, expected, torch.float32)
        if self.gradient:
            close(b.prediction.grad.double() * b.x1.numel(), gradient, self.dtype)


class LossRecompute(Loss):
    """... with the noise drawn again: the peers are given theirs."""

    op, passes, stored = "matching_loss_recompute", 3, False


class LossValue(Loss):
    """The loss alone, noise stored: read prediction, x1, x0."""

    op, passes, gradient = "matching_loss_value", 3, False


class Scale(Case):
    """The backward's product with a scale that is not 1, in place: read and write the gradient."""

    op, kernel, passes = "scale_gradient", "_scale_gradient_", 2

    def tensors(self):
        scale = torch.tensor(-1.0, device=self.device)  # stays of one size however often it is applied
        return SimpleNamespace(gradient=self.randn(), scale=scale, denominator=scale.new_empty(0))

    def ours(self, b):
        torch.ops.fmkernels._scale_gradient_(b.gradient, b.scale, b.denominator, 1.0)

    def peers(self):
        return {"eager": lambda b: b.gradient.mul_(b.scale)}

    def verify(self, b):
        before = b.gradient.clone()
        self.ours(b)
        close(b.gradient, -before, self.dtype)


OPS = {
    case.op: case
    for case in (
        Head, HeadRecompute, Noise, Path, PathStore, PathGiven, PathOneCore, Loss, LossRecompute, LossValue,
        Scale,
    )
}  # fmt: skip


def cases(device: torch.device, ops=None, sizes=None, dtypes=None) -> list[Case]:
    """The cases wanted; None takes all. One core is measured at one size, and on a CPU only."""
    found = []
    known = [op for op in OPS if ops is None or op in ops]
    for op, (rows, columns), dtype in itertools.product(known, sizes or SIZES, dtypes or DTYPES):
        if op != "sample_path_one_core" or (device.type == "cpu" and (rows, columns) == (128, 12288)):
            found.append(OPS[op](rows, columns, dtype, device))
    return found
