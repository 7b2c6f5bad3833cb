"""How every case is measured: verified first, then timed in turn with its peers and with a copy of the same size.

* **Interleaved.** A round runs every candidate once, in a rotating order: ours, each peer, and a plain copy. A drifting
  clock or a busy neighbour meets all alike. A time is the median over rounds, a ratio the median of the rounds' ratios.
* **Cold.** Candidates rotate over sets of tensors that together exceed the last-level cache several times, and so does
  the copy. An op cannot then outrun the memory that the copy has measured, and a figure that says so is an error.
* **Peak memory** is what a call allocates at its worst beyond what the caller holds: on a GPU by the counters of the
  caching allocator, on a CPU by summing its events as torch.profiler records them (not a kernel's own malloc).
* **Launches** are counted on a GPU by torch.profiler as the difference between three calls and one.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fmkernels import _registration

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces every run on stderr otherwise

OURS, COPY, BASELINE = "fmkernels", "copy", "baseline"  # every other candidate is a peer
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
LAP = 4e-3  # seconds that a candidate runs for in one round; a faster one is called several times
ROUNDS = (7, 300)  # at least, at most
SETS, SETS_BYTES = 64, 2**30  # tensor sets to rotate over, at most; more of small ones, up to so many bytes
# The share of the copy's bandwidth beyond which a figure is an error. A CPU first reads what it overwrites: its copy
# moves 3 bytes for every 2 counted, and an op that only reads, or writes in place, may reach 150 %. One machine goes
# further: over 4 GiB, which no cache holds, torch's mul_ in place reached 173 % there, _scale_gradient_ 201 %.
LIMIT = {"cpu": 2.2, "cuda": 1.05}


@dataclass
class Case:
    """One op at one size and dtype: what to run, against whom, how many bytes it must move, and whether it is right.

    A subclass is an op. Its methods take a set of tensors that :meth:`tensors` made.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device

    # What a subclass sets; no annotations, which would make fields of them.
    op = ""
    kernel = ""  # the dispatcher op whose backend answers
    passes = 0  # tensors of the data's size that must be read or written
    threads = None  # None leaves torch's own number
    baseline = None  # what nobody can avoid, called with tensors; ratios are also given without it

    def __post_init__(self):
        """What an op prepares once for a case."""

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.columns}"

    def __str__(self) -> str:
        return f"{self.op}-{self.size}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        return int(self.passes * self.rows * self.columns * self.dtype.itemsize)

    def randn(self) -> torch.Tensor:
        return torch.randn(self.rows, self.columns, device=self.device).to(self.dtype)

    def tensors(self):
        """A fresh set of the tensors that a call needs."""
        raise NotImplementedError

    def ours(self, tensors):
        """One call of the op."""
        raise NotImplementedError

    def peers(self) -> dict[str, Callable]:
        """Other ways to do the same: name → callable of a set of tensors. "family, variant" names one of several."""
        return {}

    def verify(self, tensors) -> None:
        """Compare one call with a plain formula; raises AssertionError."""
        raise NotImplementedError


@functools.cache
def cache_bytes(device_type: str) -> int:
    """The last-level cache."""
    if device_type == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) * 1024 for path in sizes), default=2**25)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Race:
    """Candidates that take turns on the same rotating sets of tensors."""

    def __init__(self, candidates: dict[str, Callable], sets: list, device: torch.device):
        self.device = device
        self.candidates = candidates
        self.sets = {name: itertools.cycle(sets) for name in candidates}
        self.calls = dict.fromkeys(candidates, 1)
        self.seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for name in candidates:
            for _ in range(3):  # compile, fill the allocator's pools
                self.lap(name)
            self.calls[name] = min(1000, max(1, round(LAP / min(self.lap(name) for _ in range(3)))))

    def lap(self, name: str) -> float:
        """Seconds a call, over ``calls`` calls."""
        call, calls = self.candidates[name], self.calls[name]
        sets = list(itertools.islice(self.sets[name], calls))
        synchronize(self.device)
        start = time.perf_counter()
        for tensors in sets:
            call(tensors)
        synchronize(self.device)
        return (time.perf_counter() - start) / calls

    def rounds(self, seconds: float) -> int:
        """How many rounds fit into that time."""
        one = sum(self.lap(name) * calls for name, calls in self.calls.items())
        return min(ROUNDS[1], max(ROUNDS[0], int(seconds / one)))

    def run_ours(self) -> None:
        self.seconds[OURS].append(self.lap(OURS))

    def run_others(self) -> None:
        """A lap of every other candidate, starting with another one each time."""
        others = [name for name in self.candidates if name != OURS]
        turn = len(self.seconds[COPY]) % len(others)
        for name in others[turn:] + others[:turn]:
            self.seconds[name].append(self.lap(name))


def run_plainly(race: Race, rounds: int) -> None:
    for _ in range(rounds):
        race.run_others()
        race.run_ours()


def copies(case: Case, count: int) -> list:
    """Pairs to copy, of the case's bytes in all."""
    half = max(case.bytes // 2, 1)
    return [[torch.ones(half, dtype=torch.uint8, device=case.device) for _ in range(2)] for _ in range(count)]


@contextlib.contextmanager
def quiet(threads: int | None):
    """No garbage collection and a fixed number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(before)


def measure(case: Case, peers=None, seconds: float = 2.0, run: Callable = run_plainly) -> dict:
    """Verify and time one case; ``run(race, rounds)`` lets the others and ours take turns, e.g. under pytest-benchmark.

    Returns a row of results; with "error" and without any time where the op fails.
    """
    row = {
        "op": case.op,
        "size": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": case.device.type,
        "backend": _registration.answering(case.kernel, case.device.type),
        "bytes": case.bytes,
    }
    torch.compiler.reset()  # a compiled peer of another size must not make this one's shapes dynamic
    with quiet(case.threads):
        row["threads"] = torch.get_num_threads()
        try:
            case.verify(case.tensors())
        except Exception as error:  # whatever a broken kernel raises, it has no speed
            return row | failure(error)
        size = max(case.bytes, 1)
        count = min(max(SETS, min(SETS_BYTES // size, 16 * SETS)), 1 + 4 * cache_bytes(case.device.type) // size)
        pairs = itertools.cycle(copies(case, count))
        rivals = select(case.peers(), peers)
        candidates = {OURS: case.ours, COPY: lambda _: torch.Tensor.copy_(*next(pairs)), **rivals}
        if case.baseline is not None:
            candidates[BASELINE] = case.baseline
        race = Race(candidates, [case.tensors() for _ in range(count)], case.device)
        run(race, race.rounds(seconds))
        row |= results(case, race)
        row |= cost(case.ours, case)
        for name, call in rivals.items():
            row["peers"][name] |= cost(call, case)
    return row


def select(available: dict[str, Callable], wanted) -> dict[str, Callable]:
    """The peers whose family is wanted; all for None."""
    return {name: call for name, call in available.items() if wanted is None or family(name) in wanted}


def family(peer: str) -> str:
    """What a peer is a variant of: "torch.compile" for "torch.compile, randn outside"."""
    return peer.split(",")[0]


def short(dtype: str) -> str:
    return next(name for name, long in SHORT.items() if long == dtype)


def timing(seconds: list[float]) -> dict:
    first, _, third = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"median_s": statistics.median(seconds), "iqr_s": third - first}


def head_of(case, kernel: str) -> dict:
    """What a row of the results begins with; ``kernel`` is the op whose backend it names."""
    return {
        "op": case.op,
        "size": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": case.device.type,
        "backend": _registration.answering(kernel, case.device.type),
        "threads": torch.get_num_threads(),
    }


def require(holds, what: str) -> None:
    """An assertion that ``python -O`` keeps: what fails it gets no speed."""
    if not holds:
        raise AssertionError(what)


def failure(error: Exception) -> dict:
    """Why a case has no speed."""
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def in_turns(candidates: dict[str, Callable], rounds: int, seconds: float) -> dict[str, list[float]]:
    """What each candidate returns, its own seconds, in rounds that each begin with another one."""
    spent: dict[str, list[float]] = {name: [] for name in candidates}
    names, started = list(candidates), time.perf_counter()
    for turn in itertools.count():
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            spent[name].append(candidates[name]())
        if turn + 1 >= rounds and time.perf_counter() - started > seconds:
            return spent


def ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def results(case: Case, race: Race) -> dict:
    """Times, bandwidths and ratios of a finished race."""
    seconds = race.seconds
    ours, copy, baseline = seconds[OURS], seconds[COPY], seconds.get(BASELINE)
    figures = timing(ours) | {"rounds": len(ours), "calls": race.calls[OURS]}
    figures["gb_per_s"] = case.bytes / figures["median_s"] / 1e9
    figures["copy_s"] = statistics.median(copy)
    figures["copy_gb_per_s"] = case.bytes / min(copy) / 1e9  # its best: what the memory can do
    figures["of_copy"] = figures["gb_per_s"] / figures["copy_gb_per_s"]
    if figures["of_copy"] > LIMIT[case.device.type]:
        share = f"{figures['of_copy']:.0%}"
        figures["error"] = f"{share} of the copy's bandwidth: the data was cached or the bytes are wrong"
    figures["peers"] = {}
    for name in [name for name in seconds if name not in (OURS, COPY, BASELINE)]:
        figures["peers"][name] = timing(seconds[name]) | {"ratio": ratio(seconds[name], ours)}
        if baseline:
            net = [[a - b for a, b in zip(times, baseline)] for times in (seconds[name], ours)]
            figures["peers"][name]["ratio_less_baseline"] = ratio(*net)
    if baseline:
        figures["baseline_s"] = statistics.median(baseline)
    return figures


def cost(call: Callable, case: Case) -> dict:
    """What one call costs besides time."""
    tensors = case.tensors()
    call(tensors)
    for tensor in vars(tensors).values():
        if isinstance(tensor, torch.Tensor):
            tensor.grad = None  # the call's own gradient counts, not one that it finds
    peak = peak_bytes(functools.partial(call, tensors), case.device)
    if case.device.type != "cuda":
        return {"peak_bytes": peak}
    return {"peak_bytes": peak} | gpu_activity(functools.partial(call, tensors))


def peak_bytes(call: Callable, device: torch.device) -> int | None:
    """The most that one call holds beyond what was allocated before it; None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def gpu_activity(call: Callable) -> dict:
    """Kernels, fills and copies launched, and waits of the host, a call: the difference between three calls and one."""

    def count(calls: int) -> tuple[int, int]:
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
        events = [event for event in profile.events() if not getattr(event, "is_user_annotation", False)]
        launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
        return launches, sum(event.name in WAITS or "DtoH" in event.name for event in events)

    count(1)
    one, three = count(1), count(3)
    if three[0] == 0:  # the profiler sees no device here
        return {"launches": None, "synchronisations": None}
    return {name: (b - a) / 2 for name, a, b in zip(("launches", "synchronisations"), one, three)}
