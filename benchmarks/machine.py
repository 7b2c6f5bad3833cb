"""Whether the machine was quiet while a benchmark ran: the same small jobs between the cases, and who else used it.

Ratios survive a noisy machine, because candidates take turns; times do not. What is watched:

* a copy beyond the caches and a loop of plain Python, a few laps after every case: how much the laps of one pause
  differ, and how far the pauses drift apart;
* on Linux the share of the processors that other programs used, and that the host of a virtual machine withheld;
* on an NVIDIA GPU the reasons for which its clocks were held down (by nvidia-smi, where it is).
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

LAPS = 7
COPY_BYTES = {"cpu": 2**25, "cuda": 2**28}
JITTER, DRIFT, OTHERS, STEAL = 0.15, 0.25, 0.10, 0.02  # shares beyond which a machine is called noisy
SLOWDOWNS = {  # bits of clocks_event_reasons.active that mean slower than the GPU can
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature (driver)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


def processor_ticks() -> tuple[int, int, int] | None:
    """(all, busy, withheld by the host) ticks of the processors that this process may use; None where unknown."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in path.read_text().splitlines()]
    counts = [list(map(int, line[1:9])) for line in lines if line and line[0] in mine]
    user, nice, system, idle, wait, interrupt, soft, steal = map(sum, zip(*counts))
    busy = user + nice + system + interrupt + soft
    return busy + idle + wait + steal, busy, steal


def held_down() -> list[str]:
    """Why the GPU's clocks are below what it can, as nvidia-smi tells."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=clocks_throttle_reasons.active", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
        reasons = int(said[torch.cuda.current_device()], 16)
    except (subprocess.TimeoutExpired, ValueError, IndexError):  # another driver, which says it otherwise
        return []
    return [name for bit, name in SLOWDOWNS.items() if reasons & bit]


def loop() -> int:
    return sum(range(150_000))


class Machine:
    """Watches from its making on; :meth:`pause` between cases, :meth:`report` whenever asked."""

    def __init__(self, device: torch.device):
        self.device = device
        pair = [torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device) for _ in range(2)]
        self.jobs: dict[str, Callable] = {"copy": lambda: pair[0].copy_(pair[1]), "loop": loop}
        self.laps: dict[str, list[list[float]]] = {name: [] for name in self.jobs}
        self.slowed: set[str] = set()
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self.started, self.ticks, self.own = time.perf_counter(), processor_ticks(), self.own_seconds()
        self.pause()

    @staticmethod
    def own_seconds() -> float:
        """Processor time of this process and of the compilers that it has run."""
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    def lap(self, name: str) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.jobs[name]()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def pause(self) -> float:
        """A few laps of each job; the seconds of the fastest copy, by which times of two runs can be compared."""
        if self.device.type == "cuda":  # while it is still as warm as the case has left it
            self.slowed.update(held_down())
        for name in self.jobs:
            self.lap(name)
            self.laps[name].append([self.lap(name) for _ in range(LAPS)])
        return min(self.laps["copy"][-1])

    def report(self) -> dict:
        """Shares of 1, and a sentence for each that says why times are not to be trusted."""
        found: dict = {"load_before": self.load}
        for name, pauses in self.laps.items():
            medians = [statistics.median(laps) for laps in pauses]
            middle = statistics.median(medians)
            spreads = [(sorted(laps)[-2] - min(laps)) / statistics.median(laps) for laps in pauses]
            found[f"{name}_jitter"] = statistics.median(spreads)
            found[f"{name}_drift"] = (max(medians) - min(medians)) / middle if len(medians) > 1 else 0.0
        ticks = processor_ticks()
        if ticks and self.ticks and ticks[0] > self.ticks[0]:
            every, busy, steal = (now - then for now, then in zip(ticks, self.ticks))
            own = (self.own_seconds() - self.own) * os.sysconf("SC_CLK_TCK")
            found["others"], found["steal"] = max(0.0, (busy - own) / every), steal / every
        if self.slowed:
            found["clocks"] = sorted(self.slowed)
        found["warnings"] = self.warnings(found)
        return found

    def warnings(self, found: dict) -> list[str]:
        said = []
        for name in self.jobs:
            if found[f"{name}_jitter"] > JITTER:
                said.append(f"laps of one {name} differ by {found[f'{name}_jitter']:.0%}")
            if found[f"{name}_drift"] > DRIFT:
                said.append(f"the {name} drifts by {found[f'{name}_drift']:.0%} during the run")
        if found.get("others", 0.0) > OTHERS:
            said.append(f"other programs use {found['others']:.0%} of the processors")
        if found.get("steal", 0.0) > STEAL:
            said.append(f"the host withholds {found['steal']:.0%} of the processors")
        if "clocks" in found:
            said.append(f"the GPU's clocks are held down: {', '.join(found['clocks'])}")
        return said
