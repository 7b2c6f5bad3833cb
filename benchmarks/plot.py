"""Draws the head's speed-up over each peer: python -m benchmarks.plot [RESULTS.json] [PICTURE.png]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .run import FOLDER, fastest

COLOURS = {"eager": "#9aa5b1", "torch.compile": "#e0a458", "flow_matching": "#3d6fa5", "torchcfm": "#7ab3a2"}


def speed_up(results: dict, path: Path, op: str = "head") -> None:
    """Bars of the ratio to each peer, a group for every size and a panel for every dtype; 1 is ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results["results"] if row["op"] == op and row.get("peers")]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    families = [name for name in COLOURS if any(name in fastest(row) for row in rows)]
    if not families:
        raise ValueError(f"results: expected rows of {op!r} with peers, got none")
    figure, axes = pyplot.subplots(
        1, len(dtypes), figsize=(4.6 * len(dtypes) + 0.6, 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    width = 0.84 / len(families)
    for axis, dtype in zip(axes[0], dtypes):
        group = [row for row in rows if row["dtype"] == dtype]
        for index, name in enumerate(families):
            heights = [fastest(row).get(name, {}).get("ratio", 0) for row in group]
            places = [place + (index - (len(families) - 1) / 2) * width for place in range(len(group))]
            bars = axis.bar(places, heights, width * 0.94, color=COLOURS[name], label=name)
            axis.bar_label(bars, [f"{height:.1f}" if height else "" for height in heights], fontsize=7, padding=1)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(group)), [row["size"].replace("x", " × ") for row in group])
        axis.set_title(f"{dtype}, {results['device']}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("time relative to fmkernels")
    axes[0][0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    source = Path(argv[0]) if argv else next(iter(sorted((FOLDER / "results").glob("*.json"))), None)
    if source is None or not source.exists():
        sys.exit(f"benchmarks.plot: no results file{'' if source is None else f' {source}'}; bench --json writes one")
    path = Path(argv[1]) if len(argv) > 1 else FOLDER.parent / "docs" / "speedup.png"
    speed_up(json.loads(source.read_text()), path)
    print(f"written: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
