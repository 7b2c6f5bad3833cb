"""A log-density by one Rademacher probe against the evaluations that it cannot do without, and against its peers.

`log_prob` times whole solves by dopri5 at one tolerance, of a field of three layers, 512 wide. "bare" makes as many
evaluations of field and vector-Jacobian product as ours did, and nothing else. The peers choose their own steps, one
size for the batch with the log-density in their norm (which "norm_all" puts into ours), so their evaluations are
counted, and everyone's errors against a tight solve are kept beside the time: at a tenth of the tolerance, "tighter",
ours are about as small as theirs. `divergence` times one evaluation by one probe in the mode that ``mode="auto"``
takes, beside other estimators. Candidates take turns, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fmkernels as fmk

from .measure import failure, head_of, in_turns, peak_bytes, ratio, synchronize, timing

TOLERANCE = 1e-5
WIDTH = 512
ROUNDS = 5
EXACT_UP_TO = 64  # columns: the trace itself takes that many products


class Field(torch.nn.Module):
    """Three layers; calls are counted. Its weights are large enough that the flow bends."""

    def __init__(self, columns: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = [columns + 1, WIDTH, WIDTH, columns]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        for layer in self.layers:
            torch.nn.init.normal_(layer.weight, std=1.5 * layer.in_features**-0.5, generator=generator)
            torch.nn.init.zeros_(layer.bias)
        self.calls = 0

    def forward(self, t, x):
        self.calls += 1
        h = torch.cat([x, torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, 1).expand(len(x), 1)], 1)
        for layer in self.layers[:-1]:
            h = torch.nn.functional.silu(layer(h))
        return self.layers[-1](h)


@dataclass
class LikelihoodCase:
    """One job at one size; ``ours`` and each peer return what :meth:`verify` can compare."""

    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device

    op = ""

    def __post_init__(self):
        self.field = Field(self.columns).to(self.device, self.dtype)
        generator = torch.Generator().manual_seed(1)
        self.x1 = 0.5 * torch.randn(self.rows, self.columns, generator=generator).to(self.device, self.dtype)
        self.key = torch.tensor([5], device=self.device)
        self.z = fmk.ops.probe(self.key, self.rows, self.columns, dtype=self.dtype)[0]
        self.calls = 1  # of the field in ours

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.columns}"

    def __str__(self) -> str:
        return f"{self.op}-{self.size}-{str(self.dtype).removeprefix('torch.')}"

    def bare(self) -> None:
        """The field and the product with the probe, as often as ours asks for them."""
        t = torch.zeros(self.rows, dtype=self.dtype, device=self.device)
        for _ in range(self.calls):
            with torch.enable_grad():
                x = self.x1.detach().requires_grad_()
                torch.autograd.grad(self.field(t, x), x, self.z)

    def ours(self):
        raise NotImplementedError

    def peers(self) -> dict[str, Callable]:
        return {}

    def verify(self) -> None:
        raise NotImplementedError

    def extras(self, candidates: dict[str, Callable]) -> dict[str, dict]:
        """More to say of a candidate, by its name."""
        return {}

    def seconds(self, call: Callable) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - start

    def evaluations(self, call: Callable) -> int:
        before = self.field.calls
        call()
        return self.field.calls - before

    def measure(self, peers=None, seconds: float = 2.0) -> dict:
        row = head_of(self, "probe_dot")
        with torch.no_grad():
            try:
                self.verify()
            except Exception as error:  # whatever a broken solve raises, it has no speed
                return row | failure(error)
            wanted = {name: call for name, call in self.peers().items() if peers is None or name in peers}
            candidates = {"fmkernels": self.ours, "bare": self.bare, **wanted}
            self.calls = self.evaluations(self.ours)
            calls = {name: self.evaluations(call) for name, call in candidates.items()}
            timed = {name: functools.partial(self.seconds, call) for name, call in candidates.items()}
            spent = in_turns(timed, ROUNDS, seconds)
            more = self.extras(candidates)
            row["peak_bytes"] = peak_bytes(self.ours, self.device)
        ours = spent["fmkernels"]
        row |= timing(ours) | {"rounds": len(ours), "calls": calls["fmkernels"]} | more.get("fmkernels", {})
        row["of_bare"] = ratio(ours, spent["bare"])
        row["peers"] = {
            name: timing(spent[name]) | {"ratio": ratio(spent[name], ours), "calls": calls[name]} | more.get(name, {})
            for name in candidates
            if name != "fmkernels"
        }
        return row


class LogProb(LikelihoodCase):
    """The log-density of a batch."""

    op = "log_prob"

    def ours(self, norm: str = "state", tolerance: float = TOLERANCE):
        result = fmk.log_prob(self.field, self.x1, key=self.key, rtol=tolerance, atol=tolerance, norm=norm)
        return result.x0, result.log_prob

    def peers(self):
        found = {"norm_all": lambda: self.ours("all"), "tighter": lambda: self.ours(tolerance=TOLERANCE / 10)}
        for name, make in (("flow_matching", flow_matching), ("torchdiffeq", torchdiffeq)):
            try:
                found[name] = make(self)
            except ImportError:  # not installed
                continue
        return found

    def verify(self):
        """Our x0 and log-density against a tight solve in fp64 with the same probes."""
        exact = Field(self.columns).to(self.device, torch.float64)
        self.exact = fmk.log_prob(
            exact, self.x1.double(), key=self.key, method="dopri8", rtol=1e-8, atol=1e-8
        ).raise_for_status()  # fmt: skip
        x0, log_prob = self.ours()
        allowed = 100 * TOLERANCE
        for name, ours, value in (("x0", x0, self.exact.x0), ("log_prob", log_prob, self.exact.log_prob)):
            error = (ours - value).abs().max() / value.abs().max()
            if not error <= allowed:
                raise AssertionError(f"{name} off by {error:.2g} of its largest, allowed {allowed:.2g}")

    def extras(self, candidates):
        def errors(call):
            x0, log_prob = call()
            return {
                "x0_error": float((x0 - self.exact.x0).square().mean().sqrt()),
                "log_prob_error": float((log_prob - self.exact.log_prob).square().mean().sqrt()),  # of the same probe
            }

        found = {name: errors(call) for name, call in candidates.items() if name != "bare"}
        found.get("flow_matching", {}).pop("log_prob_error", None)  # it draws a probe of its own
        return found


def flow_matching(case: LikelihoodCase) -> Callable:
    """As in its examples (2d_flow_matching.ipynb), by dopri5."""
    from flow_matching.solver import ODESolver
    from flow_matching.utils import ModelWrapper

    class Wrapped(ModelWrapper):
        def forward(self, x, t, **extras):
            return self.model(t, x)

    solver, base = ODESolver(velocity_model=Wrapped(case.field)), fmk.StandardNormal()
    options = {"step_size": None, "method": "dopri5", "rtol": TOLERANCE, "atol": TOLERANCE}
    return lambda: solver.compute_likelihood(case.x1, base.log_prob, **options)


def torchdiffeq(case: LikelihoodCase) -> Callable:
    """Hutchinson's estimate beside x in one call of odeint, as a user writes it."""
    from torchdiffeq import odeint

    times = torch.tensor([1.0, 0.0], dtype=case.dtype, device=case.device)

    def dynamics(t, state):
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            v = case.field(t, x)
            (product,) = torch.autograd.grad(v, x, case.z)
        return v.detach(), (product * case.z).sum(1)

    def solve():
        start = case.x1, case.x1.new_zeros(case.rows)
        x, integral = odeint(dynamics, start, times, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")
        return x[-1], fmk.StandardNormal().log_prob(x[-1]) + integral[-1]

    return solve


class Divergence(LikelihoodCase):
    """One evaluation of the field and its divergence by one probe; beside it more probes, the other mode, the trace."""

    op = "divergence"

    def estimate(self, estimator) -> torch.Tensor:
        return fmk.divergence(self.field, 0.5, self.x1, estimator, key=self.key)

    def ours(self):
        return self.estimate(fmk.Hutchinson())

    def peers(self):
        estimators = {
            "forward": fmk.Hutchinson(mode="forward"),
            "reverse": fmk.Hutchinson(mode="reverse"),
            "probes_4": fmk.Hutchinson(4),
            "probes_16": fmk.Hutchinson(16),
        }
        if self.columns <= EXACT_UP_TO:
            estimators |= {"exact": fmk.Exact(), "exact_forward": fmk.Exact("forward")}
        return {name: (lambda estimator=estimator: self.estimate(estimator)) for name, estimator in estimators.items()}

    def verify(self):
        """Both modes give one number, as does the Jacobian of a row itself."""
        found = self.peers()
        value = self.ours()
        torch.testing.assert_close(found["forward"](), found["reverse"](), rtol=1e-3, atol=1e-3)
        t, x = torch.full((1,), 0.5, dtype=self.dtype, device=self.device), self.x1[:1]
        _, product = torch.func.jvp(lambda x: self.field(t, x), (x,), (self.z[:1],))
        torch.testing.assert_close(value[:1], (product * self.z[:1]).sum(1), rtol=1e-3, atol=1e-3)


SHOWN = {
    "log_prob": ("norm_all", "tighter", "flow_matching", "torchdiffeq"),
    "divergence": ("forward", "reverse", "probes_4", "probes_16", "exact", "exact_forward"),
}
INSTALLED = ("flow_matching", "torchdiffeq")
FAMILIES = ("bare", *SHOWN["log_prob"], *SHOWN["divergence"])
OPS = {case.op: case for case in (LogProb, Divergence)}
SIZES = {"log_prob": [(256, 3072)], "divergence": [(256, 64), (256, 3072)]}
DTYPES = (torch.float32,)


def cases(device: torch.device, ops=None, sizes=None, dtypes=None) -> list[LikelihoodCase]:
    """The cases wanted; None takes all."""
    return [
        OPS[op](*size, dtype, device)
        for op in OPS
        for size in SIZES[op]
        for dtype in DTYPES
        if (ops is None or op in ops) and (sizes is None or size in sizes) and (dtypes is None or dtype in dtypes)
    ]
