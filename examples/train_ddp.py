"""Train on several processes with the numbers of one: DDP or FSDP2, mixed precision, accumulation, averaged weights.

    python examples/train_ddp.py --out out/one                                      # one process
    torchrun --nproc_per_node=3 examples/train_ddp.py --out out/three               # the same losses from three
    torchrun --nproc_per_node=2 examples/train_ddp.py --out out/fsdp2 --parallel fsdp2 --amp bf16 --accumulate 4
    torchrun --nproc_per_node=2 examples/train_ddp.py --out out/three --resume --steps 600 --likelihood

``--batch`` is the batch of all processes together and need not be a multiple of their number. Every rank draws the same
key and takes its rows of the batch (``Trainer.loss_of``): noise, times and dequantisation are those of one process bit
for bit, losses and weights are to rounding. OUT has the losses, log.jsonl, and the checkpoints, step-…, from which any
number of processes resumes, bit for bit if it is the same number. Explained in docs/distributed.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from common import at_least, number, positive
from image_data import READERS, load
from networks import Attention, ImageMLP, ResidualBlock, Transformer, TransformerBlock, UNet, UNetSize
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

import fmkernels as fmk
from fmkernels.distributed import DatasetScores, score_dataset, shard_rows

# FSDP2 says so of a network whose last operation is a view: the head writes to no prediction. And one process is meant.
for message in ("FSDP2-wrapped module", "torch.distributed is disabled"):
    warnings.filterwarnings("ignore", message)

NETWORKS = {
    "mlp": lambda shape, dropout: ImageMLP(shape, dropout=dropout),
    "transformer": lambda shape, dropout: Transformer(shape, dropout=dropout),
    "unet": lambda shape, dropout: UNet(shape, UNetSize(32, (1, 2), 1, (4, 16), 32, dropout)),
}
HALF = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOG_EVERY = 20  # steps; reading the losses waits for the device
# What a run must go on with as it began, since its numbers depend on it.
KEPT = ("network", "data", "batch", "seed", "dtype", "amp", "learning_rate", "dropout")
PATIENCE = datetime.timedelta(hours=2)  # of a process that has scored its share with those that still score


class Trainer:
    """A run: its network in one of the three ways, and everything that must survive an interruption."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.step = options, 0
        joined = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self.device = torch.empty(0, device=options.device).device  # with the number of the GPU
        self.data = load(options.data, options.root)
        self.images = torch.cat(list(self.data.training_images()))
        self.fm = fmk.FlowMatching(timesteps=fmk.Uniform(stratified=True))

        torch.manual_seed(options.seed)  # the same first weights in every rank
        self.network = self.new_network()
        # Sharded modules cannot be copied, so the average is made first and sharded alike.
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
        self.model: nn.Module = self.network
        if joined and options.parallel == "fsdp2":
            shard(self.network), shard(self.average.module)
        elif joined:
            self.model = DistributedDataParallel(self.network)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), options.learning_rate)
        self.fill_optimizer()
        if self.model is not self.network:
            self.settle()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        # Only keys are drawn from it, so that nothing else that one rank draws moves them.
        self.keys = torch.Generator(self.device).manual_seed(options.seed)

    def new_network(self) -> nn.Module:
        network = NETWORKS[self.options.network](self.data.shape, self.options.dropout)
        return network.to(self.device, self.options.dtype)

    def fill_optimizer(self) -> None:
        """The optimizer's state before its first step. Saving would make it too, and count that as a step."""
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate
        for state in self.optimizer.state.values():
            state["step"].zero_()
        self.optimizer.zero_grad()

    def settle(self) -> None:
        """One step of no effect. After the first DDP groups the gradients anew, and with the groups the order of sums
        changes: a resumed run would differ in the last bit from one that was not interrupted."""
        key = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.loss_of(torch.zeros(1, dtype=torch.int64), key, 0, 0).backward()
        self.optimizer.zero_grad()

    def next_rows(self) -> torch.Tensor:
        """The images of the step's batch: in every epoch all of them in a new order, the last batch shorter."""
        epoch, place = divmod(self.step, -(-len(self.images) // self.options.batch))
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.options.seed + epoch))
        return order.split(self.options.batch)[place]

    def loss_of(self, rows: torch.Tensor, key: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """What images ``first`` … ``last`` − 1 of the batch add to its mean loss."""
        total = len(rows)
        weight = None
        if first == last:  # nothing to do; one row of weight 0 takes part in what the processes do together
            first, last, weight = 0, 1, torch.zeros(1, device=self.device)
        images = self.images[rows[first:last]].to(self.device)
        x1 = fmk.dequantise(images, self.data.bits, key=key, first_row=first, dtype=self.options.dtype)
        batch = self.fm.sample(x1, key=key, first_row=first, total_rows=total)
        with torch.autocast(self.device.type, HALF[self.options.amp], enabled=self.options.amp != "none"):
            prediction = self.model(batch.x_t, batch.t)
        return self.fm.loss(prediction, batch, weight=weight, reduction="sum") / (total * x1[0].numel())

    def unsynchronised(self, last: bool):
        """Leaves gradients in each rank until the last of the accumulated parts."""
        if self.model is not self.network:
            return contextlib.nullcontext() if last else self.model.no_sync()
        if hasattr(self.network, "set_requires_gradient_sync"):
            self.network.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One step; this rank's share of the mean loss and the norm of the whole gradient."""
        rows, key = self.next_rows(), fmk.key(self.device, self.keys)
        torch.manual_seed(seed_of(self.options.seed, self.step * self.world + self.rank))  # for dropout
        share = torch.arange(*shard_rows(len(rows), self.rank, self.world))
        parts = share.tensor_split(self.options.accumulate)  # as many in every rank, some of them empty perhaps
        loss = torch.zeros((), device=self.device, dtype=self.options.dtype)
        for i, part in enumerate(parts, 1):
            first, last = (int(part[0]), int(part[-1]) + 1) if len(part) else (0, 0)
            with self.unsynchronised(i == len(parts)):
                part_loss = self.loss_of(rows, key, first, last)
                # DDP and FSDP2 divide the sum over the ranks by their number.
                self.scaler.scale(part_loss * self.world).backward()
            loss += part_loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.network)
        self.step += 1
        return loss, norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def run(self) -> None:
        """All that the options ask for."""
        out, began = self.options.out, {name: str(getattr(self.options, name)) for name in KEPT}
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"--out: expected a folder that can be written, got {out}: {error.strerror}") from error
        if self.options.resume:
            self.resume(began)
        elif self.rank == 0:
            (out / "log.jsonl").unlink(missing_ok=True)  # of a run that was never saved
            (out / "options.json").write_text(json.dumps(began, indent=1) + "\n")
        self.train()
        if self.options.likelihood:
            scores = self.likelihood()
            if self.rank == 0:
                failed = f", {scores.failed} failed" if scores.failed else ""
                figures = f"{scores.mean:.4f} ± {scores.standard_error:.4f} bits per dimension"
                print(f"{figures} over {scores.images} test images{failed}")

    def train(self) -> None:
        """Steps up to ``--steps``, with the log and the checkpoints."""
        options = self.options
        steps = trange(self.step, options.steps, initial=self.step, total=options.steps, disable=self.rank > 0)
        kept = []
        for step in steps:
            kept.append(torch.stack([value.detach().double() for value in self.train_step()]))
            saving = self.step % options.save_every == 0 or self.step == options.steps
            if saving or self.step % LOG_EVERY == 0:
                losses, norms = torch.stack(kept).unbind(1)
                if self.world > 1:
                    dist.all_reduce(losses := losses.contiguous())
                lines = [
                    {"step": step - len(kept) + 2 + i, "loss": loss, "gradient_norm": norm}
                    for i, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist()))
                ]
                if self.rank == 0:
                    with (options.out / "log.jsonl").open("a") as log:
                        log.writelines(json.dumps(line) + "\n" for line in lines)
                steps.set_postfix(loss=f"{lines[-1]['loss']:.4f}")
                kept = []
            if saving:
                dcp.save({"run": self}, checkpoint_id=checkpoint_of(options.out, self.step), no_dist=self.world == 1)

    def state_dict(self) -> dict:
        model, optimizer = get_state_dict(self.network, self.optimizer)
        average = get_model_state_dict(self.average.module)
        return {
            "model": model,
            "optimizer": optimizer,
            "average": {"model": average, "count": self.average.n_averaged},
            "scaler": self.scaler.state_dict(),
            "keys": self.keys.get_state(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict) -> None:
        set_state_dict(
            self.network, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        set_model_state_dict(self.average.module, state["average"]["model"])
        self.average.n_averaged.copy_(state["average"]["count"])
        self.scaler.load_state_dict(state["scaler"])
        self.keys.set_state(state["keys"])
        self.step = state["step"]

    def resume(self, given: dict[str, str]) -> None:
        """From the last checkpoint that was finished."""
        file = self.options.out / "options.json"
        for name, value in (json.loads(file.read_text()) if file.exists() else {}).items():
            if given[name] != value:
                option = {"dtype": "float64"}.get(name, name.replace("_", "-"))
                raise SystemExit(
                    f"--{option}: expected {value}, with which the run in {self.options.out} began, "
                    f"got {given[name]}; name another --out for another run"
                )
        last = finished_in(self.options.out)[-1]
        try:
            dcp.load({"run": self}, checkpoint_id=last, no_dist=self.world == 1)
        except (Exception, CheckpointException) as error:
            raise RuntimeError(f"{last} does not load; remove it to resume from the one before: {error}") from error
        log = self.options.out / "log.jsonl"
        if self.rank == 0 and log.exists():  # what came after the checkpoint comes again
            lines = log.read_text().splitlines(keepends=True)
            lines = lines if not lines or lines[-1].endswith("\n") else lines[:-1]  # cut short as it was written
            log.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))

    def likelihood(self) -> DatasetScores:
        """Bits per dimension of the test images under the averaged weights, each rank scoring its batches."""
        # Whole weights in every rank: ranks call the field different numbers of times, and a sharded one waits for all.
        whole = get_model_state_dict(self.average.module, options=StateDictOptions(full_state_dict=True))
        network = self.new_network()
        network.load_state_dict(whole)
        return score_dataset(
            self.fm.velocity(network.eval()), self.data.test, self.options.score_batch, bits=self.data.bits,
            divergence=fmk.Hutchinson(4, "hadamard"), key=torch.tensor([self.options.seed], device=self.device),
            device=self.device, dtype=self.options.dtype, progress=True,
        )  # fmt: skip


def shard(network: nn.Module) -> None:
    """FSDP2: the parameters of every block, and of what is left, spread over the ranks."""
    for module in list(network.modules()):
        if isinstance(module, (ResidualBlock, Attention, TransformerBlock)):
            fully_shard(module)
    fully_shard(network)


def checkpoint_of(out: Path, step: int) -> Path:
    return out / f"step-{step:08d}"


def finished_in(out: Path) -> list[Path]:
    """The checkpoints that were written to their end, where their metadata is."""
    return sorted(file.parent for file in out.glob("step-*/.metadata"))


def seed_of(*numbers: int) -> int:
    """A seed that depends on every number; of a larger one torch's generator on the CPU takes the low 32 bits alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def options_of(argv: list[str] | None) -> argparse.Namespace:
    kind = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=kind)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp", help="how several processes share")
    parser.add_argument("--data", choices=tuple(READERS), default="digits", help="what to train on")
    parser.add_argument("--root", type=Path, metavar="DIR", help="where the files of the data are")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="mlp", help="what to train")
    parser.add_argument("--steps", type=positive, default=500, help="steps from the very first one on")
    parser.add_argument("--batch", type=positive, default=256, help="images in a batch of all processes together")
    parser.add_argument("--accumulate", type=positive, default=1, metavar="N", help="parts of a rank's share of a step")
    parser.add_argument("--amp", choices=tuple(HALF), default="none", help="autocast; fp16 scales the loss")
    parser.add_argument(
        "--float64", dest="dtype", action="store_const", const=torch.float64, default=torch.float32, help="for float32"
    )
    parser.add_argument("--learning-rate", type=number(0), default=1e-3, metavar="R", help="of AdamW")
    parser.add_argument("--clip", type=number(0), default=1.0, metavar="NORM", help="the largest norm of a gradient")
    parser.add_argument("--ema", type=number(0, 1), default=0.999, metavar="DECAY", help="of the averaged weights")
    parser.add_argument(
        "--dropout", type=number(0, 1), default=0.0, metavar="P", help="above 0 the split changes the numbers"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights, keys, the order of images, dropout")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="to train on"
    )
    parser.add_argument("--out", type=Path, default=Path("out/train"), metavar="DIR", help="log and checkpoints")
    parser.add_argument("--save-every", type=positive, default=200, metavar="STEPS", help="between checkpoints")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --out, with the options it began with"
    )
    parser.add_argument("--likelihood", action="store_true", help="then score the test images")
    parser.add_argument("--score-batch", type=positive, default=64, metavar="N", help="images scored together")
    options = parser.parse_args(argv)
    if options.resume and not finished_in(options.out):
        parser.error(f"--resume: expected a finished checkpoint in {options.out}, found none; start without it")
    if not options.resume and finished_in(options.out):
        parser.error(f"--out {options.out}: has a run already; go on with --resume, or name another folder")
    return options


def main(argv: list[str] | None = None) -> None:
    options = options_of(argv)
    several = "RANK" in os.environ  # torchrun has started this process
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if several:
        dist.init_process_group(timeout=PATIENCE)  # NCCL for CUDA tensors, gloo for those of the CPU
    try:
        Trainer(options).run()
    finally:
        if several:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
