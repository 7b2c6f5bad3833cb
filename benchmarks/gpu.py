"""All that a GPU can show, in one go: python benchmarks/gpu.py --out DIR

Builds in place, verifies, runs the contract suite with the Triton and the CUDA kernels, compute-sanitizer on a small
run, and the benchmarks of both backends. Runs unattended and offline, with whatever Python, torch and triton it finds,
in under ten minutes. A step that fails or takes too long does not stop the next. DIR gets log.txt, summary.json and the
results.

Exit status: 0 if every step passed, 1 if one failed, 2 if there is no GPU or no fitting torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 570.0  # seconds for everything


@dataclass
class Step:
    name: str
    status: str  # passed, failed, timed out, not run
    seconds: float
    note: str  # the last line it printed, or why it was not run


class Steps:
    """Runs commands one after another, each with a limit of its own and within the budget."""

    def __init__(self, out: Path):
        self.out, self.start, self.steps = out.resolve(), time.monotonic(), []
        self.log = (out / "log.txt").open("w")

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def add(self, step: Step) -> Step:
        self.steps.append(step)
        self.say(f"{step.status:9} {step.seconds:6.1f} s  {step.name}: {step.note}")
        return step

    def run(self, name: str, command: list[str], limit: float, **environment: str) -> bool:
        """Run a command, its output into the log; whether it ended with status 0 in time."""
        limit = min(limit, BUDGET - (time.monotonic() - self.start))
        if limit <= 0:
            self.add(Step(name, "timed out", 0.0, "the time for everything is used up"))
            return False
        shown = " ".join([*(f"{k}={v}" for k, v in environment.items()), *command])
        print(f"\n=== {name}\n$ {shown}", file=self.log, flush=True)
        begin = time.monotonic()
        before = self.log.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=self.log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
            code = None
        status = "passed" if code == 0 else "timed out" if code is None else "failed"
        self.add(Step(name, status, time.monotonic() - begin, self.last_line(before)))
        return status == "passed"

    def last_line(self, before: int) -> str:
        with (self.out / "log.txt").open(errors="replace") as log:
            log.seek(before)
            lines = [line.strip() for line in log if line.strip()]
        return lines[-1].replace(f"{self.out}/", "")[:160] if lines else ""

    def skip(self, name: str, why: str) -> None:
        self.add(Step(name, "not run", 0.0, why))


def environment() -> dict:
    """What is here; ends with status 2 where nothing can be shown."""
    try:
        import torch
    except ImportError:
        stop("this Python has no torch")
    if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 11):
        stop(f"torch 2.11 or later is needed, found {torch.__version__}")
    if not torch.cuda.is_available():
        stop("torch finds no GPU on this machine: nothing to show")
    major, minor = torch.cuda.get_device_capability()
    cuda_home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which(f"{cuda_home}/bin/nvcc") or shutil.which("nvcc")
    sanitizer = shutil.which("compute-sanitizer") or (nvcc and shutil.which(Path(nvcc).parent / "compute-sanitizer"))
    return {
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "triton": importlib.util.find_spec("triton") is not None,
        "pytest": importlib.util.find_spec("pytest") is not None,
        "nvcc": nvcc,
        "sanitizer": sanitizer,
    }


def stop(why: str) -> None:
    print(f"gpu: {why}", file=sys.stderr)
    sys.exit(2)


def exercise(device: str = "cuda") -> None:
    """Every op once, forward and backward, at sizes that no block divides: for compute-sanitizer."""
    import torch

    import fmkernels as fmk

    for rows, columns in ((1, 1), (37, 3), (5, 1027)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x1 = torch.randn(rows, columns, device=device).to(dtype)
            for matching in (
                fmk.FlowMatching(noise="recompute"),
                fmk.FlowMatching(noise="store", timesteps=fmk.LogitNormal(stratified=True)),
                fmk.FlowMatching(fmk.SchrodingerBridge(0.5), rho="pseudo_huber"),
            ):
                for reduction in ("mean", "none"):
                    prediction = torch.randn_like(x1, requires_grad=True)
                    mask = torch.rand(rows, columns, device=device) < 0.7
                    batch = matching.sample(x1)
                    matching.loss(prediction, batch, mask=mask, reduction=reduction).sum().mul(3).backward()
                    assert prediction.grad.isfinite().all()
            fmk.ops.noise(fmk.key(device), rows, columns, dtype=dtype, distribution="uniform")
    if device == "cuda":
        torch.cuda.synchronize()
    print("every op ran")


def run(out: Path) -> int:
    here = environment()
    out.mkdir(parents=True, exist_ok=True)
    steps = Steps(out)
    steps.say("  ".join(f"{name} {value}" for name, value in here.items()))
    python = sys.executable
    build = {"FMK_CUDA": "1" if here["nvcc"] else "0", "TORCH_CUDA_ARCH_LIST": here["capability"]}
    built = steps.run("build", [python, "setup.py", "build_ext", "--inplace"], 200, **build)
    steps.run("info", [python, "-m", "fmkernels", "info"], 40)

    verify = [python, "-m", "fmkernels", "verify", "--device", "cuda", "--json", str(steps.out / "verify.json")]
    steps.run("verify", verify, 120)

    missing = {
        "triton": "" if here["triton"] else "no triton",
        "cuda": "" if built and here["nvcc"] else "no nvcc" if not here["nvcc"] else "the build failed",
    }
    for backend, why in missing.items():
        name = f"contract, {backend}"
        if why or not here["pytest"]:
            steps.skip(name, why or "no pytest")
        else:
            workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
            command = [python, "-m", "pytest", "tests/test_contract.py", "-k", "cuda", "-q", *workers]
            steps.run(name, command, 150, FMK_BACKEND=backend)
    for tool in ("memcheck", "racecheck"):
        name = f"compute-sanitizer, {tool}"
        if missing["cuda"] or not here["sanitizer"]:
            steps.skip(name, missing["cuda"] or "no compute-sanitizer")
        else:
            command = [here["sanitizer"], "--tool", tool, "--error-exitcode", "1", python, __file__, "--exercise"]
            steps.run(name, command, 50, FMK_BACKEND="cuda", PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    def bench(peers: str, results: str, *more: str) -> list[str]:
        command = [python, "-m", "fmkernels", "bench", "--device", "cuda", "--seconds", "0.2", "--peers", peers]
        return [*command, "--json", str(steps.out / results), *more]

    for backend, why in missing.items():
        name = f"benchmarks, {backend}"
        if why:
            steps.skip(name, why)
        else:
            command = bench("eager,flow_matching,torchcfm,torch.randn", f"{backend}.json")
            steps.run(name, command, 80, FMK_BACKEND=backend)
    # Compiling takes most of the time here, so that one backend meets torch.compile, and with the whole head only.
    command = bench("eager,torch.compile", "compile.json", "--op", "head,head_recompute")
    steps.run("benchmarks, torch.compile", command, 120)

    steps.say("\nsummary")
    for step in steps.steps:
        steps.say(f"  {step.status:9} {step.name}: {step.note}")
    report = {name: value for name, value in here.items() if name not in ("nvcc", "sanitizer")}
    report["steps"] = [asdict(step) for step in steps.steps]
    (out / "summary.json").write_text(json.dumps(report, indent=1) + "\n")
    return int(any(step.status in ("failed", "timed out") for step in steps.steps))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for log and results (default: out)")
    parser.add_argument("--exercise", action="store_true", help="only run every op once, for compute-sanitizer")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    if options.exercise:
        exercise()
        return 0
    return run(options.out)


if __name__ == "__main__":
    sys.exit(main())
