"""The table of flow matching's paper: five ways to train one network, by bits per dimension, Fréchet distance and NFE.

    python examples/paper_table.py --data digits --seeds 3
    python examples/paper_table.py --data cifar10 --root DIR --features inception.pt

The rows are DDPM, Score Matching and ScoreFlow on the diffusion path, and flow matching on the diffusion and on the
optimal-transport path. They share the network, its first weights, the batches and the number of steps; only
``fmk.FlowMatching`` differs. What a trainer needs of the library:

1. ``train``: ``fmk.dequantise``, ``fm.sample``, ``fm.loss``;
2. ``draw_samples``: ``fmk.solve`` along ``fm.velocity(model)``, which counts the evaluations of every sample;
3. ``bits_of``: ``fmk.evaluate_bits_per_dim`` with Hadamard probes.

Source and published numbers: protocols.py. Data: image_data.py. Networks: networks.py. Distance: frechet.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import frechet
import torch
from common import markdown_table, positive, terminal_table
from image_data import READERS, ImageData, load
from networks import ImageMLP, UNet
from paper_pictures import draw_bars, draw_samples_of
from protocols import IMAGENET_128, PROTOCOLS, PUBLISHED, TOLERANCE, Protocol, objectives
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm, trange

import fmkernels as fmk

FIGURES = {"bits": "bits/dim", "frechet": "Fréchet", "nfe": "NFE"}
SHOWN = 16  # samples of each row in the picture


def network_for(data: ImageData, protocol: Protocol, device: str) -> nn.Module:
    network = ImageMLP(data.shape) if protocol.network is None else UNet(data.shape, protocol.network)
    return network.to(device)


class Run:
    """One row of the table with one seed: its network, the average of its weights, and how far training has come."""

    def __init__(self, fm: fmk.FlowMatching, data: ImageData, protocol: Protocol, seed: int, device: str, file: Path):
        torch.manual_seed(seed)
        self.fm, self.data, self.protocol, self.seed, self.device, self.file = fm, data, protocol, seed, device, file
        self.model = network_for(data, protocol, device)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(protocol.ema))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=protocol.learning_rate, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.step = 0

    def rate(self, step: int) -> float:
        """The learning rate's factor: it rises over the warm-up and then falls linearly, or stays."""
        p = self.protocol
        rising = (step + 1) / p.warmup if step < p.warmup else 1.0
        return min(rising, (p.steps - step) / max(1, p.steps - p.warmup)) if p.decays else rising

    @property
    def parts(self) -> dict:
        return {name: getattr(self, name) for name in ("model", "average", "optimizer", "schedule")}

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        unfinished = self.file.with_suffix(".partial")
        torch.save({"step": self.step, "steps": self.protocol.steps, **state}, unfinished)
        unfinished.replace(self.file)  # an interrupted save leaves the one before

    def resume(self) -> None:
        try:
            state = torch.load(self.file, map_location=self.device, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{self.file}: expected a network that this command left, got another file") from error
        if state["steps"] != self.protocol.steps:
            raise ValueError(f"{self.file}: expected a run of {self.protocol.steps} steps, got one of {state['steps']}")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step = state["step"]

    @property
    def field(self) -> nn.Module:
        """The velocity that the averaged weights give."""
        return self.fm.velocity(self.half(self.average.eval()))

    def half(self, model: nn.Module) -> Callable:
        """The network, in bfloat16 on a GPU where the protocol says so."""
        if not (self.protocol.half and self.device == "cuda"):
            return model

        def call(x, t):
            with torch.autocast("cuda", torch.bfloat16):
                return model(x, t).float()

        return call


def train(run: Run, label: str, microbatch: int) -> float | None:
    """Adam on what is left of the run's steps; returns the mean loss over the last tenth, None if no step was left."""
    first = run.step
    model, data, protocol = run.half(run.model.train()), run.data, run.protocol
    torch.manual_seed(run.seed + run.step)
    batches = data.batches(protocol.batch, run.seed + run.step)
    losses = torch.zeros(protocol.steps, device=run.device)
    progress = trange(first, protocol.steps, desc=label, unit="step", initial=first, total=protocol.steps)
    for step in progress:
        images = next(batches).to(run.device)
        run.optimizer.zero_grad()
        for part in images.split(microbatch):
            batch = run.fm.sample(fmk.dequantise(part, data.bits))
            loss = run.fm.loss(model(batch.x_t, batch.t), batch) * (len(part) / len(images))
            loss.backward()
            losses[step] += loss.detach()
        run.optimizer.step()
        run.schedule.step()
        run.average.update_parameters(run.model)
        run.step = step + 1
        if step % 100 == 99:  # read rarely: each reading waits for the device
            progress.set_postfix(loss=f"{losses[step - 99 : step + 1].mean():.4f}")
        if step % 5000 == 4999:
            run.save()
    last = losses[max(first, protocol.steps - protocol.steps // 10 - 1) :]
    return last.mean().item() if len(last) else None


@torch.no_grad()
def draw_samples(run: Run, label: str) -> tuple[torch.Tensor, dict]:
    """uint8 images of the run's flow, those that reached the end, and the evaluations that they took."""
    images, counts, calls, failed = [], [], 0, 0
    field, levels = run.field, run.data.levels
    torch.manual_seed(run.seed)
    parts = torch.arange(run.protocol.samples).split(run.protocol.together)
    for part in tqdm(parts, desc=f"{label}: samples", unit="batch"):
        noise = field.base().sample((len(part), *run.data.shape), device=run.device)
        solution = fmk.solve(field, noise, field.t_range, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)
        done = solution.status == 0
        images.append(((solution.y[done] + 1) * (levels / 2)).floor().clamp(0, levels - 1).to(torch.uint8).cpu())
        counts += solution.nfe[done].tolist()
        calls, failed = max(calls, solution.calls), failed + int((~done).sum())
    if not counts:
        raise RuntimeError(f"{label}: no sample reached the end of its solve")
    figures = {"nfe": statistics.fmean(counts), "fewest": min(counts), "most": max(counts)}
    return torch.cat(images), {**figures, "calls": calls, "failed_samples": failed}


def bits_of(run: Run, label: str) -> dict:
    """Bits per dimension over the test images, with the standard error over them, and of the probes alone."""
    protocol, images = run.protocol, run.data.test[: run.protocol.scored]
    divergence = fmk.Hutchinson(protocol.probes, "hadamard" if protocol.probes > 1 else "rademacher")
    generator = torch.Generator(run.device).manual_seed(run.seed)  # the same dequantisation and probes in every row
    batches = tqdm(images.split(protocol.together), desc=f"{label}: bits", unit="batch")
    bits, nfe = [], []
    for result in fmk.evaluate_bits_per_dim(
        run.field, batches, bits=run.data.bits, draws=protocol.draws, divergence=divergence, generator=generator,
        device=run.device, rtol=TOLERANCE, atol=TOLERANCE,
    ):  # fmt: skip
        bits.append(result.bits_per_dim)
        nfe.append(result.nfe.flatten())
        batches.set_postfix(mean=f"{result.mean:.4f}")
    bits = torch.cat(bits)
    failed, bits = int(bits.isnan().sum()), bits[~bits.isnan()]
    if not len(bits):
        raise RuntimeError(f"{label}: no density reached the end of its solve")
    spread = (bits.std() / math.sqrt(len(bits))).item() if len(bits) > 1 else math.nan
    figures = {"bits": bits.mean().item(), "bits_stderr": spread, "failed_densities": failed}
    return {**figures, "density_nfe": torch.cat(nfe).double().mean().item()}


class Judge:
    """The Fréchet distance of images to the training images, where there are features to take it in."""

    def __init__(self, data: ImageData, options: argparse.Namespace, protocol: Protocol):
        self.extractor, self.notes, self.together = None, {}, protocol.together
        if options.features is not None:
            self.extractor = frechet.load_extractor(options.features, options.device)
        elif data.labels is not None:
            steps = 100 if options.quick else 600
            classifier = frechet.train_classifier(next(data.training_images()), data.labels[0], steps, options.seed)
            self.extractor = classifier.features
            self.notes["accuracy of the classifier"] = classifier.accuracy(data.test, data.labels[1])
        if options.statistics is not None:
            self.reference = frechet.load_statistics(options.statistics)
            count, known = self.extractor(data.test[:1]).flatten(1).shape[1], len(self.reference[0])
            if count != known:
                raise ValueError(f"--statistics: expected those of the extractor's {count} features, got {known}")
        elif self.extractor is not None:
            batches = (batch for part in data.training_images() for batch in part.split(self.together))
            self.reference = frechet.moments(self.extractor, tqdm(batches, desc="features", unit="batch"))
        if data.labels is not None and self.extractor is not None:
            self.notes["Fréchet distance of the test images"] = self(data.test)

    def __call__(self, images: torch.Tensor) -> float | None:
        if self.extractor is None:
            return None
        return frechet.frechet_distance(frechet.moments(self.extractor, images.split(self.together)), self.reference)


# The table.


def mean_and_spread(runs: list[dict], figure: str, digits: int) -> str:
    """Mean ± standard deviation over the seeds; a dash where there is no such figure."""
    values = [run[figure] for run in runs if run[figure] is not None]
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def tables(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows): ours beside the published numbers, and those of ImageNet 128 × 128."""
    published = PUBLISHED.get(results["data"]) or PUBLISHED["cifar10"]
    source = results["data"] if results["data"] in PUBLISHED else "cifar10"
    digits = {"bits": 3, "frechet": 2, "nfe": 0}
    rows = []
    for name, runs in results["rows"].items():
        bits, distance, nfe = published[name]
        ours = [mean_and_spread(runs, figure, digits[figure]) for figure in FIGURES]
        rows.append([name, *ours, f"{bits:.2f} / {distance:.2f} / {nfe}"])
    header = ["", *FIGURES.values(), f"published, {source}"]
    title = f"{results['data']}: {results['protocol']['steps']} steps, seeds: {results['seeds']}"
    largest = [
        [name, "–" if bits is None else f"{bits:.2f}", f"{distance:.1f}"]
        for name, (bits, distance) in IMAGENET_128.items()
    ]
    return [(title, header, rows), ("ImageNet 128 × 128, published", ["", "bits/dim", "FID"], largest)]


def report(results: dict, out: Path) -> None:
    from rich.console import Console

    notes = [
        "bits/dim: of the test images, an upper bound; Fréchet: of samples to the training images; NFE: evaluations of "
        f"the network that a sample takes by dopri5 at {TOLERANCE:g}, each with its own step sizes, the mean of all "
        "(the paper's samples share theirs); ± standard deviation over the seeds; published: bits/dim / FID / NFE",
        *(f"{name}: {value:.3g}" for name, value in results["notes"].items()),
    ]
    failed = sum(run["failed_samples"] + run["failed_densities"] for runs in results["rows"].values() for run in runs)
    if failed:
        notes.append(f"{failed} solves failed and are left out: results.json has them by row")
    (first, *others), console = tables(results), Console()
    console.print(terminal_table(*first, caption="\n".join(notes)), *(terminal_table(*other) for other in others))
    pages = [f"**{title}**\n\n{markdown_table(header, rows)}" for title, header, rows in (first, *others)]
    pages.insert(1, "\n".join(f"- {note}" for note in notes))
    (out / "table.md").write_text("\n\n".join(pages) + "\n")


# The command.


def options_of(argv: list[str] | None) -> argparse.Namespace:
    rows = list(objectives(fmk.Uniform()))
    parser = argparse.ArgumentParser(
        description="Train one network in five ways and compare bits per dimension, Fréchet distance and number of "
        "evaluations, as table 1 of Lipman et al. (2023). Writes table.md, results.json, samples.png, bars.png and the "
        "networks. The digits take some five minutes a seed on two cores; the other data sets need a GPU and days.",
    )
    add = parser.add_argument
    add("--data", choices=READERS, default="digits", help="data set (default: digits)")
    add("--root", type=Path, metavar="DIR", help="where the files of CIFAR-10 or of the downsampled ImageNet are")
    add("--out", type=Path, metavar="DIR", help="where results go (default: out/paper_table/DATA)")
    add("--seeds", type=positive, default=1, metavar="N", help="runs of every row (default: 1)")
    add("--seed", type=int, default=0, help="the first seed (default: 0)")
    add("--rows", nargs="+", choices=rows, default=rows, metavar="ROW", help=f"of: {', '.join(map(repr, rows))}")
    add("--features", type=Path, metavar="FILE", help="TorchScript network for the Fréchet distance: uint8 images in, "
        "features out; without it only the digits have one")  # fmt: skip
    add("--statistics", type=Path, metavar="FILE", help="npz with mu and sigma of the training images' features")
    add("--resume", action="store_true", help="go on with the networks that are in OUT")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--microbatch", type=positive, metavar="N", help="images of a batch that the network sees at once")
    add("--quick", action="store_true", help="a tiny run that shows only that everything works")
    protocol = parser.add_argument_group("protocol", "by default that of the data set, see protocols.py")
    for name in ("steps", "batch", "draws", "probes", "scored", "samples", "together"):
        protocol.add_argument(f"--{name}", type=positive, metavar="N", help=MEANINGS[name])
    for name in ("channels", "depth"):
        protocol.add_argument(f"--{name}", type=positive, metavar="N", help=f"of the U-Net: {MEANINGS[name]}")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if options.statistics is not None and options.features is None:
        parser.error("--statistics: needs --features, the network that they are of")
    if options.data == "digits" and (options.channels or options.depth):
        parser.error("--channels, --depth: the digits' network is no U-Net")
    if options.samples == 1:
        parser.error("--samples: a Fréchet distance needs at least 2 images")
    return options


MEANINGS = {
    "steps": "steps of training",
    "batch": "images in a batch of training",
    "draws": "dequantisation draws of a test image",
    "probes": "probes of each density",
    "scored": "test images scored",
    "samples": "images drawn",
    "together": "images in a batch of the solver",
    "channels": "channels at full resolution",
    "depth": "residual blocks at each resolution",
}
QUICK = {"steps": 40, "batch": 64, "draws": 1, "probes": 2, "scored": 16, "samples": 64, "warmup": 10}


def protocol_of(options: argparse.Namespace) -> Protocol:
    """The data set's protocol, with what the user asks for instead."""
    protocol = PROTOCOLS[options.data]
    given = {name: getattr(options, name) for name in MEANINGS if getattr(options, name) is not None}
    size = {name: given.pop(name) for name in ("channels", "depth") if name in given}
    if size:
        given["network"] = dataclasses.replace(protocol.network, **size)
    given = {**(QUICK if options.quick else {}), **given}
    steps = given.get("steps", protocol.steps)
    return dataclasses.replace(protocol, **{"warmup": min(protocol.warmup, steps // 10), **given})


def file_name(row: str, seed: int) -> str:
    return f"{row.lower().replace(',', '').replace(' ', '-')}-{seed}.pt"


def main(argv: list[str] | None = None) -> None:
    options, started = options_of(argv), time.perf_counter()
    protocol, out = protocol_of(options), options.out or Path("out/paper_table") / options.data
    try:
        data = load(options.data, options.root)
        judge = Judge(data, options, protocol)
    except (OSError, ValueError) as error:
        sys.exit(f"paper_table: {error}")
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "data": options.data, "torch": torch.__version__, "device": options.device, "seeds": options.seeds,
        "protocol": dataclasses.asdict(protocol), "notes": judge.notes,
        "parameters": sum(p.numel() for p in network_for(data, protocol, "meta").parameters()),
        "rows": {name: [] for name in options.rows},
    }  # fmt: skip
    pictures = {"test images": data.test[:SHOWN]}
    for seed in range(options.seed, options.seed + options.seeds):
        for name, fm in objectives(fmk.Uniform(stratified=True)).items():
            if name not in options.rows:
                continue
            label, clock = f"{name} {seed}", time.perf_counter()
            run = Run(fm, data, protocol, seed, options.device, out / file_name(name, seed))
            if options.resume and run.file.exists():
                try:
                    run.resume()
                except ValueError as error:
                    sys.exit(f"paper_table: {error}")
            loss = train(run, label, options.microbatch or protocol.batch)
            run.save()
            trained = time.perf_counter() - clock
            images, figures = draw_samples(run, label)
            figures = {"seed": seed, "loss": loss, "train_s": trained, "frechet": judge(images), **figures}
            results["rows"][name].append({**figures, **bits_of(run, label), "all_s": time.perf_counter() - clock})
            pictures.setdefault(name, images[:SHOWN])
            (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw_samples_of(pictures, data.levels, out / "samples.png")
    draw_bars(results["rows"], PUBLISHED.get(options.data), FIGURES, out / "bars.png")
    report(results, out)
    print(f"table.md, results.json, samples.png and bars.png in {out}, after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
