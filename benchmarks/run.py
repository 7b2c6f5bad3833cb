"""The benchmark command: choose cases, run them under pytest-benchmark, print a table, write JSON."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from fmkernels import _info, _registration

from . import conditional_flow, head, likelihood, marginal, peers, probes, sampling, solvers
from .compare import SCHEMA, compare, load
from .machine import Machine
from .measure import SHORT, failure, family, measure, short

FOLDER = Path(__file__).resolve().parent
NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
OPS = head.OPS | conditional_flow.OPS | sampling.OPS | probes.OPS | marginal.OPS | solvers.OPS | likelihood.OPS
FAMILIES = tuple(dict.fromkeys((*peers.FAMILIES, *solvers.FAMILIES, *likelihood.FAMILIES)))


def words(text: str) -> list[str]:
    return text.split(",")


def one_of(choices):
    def parse(text: str) -> list[str]:
        found = words(text)
        for word in found:
            if word not in choices:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(choices)}, got {word!r}")
        return found

    return parse


def sizes(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word) for word in words(text)]
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS, such as 256x784, got {text!r}")
    return [(int(match[1]), int(match[2])) for match in found]


def dtypes(text: str) -> list[torch.dtype]:
    return [NAMES[SHORT.get(word, word)] for word in one_of([*SHORT, *NAMES])(text)]


def device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no CUDA device here")
    return torch.device(text)


def number(low: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number of at least {low:g}, got {text}")
        return value

    return parse


def count_of_threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an int of at least 1, got {text}")
    return int(text)


def peers_of(text: str) -> list[str]:
    found = one_of([*FAMILIES, "none"])(text)
    if "none" in found and len(found) > 1:
        raise argparse.ArgumentTypeError(f"expected peers or none, got {text!r}")
    return found


def refuse_unwritable(path: Path) -> None:
    """OSError before anything is measured rather than after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _info.refuse_unwritable(path)


def parser(prog: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog=prog,
        description="Measure every op here against its peers: verified first, then timed in turn with them and with a "
        "copy of the same size. Without options that is everything, most of an hour on two cores; --quick takes 2 "
        "minutes.",
        epilog="Several values are separated by commas. Peers that are not installed are left out. Exit status 1 where "
        "an op fails its check. CONTRIBUTING.md says how to read the tables.",
    )
    found.add_argument("--quick", action="store_true", help="one size an op, fp32, short rounds, without torch.compile")
    found.add_argument("--op", type=one_of(OPS), metavar="OP", help=f"of {', '.join(OPS)}")
    found.add_argument("--size", type=sizes, metavar="RxC", help="rows x columns, such as 256x784")
    found.add_argument("--dtype", type=dtypes, metavar="TYPE", help="fp32, bf16, fp16 or fp64; fp32,bf16 unless given")
    found.add_argument("--peers", type=peers_of, metavar="PEER", help=f"of {', '.join(FAMILIES)}, or none")
    found.add_argument("--device", type=device, default=None, help="cpu or cuda; cuda where there is one")
    found.add_argument("--threads", type=count_of_threads, default=2, help="CPU threads (default: 2)")
    found.add_argument("--seconds", type=number(0), help="time for the rounds of a case (default: 2; 0.5 with --quick)")
    found.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="write the results; without FILE to benchmarks/results"
    )
    found.add_argument(
        "--plot", nargs="?", const="out", metavar="FOLDER", help="draw roofline.png and speedup.png (default: into out)"
    )
    found.add_argument("--from", dest="source", type=Path, metavar="FILE", help="plot these results; measure nothing")
    found.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two result files; measure nothing"
    )
    found.add_argument(
        "--fail-on-regression", type=number(0), metavar="PERCENT", help="with --compare: exit status 1 where something "
        "is slower by more than this, and beyond the spread",
    )  # fmt: skip
    return found


QUICK_SIZE = "256x784"
UNHURRIED = ("log_prob", "marginal_field")  # ops left out of --quick unless asked for


def quickest(cases: list, asked: bool) -> list:
    """A case of each op, in fp32: of the usual small size, else its first."""
    found: dict = {}
    for case in cases:
        if case.dtype == torch.float32 and (asked or case.op not in UNHURRIED):
            if case.op not in found or case.size == QUICK_SIZE:
                found[case.op] = case
    return list(found.values())


class Session:
    """What pytest's cases share: which cases to run, how, and the rows they have measured."""

    def __init__(self, options, show=print):
        torch.set_num_threads(options.threads)
        where = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device, self.peers, self.seconds, self.show = where, options.peers, options.seconds, show
        wanted = where, options.op, options.size, options.dtype
        modules = (head, conditional_flow, sampling, probes, marginal, solvers, likelihood)
        self.cases = [case for module in modules for case in module.cases(*wanted)]
        if options.quick:
            self.cases = self.cases if options.size or options.dtype else quickest(self.cases, bool(options.op))
            if self.peers is None:
                self.peers = [name for name in FAMILIES if name != "torch.compile"]
        self.seconds = (0.5 if options.quick else 2.0) if self.seconds is None else self.seconds
        self.machine = Machine(where)
        self.bar = bar(len(self.cases))
        self.rows: list[dict] = []
        self.path = None  # of the results
        self.unwritten: OSError | None = None
        if options.json is not None:
            default = FOLDER / "results" / f"{slug(where.type)}.json"
            self.path = Path(options.json) if options.json else default

    def measure(self, case, **how) -> dict:
        """Measure a case, keep its row, write what there is so far, and say so."""
        if self.bar is not None:
            self.bar.set_description_str(str(case))
        try:
            if isinstance(case, (solvers.SolverCase, likelihood.LikelihoodCase)):
                row = case.measure(self.peers, self.seconds)
            else:
                row = measure(case, self.peers, self.seconds, **how)
        except Exception as error:  # of a peer, perhaps: the other cases are measured all the same
            traceback.print_exc()
            dtype = str(case.dtype).removeprefix("torch.")
            row = {"op": case.op, "size": case.size, "dtype": dtype, "device": case.device.type} | failure(error)
        row["pause_s"] = self.machine.pause()
        self.rows.append(row)
        if self.path:
            try:
                self.path.write_text(json.dumps(document(self), indent=1, ensure_ascii=False) + "\n")
            except OSError as error:  # a full disk: what is measured is still shown
                self.unwritten = error
        spent = time.perf_counter() - self.machine.started
        left = spent / len(self.rows) * (len(self.cases) - len(self.rows))
        place = f"[{len(self.rows)}/{len(self.cases)}, {clock(left)} left]"
        said = f"  {place} {case}: {row.get('error') or duration(row['median_s'])}"
        if self.bar is None:
            self.show(said, flush=True)
        else:
            self.bar.write(said)
            self.bar.update()
        return row


def bar(total: int):
    """A progress bar on a terminal; None elsewhere, or without tqdm."""
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        return None
    from tqdm import tqdm

    return tqdm(total=total, unit="case", leave=False, smoothing=0)


def clock(seconds: float) -> str:
    """A time to wait: "40 s", "12 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def guess(session: Session) -> float:
    """Seconds that the cases may take, from what they took on two cores: compiling peers is most of it."""
    compiles = session.peers is None or "torch.compile" in session.peers
    slow = {"log_prob": 120.0, "marginal_field": 150.0, "divergence": 20.0}
    return sum(slow.get(case.op, 2 * session.seconds + 4 + 10 * compiles) for case in session.cases)


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.4g} ms"


def amount(count: int | None) -> str:
    if count is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count} B"


def count(number: float | None) -> str:
    return "–" if number is None else f"{number:g}"


def times(figures: dict | None) -> str:
    return f"{figures['ratio']:.2f}x" if figures else "–"


COLUMNS = (
    ("op", lambda row: row["op"]),
    ("size", lambda row: row["size"]),
    ("dtype", lambda row: short(row["dtype"])),
    ("backend", lambda row: row["backend"]),
    ("time", lambda row: duration(row["median_s"])),
    ("spread", lambda row: f"{row['iqr_s'] / row['median_s']:.0%}"),
    ("GB/s", lambda row: f"{row['gb_per_s']:.3g}"),
    ("of copy", lambda row: f"{row['of_copy']:.0%}"),
    ("peak", lambda row: amount(row["peak_bytes"])),
    ("launches", lambda row: count(row["launches"])),
    ("waits", lambda row: count(row["synchronisations"])),
)


def fastest(row: dict) -> dict[str, dict]:
    """The fastest variant of every family of peers."""
    found: dict[str, dict] = {}
    for name, figures in sorted(row.get("peers", {}).items(), key=lambda item: item[1]["ratio"]):
        found.setdefault(family(name), figures)
    return found


def show(rows: list[dict]) -> None:
    """Print the rows as tables, the whole head first; ratios are to the fastest variant of each peer."""
    for title, wanted in (("The training head", True), ("Single ops", False)):
        single = [row for row in rows if "error" not in row and row["op"] not in solvers.OPS | likelihood.OPS]
        chosen = [row for row in single if row["op"].startswith("head") == wanted]
        if not chosen:
            continue
        families = [name for name in peers.FAMILIES if any(name in fastest(row) for row in chosen)]
        columns = COLUMNS if "launches" in chosen[0] else COLUMNS[:-2]
        table = []
        for row in chosen:
            ratios = fastest(row)
            table.append([*(text(row) for _, text in columns), *(times(ratios.get(name)) for name in families)])
        header = [*(name for name, _ in columns), *families]
        _info.print_table(f"{title}; a peer's column says how many times as long it takes", header, table, left=4)
    solved = [row for row in rows if "error" not in row and row["op"] in solvers.OPS]
    if solved:
        table = [
            [
                *(text(row) for _, text in COLUMNS[:4]),
                duration(row["median_s"]),
                f"{row['iqr_s'] / row['median_s']:.0%}",
                f"{row['of_copy']:.0%}" if "of_copy" in row else "–",
                str(row["calls"]),
                *(times(row["peers"].get(name)) for name in solvers.FAMILIES),
            ]
            for row in solved
        ]
        header = [*(name for name, _ in COLUMNS[:4]), "outside f", "spread", "of copy", "calls of f", *solvers.FAMILIES]
        _info.print_table("Solvers: time outside f per six evaluations of it", header, table, left=4)
    for op, names in likelihood.SHOWN.items():
        scored = [row for row in rows if "error" not in row and row["op"] == op]
        table = [
            [
                *(text(row) for _, text in COLUMNS[:6]),
                str(row["calls"]),
                f"{row['of_bare']:.2f}x",
                amount(row["peak_bytes"]),
                *(times(row["peers"].get(name)) for name in names),
            ]
            for row in scored
        ]
        header = [*(name for name, _ in COLUMNS[:6]), "calls of f", "of bare", "peak", *names]
        if table:
            _info.print_table(f"{op}: also as a multiple of the bare field and products", header, table, left=4)
    for row in rows:
        if row["size"] == "256x2" and row.get("baseline_s") and row["peers"]:
            net = ", ".join(f"{name} {figures['ratio_less_baseline']:.2f}x" for name, figures in fastest(row).items())
            print(f"{row['op']} 256x2 {row['dtype']} less an empty backward ({duration(row['baseline_s'])}): {net}")
    for row in rows:
        if "error" in row:
            print(f"FAILED {row['op']} {row['size']} {row['dtype']}: {row['error']}")


def slug(device_type: str) -> str:
    """A device's name as a file name: "cpu-amd-epyc-2c", "nvidia-h200"."""
    name = f"cpu {_info.cpu_name()} {torch.get_num_threads()}c" if device_type == "cpu" else _info.device_name("cuda")
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


@functools.cache
def commit() -> str | None:
    """The commit measured, with "+" where the working tree differs from it."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return None
    return described.stdout.strip() or None


def document(session: Session) -> dict:
    """The results as JSON: nothing of the machine but its device."""
    facts = _registration.build_facts()
    return {
        "schema": SCHEMA,
        "device": _info.device_name(session.device.type),
        "versions": _info.versions("flow_matching", "torchcfm", "torchdiffeq", "torchode"),
        "build": {name: facts.get(name) for name in ("compiler", "nvcc", "cuda_arch_list", "flags")},
        "commit": commit(),
        "machine": session.machine.report(),
        "results": session.rows,
    }


def run(session: Session) -> bool:
    """Every case, under pytest-benchmark where it is installed and in a plain loop elsewhere; False if interrupted."""
    if any(importlib.util.find_spec(name) is None for name in ("pytest", "pytest_benchmark")):
        with contextlib.suppress(KeyboardInterrupt):
            for case in session.cases:
                session.measure(case)
            return True
        return False
    import pytest

    from . import conftest

    conftest.chosen = session
    arguments = [str(FOLDER), "-s", "-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:xdist"]
    status = pytest.main([*arguments, "--benchmark-quiet", "--rootdir", str(FOLDER.parent)])
    if status == pytest.ExitCode.INTERRUPTED:
        return False
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or len(session.rows) < len(session.cases):
        done = f"{len(session.rows)} of {len(session.cases)} cases"
        raise SystemExit(f"fmkernels: pytest stopped with {status!r} after {done}; see pytest benchmarks")
    return True


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(argv)
    chosen = [f"--{name}" for name in ("quick", "op", "size", "dtype", "peers") if getattr(options, name)]
    for name, alone in (("compare", options.compare), ("from", options.source)):
        if alone and chosen:
            parser(prog).error(f"--{name}: measures nothing and chooses nothing; expected it without {chosen[0]}")
    if options.compare:
        return compare(*options.compare, options.fail_on_regression)
    if options.fail_on_regression is not None:
        parser(prog).error("--fail-on-regression: expected with --compare OLD NEW")
    plots = Path(options.plot or "out") if options.plot or options.source else None
    if plots is not None:
        if importlib.util.find_spec("matplotlib") is None:
            parser(prog).error("--plot: expected matplotlib to be installed (pip install matplotlib), found none")
        try:
            refuse_unwritable(plots / "roofline.png")
        except OSError as error:
            parser(prog).error(f"--plot: expected a folder that can be written, got {plots}: {error.strerror}")
    if options.source:
        return draw(load(options.source), plots)
    session = Session(options)
    if not session.cases:
        parser(prog).error("no case is of that op, size and device")
    if session.path:
        try:
            refuse_unwritable(session.path)
        except OSError as error:
            parser(prog).error(f"--json: expected a file that can be written, got {session.path}: {error.strerror}")
        others = dropped(session) if not options.json else 0
        if others:
            parser(prog).error(
                f"--json: {session.path} has {others} cases that this run does not measure and would drop; name a file"
            )
    wait = guess(session)
    hint = "; --quick is shorter" if wait > 300 and not options.quick else ""
    print(f"{_info.device_name(session.device.type)}: {len(session.cases)} to measure, some {clock(wait)}{hint}")
    whole = run(session)
    if session.bar is not None:
        session.bar.close()
    show(session.rows)
    met = {family(peer) for row in session.rows for peer in row.get("peers", {})}
    for name in options.peers or ():
        if name != "none" and name not in met:
            print(f"note: no case was measured beside {name}: none of these ops has it, or it is not installed")
    if session.path and session.rows and not session.unwritten:
        print(f"written: {session.path}")
    if not whole:
        print(f"fmkernels: interrupted after {len(session.rows)} of {len(session.cases)} cases", file=sys.stderr)
        return 130
    if session.unwritten:
        print(f"fmkernels: --json: {session.path} could not be written: {session.unwritten}", file=sys.stderr)
        return 2
    if options.plot:
        draw(document(session), plots)
    for text in session.machine.report()["warnings"]:
        print(f"warning: the machine is noisy: {text}")
    return int(any("error" in row for row in session.rows))


def dropped(session: Session) -> int:
    """How many cases of the committed file of this device a run would lose."""
    if not session.path.exists():
        return 0
    key = "op", "size", "dtype"
    kept = {(case.op, case.size, str(case.dtype).removeprefix("torch.")) for case in session.cases}
    return len({tuple(row[name] for name in key) for row in load(session.path)["results"]} - kept)


def draw(results: dict, folder: Path) -> int:
    """The pictures of results."""
    from . import plot

    for picture in (plot.roofline, plot.speed_ups):
        path = folder / plot.FILES[picture.__name__]
        if picture(results, path):
            print(f"written: {path}")
    return 0
