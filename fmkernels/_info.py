"""What is installed here and which backend answers each op: `python -m fmkernels info`."""

from __future__ import annotations

import getpass
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from . import _registration

DEVICE_TYPES = ("cpu", "cuda")


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(*more: str) -> dict[str, str | None]:
    """Versions of Python, fmkernels and what it runs on, and of the distributions named."""
    from . import __version__

    found: dict[str, str | None] = {
        "fmkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    found["cuda"] = torch.version.cuda
    return found | {name: version(name) for name in ("triton", "numpy", *more)}


def cpu_name() -> str:
    """The processor's model, e.g. "AMD EPYC"."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def device_name(device_type: str, index: int = 0) -> str:
    """The name of a device, e.g. "AMD EPYC, 2 threads" or "NVIDIA H200"."""
    if device_type == "cpu":
        return f"{cpu_name()}, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(index)


def devices() -> dict[str, str]:
    """What torch can run on here."""
    found = {"cpu": device_name("cpu")}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found[f"cuda:{index}"] = f"{device_name('cuda', index)}, compute capability {major}.{minor}, {memory:.0f} GiB"
    return found


def backends() -> dict[str, dict[str, str]]:
    """Which backend answers each op on each type of device."""
    return {
        name: {device: _registration.answering(name, device) for device in DEVICE_TYPES}
        for name in _registration.references
    }


def inductor_cache() -> Path:
    """Where torch.compile stores what it compiles unless told otherwise."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without an entry and without a name in the environment
        user = "user"
    return Path(tempfile.gettempdir()) / f"torchinductor_{user}"


def unwritable_caches() -> list[str]:
    """What keeps Triton and torch.compile from storing what they compile. fmkernels itself writes nothing."""
    folders = {
        "TRITON_CACHE_DIR": ("Triton", Path.home() / ".triton" / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": ("torch.compile", inductor_cache()),
    }
    found = []
    for variable, (tool, default) in folders.items():
        folder = Path(os.environ.get(variable) or default)
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            found.append(f"{tool} cannot write its cache {folder}: set {variable} to a folder that can be written")
    return found


def refuse_unwritable(path: Path) -> None:
    """OSError where a file cannot be written, before the work whose results it is to hold."""
    there = path.exists()
    with path.open("a"):
        pass
    if not there:
        path.unlink()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """A table, by rich on a terminal and as plain aligned text elsewhere; the first ``left`` columns align left."""
    # A dumb terminal is 80 columns wide to rich, whatever is asked of it.
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and importlib.util.find_spec("rich"):
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(header):
            last_text = index == left - 1 == len(header) - 1
            table.add_column(name, justify="left" if index < left else "right", no_wrap=not last_text)
        for row in rows:
            table.add_row(*row)
        # A table of figures is never cut: a narrow terminal breaks its lines.
        Console(width=None if left == len(header) else max(Console().width, 200)).print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title)
    for row in (header, ["-" * width for width in widths], *rows):
        cells = (cell.ljust(w) if index < left else cell.rjust(w) for index, (cell, w) in enumerate(zip(row, widths)))
        print("  " + "  ".join(cells).rstrip())
    print()


def show() -> None:
    """Print versions, build, devices, op × device → backend, and what is missing."""
    found = [(name, value or "–") for name, value in versions().items()]
    print_table("Versions", ("package", "version"), found, left=2)
    library = _registration.library_path()
    facts = {"library": str(library) if library.exists() else "–", "FMK_BACKEND": _registration.backend()}
    facts |= {name: str(value or "–") for name, value in _registration.build_facts().items()}
    print_table("Build", ("fact", "value"), list(facts.items()), left=2)
    here = devices()
    print_table("Devices", ("device", "name"), list(here.items()), left=2)
    columns = [name if any(d.startswith(name) for d in here) else f"{name} (none here)" for name in DEVICE_TYPES]
    rows = [(name, *by_device.values()) for name, by_device in backends().items()]
    print_table("Which backend answers", ("op", *columns), rows, left=3)
    for problem in [*_registration.problems, *unwritable_caches()]:
        print(f"note: {problem}")
