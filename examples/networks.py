"""Networks of the examples: v(x, t) for points, for small images and, as Dhariwal and Nichol's U-Net, for large ones.

All take x ``[B, …]`` and t ``[B]`` and return the shape of x. Their last layer starts at zero, as is usual for residual
networks that predict noise or velocity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import interpolate, scaled_dot_product_attention


class VelocityMLP(nn.Module):
    """v(x, t) for points [B, 2]: Fourier features of x and t, then ``depth`` ReLU layers of ``width``."""

    def __init__(self, width: int = 256, depth: int = 4, features: int = 32):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, features) * math.pi / 2)
        self.register_buffer("harmonics", math.pi * torch.arange(1, 9))
        sizes = [3 + 2 * features + 16, *[width] * depth]
        layers = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.unsqueeze(-1)
        angles = torch.cat([x @ self.frequencies, t * self.harmonics], dim=-1)
        return self.layers(torch.cat([x, t, angles.sin(), angles.cos()], dim=-1))


def time_features(t: torch.Tensor, count: int, longest: float = 10_000.0) -> torch.Tensor:
    """Cosines and sines [B, count] of 1000·t at frequencies from 1 to 1/longest, as transformers number positions."""
    frequencies = torch.exp(-math.log(longest) / (count // 2) * torch.arange(count // 2, device=t.device))
    angles = 1000 * t.unsqueeze(-1) * frequencies.to(t.dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weights and bias 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ImageMLP(nn.Module):
    """v(x, t) for small images: residual layers on the pixels in a row, each scaled and shifted by features of t."""

    def __init__(self, shape: tuple[int, ...], width: int = 192, depth: int = 3, dropout: float = 0.0):
        super().__init__()
        pixels = math.prod(shape)
        self.time = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU())
        self.first = nn.Linear(pixels, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(depth + 1))
        self.scales = nn.ModuleList(zeroed(nn.Linear(64, 2 * width)) for _ in range(depth + 1))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.last = zeroed(nn.Linear(width, pixels))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times = self.time(time_features(t, 64))
        hidden = self.first(x.flatten(1))
        for norm, scale, block in zip(self.norms, self.scales, [*self.blocks, None]):
            gain, shift = scale(times).chunk(2, dim=-1)
            inner = norm(hidden) * (1 + gain) + shift
            hidden = inner if block is None else hidden + block(inner)
        return self.last(hidden).view_as(x)


@dataclass(frozen=True)
class UNetSize:
    """Sizes of a :class:`UNet`: channels at full resolution, their multiples at each halving, residual blocks at each,
    the resolutions with attention and the channels of one of its heads."""

    channels: int
    multiples: tuple[int, ...]
    depth: int
    attention: tuple[int, ...]
    head_channels: int = 64
    dropout: float = 0.0


def normalised(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


class ResidualBlock(nn.Module):
    """Two convolutions, the second's input scaled and shifted by features of t; ``resize`` ½ or 2 changes the side."""

    def __init__(self, before: int, after: int, times: int, dropout: float = 0.0, resize: float = 1.0):
        super().__init__()
        self.resize = resize
        self.norm, self.first = normalised(before), nn.Conv2d(before, after, 3, padding=1)
        self.scale, self.inner_norm = nn.Linear(times, 2 * after), normalised(after)
        self.dropout, self.second = nn.Dropout(dropout), zeroed(nn.Conv2d(after, after, 3, padding=1))
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        self.activation = nn.SiLU()

    def resized(self, x: torch.Tensor) -> torch.Tensor:
        if self.resize == 1:
            return x
        if self.resize < 1:
            return nn.functional.avg_pool2d(x, 2)
        return interpolate(x, scale_factor=2, mode="nearest")

    def forward(self, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.resized(self.activation(self.norm(x))))
        gain, shift = self.scale(times)[..., None, None].chunk(2, dim=1)
        hidden = self.activation(self.inner_norm(hidden) * (1 + gain) + shift)
        return self.skip(self.resized(x)) + self.second(self.dropout(hidden))


class Attention(nn.Module):
    """Self-attention over the pixels, added to its input."""

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm, self.inputs = normalised(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.output = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        rows, channels = x.shape[:2]
        pixels = self.inputs(self.norm(x).flatten(2))
        query, key, value = pixels.view(rows, 3, self.heads, channels // self.heads, -1).transpose(-1, -2).unbind(1)
        mixed = scaled_dot_product_attention(query, key, value).transpose(-1, -2).reshape(rows, channels, -1)
        return x + self.output(mixed).view_as(x)


class UNet(nn.Module):
    """v(x, t) for images [B, C, S, S]: residual blocks and attention at every halving of the side, and back up.

    Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), section 3, their ADM: scaled
    and shifted group norm, residual blocks that halve and double, attention heads of 64 channels.
    """

    def __init__(self, shape: tuple[int, int, int], size: UNetSize):
        super().__init__()
        planes, side, _ = shape
        if side % 2 ** (len(size.multiples) - 1):
            raise ValueError(f"shape: expected a side that halves {len(size.multiples) - 1} times, got {side}")
        times = 4 * size.channels
        self.features = size.channels
        self.time = nn.Sequential(nn.Linear(self.features, times), nn.SiLU(), nn.Linear(times, times), nn.SiLU())

        def stage(before, after):
            layers = [ResidualBlock(before, after, times, size.dropout)]
            return nn.ModuleList(layers + [Attention(after, size.head_channels)] * (side in size.attention))

        now = size.channels
        self.first = nn.Conv2d(planes, now, 3, padding=1)
        self.down, self.up, kept = nn.ModuleList(), nn.ModuleList(), [now]
        for level, multiple in enumerate(size.multiples):
            if level:
                self.down.append(nn.ModuleList([ResidualBlock(now, now, times, size.dropout, 0.5)]))
                kept.append(now)
                side //= 2
            for _ in range(size.depth):
                self.down.append(stage(now, multiple * size.channels))
                now = multiple * size.channels
                kept.append(now)
        self.middle = nn.ModuleList(
            [ResidualBlock(now, now, times, size.dropout), Attention(now, size.head_channels),
             ResidualBlock(now, now, times, size.dropout)]
        )  # fmt: skip
        for level, multiple in reversed(list(enumerate(size.multiples))):
            for place in range(size.depth + 1):
                layers = stage(now + kept.pop(), multiple * size.channels)
                now = multiple * size.channels
                if level and place == size.depth:
                    layers.append(ResidualBlock(now, now, times, size.dropout, 2.0))
                    side *= 2
                self.up.append(layers)
        self.last = nn.Sequential(normalised(now), nn.SiLU(), zeroed(nn.Conv2d(now, planes, 3, padding=1)))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times = self.time(time_features(t, self.features).to(self.first.weight.dtype))
        hidden = self.first(x)
        kept = [hidden]
        for layers in self.down:
            for layer in layers:
                hidden = layer(hidden, times)
            kept.append(hidden)
        for layer in self.middle:
            hidden = layer(hidden, times)
        for layers in self.up:
            hidden = torch.cat([hidden, kept.pop()], dim=1)
            for layer in layers:
                hidden = layer(hidden, times)
        return self.last(hidden)


class TransformerBlock(nn.Module):
    """Self-attention and two linear layers, each scaled, shifted and let through as features of t say."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.norm, self.inner_norm = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.scale = zeroed(nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        gain, shift, gate, inner_gain, inner_shift, inner_gate = self.scale(times).unsqueeze(1).chunk(6, dim=-1)
        tokens = self.inputs(self.norm(x) * (1 + gain) + shift)
        query, key, value = tokens.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + gate * self.output(mixed)
        return x + inner_gate * self.layers(self.inner_norm(x) * (1 + inner_gain) + inner_shift)


class Transformer(nn.Module):
    """v(x, t) for images [B, C, S, S] as a row of patches: a small diffusion transformer.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), their DiT with zero-initialised
    adaptive layer norm; learned positions.
    """

    def __init__(self, shape: tuple[int, int, int], width: int = 64, depth: int = 3, patch: int = 2, dropout=0.0):
        super().__init__()
        planes, side, _ = shape
        if side % patch:
            raise ValueError(f"shape: expected a side that is a multiple of the patch's {patch}, got {side}")
        self.patch, self.width = patch, width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.first = nn.Conv2d(planes, width, patch, patch)
        self.positions = nn.Parameter(torch.randn((side // patch) ** 2, width) / math.sqrt(width))
        self.blocks = nn.ModuleList(TransformerBlock(width, max(1, width // 32), dropout) for _ in range(depth))
        self.norm, self.last = nn.LayerNorm(width), zeroed(nn.Linear(width, planes * patch * patch))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times = self.time(time_features(t, self.width).to(self.first.weight.dtype))
        grid = self.first(x)
        hidden = grid.flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            hidden = block(hidden, times)
        patches = self.last(self.norm(hidden)).unflatten(2, (-1, self.patch, self.patch)).unflatten(1, grid.shape[2:])
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
