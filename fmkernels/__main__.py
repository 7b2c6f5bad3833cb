"""The command line: python -m fmkernels info | verify | bench | demo."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from . import _info

ROOT = Path(__file__).resolve().parent.parent  # of a checkout; an installed wheel has only the package


def in_checkout(path: str) -> Path:
    """A file or folder that only a checkout has; ends with a message where it is missing."""
    if not (ROOT / path).exists():
        sys.exit(
            f"fmkernels: {path} is not here: it comes with the source, not with the installed package. "
            "Run this in a checkout (make demo, make bench) or install one with pip install -e ."
        )
    return ROOT / path


def info(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m fmkernels info", description=COMMANDS["info"][1]).parse_args(arguments)
    _info.show()
    return 0


def verify(arguments: list[str]) -> int:
    from .verification import main

    return main(arguments, prog="python -m fmkernels verify")


def bench(arguments: list[str]) -> int:
    in_checkout("benchmarks/run.py")
    sys.path.insert(0, str(ROOT))
    from benchmarks.run import main

    return main(arguments, prog="python -m fmkernels bench")


def demo(arguments: list[str]) -> int:
    script = in_checkout("examples/checkerboard.py")
    sys.path.insert(0, str(script.parent))  # it imports its neighbours
    return runpy.run_path(str(script))["main"](arguments) or 0


COMMANDS = {
    "info": (info, "Show versions, the build, the devices, and which backend answers each op."),
    "verify": (verify, "Compare every kernel here with its reference in float64: errors, bounds, exit status."),
    "bench": (bench, "Measure every op here against its peers, after verifying it."),
    "demo": (demo, "Train and sample a small flow on the checkerboard, with pictures."),
}


def main(argv: list[str] | None = None) -> int:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m fmkernels",
        usage="%(prog)s [-h] command ...",
        description="Fused flow-matching kernels: what is installed, whether it is right, how fast it is.",
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
        + "\n\npython -m fmkernels COMMAND --help shows a command's own options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("command", choices=COMMANDS, metavar="command", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        return 2
    options = parser.parse_args(argv)
    try:
        status = COMMANDS[options.command][0](options.arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # of `… | head`; Python would complain once more when it closes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
