"""The pictures of checkerboard.py: samples and densities, the ways of samples, and their quality by evaluations."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import torch
from common import BLUE, ORANGE, plotter

import fmkernels as fmk

SIDE = 4  # squares a side; the board is [-2, 2]², half of it dark, its deviation close to that of the noise
WINDOW = 2.5  # densities and samples are shown on [-WINDOW, WINDOW]²
FULL_STEPS = 32
FEW_STEPS = (4, 8, 16)
TOLERANCE = 1e-5  # that of the paper's table of function evaluations
DRAWN = 250  # samples whose ways are drawn
BRIGHTEST = 0.19  # the dark squares have density 1/8, the noise at most 0.16
HUES = (BLUE, ORANGE)


def draw_samples(panels: dict[str, tuple], paths: dict[str, dict], file: Path) -> None:
    """A row for each path: its snapshots in time, the density of its flow, its samples after few steps."""
    plt = plotter()
    times, bins = ("t = 0", "t = ¼", "t = ½", "t = ¾", "t = 1"), 100  # bins end where squares do
    figure = plt.figure(figsize=(18.4, 4.9), layout="constrained")
    parts = figure.subfigures(1, 3, width_ratios=(5.1, 1, 3), wspace=0.02)
    titles = f"from noise to data in {FULL_STEPS} midpoint steps", "exp(log_prob)", "the same networks, few steps"
    for part, title in zip(parts, titles):
        part.suptitle(title, fontsize=13)
    left, middle, right = (
        part.subplots(len(panels), columns, squeeze=False)
        for part, columns in zip(parts, (len(times), 1, len(FEW_STEPS)))
    )
    for row, (name, (snapshots, few, log_density)) in enumerate(panels.items()):
        shares = paths[name]["misplaced"]
        shown = [(axis, title, x) for axis, title, x in zip(left[row], times, snapshots)]
        shown += [(axis, f"{n} steps: {shares[n]:.0%} misplaced", x) for axis, n, x in zip(right[row], FEW_STEPS, few)]
        for axis, title, x in shown:
            most = BRIGHTEST * (2 * WINDOW / bins) ** 2 * len(x)
            box = [(-WINDOW, WINDOW)] * 2
            axis.hist2d(*x.cpu().numpy().T, bins=bins, range=box, vmin=0, vmax=most, cmap="inferno")
            axis.set_title(title, fontsize=11)
        axis = middle[row, 0]
        box = (-WINDOW, WINDOW, -WINDOW, WINDOW)
        axis.imshow(
            log_density.exp().mT.cpu().numpy(), origin="lower", extent=box, vmin=0, vmax=BRIGHTEST, cmap="inferno"
        )
        axis.set_title(f"density: {paths[name]['density']['nats']:.2f} nats", fontsize=11)
        left[row, 0].set_ylabel(name, fontsize=13)
    for axis in (*left.flat, *middle.flat, *right.flat):
        axis.set(xticks=[], yticks=[], aspect="equal")
        axis.spines[:].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_curves(paths: dict[str, dict], file: Path) -> None:
    """The share of misplaced samples against the number of evaluations, a curve for each path and method."""
    plt = plotter()
    figure, axis = plt.subplots(figsize=(7.4, 4.4), layout="constrained")
    for (name, path), hue in zip(paths.items(), HUES):
        for (method, shares), (style, marker) in zip(path["given"].items(), (("--", "s"), ("-", "o"))):
            values = [100 * share for share in shares.values()]
            axis.plot(list(shares), values, style, marker=marker, color=hue, label=f"{name}, {method}")
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(shares), [str(given) for given in shares])
    axis.minorticks_off()
    axis.set(xlabel="evaluations of the network", ylabel="samples misplaced, %", ylim=(0, None))
    axis.set_title("quality of the samples by the evaluations that a fixed method is given")
    axis.grid(True)
    axis.legend(fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_trajectories(solutions: dict[str, fmk.Solution], file: Path) -> None:
    """The picture of the ways from noise to data: a panel for each path, then how many evaluations the samples took."""
    plt = plotter()
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    limit = 3.1
    figure = plt.figure(figsize=(15.2, 5.6), layout="constrained")
    axes = figure.subplots(1, len(solutions) + 1, width_ratios=(*(1 for _ in solutions), 0.9))
    counts = {name: solution.nfe.tolist() for name, solution in solutions.items()}
    ends = min(map(min, counts.values())), max(map(max, counts.values()))
    bins = [ends[0] - 3 + 6 * i for i in range((ends[1] - ends[0]) // 6 + 2)]  # a step is six evaluations
    for axis, (name, solution), hue in zip(axes, solutions.items(), HUES):
        corners = itertools.product(range(-SIDE // 2, SIDE // 2), repeat=2)
        for corner in (corner for corner in corners if sum(corner) % 2 == 0):
            axis.add_patch(plt.Rectangle(corner, 1, 1, color="#e9ecf1", linewidth=0, zorder=0))
        ways = solution.y[:DRAWN].cpu()
        pieces = torch.stack([ways[:, :-1], ways[:, 1:]], dim=2)
        shades = LinearSegmentedColormap.from_list(name, ["#c9ced6", "#c9ced6", hue])
        time = torch.linspace(0, 1, pieces.shape[1]).repeat(len(pieces))
        lines = LineCollection(pieces.flatten(0, 1).numpy(), array=time.numpy(), cmap=shades, linewidths=0.9)
        axis.add_collection(lines)
        axis.scatter(*ways[:, 0].numpy().T, s=9, color="#9aa1ac", linewidths=0, zorder=3)
        axis.scatter(*ways[:, -1].numpy().T, s=13, color=hue, linewidths=0, zorder=4)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
        axis.spines[:].set_color("#9aa5b1")
        axis.set_title(name, fontsize=13)
        label = f"{name}: mean {statistics.mean(counts[name]):.0f}"
        axes[-1].hist(counts[name], bins, color=hue, alpha=0.3)
        axes[-1].hist(counts[name], bins, color=hue, histtype="step", linewidth=1.8, label=label)
    axes[-1].set_title("evaluations that a sample takes", fontsize=13)
    axes[-1].set(yticks=[], xlabel=f"evaluations of the network, tolerance {TOLERANCE:.0e}")
    axes[-1].legend(frameon=False, fontsize=11)
    axes[-1].spines[["left", "top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)
