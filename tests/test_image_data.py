"""The readers of the examples: small files in the real formats, and every way in which a file can be wrong."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import image_data

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def pixels(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3 * side * side), dtype=np.uint8)


def cifar_pickles(folder: Path, count: int = 4) -> Path:
    """CIFAR-10's Python version, as Python 2 wrote it: keys are bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(NAMES):
        batch = {b"batch_label": name.encode(), b"labels": [seed] * count, b"data": pixels(count, seed=seed)}
        (folder / name).write_bytes(pickle.dumps({**batch, b"filenames": [b"a.png"] * count}, protocol=2))
    return folder


def cifar_binaries(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(NAMES):
        labels = np.full((count, 1), seed, dtype=np.uint8)
        np.hstack([labels, pixels(count, seed=seed)]).tofile(folder / f"{name}.bin")
    return folder


def imagenet_files(folder: Path, side: int = 32, count: int = 3) -> Path:
    """The downsampled ImageNet's npz files, with the arrays that the real ones have."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate([*image_data.IMAGENET_BATCHES, "val_data.npz"]):
        rows, labels = pixels(count, side, seed), np.arange(1, count + 1)
        np.savez(folder / name, data=rows, labels=labels, mean=rows.mean(axis=0))
    return folder


def test_digits():
    digits = image_data.load("digits")
    (train,) = digits.training_images()
    assert train.shape == (1437, 1, 8, 8) and digits.test.shape == (360, 1, 8, 8) and train.dtype == torch.uint8
    assert train.max() == digits.test.max() == digits.levels - 1 == 16
    assert [len(part) for part in digits.labels] == [1437, 360]
    from sklearn.datasets import load_digits

    rows = torch.cat([train, digits.test]).flatten(1)
    original = torch.from_numpy(load_digits().data.astype(np.uint8))
    assert sorted(rows.tolist()) == sorted(original.tolist())  # every image once


@pytest.mark.parametrize("make", [cifar_pickles, cifar_binaries])
@pytest.mark.parametrize("inner", ["", "cifar-10"])
def test_cifar(tmp_path, make, inner):
    make(tmp_path / inner)
    data = image_data.load("cifar10", tmp_path)
    (train,) = data.training_images()
    assert data.shape == (3, 32, 32) and data.levels == 256 and train.shape == (20, 3, 32, 32)
    assert torch.equal(train[4:8].flatten(1), torch.from_numpy(pixels(4, seed=1)))
    assert torch.equal(data.test.flatten(1), torch.from_numpy(pixels(4, seed=5)))
    assert train[0, 1, 2, 3] == pixels(4)[0, 1024 + 2 * 32 + 3]  # green plane, third row, fourth column


def test_cifar_with_text_keys(tmp_path):
    for name in NAMES:
        (cifar_pickles(tmp_path) / name).write_bytes(pickle.dumps({"data": pixels(2)}))
    assert image_data.load("cifar10", tmp_path).test.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("side", [32, 64])
def test_imagenet(tmp_path, side):
    files = imagenet_files(tmp_path / "train", side)
    (tmp_path / "val").mkdir()
    (files / "val_data.npz").rename(tmp_path / "val" / "val_data.npz")
    data = image_data.load(f"imagenet{side}", tmp_path)
    parts = list(data.training_images())
    assert data.shape == (3, side, side) and len(parts) == 10
    assert all(torch.equal(part.flatten(1), torch.from_numpy(pixels(3, side, i))) for i, part in enumerate(parts))
    assert torch.equal(data.test.flatten(1), torch.from_numpy(pixels(3, side, 10)))


def test_batches_have_every_image_once_a_round(tmp_path):
    data = image_data.load("imagenet32", imagenet_files(tmp_path, count=4))
    known = torch.cat(list(data.training_images())).flatten(1).tolist()
    batches = data.batches(2, seed=1)
    rounds = [[next(batches) for _ in range(20)] for _ in range(2)]
    assert all(sorted(torch.cat(found).flatten(1).tolist()) == sorted(known) for found in rounds)
    assert not torch.equal(torch.cat(rounds[0]), torch.cat(rounds[1]))
    again = data.batches(2, seed=1)
    assert torch.equal(next(again), rounds[0][0]) and not torch.equal(next(data.batches(2, seed=2)), rounds[0][0])
    assert next(data.batches(100)).shape[0] == 4  # a part has no more


def test_the_first_training_images(tmp_path):
    data = image_data.load("imagenet32", imagenet_files(tmp_path, count=4))
    assert [len(part) for part in data.training_images(6)] == [4, 2]


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harm.done"),)


def broken_cifar(tmp_path: Path, content: bytes, name: str = "data_batch_3") -> Path:
    (cifar_pickles(tmp_path) / name).write_bytes(content)
    return tmp_path


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken_cifar(tmp_path, pickle.dumps({b"data": Harmful()}))
    with pytest.raises(ValueError, match=r"data_batch_3.*only numpy arrays are allowed"):
        image_data.load("cifar10", tmp_path)
    assert not (tmp_path / "harm.done").exists()


WRONG_PICKLES = {
    "empty": (b"", "damaged"),
    "cut short": (pickle.dumps({b"data": pixels(2)})[:500], "damaged"),
    "no pickle": (b"\x89PNG\r\n", "damaged"),
    "no dict": (pickle.dumps([1, 2]), "expected a dict with data, got list"),
    "no data": (pickle.dumps({b"labels": [1]}), "got NoneType"),
    "other size": (pickle.dumps({b"data": pixels(2, 16)}), r"got uint8 \[2, 768\]"),
    "other dtype": (pickle.dumps({b"data": pixels(2).astype(np.float32)}), r"got float32 \[2, 3072\]"),
    "no images": (pickle.dumps({b"data": pixels(0)}), "expected images, got none"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_PICKLES.values(), ids=WRONG_PICKLES)
def test_a_wrong_pickle_is_explained(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"(?s)data_batch_3.*{message}"):
        image_data.load("cifar10", broken_cifar(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "multiple of 3073 bytes.*got 0"), (bytes(3072), "got 3072"), (b"\x0a" + bytes(3072), "labels 0 to 9.*10")],
)
def test_a_wrong_binary_is_explained(tmp_path, content, message):
    (cifar_binaries(tmp_path) / "test_batch.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"test_batch.bin.*{message}"):
        image_data.load("cifar10", tmp_path)


WRONG_NPZ = {
    "cut short": (None, "damaged"),
    "no data": ({"images": pixels(2)}, "expected an array 'data', got images"),
    "objects": ({"data": np.array([{}, {}], dtype=object)}, "Object arrays"),
    "other size": ({"data": pixels(2, 64)}, r"expected data as uint8 \[N, 3072\].*got uint8 \[2, 12288\]"),
}


@pytest.mark.parametrize(("arrays", "message"), WRONG_NPZ.values(), ids=WRONG_NPZ)
def test_a_wrong_npz_is_explained(tmp_path, arrays, message):
    file = imagenet_files(tmp_path) / "val_data.npz"
    if arrays is None:
        file.write_bytes(file.read_bytes()[:200])
    else:
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match=rf"val_data.npz.*{message}"):
        image_data.load("imagenet32", tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cifar10: needs --root.*data_batch_1 or data_batch_1.bin"):
        image_data.load("cifar10")
    with pytest.raises(ValueError, match=r"expected a folder, got nothing there"):
        image_data.load("imagenet32", tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"expected a folder, got a file"):
        image_data.load("imagenet64", tmp_path / "file")
    with pytest.raises(ValueError, match=r"expected train_data_batch_1.npz there or in a folder of it"):
        image_data.load("imagenet64", tmp_path)
    (cifar_pickles(tmp_path / "a") / "data_batch_4").unlink()
    with pytest.raises(ValueError, match=r"got no data_batch_4$"):
        image_data.load("cifar10", tmp_path)
    (imagenet_files(tmp_path / "b") / "train_data_batch_7.npz").unlink()
    with pytest.raises(ValueError, match=r"got no train_data_batch_7.npz$"):
        image_data.load("imagenet32", tmp_path)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        image_data.load("digits")
