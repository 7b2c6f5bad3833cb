"""What a solver spends outside the vector field: per six evaluations for small states, against a copy for large ones.

f is timed from inside each call, so a candidate's figure is its own time: (whole − f) / (evaluations of f) · 6, six
being the evaluations of a Dormand–Prince step. Candidates take turns, and a ratio is the median of the rounds' ratios.
They do not take equal steps (torchode and ``solve`` give each row its own), which the figure does not depend on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fmkernels as fmk

from .measure import failure, head_of, in_turns, ratio, synchronize, timing

TOLERANCE = 1e-5
OUTPUTS = 50
ROUNDS = 7
DORMAND_PRINCE_PASSES = 41  # docs/cost.md: tensors of the state's size that a step reads or writes


class TimedField:
    """A field that knows how often it was called and how long that took."""

    def __init__(self, f: Callable):
        self.f, self.calls, self.seconds = f, 0, 0.0

    def __call__(self, t, y):
        start = time.perf_counter()
        k = self.f(t, y)
        self.calls += 1
        self.seconds += time.perf_counter() - start
        return k


def van_der_pol(t, y, mu=2.0):
    x, v = y[..., 0], y[..., 1]
    return torch.stack((v, mu * (1 - x * x) * v - x), -1)


def decay(t, y):
    return -y


@dataclass
class SolverCase:
    """One solver on one problem; ``run(field, y0)`` of ours and of each peer solves it and returns the final state."""

    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device

    op = ""
    problem = staticmethod(van_der_pol)
    end = 10.0

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.columns}"

    def __str__(self) -> str:
        return f"{self.op}-{self.size}-{str(self.dtype).removeprefix('torch.')}"

    def y0(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.rows, self.columns, generator=generator, dtype=torch.float64).to(
            self.device, self.dtype
        )

    def times(self) -> torch.Tensor:
        return torch.linspace(0, self.end, OUTPUTS, dtype=self.dtype, device=self.device)

    def ours(self, field, y0) -> torch.Tensor:
        raise NotImplementedError

    def peers(self) -> dict[str, Callable]:
        return {}

    def verify(self) -> None:
        """Our final state against dopri8 at a tight tolerance in fp64."""
        y0 = self.y0()
        exact = fmk.solve(self.problem, y0.double(), (0, self.end), method="dopri8", rtol=1e-11, atol=1e-11)
        error = (self.ours(self.problem, y0).double() - exact.raise_for_status().y).abs().max()
        allowed = 100 * TOLERANCE * exact.y.abs().max()
        if not error <= allowed:
            raise AssertionError(f"final state off by {error:.2g}, allowed {allowed:.2g}")

    def outside(self, solve: Callable, y0) -> tuple[float, int]:
        """Seconds outside f per six evaluations, and evaluations."""
        field = TimedField(self.problem)
        synchronize(self.device)
        start = time.perf_counter()
        solve(field, y0)
        synchronize(self.device)
        whole = time.perf_counter() - start
        return (whole - field.seconds) / field.calls * 6, field.calls

    def measure(self, peers=None, seconds: float = 2.0) -> dict:
        row = head_of(self, "runge_kutta_stage")
        with torch.no_grad():
            try:
                self.verify()
            except Exception as error:  # whatever a broken solver raises, it has no speed
                return row | failure(error)
            wanted = {name: call for name, call in self.peers().items() if peers is None or name in peers}
            candidates = {"fmkernels": self.ours, **wanted}
            y0 = self.y0()
            calls = {name: self.outside(solve, y0)[1] for name, solve in candidates.items()}
            timed = {name: lambda solve=solve: self.outside(solve, y0)[0] for name, solve in candidates.items()}
            spent = in_turns(timed, ROUNDS, seconds)
        ours = spent["fmkernels"]
        row |= timing(ours) | {"rounds": len(ours), "calls": calls["fmkernels"]}
        row["peers"] = {
            name: timing(spent[name]) | {"ratio": ratio(spent[name], ours), "calls": calls[name]} for name in wanted
        }
        return row | self.against_copy(ours)

    def against_copy(self, ours: list[float]) -> dict:
        return {}


def torchdiffeq_odeint(times) -> Callable | None:
    try:
        from torchdiffeq import odeint
    except ImportError:
        return None
    return lambda f, y0: odeint(f, y0, times, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")[-1]


def torchode_solve(times, rows) -> Callable | None:
    try:
        import torchode
    except ImportError:
        return None
    t_eval = times.expand(rows, -1)

    def solve(f, y0):
        term = torchode.ODETerm(f)
        controller = torchode.IntegralController(atol=TOLERANCE, rtol=TOLERANCE, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller)
        return solver.solve(torchode.InitialValueProblem(y0=y0, t_eval=t_eval)).ys[:, -1]

    return solve


def installed(**peers) -> dict[str, Callable]:
    return {name: call for name, call in peers.items() if call is not None}


class Odeint(SolverCase):
    """van der Pol, one step size for the batch, as torchdiffeq."""

    op = "odeint"

    def ours(self, field, y0):
        from fmkernels.integrations.torchdiffeq import odeint

        return odeint(field, y0, self.times(), rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")[-1]

    def peers(self):
        return installed(torchdiffeq=torchdiffeq_odeint(self.times()))


class Solve(SolverCase):
    """van der Pol, a step size for each row, as torchode."""

    op = "solve"

    def ours(self, field, y0):
        return fmk.solve(field, y0, (0.0, self.end), self.times(), rtol=TOLERANCE, atol=TOLERANCE).y[:, -1]

    def peers(self):
        return installed(torchdiffeq=torchdiffeq_odeint(self.times()), torchode=torchode_solve(self.times(), self.rows))


class SolveLarge(SolverCase):
    """A state beyond the caches: a step's time against copies that move its bytes through the same working set."""

    op, problem, end = "solve_large", staticmethod(decay), 4.0

    def ours(self, field, y0):
        return fmk.solve(field, y0, (0.0, self.end), rtol=TOLERANCE, atol=TOLERANCE).y

    def peers(self):
        return installed(
            torchdiffeq=torchdiffeq_odeint(torch.tensor([0.0, self.end], dtype=self.dtype, device=self.device))
        )

    def against_copy(self, ours):
        tensors = [self.y0() for _ in range(10)]  # y, seven k's, a stage and its successor
        pairs = list(zip(tensors, tensors[1:] + tensors[:1], strict=True))
        laps = []
        for _ in range(20):
            synchronize(self.device)
            start = time.perf_counter()
            for source, target in pairs:
                target.copy_(source)
            synchronize(self.device)
            laps.append((time.perf_counter() - start) / len(pairs))
        copy = sorted(laps)[len(laps) // 2] / 2 * DORMAND_PRINCE_PASSES
        return {"copy_s": copy, "of_copy": copy / sorted(ours)[len(ours) // 2]}


FAMILIES = ("torchdiffeq", "torchode")
OPS = {case.op: case for case in (Odeint, Solve, SolveLarge)}
SIZES = {"odeint": (256, 2), "solve": (256, 2), "solve_large": (4096, 256)}
DTYPES = (torch.float32, torch.float64)


def cases(device: torch.device, ops=None, sizes=None, dtypes=None) -> list[SolverCase]:
    """The cases wanted; None takes all."""
    found = []
    for op in OPS:
        for dtype in dtypes or DTYPES:
            if (ops is None or op in ops) and (sizes is None or SIZES[op] in sizes) and dtype in DTYPES:
                found.append(OPS[op](*SIZES[op], dtype, device))
    return found
