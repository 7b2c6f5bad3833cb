"""The checkerboard comparison of the flow matching paper: optimal-transport path against variance-preserving diffusion.

Two equal networks are trained through the fused head, one on each path, and sampled with ``fmk.solve``:

1. ``train``: the loop a trainer keeps, with ``fm.sample`` and ``fm.loss`` in place of its own arithmetic;
2. ``integrate``: from noise to data along ``fm.velocity(model)``, in equal steps;
3. ``adapt``: the same with a step size for every sample, which counts the evaluations that a tolerance takes;
4. ``density``: ``fmk.log_prob`` with the exact divergence on a grid, beside the samples;
5. ``curve``: how many samples are misplaced, by the number of evaluations that a fixed method is given;
6. ``measure``: time and memory of the head against plain PyTorch, compiled and not.

checkerboard_pictures.py draws them.

Run it with ``python -m fmkernels demo`` or by its path. Source: Lipman et al., "Flow Matching for Generative Modeling"
(2023), section 6.1 and figure 4.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
from checkerboard_pictures import (
    FEW_STEPS,
    FULL_STEPS,
    SIDE,
    TOLERANCE,
    WINDOW,
    draw_curves,
    draw_samples,
    draw_trajectories,
)
from common import positive, terminal_table
from networks import VelocityMLP
from torch import nn
from torch.utils.benchmark import Timer
from tqdm import trange

import fmkernels as fmk
from fmkernels._registration import answering
from fmkernels.objectives import REDUCTIONS, RHOS
from fmkernels.ops.matching_loss import matching_loss_reference
from fmkernels.ops.noise import noise_reference
from fmkernels.ops.sample_path import PathArguments, sample_path_reference

COUNTED, INSTANTS = 2000, 129  # samples whose evaluations are counted; times at which their ways are drawn
GIVEN = (4, 8, 16, 32, 64)  # evaluations that fixed methods are given
CELLS = 80  # a side of the density's grid
IMAGES = (128, 12288)  # a batch of 64 × 64 RGB images, for the head alone


def checkerboard(rows: int, device=None) -> torch.Tensor:
    """Points [rows, 2], uniform on the dark squares."""
    column = torch.randint(SIDE, (rows,), device=device)
    row = 2 * torch.randint(SIDE // 2, (rows,), device=device) + column % 2
    return torch.stack([column, row], dim=-1) + torch.rand(rows, 2, device=device) - SIDE / 2


def dark(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether points are on dark squares."""
    return (x.abs() < SIDE / 2) & (y.abs() < SIDE / 2) & ((x.floor() + y.floor()) % 2 == 0)


def on_dark(x: torch.Tensor) -> float:
    """Fraction of points on dark squares: 0.5 for points spread evenly over the board."""
    return dark(*x.unbind(-1)).float().mean().item()


def misplaced(x: torch.Tensor, cells: int = 4) -> float:
    """Total variation between the points and the board, over cells of 1/cells: the share that would have to move."""
    limit = SIDE / 2 + 1
    edges = torch.linspace(-limit, limit, 2 * int(limit) * cells + 1)
    share = torch.histogramdd(x.float().cpu(), [edges, edges]).hist / len(x)
    middle = (edges[1:] + edges[:-1]) / 2
    board = dark(*torch.meshgrid(middle, middle, indexing="ij"))
    outside = 1 - share.sum()
    return 0.5 * ((share - board / board.sum()).abs().sum() + outside).item()


def train(fm: fmk.FlowMatching, model: nn.Module, steps: int, batch_size: int, label: str = "") -> list[float]:
    """Adam with a one-cycle learning rate; returns the loss of every step."""
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps, pct_start=0.1)
    losses = torch.empty(steps, device=device)
    progress = trange(steps, desc=label, unit="step")
    for step in progress:
        batch = fm.sample(checkerboard(batch_size, device))
        loss = fm.loss(model(batch.x_t, batch.t), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
        if step % 50 == 49:  # read rarely: each reading waits for the device
            progress.set_postfix(loss=f"{losses[step - 49 : step + 1].mean():.4f}")
    return losses.tolist()


@torch.no_grad()
def integrate(field, x: torch.Tensor, steps: int, snapshots: int = 1) -> list[torch.Tensor]:
    """x and ``snapshots`` later states: equal midpoint steps from the low to the high end of the field's times."""
    times = torch.linspace(*field.t_range, snapshots + 1, dtype=torch.float64)
    return list(fmk.solve(field, x, field.t_range, times, "midpoint", steps=steps).y.unbind(1))


@torch.no_grad()
def adapt(field, x: torch.Tensor, instants: int = INSTANTS) -> fmk.Solution:
    """Dormand and Prince's method with a step size for every sample; the states [B, instants, 2]."""
    times = torch.linspace(*field.t_range, instants, dtype=torch.float64)
    return fmk.solve(field, x, field.t_range, times, "dopri5", rtol=TOLERANCE, atol=TOLERANCE).raise_for_status()


@torch.no_grad()
def density(field, cells: int = CELLS, window: float = WINDOW, device=None) -> torch.Tensor:
    """log p of the samples at the middles of the grid's cells, [cells, cells], x first; the trace is exact."""
    middle = (torch.arange(cells, device=device) + 0.5) * (2 * window / cells) - window
    points = torch.cartesian_prod(middle, middle)
    result = fmk.log_prob(field, points, divergence=fmk.Exact(), rtol=1e-3, atol=1e-3)
    return result.raise_for_status().log_prob.view(cells, cells)


def fit_of(log_density: torch.Tensor, window: float = WINDOW) -> dict:
    """The mass on the grid, and the cross-entropy of the board's points in nats: at least ln 8, the board's own."""
    cells = len(log_density)
    middle = (torch.arange(cells) + 0.5) * (2 * window / cells) - window
    column, row = torch.meshgrid(middle, middle, indexing="ij")
    log_density, mask = log_density.cpu().double(), dark(column, row)
    mass = log_density.exp().sum() * (2 * window / cells) ** 2
    return {"mass": mass.item(), "nats": -log_density[mask].mean().item()}


@torch.no_grad()
def curve(field, noise: torch.Tensor) -> dict[str, dict[int, float]]:
    """For Euler's and the midpoint method the share of samples misplaced after so many evaluations."""
    found: dict[str, dict[int, float]] = {}
    for method, evaluations_a_step in (("euler", 1), ("midpoint", 2)):
        for given in GIVEN:
            steps = given // evaluations_a_step
            samples = fmk.solve(field, noise, field.t_range, method=method, steps=steps).y
            found.setdefault(method, {})[given] = misplaced(samples)
    return found


def evaluations_of(solution: fmk.Solution) -> dict:
    """Calls of the network that the samples took, and that the batch took."""
    nfe, steps = solution.nfe, solution.accepted + solution.rejected
    return {
        "mean": nfe.double().mean().item(),
        "min": nfe.min().item(),
        "max": nfe.max().item(),
        "rejected": (solution.rejected.sum() / steps.sum()).item(),
        "calls": solution.calls,
    }


def normal_points(rows: int, seed: int, device=None) -> torch.Tensor:
    """Standard normal points [rows, 2] from a scrambled Sobol sequence: even, so that histograms show little noise."""
    uniform = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(rows)
    return torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)).to(device)


# The head, four ways: sample(x1) -> (x_t, t, what the loss needs again) and loss(prediction, that).


def plain_path(x1, x0, t):
    """The optimal-transport path as trainers write it."""
    t = t.view(-1, *(1,) * (x1.dim() - 1))
    return t * x1 + (1 - t) * x0


def plain_sample(x1, path=plain_path):
    t = torch.rand(x1.shape[0], device=x1.device)
    x0 = torch.randn_like(x1)
    return path(x1, x0, t), t, (x1, x0)


def plain_loss(prediction, ends):
    x1, x0 = ends
    return (prediction - (x1 - x0)).square().mean()


def fused_head(fm: fmk.FlowMatching):
    def sample(x1):
        batch = fm.sample(x1)
        return batch.x_t, batch.t, batch

    return sample, fm.loss


def reference_head(fm: fmk.FlowMatching):
    """The pure-PyTorch references of the fused ops: the same numbers, on any device."""
    path = PathArguments.of(fm.objective, fm.timesteps)

    def sample(x1):
        key = fmk.key(x1.device)
        rows, columns = x1.shape[0], x1[0].numel()
        x0 = noise_reference(key, rows, columns, 0, 0, 0, 0, x1.dtype).reshape(x1.shape)
        x_t, t, table, *_ = sample_path_reference(x1, x0, None, None, key, 0, 0, 1, *path, 0)
        return x_t, t, (x1, x0, table, key)

    def loss(prediction, state):
        x1, x0, table, key = state
        mean, square = REDUCTIONS["mean"], RHOS["square"]
        terms = fm.objective.terms
        return matching_loss_reference(prediction, x1, x0, None, table, None, None, key, 0, terms, square, 1.0, mean)

    return sample, loss


def heads(compiled: bool) -> dict[str, tuple]:
    """The ways to compute the head of the optimal-transport path, by the names they have in the table."""

    store, recompute = (fmk.FlowMatching(fmk.CondOT(), noise=noise) for noise in ("store", "recompute"))
    ways = {"plain PyTorch": (plain_sample, plain_loss)}
    if compiled:
        # The noise stays outside: Inductor's own on the CPU is several times slower than torch.randn.
        path, loss = (torch.compile(part, dynamic=False) for part in (plain_path, plain_loss))
        ways["torch.compile"] = functools.partial(plain_sample, path=path), loss
    ways["reference"] = reference_head(store)
    ways["fused, x0 stored"] = fused_head(store)
    ways["fused, x0 redrawn"] = fused_head(recompute)
    return ways


def training_step(head, model, x1) -> torch.Tensor:
    sample, loss = head
    x_t, t, state = sample(x1)
    value = loss(model(x_t, t), state)
    value.backward()
    return value


def seconds(run, at_least: float) -> float:
    """Median seconds of ``run()`` on all threads, the device waited for."""
    run()
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=at_least).median


@contextlib.contextmanager
def quiet_stderr():
    """File descriptor 2 goes nowhere meanwhile: the profiler announces its start and end there."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_bytes(run, device: str) -> int:
    """The most memory that ``run()`` holds at one time above what was held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - held
    with quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def measure(model: nn.Module, batch_size: int, shape, device: str, quick: bool) -> list[dict]:
    """A row for each head: time alone and in a training step of this demo, time and peak memory on images."""
    points = checkerboard(batch_size, device)
    images = torch.randn(shape, device=device)
    guess, picture = (torch.randn_like(x).requires_grad_() for x in (points, images))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
    at_least = 0.01 if quick else 1.0

    rows = []
    for name, head in heads(compiled=not quick).items():

        def alone(prediction, x1, head=head):
            prediction.grad = None
            training_step(head, lambda x_t, t: prediction, x1)

        def step(head=head):
            optimizer.zero_grad()
            training_step(head, model, points)
            optimizer.step()

        row = {"head": name}
        try:
            row["points_s"] = seconds(lambda: alone(guess, points), at_least)
            row["step_s"] = seconds(step, at_least)
            row["images_s"] = seconds(lambda: alone(picture, images), at_least)
            picture.grad = None
            row["images_bytes"] = peak_bytes(lambda: alone(picture, images), device)
        except RuntimeError as error:  # torch.compile needs a C++ compiler, or Triton on a GPU
            row["error"] = str(error).strip().splitlines()[0]
        rows.append(row)
    return rows


def tables(results: dict) -> list[tuple[str, list[str], list[list[str]], str | None]]:
    """(title, header, rows, caption) of what was found."""
    paths, evaluations, curves, heads = [], [], [], []
    for name, path in results["paths"].items():
        misplaced_share = {int(steps): share for steps, share in path["misplaced"].items()}[FULL_STEPS]
        losses = f"{path['first_loss']:.3f}", f"{path['final_loss']:.3f}"
        paths.append([name, *losses, f"{misplaced_share:.1%}", f"{path['density']['nats']:.3f}"])
        nfe = path["nfe"]
        figures = f"{nfe['mean']:.1f}", f"{nfe['min']}", f"{nfe['max']}", f"{nfe['rejected']:.1%}", f"{nfe['calls']}"
        evaluations.append([name, *figures])
        for method, shares in path["given"].items():
            curves.append([f"{name}, {method}", *[f"{share:.1%}" for share in shares.values()]])
    for row in results["heads"]:
        if "error" in row:
            heads.append([row["head"], row["error"]])
            continue
        values = (1e6 * row["points_s"], 1e3 * row["step_s"], 1e3 * row["images_s"], row["images_bytes"] / 1e6)
        heads.append([row["head"], *[f"{value:.1f}" for value in values]])
    rows, columns = results["images"]
    return [
        (
            "Checkerboard", ["path", "first loss", "last", "misplaced", "nats"], paths,
            f"misplaced: samples after {FULL_STEPS} midpoint steps, their total variation from the board; nats: −log p "
            f"of the board's points, at least ln 8 = {math.log(8):.3f}",
        ),
        (
            f"Evaluations of the network that a sample takes, dopri5 at {TOLERANCE:g}",
            ["path", "mean", "fewest", "most", "rejected steps", "calls"], evaluations,
            f"over {results['counted']} samples, each with its own step sizes; calls: for all of them at once",
        ),
        (
            "Samples misplaced, by the evaluations that a fixed method is given",
            ["path", *[f"{given}" for given in GIVEN]], curves, None,
        ),
        (
            "The head of the optimal-transport path, forward and backward",
            ["head", f"{results['batch']} × 2, µs", "with network, ms", f"{rows} × {columns}, ms", "its peak, MB"],
            heads, f"fused: answered by the {results['backend']} backend; peak: memory beyond data and prediction",
        ),
    ]  # fmt: skip


def report(results: dict) -> None:
    from rich.console import Console

    Console().print(*(terminal_table(*table) for table in tables(results)), sep="\n\n")


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fmkernels demo",
        description="Train a small network on the checkerboard with the optimal-transport path and with the diffusion "
        "path through the fused head, sample both, draw them with their densities (checkerboard.png, trajectories.png, "
        "few_evaluations.png), count the network's evaluations, and compare the head with plain PyTorch "
        "(checkerboard.json has the numbers). About four minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--steps", type=positive, default=4000, help="training steps on each path")
    parser.add_argument("--batch", type=positive, default=1024, help="points in a training batch")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="where the results go")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, noise and initial weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device, help="where to train")
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows only that everything works")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if options.quick:
        options.steps, options.batch = min(options.steps, 200), min(options.batch, 512)
    return options


def main(argv: list[str] | None = None) -> None:
    options = options_of(argv)
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    noise = normal_points(2000 if options.quick else 30_000, options.seed, options.device)
    cells = 20 if options.quick else CELLS

    panels, paths, solutions = {}, {}, {}
    for name, schedule in (("optimal transport", fmk.CondOT()), ("diffusion", fmk.VP())):
        torch.manual_seed(options.seed)
        model = VelocityMLP(64 if options.quick else 256).to(options.device)
        fm = fmk.FlowMatching(schedule, timesteps=fmk.Uniform(stratified=True))
        losses = train(fm, model, options.steps, options.batch, name)
        field = fm.velocity(model)
        snapshots = integrate(field, noise, FULL_STEPS, snapshots=4)
        few = [integrate(field, noise, steps)[-1] for steps in FEW_STEPS]
        log_density = density(field, cells, device=options.device)
        panels[name] = snapshots, few, log_density
        solutions[name] = adapt(field, noise[:COUNTED])
        paths[name] = {
            "first_loss": statistics.median(losses[:10]),
            "final_loss": statistics.median(losses[-(len(losses) // 10 + 1) :]),  # diffusion's has a long tail
            "on_dark": on_dark(snapshots[-1]),
            "misplaced": {n: misplaced(x) for n, x in zip((FULL_STEPS, *FEW_STEPS), (snapshots[-1], *few))},
            "nfe": evaluations_of(solutions[name]),
            "density": fit_of(log_density),
            "given": curve(field, noise[:10_000]),
        }

    draw_samples(panels, paths, options.out / "checkerboard.png")
    draw_trajectories(solutions, options.out / "trajectories.png")
    draw_curves(paths, options.out / "few_evaluations.png")
    print("Measuring the head", flush=True)
    images = (4, 48) if options.quick else IMAGES
    results = {
        "torch": torch.__version__,
        "device": options.device,
        "backend": answering("sample_path", options.device),
        "steps": options.steps,
        "batch": options.batch,
        "counted": len(noise[:COUNTED]),
        "paths": paths,
        "images": images,
        "heads": measure(model, options.batch, images, options.device, options.quick),
    }
    (options.out / "checkerboard.json").write_text(json.dumps(results, indent=2) + "\n")
    report(results)
    written = "checkerboard.png, trajectories.png, few_evaluations.png and checkerboard.json"
    print(f"{written} in {options.out}, after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
