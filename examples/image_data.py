"""Real images from disk: scikit-learn's digits, CIFAR-10, and the downsampled ImageNet at 32 × 32 and 64 × 64.

``load(name, root)`` gives an :class:`ImageData`. CIFAR-10 is read in its Python or its binary version, ImageNet as the
npz batches of Chrabaszcz et al. ("A Downsampled Variant of ImageNet", 2017); of those one file is in memory at a time.
A file that is missing or is not what its name says ends in an error that names it.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

DIGITS_TEST = 360  # of the 1797 digits; the others are for training
CIFAR_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
IMAGENET_BATCHES = [f"train_data_batch_{i}.npz" for i in range(1, 11)]


@dataclass(frozen=True)
class ImageData:
    """A data set: images are uint8 [N, C, S, S] with values below ``levels``.

    Attributes:
        shape: (C, S, S).
        levels: number of values a pixel can have.
        parts: for each part of the training images a function that reads it.
        test: the test images.
        labels: of the training and of the test images, where they are of use.
    """

    name: str
    shape: tuple[int, int, int]
    levels: int
    parts: tuple[Callable[[], torch.Tensor], ...]
    test: torch.Tensor
    labels: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def bits(self) -> float:
        return math.log2(self.levels)

    def batches(self, size: int, seed: int = 0) -> Iterator[torch.Tensor]:
        """Batches of training images without end: parts and the images of a part each in a new order every time."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for part in torch.randperm(len(self.parts), generator=generator).tolist():
                images = self.parts[part]()
                size = min(size, len(images))
                order = torch.randperm(len(images), generator=generator)
                for rows in order[: len(images) // size * size].split(size):
                    yield images[rows]

    def training_images(self, count: int | None = None) -> Iterator[torch.Tensor]:
        """Each training image once, in order, part after part; the first ``count`` of them."""
        left = math.inf if count is None else count
        for part in self.parts:
            if left > 0:
                images = part()[: min(left, 2**62)]
                left -= len(images)
                yield images


def in_memory(images: torch.Tensor) -> tuple[Callable[[], torch.Tensor], ...]:
    return (lambda: images,)


def digits(root: Path | None = None) -> ImageData:
    """1797 handwritten digits, 8 × 8 with 17 levels, which scikit-learn brings along."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("data digits: needs scikit-learn (pip install scikit-learn)") from error
    found = load_digits()
    images = torch.from_numpy(found.images.astype(np.uint8)).unsqueeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    labels = torch.from_numpy(found.target)
    return ImageData("digits", (1, 8, 8), 17, in_memory(images[train]), images[test], (labels[train], labels[test]))


def folder_of(root: Path | None, name: str, wanted: list[str]) -> tuple[Path, str]:
    """Of root and the folders in it the one with a wanted file, and which of the files it is."""
    if root is None:
        raise ValueError(f"data {name}: needs --root, the folder with {' or '.join(wanted)}")
    if not root.is_dir():
        raise ValueError(f"--root {root}: expected a folder, got {'a file' if root.exists() else 'nothing there'}")
    for folder in [root, *sorted(path for path in root.iterdir() if path.is_dir())]:
        for file in wanted:
            if (folder / file).exists():
                return folder, file
    raise ValueError(f"--root {root}: expected {' or '.join(wanted)} there or in a folder of it, got neither")


class ArraysOnly(pickle.Unpickler):
    """Unpickles what batches of CIFAR-10 are made of and refuses everything else, which could run any code."""

    ALLOWED = {
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
        *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    }  # fmt: skip

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only numpy arrays are allowed")
        return super().find_class(module, name)


def image_rows(rows, file: Path, side: int) -> torch.Tensor:
    """Rows of 3·S·S bytes, plane after plane, as images [N, 3, S, S]."""
    columns = 3 * side * side
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != columns:
        came = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise ValueError(f"{file}: expected data as uint8 [N, {columns}], {side} × {side} in colour, got {came}")
    if not len(rows):
        raise ValueError(f"{file}: expected images, got none")
    return torch.from_numpy(np.ascontiguousarray(rows)).view(-1, 3, side, side)


def read_cifar_pickle(file: Path) -> torch.Tensor:
    """A batch of CIFAR-10's Python version: a pickled dict with an array under ``data``."""
    with file.open("rb") as opened:
        try:
            batch = ArraysOnly(opened, encoding="bytes").load()
        except (
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            ImportError,
            IndexError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{file}: expected a pickled batch of CIFAR-10, got another or a damaged file: {error}"
            ) from error
    if not isinstance(batch, dict):
        raise ValueError(f"{file}: expected a dict with data, got {type(batch).__name__}")
    return image_rows(batch.get(b"data", batch.get("data")), file, 32)


def read_cifar_binary(file: Path) -> torch.Tensor:
    """A batch of CIFAR-10's binary version: for each image its label, then its 3072 bytes."""
    values = np.fromfile(file, dtype=np.uint8)
    if not len(values) or len(values) % 3073:
        raise ValueError(f"{file}: expected a multiple of 3073 bytes, a label and 3072 values each, got {len(values)}")
    rows = values.reshape(-1, 3073)
    if rows[:, 0].max() > 9:
        raise ValueError(f"{file}: expected labels 0 to 9 before each image, got {rows[:, 0].max()}")
    return image_rows(rows[:, 1:], file, 32)


def read_npz(file: Path, side: int) -> torch.Tensor:
    """A batch of the downsampled ImageNet: an array ``data`` in an npz file."""
    try:
        with np.load(file, allow_pickle=False) as batch:
            names = list(batch)
            rows = batch["data"] if "data" in names else None
    except (zipfile.BadZipFile, EOFError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected an npz file of arrays, got another or a damaged one: {error}") from error
    if rows is None:
        raise ValueError(f"{file}: expected an array 'data', got {', '.join(names) or 'nothing'}")
    return image_rows(rows, file, side)


def present(folder: Path, files: list[str]) -> list[Path]:
    """The files' paths; an error that names those missing."""
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{folder}: expected {', '.join(files)}, got no {', '.join(missing)}")
    return [folder / file for file in files]


def cifar10(root: Path | None) -> ImageData:
    """CIFAR-10, all of it in memory (184 MB)."""
    folder, found = folder_of(root, "cifar10", ["data_batch_1", "data_batch_1.bin"])
    ending, read = (".bin", read_cifar_binary) if found.endswith(".bin") else ("", read_cifar_pickle)
    *train, test = present(folder, [f"{name}{ending}" for name in (*CIFAR_BATCHES, "test_batch")])
    images = torch.cat([read(file) for file in train])
    return ImageData("cifar10", (3, 32, 32), 256, in_memory(images), read(test))


def imagenet(side: int, root: Path | None) -> ImageData:
    """The downsampled ImageNet; its validation images are the test images."""
    name = f"imagenet{side}"
    folder, _ = folder_of(root, name, IMAGENET_BATCHES[:1])
    train = present(folder, IMAGENET_BATCHES)
    where, file = folder_of(root, name, ["val_data.npz"])
    test = read_npz(where / file, side)
    parts = tuple(lambda path=path: read_npz(path, side) for path in train)
    return ImageData(name, (3, side, side), 256, parts, test)


READERS = {
    "digits": digits,
    "cifar10": cifar10,
    "imagenet32": lambda root: imagenet(32, root),
    "imagenet64": lambda root: imagenet(64, root),
}


def load(name: str, root: Path | None = None) -> ImageData:
    """The data set ``name``, one of READERS, from ``root``; raises ValueError that says what is wrong with a file."""
    return READERS[name](root)
