"""Whether the kernels are right on this machine: `python -m fmkernels verify`.

Every op is called as its users call it, in every dtype and in several forms and sizes. What the kernel makes of the
arguments that reach it is compared with the op's reference evaluated in float64 on the same rounded arguments, element
by element:

    |kernel − oracle| ≤ 2·|reference in that dtype − oracle| + ½ε·|oracle| + 16·ε'·max|oracle|

with ε the spacing of the output's dtype at 1, once more for gradients, which may be rounded twice, and ε' that of the
arithmetic (float32, or float64 for float64, where the oracle rounds too and 256 are allowed). What is integer or drawn
without rounding must be equal to the bit, and every call must repeat itself to the bit. The reference itself may be off
by four times that, without the first term. Fresh memory is NaN, so that what a kernel leaves unwritten shows. Then come
whole pieces, against formulas that share nothing with the references.

Each backend runs in a process of its own: FMK_BACKEND is read at import, and a kernel that crashes takes no more than
its own row with it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from . import _info, _registration
from ._verification_cases import DTYPES, OPS, PIECES, SIZES, SMALL, Data, Op, Piece

EVERYTHING: dict[str, Op | Piece] = {**OPS, **PIECES}
BACKENDS = {"cpu": ("reference", "cpp", "triton"), "cuda": ("reference", "triton", "cuda")}
FEW = {torch.float32: 16, torch.float64: 256}  # roundings of the arithmetic; in float64 the oracle's own among them
PATIENCE = 120.0  # seconds for one op in one dtype


class Worst(NamedTuple):
    """The element nearest to its bound, or furthest beyond it."""

    share: float  # of the bound
    error: float
    bound: float
    where: str

    def of(self, what: str) -> Worst:
        return self._replace(where=f"{what} {self.where}")


NOTHING = Worst(-1.0, 0.0, 0.0, "")


@dataclass(frozen=True)
class Row:
    """What was found of one op, or whole piece, in one dtype of one backend; ``problem`` is empty where all held."""

    op: str
    backend: str
    device: str
    dtype: str
    checked: str = ""
    error: float = 0.0
    bound: float = 0.0
    worst: str = ""
    problem: str = ""
    seconds: float = 0.0


# ---- one op -----------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Keeps copies of the arguments with which an op is reached."""

    def __init__(self, name: str):
        super().__init__()
        self.overload = _registration.overload(name)
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.overload:
            self.calls.append(tree_map_only(torch.Tensor, lambda value: value.detach().clone(), args))
        return func(*args, **(kwargs or {}))


class DrawnIn(TorchDispatchMode):
    """What is drawn in float64 is drawn in another dtype and widened: the oracle sees the rounded noise."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.normals = {_registration.overload("noise"): 6, _registration.overload("probe"): None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.normals and args[-1] == torch.float64:
            distribution = self.normals[func]
            if distribution is None or args[distribution] == 0:  # uniform numbers become times, in float64
                return func(*args[:-1], self.dtype).double()
        return func(*args, **(kwargs or {}))


def widen(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers in float64."""
    wide = tree_map_only(torch.Tensor, lambda v: v.double() if v.is_floating_point() else v, arguments)
    return tuple(torch.float64 if isinstance(value, torch.dtype) else value for value in wide)


def outputs_of(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """The outputs of an op, or what it overwrites, by its kernel or by another function of its arguments."""
    schema = _registration.overload(name)._schema
    written = [i for i, argument in enumerate(schema.arguments) if argument.alias_info and argument.alias_info.is_write]
    inputs = [value.clone() if i in written and value is not None else value for i, value in enumerate(arguments)]
    outputs = call(*inputs)
    if written:
        return tuple(inputs[i] for i in written if inputs[i] is not None)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients_of(op: Op, call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Gradients to the arguments that ``op`` names, for fixed gradients of the outputs."""
    inputs = [
        tree_map_only(torch.Tensor, lambda v: v.detach().requires_grad_(), value) if i in op.gradient else value
        for i, value in enumerate(arguments)
    ]
    outputs = call(*inputs)
    outputs = [v for v in (outputs if isinstance(outputs, tuple) else (outputs,)) if v.requires_grad]
    incoming = [torch.arange(v.numel(), device=v.device).double().cos().reshape(v.shape).to(v.dtype) for v in outputs]
    return torch.autograd.grad(outputs, tree_leaves([inputs[i] for i in op.gradient]), incoming)


def expected(op: Op, make: Callable[..., Any], arguments: tuple[Any, ...]) -> list[tuple[torch.Tensor, ...]]:
    """What the reference makes of the arguments, and of the same in float64; ``make`` is called with arguments."""
    same = contextlib.nullcontext() if op.draws is None else DrawnIn(arguments[op.draws].dtype)
    reference = make(arguments)
    with same:
        return [reference, make(widen(arguments))]


def outputs_expected(
    name: str, op: Op, arguments: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]
) -> list[list[torch.Tensor]]:
    """Reference and oracle of the outputs; what follows from a drawn time is taken at the time that was drawn."""
    function = _registration.references[name]

    def make(given: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        return outputs_of(name, function, given)

    found = [list(values) for values in expected(op, make, arguments)]
    if name == "sample_path" and arguments[2] is None:
        pinned = expected(op, make, (*arguments[:2], outputs[1], *arguments[3:]))
        found = [[*at[:1], drawn[1], *at[2:]] for at, drawn in zip(pinned, found)]
    if op.scale is not None:
        found[1] = op.scale(arguments, found[1])
    return found


def worst_of(
    value: torch.Tensor,
    reference: torch.Tensor,
    oracle: torch.Tensor,
    dtype: torch.dtype,
    *,
    roundings: int = 1,
    exact: bool = False,
    itself: bool = False,
    nan: bool = False,
) -> Worst:
    """Compare an output that is rounded so many times; ``itself`` where it is the reference's, ``nan`` where NaN may
    stand for NaN."""
    if (value.shape, value.dtype) != (reference.shape, reference.dtype):
        wanted = f"{reference.dtype} of shape {list(reference.shape)}"
        raise ValueError(f"output: expected {wanted}, got {value.dtype} of shape {list(value.shape)}")
    if value.numel() == 0:
        return Worst(0.0, 0.0, 0.0, "")
    if exact or not value.is_floating_point():
        oracle = reference if exact else oracle
        error = torch.where(value == oracle, 0.0, (value.double() - oracle.double()).abs())
        allowed = torch.zeros_like(error)
    else:
        limits, compute = torch.finfo(value.dtype), torch.float64 if dtype == torch.float64 else torch.float32
        size = oracle.abs().nan_to_num(0.0, 0.0, 0.0)
        allowed = roundings * limits.eps / 2 * (size + limits.smallest_normal)
        allowed = allowed + FEW[compute] * torch.finfo(compute).eps * size.max()
        allowed = 4 * allowed if itself else allowed + 2 * (reference.double() - oracle).abs()
        error = torch.where(value.double() == oracle, 0.0, (value.double() - oracle).abs())
    if nan:
        error = torch.where(value.isnan() & oracle.isnan(), 0.0, error)
    share = torch.where(error == 0, 0.0, error / allowed).nan_to_num(torch.inf, torch.inf).flatten()
    at = int(share.argmax())
    indices = [int(i) for i in torch.unravel_index(torch.tensor(at), value.shape)]
    place = f"{'×'.join(map(str, value.shape))} at {indices}" if indices else ""
    return Worst(float(share[at]), float(error.flatten()[at]), float(allowed.flatten()[at]), place)


def check_call(name: str, arguments: tuple[Any, ...], dtype: torch.dtype, itself: bool) -> Iterator[Worst]:
    """The worst element of everything that one call with these arguments gives."""
    op, kernel = OPS[name], _registration.overload(name)
    outputs = outputs_of(name, kernel, arguments)
    for once, again in zip(outputs, outputs_of(name, kernel, arguments)):
        if not torch.equal(once.nan_to_num(), again.nan_to_num()):
            raise ValueError("a second call with the same arguments gave other bits")
    expectations = outputs_expected(name, op, arguments, outputs)
    if len(outputs) != len(expectations[0]):
        raise ValueError(f"expected {len(expectations[0])} outputs, got {len(outputs)}")
    how: dict[str, Any] = {"exact": op.exact(arguments), "nan": name.endswith("_"), "itself": itself}
    for i, (value, reference, oracle) in enumerate(zip(outputs, *expectations, strict=True)):
        yield worst_of(value, reference, oracle, dtype, **how).of(f"output {i}")
    if op.gradient:
        references = expected(op, lambda a: gradients_of(op, _registration.references[name], a), arguments)
        found = gradients_of(op, kernel, arguments)
        for i, (value, reference, oracle) in enumerate(zip(found, *references, strict=True)):
            yield worst_of(value, reference, oracle, dtype, roundings=2, itself=itself).of(f"gradient {i}")


def check_op(row: Row, sizes: int) -> Row:
    """An op in one dtype, over all its cases."""
    op, data = OPS[row.op], Data.of(row.dtype, row.device, sizes)
    cases, worst, calls, compared = op.calls(data), NOTHING, 0, 0
    while True:
        with Recorder(op.reached or row.op) as recorder:
            label = next(cases, None)
        if label is None:
            break
        if not recorder.calls:
            raise ValueError(f"{label}: the op was not reached")
        for arguments in recorder.calls:
            arguments = arguments[:-1] if op.reached else arguments
            try:
                found = list(check_call(row.op, arguments, data.dtype, row.backend == "reference"))
            except Exception as error:
                raise RuntimeError(f"{label}: {type(error).__name__}: {error}") from error
            calls, compared = calls + 1, compared + len(found)
            worst = max(worst, *(one.of(f"{label}:") for one in found))
    row = replace(row, error=worst.error, bound=worst.bound, worst=worst.where)
    row = replace(row, checked=f"{calls} calls, {compared} outputs" + (" and gradients" if op.gradient else ""))
    return row if worst.share <= 1 else replace(row, problem="beyond its bound")


def check_piece(row: Row, sizes: int) -> Row:
    """A whole piece in one dtype."""
    worst, names = Worst(-1.0, 0.0, 0.0, ""), []
    for what, error, bound in PIECES[row.op].measure(Data.of(row.dtype, row.device, sizes)):
        names.append(what)
        share = 0.0 if error == 0 else error / bound if bound > 0 else float("inf")
        share = share if share == share else float("inf")  # NaN
        worst = Worst(share, error, bound, what) if share > worst.share else worst
    row = replace(row, checked=", ".join(names), error=worst.error, bound=worst.bound, worst=worst.where)
    return row if worst.share <= 1 else replace(row, problem="beyond its bound")


# ---- processes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One backend on one type of device, and what of it to check."""

    backend: str
    device: str
    rows: tuple[Row, ...]
    interpreted: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """Read at import by fmkernels, Triton and OpenMP, and at the first allocation by the compiled library."""
        found = {"FMK_BACKEND": self.backend, "FMK_POISON": "1", "TRITON_INTERPRET": "1" if self.interpreted else "0"}
        found |= {"OMP_WAIT_POLICY": "passive", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONWARNINGS": "ignore"}
        return found | ({"OMP_NUM_THREADS": "1"} if self.backend == "reference" else {})

    @property
    def sizes(self) -> int:
        """How many sizes: few where kernels are interpreted; the last are for kernels, which cut them up."""
        return SMALL if self.interpreted else len(SIZES) - 2 * (self.backend == "reference")

    def answered(self) -> tuple[Row, ...]:
        """The rows of ops that this backend answers in this process; whole pieces where it answers any."""
        here = [name for name in OPS if _registration.answering(name, self.device) == self.backend]
        return tuple(row for row in self.rows if row.op in here or (here and row.op in PIECES))


@dataclass
class Findings:
    """What a job found: the rows, and why the backend is not there where it answers nothing."""

    rows: list[Row]
    missing: str = ""


def serve(connection: Connection, job: Job) -> None:
    """In a process of its own: say what is missing, then every row, once when it begins and once when it ends."""
    warnings.simplefilter("ignore")
    let_inductor_write()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch's own fresh memory with NaN too
    rows, why = job.answered(), "; ".join(_registration.problems)
    if rows or job.backend not in ("cpp", "cuda") or not _registration.library_path().exists():
        connection.send("" if rows else why or f"no kernel for {job.device} in the compiled library")
    elif _registration.build_facts():
        connection.send(f"the compiled library has no kernels for {job.device}")
    else:  # it is there but does not load: that is no missing part but a broken one
        connection.send("")
        connection.send(replace(job.rows[0], op="compiled library", dtype="", problem=why))
    for row in rows:
        connection.send(row)
        started = time.perf_counter()
        try:
            found = (check_piece if row.op in PIECES else check_op)(row, job.sizes)
        except Exception as error:  # whatever a broken kernel raises, it is this row's alone
            found = replace(row, checked="stopped", problem=f"{type(error).__name__}: {error}")
        connection.send(replace(found, seconds=time.perf_counter() - started))


def let_inductor_write() -> None:
    """What follows makes torch's compiler make its cache folder: where it cannot, another."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _info.inductor_cache())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="fmkernels-verify-")


STARTING, STOP = threading.Lock(), threading.Event()  # STOP: the user has interrupted


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """For a process to inherit; one at a time."""
    with STARTING:
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """For a process to inherit: an interrupt is the parent's, which ends its processes."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it for the first process would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def answers(connection: Connection) -> bool:
    """Whether something arrives in good time, and before the user interrupts."""
    deadline = time.monotonic() + PATIENCE
    while not connection.poll(0.5):
        if STOP.is_set() or time.monotonic() > deadline:
            return False
    return True


def run(job: Job, progress: Callable[[Row], None]) -> Findings:
    """Check a backend; a process that crashes or hangs fails the row it was at, and another goes on with the next."""
    findings, left = Findings([]), list(job.rows)
    context = multiprocessing.get_context("spawn")
    while left and not STOP.is_set():
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=serve, args=(there, replace(job, rows=tuple(left))))
        with environment(job.environment), no_interrupts():
            process.start()
        there.close()
        begun: Row | None = None
        greeted, problem = False, ""
        try:
            while True:
                if not answers(here):
                    problem = f"no answer within {PATIENCE:g} s"
                    break
                message = here.recv()
                if isinstance(message, str):
                    greeted, findings.missing = True, message
                elif begun is None and not message.problem:
                    begun = message
                    progress(begun)
                else:
                    findings.rows.append(message)
                    left = left[left.index(begun) + 1 :] if begun else []
                    begun = None
        except EOFError:  # it has ended
            process.join()
            problem = "" if process.exitcode == 0 else f"the process ended with {ending(process.exitcode)}"
        finally:
            process.kill()
            process.join()
        if not problem or STOP.is_set():
            break
        failed = begun or replace(job.rows[0], op="start", dtype="")
        findings.rows.append(replace(failed, checked="stopped", problem=problem))
        left = left[left.index(begun) + 1 :] if begun and greeted else []
    return findings


def ending(status: int | None) -> str:
    """An exit status in words."""
    if status is None or status >= 0:
        return f"status {status}"
    return f"signal {-status} ({signal.Signals(-status).name})"


# ---- the command ------------------------------------------------------------------------------------------------


def some_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        found = text.split(",")
        for word in found:
            if word not in choices:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(choices)}, got {word!r}")
        return found

    return parse


def parser(prog: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog=prog,
        description="Whether the kernels are right on this machine: every op, in every dtype, of every backend that is "
        "here, against its reference evaluated in float64, with the error and what is allowed; then whole pieces "
        "against closed forms. Exit status: 0 all hold, 1 something does not, 2 what was asked for is not here.",
        epilog="It takes some 20 seconds on two cores. FMK_BACKEND=NAME means the same as --backend NAME. Several "
        "values are separated by commas.",
    )
    names = (*OPS, *PIECES)
    backends = ("reference", "cpp", "triton", "cuda")
    found.add_argument("--op", type=some_of(names), metavar="OP", help=f"of {', '.join(names)}")
    found.add_argument("--dtype", type=some_of(tuple(DTYPES)), metavar="TYPE", help=f"of {', '.join(DTYPES)}")
    found.add_argument("--backend", type=some_of(backends), metavar="NAME", help=f"of {', '.join(backends)}")
    found.add_argument(
        "--device", type=some_of(("cpu", "cuda")), metavar="TYPE", help="cpu or cuda (default: all here)"
    )
    interpret = "also the Triton kernels on the CPU, by Triton's interpreter, at small sizes: some two minutes"
    found.add_argument("--interpret", action="store_true", help=interpret)
    found.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    return found


def jobs(options: argparse.Namespace) -> tuple[list[Job], list[str]]:
    """What to run here, and what cannot be."""
    chosen = options.backend
    if chosen is None and _registration.backend() != "auto":
        chosen = [_registration.backend()]
    interpret = options.interpret or (chosen == ["triton"] and os.environ.get("TRITON_INTERPRET") == "1")
    devices = options.device or ["cpu", *["cuda"] * torch.cuda.is_available()]
    found, missing = [], []
    if options.device is None and "cuda" not in devices:
        missing.append("GPU kernels: torch finds no CUDA device here")
    for device in devices:
        for backend in BACKENDS[device]:
            interpreted = device == "cpu" and backend == "triton"
            if chosen is not None and backend not in chosen:
                continue
            if interpreted and not interpret:
                if chosen is not None:
                    missing.append("triton on cpu: interpreted alone, with --interpret")
                continue
            if backend == "triton" and importlib.util.find_spec("triton") is None:
                missing.append(f"triton on {device}: triton is not installed (pip install triton)")
                continue
            rows = tuple(
                Row(name, backend, device, dtype)
                for name, it in EVERYTHING.items()
                for dtype in it.dtypes
                if (options.op is None or name in options.op) and (options.dtype is None or dtype in options.dtype)
                if not (interpreted and name in PIECES and not PIECES[name].interpreted)
            )
            found.append(Job(backend, device, rows, interpreted))
    return found, missing


COLUMNS: dict[str, Callable[[Row], str]] = {
    "op": lambda row: row.op,
    "backend": lambda row: f"{row.backend} on {row.device}",
    "dtype": lambda row: row.dtype,
    "checked": lambda row: row.checked,
    "worst at": lambda row: row.worst if row.error else "",
    "error": lambda row: f"{row.error:.2g}",
    "bound": lambda row: f"{row.bound:.2g}",
    "": lambda row: "FAIL" if row.problem else "ok",
}


def document(rows: list[Row], missing: list[str], seconds: float) -> dict[str, Any]:
    """What was found, as JSON; a number that is none is null."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not abs(value) < float("inf") else value

    facts = _registration.build_facts()
    return {
        "holds": not any(row.problem for row in rows),
        "seconds": round(seconds, 1),
        "devices": _info.devices(),
        "versions": _info.versions(),
        "build": {name: facts.get(name) for name in ("compiler", "nvcc", "cuda_arch_list", "flags")},
        "not_checked": missing,
        "rows": [{name: plain(value) for name, value in asdict(row).items()} for row in rows],
    }


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(argv)
    if options.device and "cuda" in options.device and not torch.cuda.is_available():
        parser(prog).error("--device: torch finds no CUDA device here")
    if options.json:
        try:
            _info.refuse_unwritable(options.json)
        except OSError as error:
            parser(prog).error(f"--json: expected a file that can be written, got {options.json}: {error.strerror}")
    started = time.perf_counter()
    todo, missing = jobs(options)
    if options.op and options.dtype and not any(job.rows for job in todo) and todo:
        has = "; ".join(f"{name} has {', '.join(EVERYTHING[name].dtypes)}" for name in options.op)
        parser(prog).error(f"--dtype: expected one that what is asked for has, got {','.join(options.dtype)}: {has}")
    total, rows, seen = sum(len(job.rows) for job in todo), [], 0

    def progress(row: Row | None) -> None:
        nonlocal seen
        seen += row is not None
        if sys.stderr.isatty():
            text = "" if row is None else f"{seen}/{total} {row.op} {row.dtype}, {row.backend} on {row.device}"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    STOP.clear()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, job, progress) for job in todo]
        try:
            wait(futures)
        except KeyboardInterrupt:
            STOP.set()
    for job, future in zip(todo, futures):
        findings = future.result()
        rows += findings.rows
        missing += [f"{job.backend} on {job.device}: {findings.missing}"] if findings.missing else []
    interrupted = STOP.is_set()
    progress(None)
    seconds = time.perf_counter() - started

    order = list(EVERYTHING)
    titles: dict[str, Collection[str]] = {
        "Ops: the element furthest off, and what it may be off by": OPS,
        "Whole pieces, against closed forms": PIECES,
    }
    for title, names in titles.items():
        chosen = sorted((row for row in rows if row.op in names), key=lambda row: order.index(row.op))
        if chosen:
            table = [[text(row) for text in COLUMNS.values()] for row in chosen]
            _info.print_table(title, tuple(COLUMNS), table, left=5)
    failed = [row for row in rows if row.problem]
    for row in failed:
        where = f", {row.worst}: error {row.error:.3g}, bound {row.bound:.3g}" if row.worst else ""
        print(f"FAIL {row.op} {row.dtype}, {row.backend} on {row.device}: {row.problem}{where}")
    for text in missing:
        print(f"NOT CHECKED {text}")
    if options.json:
        found = document(rows, [*missing, *["what came after the interrupt"] * interrupted], seconds)
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {options.json}")
    if interrupted:
        print(f"fmkernels: interrupted after {len(rows)} of {total} rows", file=sys.stderr)
        return 130
    if not rows:
        print("fmkernels: nothing was checked: what was asked for is not here", file=sys.stderr)
        return 2
    backends = ", ".join(dict.fromkeys(f"{row.backend} on {row.device}" for row in rows))
    held = f"{len(rows) - len(failed)} of {len(rows)} rows hold"
    print(f"{held} ({backends}), in {seconds:.0f} s")
    asked_for_in_vain = options.backend and set(options.backend) - {row.backend for row in rows}
    return 1 if failed else 2 if asked_for_in_vain else 0
