"""What the examples share: option types, tables in the terminal and in Markdown, and the look of the pictures."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6db3", "#d9772b", "#3a9a5b", "#c0394b", "#7d5ba6", "#6b7280"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#374151",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def plotter():
    """matplotlib.pyplot, without a window and in this project's style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def at_least(low: int):
    """The type of an option: an integer of at least ``low``."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {low}, got {text}")
        return value

    return integer


positive = at_least(1)


def number(low: float, high: float = math.inf):
    """The type of an option: a finite number from ``low`` to ``high``."""

    def real(text: str) -> float:
        value = float(text)
        if not (low <= value <= high and math.isfinite(value)):
            upper = f" to {high:g}" if high < math.inf else " on"
            raise argparse.ArgumentTypeError(f"expected a number from {low:g}{upper}, got {text}")
        return value

    return real


def terminal_table(title: str, header: list[str], rows: Iterable[list[str]], caption: str | None = None):
    """A rich table: the first column to the left, numbers to the right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for place, text in enumerate(header):
        made.add_column(text, justify="right" if place else "left", no_wrap=not place)
    for row in rows:
        made.add_row(*row)
    return made


def markdown_table(header: list[str], rows: Iterable[list[str]]) -> str:
    """The same in Markdown."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
