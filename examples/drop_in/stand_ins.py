"""Stand-ins for what a trainer has already: data, networks, and the two classes of Lightning that the scripts name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn


def moons(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Points [rows, 2] on two half circles."""
    angle = math.pi * torch.rand(rows, generator=generator)
    upper = torch.rand(rows, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], dim=1) + 0.05 * torch.randn(rows, 2, generator=generator)


def discs(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Images [rows, 1, 16, 16] of one soft disc, in [-1, 1]."""
    middle = 4 + 8 * torch.rand(2, rows, 1, 1, generator=generator)
    radius = 2 + 3 * torch.rand(rows, 1, 1, generator=generator)
    axis = torch.arange(16.0)
    distance = ((axis[:, None] - middle[0]).square() + (axis - middle[1]).square()).sqrt()
    return torch.tanh(radius - distance).unsqueeze(1)


def batches(data: Callable, rows: int, steps: int) -> Iterator[torch.Tensor]:
    """The same batches for every script, whatever it draws besides."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield data(rows, generator)


class Network(nn.Module):
    """Velocities of samples [B, *shape]."""

    def __init__(self, shape: tuple[int, ...], width: int):
        super().__init__()
        self.shape, size = shape, math.prod(shape)
        self.layers = nn.Sequential(
            nn.Linear(size + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size)
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x.flatten(1), t.expand(len(x)).unsqueeze(1)], dim=1)).view_as(x)


class PointNetwork(Network):
    def __init__(self):
        super().__init__((2,), 64)


class ImageNetwork(Network):
    def __init__(self):
        super().__init__((1, 16, 16), 256)


class LightningModule(nn.Module):
    """lightning.LightningModule, as far as the scripts use it."""

    def __init__(self):
        super().__init__()
        self.logged: list[float] = []

    def log(self, name: str, value: torch.Tensor) -> None:
        self.logged.append(value.item())


class Trainer:
    """lightning.Trainer: the loop alone."""

    def __init__(self, max_steps: int):
        self.max_steps = max_steps

    def fit(self, module: LightningModule, batches: Iterator) -> None:
        optimizer = module.configure_optimizers()
        for index, batch in zip(range(self.max_steps), batches):
            loss = module.training_step(batch, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
