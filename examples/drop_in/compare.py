"""Runs every script before and after, and prints what changes: python examples/drop_in/compare.py

1. ``curves``: both are trained from one seed, in float32 and in float64. Where the losses are not equal to the bit,
   their largest relative difference is of the size of a rounding in either precision.
2. ``heads``: what a training step does besides network and optimiser, with its backward. The scripts' own ``head`` is
   called, with a network that has its answer ready, in rounds in which before and after take turns.
3. ``samplers``: the scripts' own ``sample`` in the same way, along the field -x, less the time that is spent in it.

It needs the originals: torchcfm, flow_matching, torchdiffeq and diffusers. ``--json`` writes what the documentation
quotes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]  # the scripts, what the examples share, the checkout

from common import at_least, positive, terminal_table  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.measure import in_turns, quiet, ratio  # noqa: E402
from benchmarks.run import commit, duration  # noqa: E402
from fmkernels import _info, _registration  # noqa: E402

PAIRS = {
    "plain": ("plain_before", "plain_after"),
    "plain, drawn": ("plain_before", "plain_drawn"),
    "lightning": ("lightning_before", "lightning_after"),
    "torchcfm": ("torchcfm_before", "torchcfm_after"),
    "torchcfm, OT": ("torchcfm_ot_before", "torchcfm_ot_after"),
    "torchcfm, own hooks": ("torchcfm_hooks_before", "torchcfm_hooks_after"),
    "flow_matching": ("flow_matching_before", "flow_matching_after"),
    "torchdiffeq": ("torchdiffeq_before", "torchdiffeq_after"),
    "diffusers": ("diffusers_before", "diffusers_after"),
    "diffusers, helpers": ("diffusers_before", "diffusers_fused"),
}
IMPORTS_ONLY = tuple(style for style in PAIRS if "," not in style and style not in ("plain", "lightning")) + (
    "torchcfm, OT", "torchcfm, own hooks",
)  # fmt: skip
OTHER_DRAWS = ("plain, drawn",)  # noise differs by design
FEWER = {"torchdiffeq": 5}  # a step is a solve there: that many times fewer
SIZES = ((256, 2), (256, 784), (128, 12288))
LAP = 4e-3  # seconds that one turn takes at least


def scripts(style: str) -> tuple[ModuleType, ModuleType]:
    """The modules before and after."""
    before, after = PAIRS[style]
    return importlib.import_module(before), importlib.import_module(after)


# ---- the same training ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def precision(dtype: torch.dtype):
    """Numbers are of this dtype unless told otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def apart(before, after) -> float:
    """The largest difference, relative to the largest number before."""
    before, after = (torch.as_tensor(values, dtype=torch.float64) for values in (before, after))
    return ((after - before).abs().max() / before.abs().max()).item()


def outputs(script: ModuleType, network: Callable, seed: int) -> dict[str, torch.Tensor]:
    """What a script makes with a trained network: samples, and log-densities where it has them."""
    made = {}
    for name in ("sample", "score"):
        if hasattr(script, name):
            torch.manual_seed(seed)
            made[name] = getattr(script, name)(torch.randn(16, *network.shape), network).detach()
    return made


def curves(style: str, steps: int, seed: int = 0) -> dict:
    """Both trained from one seed: how far losses, samples and log-densities are apart, in either precision."""
    steps = max(2, steps // FEWER.get(style, 1))
    found: dict = {"style": style, "steps": steps}
    for dtype in (torch.float32, torch.float64):
        with precision(dtype):
            losses, networks = zip(*(script.train(steps, seed) for script in scripts(style)))
            if style in OTHER_DRAWS:
                late = torch.tensor(losses, dtype=torch.float64)[:, steps // 2 :]
                error = (late[1] - late[0]).std() / late.shape[1] ** 0.5
                row = {"means": late.mean(1).tolist(), "standard_error": error.item()}
            else:
                made = [outputs(*pair, seed) for pair in zip(scripts(style), networks)]
                row = {"losses": max(abs(a - b) / abs(b) for b, a in zip(*losses))}
                row |= {name: apart(made[0][name], made[1][name]) for name in made[0]}
        found[str(dtype).removeprefix("torch.")] = row
    return found


# ---- times ------------------------------------------------------------------------------------------------------


class Field:
    """The field -x, which counts its calls and the seconds spent in it."""

    def __init__(self):
        self.calls, self.seconds = 0, 0.0

    def __call__(self, x, t):
        start = time.perf_counter()
        y = -x
        self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - start
        return y


def head_of(script: ModuleType, x1: torch.Tensor, prediction: torch.Tensor) -> Callable | None:
    """One head with its backward, for a network that has its answer ready."""

    def network(x, t):
        return prediction

    if hasattr(script, "FlowModule"):
        module = script.FlowModule(network)
        module.log = lambda name, value: None  # the logger is Lightning's
        head = functools.partial(module.training_step, x1, 0)
    elif hasattr(script, "head"):
        head = functools.partial(script.head, x1, network)
    else:
        return None

    def call():
        prediction.grad = None
        head().backward()

    return call


def sampler_of(script: ModuleType, x0: torch.Tensor, field: Field) -> Callable | None:
    """One batch of samples."""
    return functools.partial(script.sample, x0, field) if hasattr(script, "sample") else None


def lap(call: Callable, field: Field) -> Callable[[], float]:
    """A turn of enough calls that returns seconds a call, less those in the field."""

    def seconds(calls: int) -> float:
        inside, start = field.seconds, time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start - (field.seconds - inside)) / calls

    for _ in range(3):
        once = seconds(1)
    return functools.partial(seconds, max(1, min(1000, round(LAP / once))))


def race(style: str, kind: str, size: tuple[int, int], seconds: float) -> dict | None:
    """Times of one script before and after; None where it has no such part."""
    x = torch.randn(size)
    fields = (Field(), Field())
    calls = [
        head_of(script, x, torch.randn_like(x).requires_grad_()) if kind == "head" else sampler_of(script, x, field)
        for script, field in zip(scripts(style), fields)
    ]
    if None in calls:
        return None
    with quiet(None):
        turns = {name: lap(*pair) for name, *pair in zip(("before", "after"), calls, fields)}
        times = in_turns(turns, rounds=5, seconds=seconds)
    row = {"style": style, "size": f"{size[0]}x{size[1]}", "rounds": len(times["after"])}
    row |= {f"{name}_s": statistics.median(values) for name, values in times.items()}
    row["ratio"] = ratio(times["before"], times["after"])
    if kind == "sampler":
        evaluations = []
        for call, field in zip(calls, fields):
            start = field.calls
            call()
            evaluations.append(field.calls - start)
        row["evaluations"] = evaluations
    return row


# ---- what is printed --------------------------------------------------------------------------------------------


def gap(figures: dict, name: str) -> str:
    """A largest difference in words."""
    if "means" in figures:
        before, after = figures["means"]
        shown = f"{before:.4f} / {after:.4f} ± {figures['standard_error']:.4f}" if name == "losses" else "–"
    elif name not in figures:
        shown = "–"
    else:
        shown = "to the bit" if figures[name] == 0 else f"{figures[name]:.0e}"
    return shown


def curve_table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The largest relative differences."""
    header = ["script", "steps", "losses, fp32", "losses, fp64", "samples, fp32", "samples, fp64"]
    body = []
    for row in rows:
        cells = [gap(row[dtype], name) for name in ("losses", "sample") for dtype in ("float32", "float64")]
        body.append([row["style"], str(row["steps"]), *cells])
    return header, body


def time_table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Times before and after, and their ratio."""
    header = ["script", "batch", "before", "after", "ratio"]
    counted = any("evaluations" in row for row in rows)
    body = []
    for row in rows:
        cells = [row["style"], row["size"].replace("x", " × "), duration(row["before_s"]), duration(row["after_s"])]
        cells += [f"{row['ratio']:.1f}×"]
        body.append([*cells, "/".join(map(str, dict.fromkeys(row["evaluations"])))] if counted else cells)
    return [*header, "evaluations"] if counted else header, body


def environment() -> dict:
    """What it ran on."""
    return {
        "device": _info.device_name("cpu"),
        "versions": _info.versions("torchcfm", "flow_matching", "torchdiffeq", "diffusers", "POT"),
        "build": {"compiler": _registration.build_facts().get("compiler")},
        "commit": commit(),
    }


def options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--styles", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="STYLE", help=f"of {[*PAIRS]}"
    )
    parser.add_argument("--steps", type=at_least(2), default=100, help="training steps that are compared (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timed pair (%(default)s)")
    parser.add_argument("--sizes", type=positive, default=len(SIZES), help=f"the first so many of {SIZES}")
    parser.add_argument("--json", type=Path, nargs="?", const=ROOT / "docs" / "experiments" / "drop_in.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    from rich.console import Console

    chosen, found = options(argv), {**environment(), "curves": [], "heads": [], "samplers": []}
    with tqdm(total=len(chosen.styles) * (1 + 2 * len(SIZES[: chosen.sizes]))) as bar:
        for style in chosen.styles:
            bar.set_description(style)
            with quiet(1):  # networks this small only wait for a second thread
                found["curves"].append(curves(style, chosen.steps))
            bar.update()
            for size in SIZES[: chosen.sizes]:
                for kind in ("head", "sampler"):
                    # A pair that shares its sampler with another is timed once.
                    row = race(style, kind, size, chosen.seconds) if kind == "head" or "," not in style else None
                    found[f"{kind}s"] += [row] if row else []
                    bar.update()
    console = Console()
    console.print(terminal_table("Largest relative differences of the same training", *curve_table(found["curves"])))
    console.print(terminal_table("Head: everything but network and optimiser", *time_table(found["heads"])))
    console.print(terminal_table("Sampler: everything but the field", *time_table(found["samplers"])))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"written: {chosen.json}")
    return found


if __name__ == "__main__":
    main()
