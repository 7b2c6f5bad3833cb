"""The pictures of paper_table.py: samples of every row, and bars of what they scored."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from common import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, plotter

COLOURS = {
    "DDPM": ORANGE,
    "Score Matching": RED,
    "ScoreFlow": PURPLE,
    "FM, diffusion path": GREEN,
    "FM, OT path": BLUE,
}


def strip(images: torch.Tensor, levels: int, gap: int = 1) -> torch.Tensor:
    """Images [N, C, S, S] side by side, [S, N·(S + gap) − gap, C], in [0, 1], the gaps white."""
    side = images.shape[-1]
    padded = torch.ones(len(images), images.shape[1], side, side + gap)
    padded[..., :side] = images.float() / (levels - 1)
    return padded.permute(2, 0, 3, 1).flatten(1, 2)[:, :-gap]


def draw_samples_of(rows: dict[str, torch.Tensor], levels: int, file: Path) -> None:
    """A strip of uint8 images for each name."""
    plt = plotter()
    count = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(len(rows), 1, figsize=(0.68 * count + 1.6, 0.74 * len(rows)), layout="constrained")
    for axis, (name, images) in zip(axes, rows.items()):
        axis.imshow(strip(images, levels).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11, color=COLOURS.get(name, "#374151"))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_bars(rows: dict[str, list[dict]], published: dict | None, figures: dict[str, str], file: Path) -> None:
    """A panel for each figure: a bar at the mean of the seeds, a dot for each, and the published number if any."""
    plt = plotter()
    shown = [name for name in figures if any(run[name] is not None for runs in rows.values() for run in runs)]
    titles = {"bits": "bits per dimension", "frechet": "Fréchet distance", "nfe": "evaluations a sample"}
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4.3 * len(shown) + 1, 0.5 * len(rows) + 1.2), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axis, figure_name in zip(axes[0], shown):
        for place, (name, runs) in enumerate(rows.items()):
            values = [run[figure_name] for run in runs]
            mean = statistics.fmean(values)
            axis.barh(place, mean, height=0.62, color=COLOURS[name], alpha=0.85)
            axis.plot(values, [place] * len(values), "o", color="white", markeredgecolor="#374151", markersize=5)
            text = f"{mean:.0f}" if figure_name == "nfe" else f"{mean:.2f}"
            axis.annotate(text, (max(values), place), (7, 0), textcoords="offset points", va="center", fontsize=10)
            if published is not None:
                value = published[name][list(figures).index(figure_name)]
                label = "published" if place == 0 else None
                axis.plot(value, place, "D", color="none", markeredgecolor=GREY, markersize=8, label=label)
        axis.set_title(titles[figure_name])
        axis.set_xlabel("lower is better")
        axis.grid(axis="x")
        axis.set_axisbelow(True)
        axis.margins(x=0.14)
        axis.set_xlim(left=0)
    axes[0, 0].set_yticks(range(len(rows)), list(rows))
    axes[0, 0].invert_yaxis()
    if published is not None:
        axes[0, -1].legend(loc="lower right")
    figure.savefig(file, dpi=130)
    plt.close(figure)
