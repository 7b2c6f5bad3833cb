"""Three theorems of flow matching, checked by numbers: python examples/change_of_variables.py

1. ``change_of_variables``: the log-density that the Jacobian of the flow gives, log p0(x0) + log|det ∂x0/∂x1|, equals
   the one that ``fmk.log_prob`` gets by integrating the divergence along the way; both follow the tolerance.
2. ``continuity``: the marginal field of a Gaussian mixture moves its density: ∂p/∂t + ∇·(p u) = 0.
3. ``gradient_gaps``, ``loss_values``: the gradients of the flow matching loss (target: the marginal field) and of the
   conditional one (target: a sample's own velocity) agree, and the two losses differ by a number that the network has
   no part in; stable targets (``fm.loss(..., reference=...)``) lie between.

Sources: Chen et al., "Neural Ordinary Differential Equations" (2018); Lipman et al., "Flow Matching for Generative
Modeling" (2023), theorems 1 and 2; Xu, Tong and Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in
Diffusion Models" (2023).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from common import BLUE, GREEN, GREY, ORANGE, markdown_table, plotter, terminal_table
from torch import nn
from tqdm import tqdm, trange

import fmkernels as fmk

SIGMA_MIN = 0.15  # the deviation of every component at t = 1
INSTANTS = (0.0, 0.25, 0.5, 0.75, 1.0)
BLOCK, REFERENCES = 256, (16, 256)  # draws in a batch; points of it that stable targets are averaged over


class SmoothField(nn.Module):
    """v(t, x) of points [B, 2] by a tanh network: smooth, so that solvers keep their order."""

    def __init__(self, width: int = 64):
        super().__init__()
        sizes = [5, width, width]
        layers = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), nn.Tanh())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.unsqueeze(-1)
        return self.layers(torch.cat([x, t, (math.pi * t).sin(), (math.pi * t).cos()], dim=-1))


def ring(count: int = 8, radius: float = 2.0) -> torch.Tensor:
    """Points on a circle, [count, 2], float64."""
    angles = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    return radius * torch.stack([angles.cos(), angles.sin()], dim=-1)


def spiral(count: int, generator: torch.Generator) -> torch.Tensor:
    """Points about two arms of a spiral, [count, 2], float64."""
    turn = torch.rand(count, generator=generator, dtype=torch.float64).sqrt()
    angles = 1.5 * math.pi * turn + math.pi * torch.randint(2, (count,), generator=generator)
    points = 2.4 * turn.unsqueeze(-1) * torch.stack([angles.cos(), angles.sin()], dim=-1)
    return points + 0.06 * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def trained(fm: fmk.FlowMatching, data: torch.Tensor, steps: int, label: str) -> SmoothField:
    """A small network in float64 after ``steps`` of Adam on batches of 512."""
    model = SmoothField().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc=label, unit="step"):
        batch = fm.sample(data[torch.randint(len(data), (512,))])
        loss = fm.loss(model(batch.x_t, batch.t), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


# 1. The change of variables.


def log_prob_by_jacobian(field, x1: torch.Tensor, tolerance: float) -> torch.Tensor:
    """log p0(x0) + log|det ∂x0/∂x1| with x0 where ``solve`` ends, differentiated through its steps."""
    x1 = x1.clone().requires_grad_()
    low, high = field.t_range
    solution = fmk.solve(field, x1, (high, low), rtol=tolerance, atol=tolerance, gradient="recorded", parameters=())
    x0 = solution.raise_for_status().y
    rows = [torch.autograd.grad(x0[:, i].sum(), x1, retain_graph=i == 0)[0] for i in range(2)]
    return field.base().log_prob(x0.detach()) + torch.linalg.slogdet(torch.stack(rows, dim=1)).logabsdet


def log_prob_by_divergence(field, x1: torch.Tensor, tolerance: float) -> fmk.LogProb:
    """The same by the integral of the exact divergence."""
    with torch.no_grad():
        result = fmk.log_prob(field, x1, divergence=fmk.Exact(), rtol=tolerance, atol=tolerance)
    return result.raise_for_status()


def change_of_variables(fields: dict, tolerances: tuple[float, ...]) -> list[dict]:
    """For each field with its points and each tolerance the largest difference of the two log-densities, and of the
    second to the exact one if that is known."""
    rows = []
    for name, (field, points) in tqdm(fields.items(), desc="change of variables", unit="field"):
        for tolerance in tolerances:
            result = log_prob_by_divergence(field, points, tolerance)
            gap = (log_prob_by_jacobian(field, points, tolerance) - result.log_prob).abs().max()
            row = {"field": name, "tolerance": tolerance, "gap": gap.item(), "nfe": result.nfe.double().mean().item()}
            if isinstance(field, fmk.MarginalField):
                # p0 of the mixture and the base agree where σ = 1 and α = 0: at t = 0 of this path.
                row["error"] = (result.log_prob - field.log_prob(field.t_range[1], points)).abs().max().item()
            rows.append(row)
    return rows


# 2. The continuity equation.


def square_grid(cells: int, limit: float) -> torch.Tensor:
    """The middles of cells² squares of [−limit, limit]², [cells², 2], float64, y slowest."""
    middle = (torch.arange(cells, dtype=torch.float64) + 0.5) * (2 * limit / cells) - limit
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=-1)


def continuity(exact: fmk.MarginalField, t: float, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """p, u, ∂p/∂t and ∇·(p u) at points x, the two derivatives by autograd of the density and of the flux."""
    x = x.clone().requires_grad_()
    time = torch.full((len(x),), t, dtype=x.dtype, requires_grad=True)
    density, velocity = exact.log_prob(time, x).exp(), exact(time, x)
    flux = density.unsqueeze(-1) * velocity
    (change,) = torch.autograd.grad(density.sum(), time, retain_graph=True)
    parts = [torch.autograd.grad(flux[:, i].sum(), x, retain_graph=i == 0)[0][:, i] for i in range(2)]
    found = {"density": density, "velocity": velocity, "change": change, "outflow": parts[0] + parts[1]}
    return {name: value.detach() for name, value in found.items()}


# 3. Flow matching and conditional flow matching.


def drawn(fm, exact, model: nn.Module, rows: int, reference: int | None, generator) -> dict[str, torch.Tensor]:
    """Two losses of the same draws: with the marginal field as target, and with conditional or stable targets.

    Stable targets are averaged over ``reference`` samples, those of a row's own group: then they are unbiased.
    """
    x1 = exact.points[torch.randint(len(exact.points), (rows,), generator=generator)]
    batches = [fm.sample(group, generator=generator) for group in x1.split(reference or rows)]
    t, x_t = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("t", "x_t"))
    prediction = model(x_t, t)
    parts = prediction.split(reference or rows)
    averaged = [{} if reference is None else {"reference": batch.x1} for batch in batches]
    other = sum(fm.loss(*pair, **options) for *pair, options in zip(parts, batches, averaged)) / len(batches)
    return {"marginal": (prediction - exact(t, x_t)).square().mean(), "other": other}


def gradient_of(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def gradient_gaps(fm, exact, model: nn.Module, blocks: int, generator) -> dict[str, dict[int, dict[str, float]]]:
    """For each loss the gap of its mean gradient over n draws to flow matching's over the same draws, relative to flow
    matching's mean gradient: the root mean square and the outer tenths over the groups of n, of which there are at
    least four."""
    gaps: dict[str, dict[int, dict[str, float]]] = {}
    for reference in (None, *REFERENCES):
        name = "conditional" if reference is None else f"stable, {reference} points"
        differences, mean = [], 0.0
        for _ in trange(blocks, desc=f"gradients: {name}", unit="batch"):
            losses = drawn(fm, exact, model, BLOCK, reference, generator)
            marginal, other = (gradient_of(loss, model) for loss in losses.values())
            differences.append(other - marginal)
            mean = mean + marginal / blocks
        gaps[name] = {}
        for size in (2**k for k in range((blocks // 4).bit_length())):
            means = torch.stack(differences).view(blocks // size, size, -1).mean(dim=1)
            found = means.norm(dim=1) / mean.norm()
            low, high = found.quantile(torch.tensor([0.1, 0.9], dtype=found.dtype)).tolist()
            gaps[name][BLOCK * size] = {"gap": found.square().mean().sqrt().item(), "low": low, "high": high}
    return gaps


@torch.no_grad()
def loss_values(fm, exact, models: dict[str, nn.Module], rows: int, generator) -> list[dict]:
    """Both losses of each network over the same draws, and their difference."""
    state = generator.get_state()
    table = []
    for name, model in models.items():
        losses = drawn(fm, exact, model, rows, None, generator.set_state(state))
        marginal, conditional = losses["marginal"].item(), losses["other"].item()
        table.append({"network": name, "marginal": marginal, "conditional": conditional})
    return table


def slope(values: dict[float, float]) -> float:
    """The exponent b of y ≈ a·xᵇ, by least squares on the logarithms."""
    x, y = (torch.tensor(list(v), dtype=torch.float64).log() for v in (values, values.values()))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


# The pictures.


def draw_densities(field, rows: list[dict], file: Path, cells: int, limit: float = 3.0) -> None:
    """The density of a trained flow both ways, their difference, and how differences follow the tolerance."""
    plt = plotter()
    from matplotlib.colors import LogNorm

    x1, extent = square_grid(cells, limit), (-limit, limit, -limit, limit)
    by_divergence = log_prob_by_divergence(field, x1, 1e-6).log_prob
    by_jacobian = log_prob_by_jacobian(field, x1, 1e-6)
    figure = plt.figure(figsize=(15.6, 3.9), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.25))
    both = (("Jacobian of the flow", by_jacobian), ("integrated divergence", by_divergence))
    for axis, (title, values) in zip(axes, both):
        shown = {"origin": "lower", "extent": extent, "cmap": "inferno", "vmin": 0, "interpolation": "bilinear"}
        image = axis.imshow(values.exp().view(cells, cells).numpy(), **shown)
        axis.set_title(f"density by the {title}")
    figure.colorbar(image, ax=axes[1], shrink=0.8, label="p₁")
    gap = (by_jacobian - by_divergence).abs().clamp_min(1e-12).view(cells, cells).numpy()
    image = axes[2].imshow(gap, origin="lower", extent=extent, cmap="viridis", norm=LogNorm())
    figure.colorbar(image, ax=axes[2], shrink=0.8, label="|Δ log p₁|")
    axes[2].set_title("difference of log p₁, tolerance 10⁻⁶")
    for axis in axes[:3]:
        axis.set(xticks=[], yticks=[])
    for name, colour in zip(dict.fromkeys(row["field"] for row in rows), (BLUE, ORANGE, GREEN)):
        own = [row for row in rows if row["field"] == name]
        tolerances = [row["tolerance"] for row in own]
        axes[3].loglog(tolerances, [row["gap"] for row in own], "o-", color=colour, label=f"{name}: one way − other")
        if "error" in own[0]:
            axes[3].loglog(tolerances, [row["error"] for row in own], "s--", color=colour, label=f"{name}: − exact")
    axes[3].loglog(tolerances, tolerances, ":", color=GREY, label="tolerance")
    axes[3].grid(True)
    axes[3].set(xlabel="tolerance of the solver", ylabel="largest |Δ log p₁|", title="both follow the tolerance")
    axes[3].legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_continuity(exact: fmk.MarginalField, file: Path, cells: int, limit: float = 3.2) -> float:
    """p_t with its velocity, ∂p/∂t and the residual of the continuity equation; the largest residual over |∂p/∂t|."""
    plt = plotter()
    x, extent = square_grid(cells, limit), (-limit, limit, -limit, limit)
    arrows = square_grid(13, limit)
    figure, axes = plt.subplots(3, len(INSTANTS), figsize=(15.6, 7.9), layout="constrained")
    worst = 0.0
    for column, t in zip(axes.T, INSTANTS):
        found = continuity(exact, t, x)
        change, residual = found["change"], found["change"] + found["outflow"]
        scale = change.abs().max()
        worst = max(worst, (residual.abs().max() / scale).item())
        floor = 10.0 ** math.floor(math.log10(max((residual.abs().max() / scale).item(), 1e-18)) + 1)
        shown = (
            (found["density"], "inferno", 0, None),
            (change, "RdBu_r", -scale, scale),
            (residual / scale, "PuOr", -floor, floor),
        )
        for axis, (values, colours, low, high) in zip(column, shown):
            image = axis.imshow(
                values.view(cells, cells).numpy(), origin="lower", extent=extent, cmap=colours, vmin=low, vmax=high
            )
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            bar = figure.colorbar(image, ax=axis, shrink=0.75)
            if axis is column[2]:
                bar.set_ticks([-floor, 0, floor], labels=[f"−{floor:.0e}", "0", f"{floor:.0e}"])
        velocity = exact(t, arrows)
        velocity = velocity / velocity.norm(dim=1).max()  # the longest arrow has the same length at every t
        column[0].quiver(*arrows.T.numpy(), *velocity.T.numpy(), color="#9fd3ff", width=0.006, scale=9)
        column[0].set_title(f"t = {t:g}", fontsize=13)
    labels = ("density p and velocity u", "∂p/∂t", "(∂p/∂t + ∇·(p u)) / max|∂p/∂t|")
    for axis, label in zip(axes[:, 0], labels):
        axis.set_ylabel(label, fontsize=12)
    figure.savefig(file, dpi=80)
    plt.close(figure)
    return worst


def draw_matching(gaps: dict, losses: list[dict], file: Path) -> None:
    """The gap of the gradients against the number of draws, and the two losses of each network."""
    plt = plotter()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.4, 4.6), width_ratios=(1.35, 1), layout="constrained")
    for (name, values), colour in zip(gaps.items(), (BLUE, ORANGE, GREEN)):
        means = {n: found["gap"] for n, found in values.items()}
        label = f"{name}: falls as $n^{{{slope(means):.2f}}}$"
        left.loglog(list(means), list(means.values()), "o-", color=colour, label=label)
        low, high = ([found[end] for found in values.values()] for end in ("low", "high"))
        left.fill_between(list(means), low, high, color=colour, alpha=0.15, linewidth=0)
    sizes = list(means)
    start = 1.6 * gaps["conditional"][sizes[0]]["gap"]
    left.loglog(sizes, [start * (n / sizes[0]) ** -0.5 for n in sizes], ":", color=GREY, label="slope −½")
    left.grid(True)
    left.set(xlabel="draws n", ylabel="gap to the gradient with the marginal field, relative")
    left.set_title("gradients of the losses agree on average")
    left.legend()
    for place, row in enumerate(losses):
        gap = row["conditional"] - row["marginal"]
        names = "flow matching", "conditional flow matching, the rest"
        right.bar(place, row["marginal"], color=BLUE, width=0.6, label=None if place else names[0])
        right.bar(place, gap, bottom=row["marginal"], color="#c9d6e6", width=0.6, label=None if place else names[1])
        right.text(place, row["marginal"] + gap / 2, f"{gap:.4f}", ha="center", va="center", color="#374151")
    right.set_xticks(range(len(losses)), [row["network"] for row in losses])
    right.set(ylabel="loss", title="the losses differ by a constant")
    right.legend(loc="upper right")
    figure.savefig(file, dpi=120)
    plt.close(figure)


# The command.


def tables(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of what was found."""
    densities = [
        [row["field"], f"{row['tolerance']:.0e}", f"{row['gap']:.1e}",
         f"{row['error']:.1e}" if "error" in row else "–", f"{row['nfe']:.0f}"]
        for row in results["change_of_variables"]
    ]  # fmt: skip
    losses = []
    for row in results["losses"]:
        values = row["marginal"], row["conditional"], row["conditional"] - row["marginal"]
        losses.append([row["network"], *(f"{value:.4f}" for value in values)])
    gaps = []
    for name, values in results["gradients"].items():
        means = {int(n): found["gap"] for n, found in values.items()}
        few, many = min(means), max(means)
        gaps.append([name, f"{means[few]:.3f}", f"{means[many]:.3f}", f"{slope(means):.2f}"])
    return [
        ("Log-density: Jacobian of the flow against integrated divergence, largest difference",
         ["field", "tolerance", "difference", "to the exact one", "evaluations"], densities),
        ("Losses with the marginal field as target and with conditional targets",
         ["network", "flow matching", "conditional", "difference"], losses),
        ("Gap of the mean gradient to flow matching's own, relative",
         ["targets", f"{few} draws", f"{many} draws", "exponent of n"], gaps),
    ]  # fmt: skip


def report(results: dict, out: Path) -> None:
    from rich.console import Console

    console = Console()
    for title, head, rows in tables(results):
        console.print(terminal_table(title, head, rows))
    console.print(f"Continuity equation: |∂p/∂t + ∇·(p u)| at most {results['continuity']:.1e} of max|∂p/∂t|\n")
    pages = [f"**{title}**\n\n{markdown_table(head, rows)}" for title, head, rows in tables(results)]
    (out / "change_of_variables.md").write_text("\n\n".join(pages) + "\n")


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Check by numbers that the Jacobian of a flow and the integral of its divergence give one density, "
        "that the marginal field obeys the continuity equation, and that flow matching and conditional flow matching "
        "have the same gradients. Writes three pictures, change_of_variables.json and .md. Takes about a "
        "minute on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/change_of_variables"), metavar="DIR", help="for results")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, draws and initial weights")
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows only that everything works")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = options_of(argv)
    quick, started = options.quick, time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)

    fm = fmk.FlowMatching(fmk.CondOT(sigma_min=SIGMA_MIN))
    mixture, data = fmk.MarginalField(ring(), fm.schedule), spiral(256, generator)
    untrained = SmoothField().double()
    short, long = (20, 40) if quick else (50, 2000)
    half, full = trained(fm, data, short, "training"), trained(fm, data, long, "training longer")
    count = 8 if quick else 200

    def blurred(centres):
        picked = centres[torch.randint(len(centres), (count,), generator=generator)]
        return picked + SIGMA_MIN * torch.randn(count, 2, generator=generator, dtype=torch.float64)

    # Where a density is next to nothing the flow contracts, and the Jacobian has few digits left for its determinant.
    fields = {"Gaussian mixture": (mixture, blurred(ring())), "network": (fm.velocity(full), blurred(data))}
    tolerances = tuple(10.0**-power for power in range(3, 7 if quick else 11))
    rows = change_of_variables(fields, tolerances)
    draw_densities(fields["network"][0], rows, options.out / "change_of_variables.png", 12 if quick else 64)

    exact = fmk.MarginalField(data, fm.schedule)
    models = {"untrained": untrained, f"{short} steps": half, f"{long} steps": full}
    results = {
        "torch": torch.__version__,
        "seed": options.seed,
        "change_of_variables": rows,
        "continuity": draw_continuity(mixture, options.out / "continuity.png", 24 if quick else 96),
        "losses": loss_values(fm, exact, models, 2**10 if quick else 2**18, generator),
        "gradients": gradient_gaps(fm, exact, half, 8 if quick else 512, generator),
    }
    draw_matching(results["gradients"], results["losses"], options.out / "matching.png")
    (options.out / "change_of_variables.json").write_text(json.dumps(results, indent=2) + "\n")
    report(results, options.out)
    seconds = time.perf_counter() - started
    print(f"Three pictures, change_of_variables.json and .md in {options.out}, after {seconds:.0f} s")


if __name__ == "__main__":
    main()
