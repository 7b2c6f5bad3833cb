"""What the tests of `solve` share: rows of every kind, a field that counts its calls, one thread."""

from __future__ import annotations

import math

import pytest
import torch

F64 = torch.float64
NAN, INF = math.nan, math.inf
DONE, MAX_STEPS, UNDERFLOW, NON_FINITE = range(4)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """States this small are one thread's work: others only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decay(t, y):
    return -y


class Counting:
    """f, and what it was called with."""

    def __init__(self, f):
        self.f, self.times, self.states = f, [], []

    def __call__(self, t, y):
        self.times.append(t.clone())
        self.states.append((y, y.clone()))
        return self.f(t, y)


RATES = torch.tensor([1.0, -0.5, 2.0, 300.0, 1.0, 1.0, 1.0, 1.0], dtype=F64)
STARTS = torch.tensor(
    [[1, 2, 3], [0.5, 0.1, -1], [1, NAN, 1], [1, 1, 1], [2, 2, 2], [1, 3, 1], [INF, 0, 0], [-9, 1, 2]], dtype=F64
)
SPANS = torch.tensor([[0, 1], [1, -2], [0, 1], [0, 2.0], [1, 1], [-3, -2.5], [0, 1], [0.3, 2.0]], dtype=F64)
OUTPUTS = torch.tensor(
    [
        [0.0, 0.5, 1.0], [1.0, 0.0, -2.0], [0.0, 0.5, 1.0], [1.0, 2.0, NAN],
        [1.0, 1.0, NAN], [-2.9, NAN, NAN], [0.0, 1.0, NAN], [0.3, 0.3, 2.0],
    ], dtype=F64,
)  # fmt: skip


def elementwise(rates, crash):
    """Oscillations of each row's own rate; rows marked so turn NaN after t = 1/2."""

    def f(t, y):
        slope = rates.unsqueeze(-1) * (y - y * y.abs() / 4) * (1 - (t / 2).unsqueeze(-1)).to(y.dtype)
        return torch.where((crash & (t > 0.5)).unsqueeze(-1), NAN, slope.to(y.dtype))

    return f
