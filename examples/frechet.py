"""The Fréchet distance between sets of images, in the features of a network.

‖μa − μb‖² + tr(Σa + Σb − 2(ΣaΣb)^½) for the means and covariances of the features. The features are those of a
classifier trained here on the digits, or of a TorchScript file that the user brings, such as Inception's.

Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (2017).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn


class Moments:
    """Mean and covariance of feature vectors, in float64, batch by batch."""

    def __init__(self):
        self.count, self.sum, self.products = 0, 0.0, 0.0

    def add(self, features: torch.Tensor) -> None:
        features = features.detach().flatten(1).double().cpu()
        self.count += len(features)
        self.sum = self.sum + features.sum(dim=0)
        self.products = self.products + features.mT @ features

    @property
    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self.sum / self.count
        return mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


@torch.no_grad()
def moments(extractor: Callable, batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, covariance) of the features of uint8 images."""
    found = Moments()
    for batch in batches:
        found.add(extractor(batch))
    return found.values


def root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ (values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT)


def frechet_distance(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The distance of two Gaussians (mean, covariance)."""
    half = root(a[1])
    cross = torch.linalg.eigvalsh(half @ b[1] @ half).clamp_min(0).sqrt().sum()
    return ((a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace() - 2 * cross).item()


class DigitClassifier(nn.Module):
    """Logits of the ten digits; ``features`` are the 32 numbers before the last layer, of total variance 100 over the
    training images, so that the distance has a scale."""

    def __init__(self, levels: int = 17):
        super().__init__()
        self.top = levels - 1
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(),
        )  # fmt: skip
        self.last = nn.Linear(32, 10)
        self.scale = 1.0

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * self.body(images.float() / self.top)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.features(images) / self.scale)

    @torch.no_grad()
    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        return (self(images).argmax(dim=1) == labels).float().mean().item()


def train_classifier(images: torch.Tensor, labels: torch.Tensor, steps: int = 600, seed: int = 0) -> DigitClassifier:
    """A classifier after ``steps`` of Adam on batches of 128; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(steps):
            rows = torch.randint(len(images), (128,))
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        model.scale = 10 * model.features(images).var(dim=0).sum().rsqrt().item()
    return model.eval()


def load_extractor(file: Path, device: str) -> Callable:
    """Features of uint8 images [B, 3, S, S] by a TorchScript file; ``return_features=True`` is passed where it is asked
    for, as the converted Inception network of NVIDIA's StyleGAN does."""
    try:
        network = torch.jit.load(str(file), map_location=device).eval()
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--features {file}: expected a TorchScript file, got another or none: {reason}") from error
    asked = any(argument.name == "return_features" for argument in network.forward.schema.arguments)
    return lambda images: network(images.to(device), **({"return_features": True} if asked else {}))


def load_statistics(file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, covariance) of an npz file with arrays ``mu`` and ``sigma``, as tools for this distance keep them."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma") if name in arrays}
    except (zipfile.BadZipFile, EOFError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"--statistics {file}: expected an npz file of arrays, got another or none: {error}"
        ) from error
    if len(found) < 2:
        raise ValueError(f"--statistics {file}: expected arrays mu and sigma, got {', '.join(found) or 'neither'}")
    mean, covariance = found.values()
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        came = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise ValueError(f"--statistics {file}: expected mu [F] and sigma [F, F], got {came}")
    return mean, covariance
