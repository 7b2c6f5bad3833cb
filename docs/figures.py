"""Draws the pictures of the documentation and fills in its measured numbers: python docs/figures.py

Pictures are drawn from the library itself, numbers from the committed results in benchmarks/results: both follow the
code when it changes, and no figure is typed by hand.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
DROP_IN = ROOT / "examples" / "drop_in"
sys.path[:0] = [str(ROOT), str(DROP_IN)]  # run by its path, from a checkout that may not be installed

import compare as drop_in  # noqa: E402

import fmkernels as fmk  # noqa: E402
from benchmarks import likelihood, solvers  # noqa: E402
from benchmarks.run import amount, duration, fastest, short  # noqa: E402
from fmkernels.objectives import velocity_from_prediction  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN = "#2f6db3", "#d9772b", "#3a9a5b", "#c0394b", "#7d5ba6", "#8a6d3b"
GREY = "#6b7280"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#374151",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "lines.linewidth": 2.0,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
TIME_AXIS = "t    (noise at 0, data at 1)"


# ---- pictures ---------------------------------------------------------------------------------------------------


def called(text: str):
    """What a constructor call such as "VP()" makes: pictures show the call itself."""
    return eval(text, vars(fmk))


def times(schedule: fmk.Schedule, count: int = 801) -> torch.Tensor:
    return torch.linspace(*schedule.t_range, count, dtype=torch.float64)


def schedules(pyplot, path: Path) -> None:
    """α, σ and γ of every schedule, a panel each."""
    shown = (
        "CondOT()", "VP()", "SubVP()", "Cosine()", "LinearVP()", "Polynomial(2)", "VE()", "ConstantNoise(0.2)",
        "SchrodingerBridge(1.0)",
    )  # fmt: skip
    figure, axes = pyplot.subplots(3, 3, figsize=(9.6, 7.4), sharex=True, layout="constrained")
    for axis, call in zip(axes.flat, shown):
        schedule = called(call)
        t = times(schedule)
        v = schedule.coefficients(t)
        curves = [("α", v.alpha, BLUE), ("σ", v.sigma, ORANGE)] + [("γ", v.gamma, GREEN)] * schedule.bridge
        for name, values, colour in curves:
            axis.plot(t, values, color=colour, label=name)
        axis.set_title(call)
        axis.set_xlim(0, 1)
        if isinstance(schedule, fmk.VE):
            axis.set_yscale("log")
        else:
            axis.set_ylim(-0.04, 1.08)
    for axis in axes[-1]:
        axis.set_xlabel(TIME_AXIS)
    handles, labels = axes[-1, -1].get_legend_handles_labels()
    meaning = {"α": "α, of the data", "σ": "σ, of the noise", "γ": "γ, of the bridge noise"}
    figure.legend(handles, [meaning[name] for name in labels], loc="outside upper center", ncols=3, fontsize=11)
    figure.savefig(path, dpi=130)


def density(sampler: fmk.TimestepSampler) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, density of t), as the slope of the distribution function that the sampler inverts."""
    u = torch.linspace(1e-6, 1 - 1e-6, 4001, dtype=torch.float64).requires_grad_()
    t = sampler.inverse_cdf(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    return t.detach(), 1 / slope.abs()


def timesteps(pyplot, path: Path) -> None:
    """Densities of the samplers, what a shift does to them, and stratified beside independent times."""
    figure, axes = pyplot.subplots(1, 3, figsize=(12.6, 4.8), layout="constrained")
    groups = (
        (
            "samplers",
            ("Uniform()", GREY), ("LogitNormal()", BLUE), ("Mode()", ORANGE), ("CosMap()", GREEN),
            ("Beta(1.5, scale=0.999)", RED),
        ),
        (
            "shift > 1 and mean < 0 favour noise",
            ("Uniform(shift=3)", GREY), ("LogitNormal(shift=3)", BLUE), ("LogitNormal(mean=-1)", PURPLE),
        ),
    )  # fmt: skip
    for axis, (title, *shown) in zip(axes, groups):
        for call, colour in shown:
            axis.plot(*density(called(call)), color=colour, label=call)
        axis.set(title=title, xlabel=TIME_AXIS, ylabel="density", xlim=(0, 1), ylim=(0, 4))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9, columnspacing=1.2)
    rows, batches = 32, 6
    for place, (stratified, colour) in enumerate(((False, ORANGE), (True, BLUE))):
        fm = fmk.FlowMatching(timesteps=fmk.Uniform(stratified=stratified))
        for batch in range(batches):
            t = fm.sample(torch.zeros(rows, 1), key=torch.tensor([batch])).t
            height = torch.full((rows,), float(batch + (batches + 1) * (1 - place)))
            axes[2].scatter(t, height, s=70, marker="|", linewidths=1.6, color=colour)
    axes[2].set_title(f"{rows} times a batch, {batches} batches")
    axes[2].set(xlabel=TIME_AXIS, xlim=(-0.01, 1.01), ylim=(-0.8, 2 * batches + 0.8))
    middles = [(batches - 1) / 2 + (batches + 1) * place for place in (0, 1)]
    axes[2].set_yticks(middles, ["stratified", "independent"], rotation=90, va="center")
    axes[2].grid(False)
    figure.savefig(path, dpi=130)


def velocity_weight(objective: fmk.Objective, t: torch.Tensor) -> torch.Tensor:
    """λ with loss = λ·(error of the implied velocity)²: w·p²/g², as the velocity moves by g times the prediction."""
    v = objective.schedule.coefficients(t)
    table, _ = objective.table(t, v)
    _, g, _ = velocity_from_prediction(objective.prediction, v, objective.sigma_data)
    return table[..., 4] * (table[..., 0] / g).square()


def weights(pyplot, path: Path) -> None:
    """What every objective weighs an error of the velocity with."""
    columns = (
        (
            "predictions, each compared itself",
            ("velocity", {}, BLUE), ("noise; score", {"prediction": "noise"}, ORANGE),
            ("data", {"prediction": "data"}, GREEN), ("EDM", {"prediction": "edm"}, RED),
        ),
        (
            "weights",
            ("velocity, weight 'min_snr'", {"weight": "min_snr"}, PURPLE),
            ("velocity, weight 'sigma_sqrt'", {"weight": "sigma_sqrt"}, ORANGE),
            ("velocity, weight 'cosmap'", {"weight": "cosmap"}, BLUE),
            ("score, weight 'likelihood'", {"prediction": "score", "weight": "likelihood"}, BROWN),
            ("data compared as velocity", {"prediction": "data", "compare": "velocity"}, GREEN),
        ),
    )  # fmt: skip
    rows = (fmk.CondOT(t_range=(1e-3, 1 - 1e-3)), fmk.VP(t_range=(1e-3, 1 - 1e-3)))
    figure, axes = pyplot.subplots(2, 2, figsize=(10.4, 7.2), sharex=True, sharey="row", layout="constrained")
    for line, schedule in zip(axes, rows):
        t = times(schedule)
        for axis, (title, *shown) in zip(line, columns):
            for name, options, colour in shown:
                style = "--" if "compared" in name else "-"
                axis.plot(t, velocity_weight(fmk.Objective(schedule, **options), t), style, color=colour, label=name)
            axis.set_yscale("log")
            axis.set_title(f"{type(schedule).__name__}(): {title}")
            axis.set_xlim(0, 1)
    for axis, bottom in zip(axes[:, 0], (3e-4, 1e-7)):
        axis.set(ylabel="λ, where loss = λ·(Δv)²", ylim=(bottom, 3e4))
    for axis in axes[0]:
        axis.legend(loc="upper center", fontsize=9)
    for axis in axes[1]:
        axis.set_xlabel(TIME_AXIS)
    figure.savefig(path, dpi=130)


STIFFNESS = ((1.0, BLUE), (4.0, GREEN), (10.0, ORANGE))


def van_der_pol(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """An oscillator for each μ of ``STIFFNESS``; y is [3, 2], or [1, 3, 2] for one step size."""
    mu = torch.tensor([mu for mu, _ in STIFFNESS], dtype=y.dtype)
    x, v = y.unbind(-1)
    return torch.stack([v, mu * (1 - x * x) * v - x], dim=-1)


def step_sizes(pyplot, path: Path) -> None:
    """Three oscillators as three rows and as one row: the solutions, and the sizes of the steps."""
    end, options = 24.0, {"rtol": 1e-6, "atol": 1e-6, "record_steps": True}
    y0 = torch.tensor([2.0, 0.0], dtype=torch.float64).expand(len(STIFFNESS), 2).contiguous()
    t = torch.linspace(0, end, 1501, dtype=torch.float64)
    own = fmk.solve(van_der_pol, y0, (0, end), t, **options).raise_for_status()
    one = fmk.solve(van_der_pol, y0.unsqueeze(0), (0, end), **options).raise_for_status()
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(10.4, 6.8), sharex=True, height_ratios=(1, 1.5), layout="constrained"
    )

    def stairs(solution, row, label, **style):
        times = solution.steps[row]
        times = times[~times.isnan()]
        below.stairs(times.diff(), times, baseline=None, label=f"{label}: {solution.nfe[row]} evaluations", **style)

    stairs(one, 0, "one step size for the three", color="#111827", linewidth=1.2, linestyle=(0, (2, 1)), zorder=3)
    for row, (mu, colour) in enumerate(STIFFNESS):
        above.plot(t, own.y[row, :, 0], color=colour, label=f"μ = {mu:g}")
        stairs(own, row, f"μ = {mu:g}", color=colour, linewidth=1.8)
    above.set(ylabel="x", title="van der Pol's oscillator, x″ = μ(1 − x²)x′ − x")
    above.legend(loc="upper right", ncols=3, bbox_to_anchor=(1, 1.16), fontsize=9)
    below.set(yscale="log", xlabel="t", ylabel="step size h", xlim=(0, end), title="steps of dopri5 at 10⁻⁶")
    below.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, fontsize=9)
    figure.savefig(path, dpi=130)


def velocities(pyplot, path: Path) -> None:
    """Conditional velocities at a few points as lines to the data they head for, and the marginal as their mean."""
    turn = torch.arange(7) * (2 * torch.pi / 7)
    data = torch.stack([turn.cos(), turn.sin()], dim=1).double() * torch.tensor([2.0, 1.4])
    exact = fmk.MarginalField(data)
    axis = torch.linspace(-2.4, 2.4, 17, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis * 0.75)
    shown = torch.tensor([[-0.9, -0.5], [0.5, 0.9], [1.3, -0.35]], dtype=torch.float64)
    figure, axes = pyplot.subplots(1, 3, figsize=(12.6, 3.9), sharey=True, layout="constrained")
    for panel, t in zip(axes, (0.1, 0.5, 0.8)):
        # CondOT's velocities, times what is left of the time, end where x would arrive: at a point, or at their mean.
        field = (exact(t, grid) * (1 - t)).T
        panel.quiver(*grid.T, *field, color="#c9d8ee", angles="xy", scale_units="xy", scale=6.5, width=0.004)
        share = (-(shown[:, None] - t * data).square().sum(-1) / (2 * (1 - t) ** 2)).softmax(-1)
        for start, shares, mean in zip(shown, share, exact.posterior_mean(t, shown)):
            for end, weight in zip(data, shares):
                panel.plot(
                    *torch.stack([start, end]).T, color="#111827", alpha=0.08 + 0.7 * float(weight), linewidth=1.3
                )
            panel.annotate("", mean, start, arrowprops={"arrowstyle": "-|>", "color": BLUE, "linewidth": 2.2})
        panel.scatter(*data.T, color=ORANGE, s=42, zorder=3)
        panel.scatter(*shown.T, color=BLUE, s=26, zorder=3)
        panel.set(title=f"t = {t:g}", aspect="equal", xlim=(-2.5, 2.5), ylim=(-1.9, 1.9), xticks=[], yticks=[])
    dot = pyplot.Line2D([], [], color=ORANGE, marker="o", linestyle="")
    handles = [dot, pyplot.Line2D([], [], color="#111827", alpha=0.5), pyplot.Line2D([], [], color=BLUE)]
    words = ["data", "velocity towards one of them, darker where likelier", "their mean, the marginal velocity"]
    figure.legend(handles, words, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)


PICTURES = {
    "velocities.png": velocities,
    "schedules.png": schedules,
    "timesteps.png": timesteps,
    "weights.png": weights,
    "step_sizes.png": step_sizes,
}


def draw(folder: Path = DOCS) -> None:
    """Draw every picture into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, picture in PICTURES.items():
        with pyplot.rc_context(STYLE):
            picture(pyplot, folder / name)
        pyplot.close("all")


# ---- numbers ----------------------------------------------------------------------------------------------------


def markdown(header: list[str], rows: Iterable[list[str]], left: int = 2) -> str:
    rule = ["---" if index < left else "--:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


HEAD_PEERS = ("flow_matching", "torchcfm")


def provenance(document: dict, peers: Iterable[str] = HEAD_PEERS) -> str:
    """What the numbers were measured on and with."""
    versions = document["versions"]
    parts = [f"{name} {versions[name]}" for name in ("python", "torch", "triton", *peers) if versions.get(name)]
    parts += [f"compiled by {document['build']['compiler']}"] if document["build"].get("compiler") else []
    parts += [f"commit {document['commit']}"] if document.get("commit") else []
    noisy = document.get("machine", {}).get("warnings")
    return f"**{document['device']}.** {', '.join(parts)}." + (f" Noisy: {'; '.join(noisy)}." if noisy else "")


def ratio(figures: dict | None, name: str = "ratio") -> str:
    return f"{figures[name]:.1f}×" if figures and name in figures else "–"


def families(rows: list[dict]) -> list[str]:
    """The peers of these rows, in the order in which they were measured."""
    return list(dict.fromkeys(name.split(",")[0] for row in rows for name in row["peers"]))


def table(rows: list[dict], first: str) -> str:
    """A row for each case: time, bandwidth, peak memory, and every peer's time as a multiple of ours."""
    names = families(rows)
    header = [first, "batch", "dtype", "time", "of a copy", "peak memory", *names]
    body = []
    for row in rows:
        rivals = fastest(row)
        cells = [row["op"], row["size"].replace("x", " × "), short(row["dtype"]), duration(row["median_s"])]
        cells += [f"{row['of_copy']:.0%}", amount(row["peak_bytes"])]
        body.append([*cells, *(ratio(rivals.get(name)) for name in names)])
    return markdown(header, body, left=3)


def is_head(row: dict) -> bool:
    return row["op"].startswith("head")


def head_numbers(document: dict) -> list[str]:
    """The training head: its table, the memory of each peer, and small batches without autograd's own time."""
    rows = [row for row in document["results"] if "error" not in row and is_head(row)]
    if not rows:
        return []
    parts = [provenance(document), table(rows, "op")]
    notes = []
    for row in rows:
        if row.get("baseline_s") and row["peers"] and row["size"] == "256x2" and row["op"] == "head":
            net = [f"{name} {ratio(peer, 'ratio_less_baseline')}" for name, peer in fastest(row).items()]
            empty = f"an empty backward, {duration(row['baseline_s'])}"
            notes.append(f"- 256 × 2 {short(row['dtype'])}, less {empty} in each: {', '.join(net)}.")
    largest = max(rows, key=lambda row: row["bytes"] if row["op"] == "head" else 0)
    memory = [f"{name} {amount(peer['peak_bytes'])}" for name, peer in fastest(largest).items()]
    if memory:
        notes.append(
            f"- Peak memory of the others at {largest['size'].replace('x', ' × ')} {short(largest['dtype'])}: "
            f"{', '.join(memory)}."
        )
    return [*parts, "\n".join(notes)] if notes else parts


def op_numbers(document: dict) -> list[str]:
    """The single ops."""
    rows = [row for row in document["results"] if "error" not in row and not (is_head(row) or is_other(row))]
    return [provenance(document), table(rows, "case")] if rows else []


def is_solver(row: dict) -> bool:
    return row["op"] in solvers.OPS


def is_other(row: dict) -> bool:
    """Whether a row belongs to a section of its own."""
    return is_solver(row) or row["op"] in likelihood.OPS


def solver_numbers(document: dict) -> list[str]:
    """The solvers: the time that they spend outside the field."""
    rows = [row for row in document["results"] if "error" not in row and is_solver(row)]
    if not rows:
        return []
    names = families(rows)
    header = ["solver", "batch", "dtype", "time outside f", "of a copy", "evaluations", *names]
    body = []
    for row in rows:
        cells = [row["op"], row["size"].replace("x", " × "), short(row["dtype"]), duration(row["median_s"])]
        cells += [f"{row['of_copy']:.0%}" if "of_copy" in row else "–", str(row["calls"])]
        body.append([*cells, *(ratio(row["peers"].get(name)) for name in names)])
    return [provenance(document, solvers.FAMILIES), markdown(header, body, left=3)]


def likelihood_numbers(document: dict) -> list[str]:
    """Log-densities, and single evaluations of a field with its divergence."""
    parts = []
    for op, peers in likelihood.SHOWN.items():
        rows = [row for row in document["results"] if "error" not in row and row["op"] == op]
        names = [name for name in peers if any(name in row["peers"] for row in rows)]
        header = ["case", "batch", "dtype", "time", "of the bare calls", "evaluations", *names]
        body = []
        for row in rows:
            cells = [row["op"], row["size"].replace("x", " × "), short(row["dtype"]), duration(row["median_s"])]
            cells += [f"{row['of_bare']:.2f}×", str(row["calls"])]
            body.append([*cells, *(ratio(row["peers"].get(name)) for name in names)])
        parts += [markdown(header, body, left=3)] if rows else []
        counted = {name: row["peers"][name]["calls"] for row in rows for name in names} if op == "log_prob" else {}
        if counted:
            parts.append(f"Evaluations of the others: {', '.join(f'{name} {n}' for name, n in counted.items())}.")
    return [provenance(document, likelihood.INSTALLED), *parts] if parts else []


# What the page of the peers shows: the case, its size, and what it is in words.
AGAINST_PEERS = (
    ("head", "256x2", "training head"),
    ("head", "256x784", "training head"),
    ("head", "128x12288", "training head"),
    ("odeint", "256x2", "`odeint`, outside f"),
    ("solve", "256x2", "`solve`, outside f"),
    ("solve_large", "4096x256", "`solve`, outside f"),
    ("log_prob", "256x3072", "`log_prob`"),
)
PEERS = ("torchcfm", "flow_matching", "torchdiffeq", "torchode", "torch.compile")


def peer_numbers(document: dict) -> list[str]:
    """How many times as long each peer takes, case by case in float32."""
    body = []
    for op, size, words in AGAINST_PEERS:
        for row in document["results"]:
            if "error" in row or (row["op"], row["size"], row["dtype"]) != (op, size, "float32"):
                continue
            rivals = fastest(row)
            body.append([words, size.replace("x", " × "), *(ratio(rivals.get(name)) for name in PEERS)])
            if "tighter" in rivals:  # ours at a tenth of the tolerance, which is about as accurate as the others
                fair = {name: {"ratio": rivals[name]["ratio"] / rivals["tighter"]["ratio"]} for name in rivals}
                words = f"{words}, equally accurate"
                body.append([words, size.replace("x", " × "), *(ratio(fair.get(name)) for name in PEERS)])
    if not body:
        return []
    source = f"[{document['file']}](../benchmarks/results/{document['file']})"
    return [f"{provenance(document, PEERS)} {source}", markdown(["job", "batch", *PEERS], body)]


def drop_in_numbers(document: dict) -> list[str]:
    """The scripts before and after: how far their training is apart, and what head and sampler take."""
    parts = [provenance(document, ("torchcfm", "flow_matching", "torchdiffeq", "diffusers"))]
    parts.append(markdown(*drop_in.curve_table(document["curves"]), left=1))
    parts.append("Head, everything of a step but network and optimiser:")
    parts.append(markdown(*drop_in.time_table(document["heads"]), left=2))
    parts.append("Sampler, everything but the field:")
    parts.append(markdown(*drop_in.time_table(document["samplers"]), left=2))
    return parts


SECTIONS = {
    "head": head_numbers,
    "ops": op_numbers,
    "solvers": solver_numbers,
    "likelihood": likelihood_numbers,
    "peers": peer_numbers,
    "drop_in": drop_in_numbers,
}
NOTHING = 'No results are committed yet; `make bench ARGS="--json"` measures and writes them.'


def numbers(section: str, results: Path = RESULTS) -> str:
    """What stands between the markers of a section, from every committed results file."""
    paths = [DOCS / "experiments" / "drop_in.json"] if section == "drop_in" else sorted(results.glob("*.json"))
    documents = [json.loads(path.read_text()) | {"file": path.name} for path in paths]
    parts = [part for document in documents for part in SECTIONS[section](document)]
    if parts and section == "head" and (DOCS / "speedup.png").exists():
        parts.append("![Time of each peer's head relative to fmkernels](docs/speedup.png)")
    return "\n\n".join(parts or [NOTHING])


def difference(before: str, after: str) -> str:
    """What changes from one script of examples/drop_in to another, as a block of Markdown."""
    old, new = ((DROP_IN / f"{name}.py").read_text().splitlines() for name in (before, after))
    lines = difflib.unified_diff(old, new, f"{before}.py", f"{after}.py", n=1, lineterm="")
    return "\n".join(["```diff", *lines, "```"])


def filled(text: str, results: Path = RESULTS) -> str:
    """A page with the numbers of every ``<!-- numbers: SECTION -->`` … ``<!-- end of numbers -->`` filled in, and the
    difference of every ``<!-- diff: BEFORE AFTER -->`` … ``<!-- end of diff -->``."""

    def fill(match: re.Match) -> str:
        return f"{match[1]}\n{numbers(match[2], results)}\n{match[3]}"

    def compared(match: re.Match) -> str:
        return f"{match[1]}\n{difference(match[2], match[3])}\n{match[4]}"

    text = re.sub(r"(<!-- diff: (\w+) (\w+) -->).*?(<!-- end of diff -->)", compared, text, flags=re.DOTALL)
    return re.sub(r"(<!-- numbers: (\w+) -->).*?(<!-- end of numbers -->)", fill, text, flags=re.DOTALL)


def pages() -> list[Path]:
    """The pages of the documentation."""
    return [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]


def main() -> None:
    draw()
    for page in pages():
        before = page.read_text()
        after = filled(before)
        if after != before:
            page.write_text(after)
            print(f"numbers filled in: {page.relative_to(ROOT)}")
    print(f"drawn: {', '.join(PICTURES)}")


if __name__ == "__main__":
    main()
