"""Pictures of results: python -m fmkernels bench --plot, and the one of the README by python -m benchmarks.plot"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .run import FOLDER, fastest

# Okabe and Ito's colours, which those who confuse red and green tell apart; a marker each besides.
PEERS = {
    "eager": ("#0072B2", "o"), "torch.compile": ("#E69F00", "s"), "flow_matching": ("#009E73", "D"),
    "torchcfm": ("#CC79A7", "v"), "diffusers": ("#56B4E9", "<"), "torch.randn": ("#56B4E9", "^"),
    "torchdiffeq": ("#D55E00", "P"), "torchode": ("#000000", "X"),
}  # fmt: skip
COLOURS = {name: PEERS[name][0] for name in ("eager", "torch.compile", "flow_matching", "torchcfm")}
LINES = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "D"), ("#CC79A7", "v"), ("#D55E00", "P"), ("#000000", "X"))
DASHES = {"float32": "-", "bfloat16": "--", "float16": ":", "float64": "-."}
PANELS = {  # of the roofline: beginnings of op names
    "training head": ("head",),
    "path": ("sample_path",),
    "path and velocity of a pair": ("conditional_flow",),
    "loss": ("matching_loss", "scale_gradient"),
    "noise and probes": ("noise", "probe"),
    "sampling": ("runge_kutta", "guided"),
}
FILES = {"roofline": "roofline.png", "speed_ups": "speedup.png"}


def pyplot_quietly():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    pyplot_quietly().close(figure)


def speed_up(results: dict, path: Path, op: str = "head") -> None:
    """Bars of the ratio to each peer, a group for every size and a panel for every dtype; 1 is ours."""
    pyplot = pyplot_quietly()
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
    save(figure, path)


def elements(size: str) -> int:
    rows, columns = size.split("x")
    return int(rows) * int(columns)


def speed_ups(results: dict, path: Path) -> bool:
    """Every case against every peer: a bar from 1 to how many times as long the peer takes. False if there is none."""
    rows = [row for row in results["results"] if any(name in PEERS for name in fastest(row))]
    if not rows:
        return False
    pyplot = pyplot_quietly()
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    ops = list(dict.fromkeys(row["op"] for row in rows))
    names = sorted({(row["op"], row["size"]) for row in rows}, key=lambda name: (ops.index(name[0]), elements(name[1])))
    families = [name for name in PEERS if any(name in fastest(row) for row in rows)]
    width, height = 4.4 + 3.2 * len(dtypes), 1.6 + 0.21 * len(names)
    figure, axes = pyplot.subplots(
        1, len(dtypes), figsize=(width, height), sharey=True, sharex=True, squeeze=False, layout="constrained"
    )
    for axis, dtype in zip(axes[0], dtypes):
        for row in rows:
            if row["dtype"] != dtype:
                continue
            place, found = names.index((row["op"], row["size"])), fastest(row)
            drawn = [name for name in families if name in found]
            for index, name in enumerate(drawn):
                ratio, (colour, marker) = found[name]["ratio"], PEERS[name]
                at = place + 0.8 * ((index + 0.5) / len(drawn) - 0.5)
                axis.plot([1, ratio], [at, at], color=colour, linewidth=1.3, solid_capstyle="butt")
                axis.plot(ratio, at, marker, color=colour, markersize=3.6)
        for place in range(1, len(names)):
            other_op = names[place][0] != names[place - 1][0]
            axis.axhline(place - 0.5, color="#9aa5b1" if other_op else "#e5e7eb", linewidth=0.8)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axis.grid(axis="x", color="#e5e7eb", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.set_title(dtype, fontsize=10)
        axis.set_xlabel("time relative to fmkernels (log)", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), [f"{op}  {size.replace('x', ' × ')}" for op, size in names])
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    handles = [pyplot.Line2D([], [], color=PEERS[n][0], marker=PEERS[n][1], markersize=5, label=n) for n in families]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"Time of each peer, {results['device']}: right of 1× fmkernels is faster", fontsize=10)
    save(figure, path)
    return True


def roofline(results: dict, path: Path) -> bool:
    """Bandwidth that every op reaches against the bytes it must move, under that of a copy. False if there is none."""
    rows = [row for row in results["results"] if row.get("gb_per_s") and "error" not in row and row.get("bytes")]
    panels = {title: [row for row in rows if row["op"].startswith(starts)] for title, starts in PANELS.items()}
    panels = {title: chosen for title, chosen in panels.items() if chosen}
    if not panels:
        return False
    pyplot = pyplot_quietly()
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(4.4 * across, 0.5 + 3.9 * down), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    counts = sorted({row["bytes"] for row in rows})
    # A copy's speed is measured beside every case: the best of those of like size is what the memory can do.
    roof = [max(r["copy_gb_per_s"] for r in rows if 0.5 < r["bytes"] / count < 2) for count in counts]
    for axis, (title, chosen) in zip(axes.flat, panels.items()):
        axis.plot(counts, roof, color="#6b7280", linewidth=1.2)
        axis.fill_between(counts, roof, 1e-6, color="#6b7280", alpha=0.08)
        for index, op in enumerate(dict.fromkeys(row["op"] for row in chosen)):
            colour, marker = LINES[index % len(LINES)]
            for dtype in dict.fromkeys(row["dtype"] for row in chosen):
                points = sorted((r["bytes"], r["gb_per_s"]) for r in chosen if (r["op"], r["dtype"]) == (op, dtype))
                if points:
                    axis.plot(*zip(*points), DASHES[dtype], color=colour, marker=marker, markersize=4, linewidth=1.2)
            axis.plot([], [], color=colour, marker=marker, markersize=4, label=op)
        axis.set_title(title, fontsize=10)
        axis.legend(frameon=False, fontsize=8, loc="lower right")
        axis.grid(color="#e5e7eb", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis in list(axes.flat)[len(panels) - across : len(panels)]:  # the lowest of its column
        axis.tick_params(labelbottom=True)
    first = axes[0][0]
    first.set_xscale("log")
    first.set_yscale("log")
    first.set_ylim(min(0.5 * min(row["gb_per_s"] for row in rows), 0.01 * max(roof)), 2 * max(roof))
    styles = [pyplot.Line2D([], [], color="#6b7280", label="copy in the same run")]
    styles += [
        pyplot.Line2D([], [], color="black", linestyle=DASHES[dtype], label=dtype)
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    ]
    figure.legend(handles=styles, loc="outside right upper", frameon=False, fontsize=9)
    figure.supxlabel("bytes that the op must move", fontsize=9)
    figure.supylabel("GB/s", fontsize=9)
    figure.suptitle(f"Bandwidth reached, {results['device']}", fontsize=11)
    save(figure, path)
    return True


def has_heads(source: Path) -> bool:
    """Whether a results file has what :func:`speed_up` draws."""
    return any(row["op"] == "head" and row.get("peers") for row in json.loads(source.read_text())["results"])


def main(argv: list[str]) -> None:
    source = Path(argv[0]) if argv else next(filter(has_heads, sorted((FOLDER / "results").glob("*.json"))), None)
    if source is None or not source.exists():
        sys.exit(f"benchmarks.plot: no results file{'' if source is None else f' {source}'}; bench --json writes one")
    path = Path(argv[1]) if len(argv) > 1 else FOLDER.parent / "docs" / "speedup.png"
    speed_up(json.loads(source.read_text()), path)
    print(f"written: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
