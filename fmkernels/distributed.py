"""Over the processes of torch.distributed: which rows a process takes, rows of all gathered, a data set scored by all.

Nothing here starts processes or wraps a model. Without a process group every function does what one process does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from . import _checks
from .dequantisation import BitsPerDim, evaluate_bits_per_dim
from .likelihood import checked_key

__all__ = ["DatasetScores", "gather_rows", "score_dataset", "shard_rows"]


def shard_rows(total: int, rank: int, world: int) -> tuple[int, int]:
    """The rows [first, last) of ``total`` that process ``rank`` of ``world`` takes: contiguous, sizes differ by one.

    Processes that call ``fm.sample(x1[first:last], key=key, first_row=first, total_rows=total)`` with one key draw the
    times and the noise of ``fm.sample(x1, key=key)``, bit for bit, whatever ``world`` is. With more processes than rows
    the last ones have none, first = last.

    Args:
        total: rows of the whole batch or data set.
        rank, world: the number of this process and of all, as of ``torch.distributed.get_rank()``.

    Returns: (first, last).

    Raises: TypeError, ValueError naming the argument.
    """
    _checks.count("total", total)
    _checks.count("world", world, 1)
    _checks.count("rank", rank)
    if rank >= world:
        raise ValueError(f"rank: expected an int below world = {world}, got {rank}")
    size, longer = divmod(total, world)
    first = rank * size + min(rank, longer)
    return first, first + size + (rank < longer)


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected a process group that this process belongs to")
    return rank, dist.get_world_size(group)


def from_everyone(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The picklable value of every process, in the order of ranks."""
    world = place_in(group)[1]
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value, group)
    return values


def gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The rows of every process, one after the other in the order of ranks; every process gets them all.

    Args:
        rows: ``[n, …]`` of a dtype and on a device that the group's backend works on; n may differ between processes
            and be 0, dtype, trailing shape and type of device may not. No gradient flows back.
        group: a process group; None takes the default one, or this process alone where there is none.

    Returns: ``[Σn, …]``.

    Raises: TypeError, ValueError naming the argument; where one process gives something else than a tensor ``[n, …]``,
        the others raise a RuntimeError that quotes its error.
    """

    def described() -> tuple[tuple[int, ...], torch.dtype, str]:
        _checks.tensor("rows", rows)
        if not rows.dim():
            raise ValueError("rows: expected shape [n, …], got a scalar")
        if rows.layout != torch.strided:
            raise ValueError(f"rows: expected a dense tensor, got layout {rows.layout}")
        return tuple(rows.shape), rows.dtype, rows.device.type

    kinds = from_everyone(together(described, group), group)
    shapes = [shape for shape, _, _ in kinds]
    for rank, (shape, *kind) in enumerate(kinds):
        if (shape[1:], *kind) != (shapes[0][1:], *kinds[0][1:]):
            expected, got = (
                f"{dtype} [n, {', '.join(map(str, shape[1:]))}] on {device}"
                for shape, dtype, device in (kinds[0], kinds[rank])
            )
            raise ValueError(f"rows: expected those of rank 0, {expected}, got {got} in rank {rank}")
    if len(kinds) == 1:
        return rows.detach()
    longest = max(shape[0] for shape in shapes)
    padded = rows.new_zeros(longest, *rows.shape[1:])  # the backends gather tensors of one size
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in kinds]
    dist.all_gather(parts, padded, group)
    return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes)])


@dataclass(frozen=True)
class DatasetScores:
    """What :func:`score_dataset` returns, in every process, on the CPU; N images in their order, K draws.

    Attributes:
        bits_per_dim: [N]; NaN where a solve of that image failed.
        log_prob: [N, K], of the dequantised data.
        stderr: [N, K], the probes' standard error of each.
        nfe: int64 [N, K].
        status: int8 [N], of the solves the worst.
        mean, standard_error: of ``bits_per_dim`` over the images that did not fail, and of that mean.
        images, failed: N, and how many of them failed.
    """

    bits_per_dim: torch.Tensor
    log_prob: torch.Tensor
    stderr: torch.Tensor
    nfe: torch.Tensor
    status: torch.Tensor
    mean: float
    standard_error: float
    images: int
    failed: int


def score_dataset(
    f: Callable[..., Any],
    images: Any,
    batch: int = 256,
    *,
    draws: int = 1,
    key: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    first_row: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    group: dist.ProcessGroup | None = None,
    progress: bool = False,
    **options: Any,
) -> DatasetScores:
    r"""Bits per dimension of a data set, every process of a group scoring its share of the batches.

    The data set is cut into the same batches whatever the number of processes, each takes a contiguous run of whole
    ones, and probes and dequantisation go by key and image number: every image's score is that of one process alone,
    bit for bit on the same hardware and threads. Processes with no batch left only wait for the others, no longer than
    the group's timeout: give ``init_process_group(timeout=…)`` more than the share of one process takes.

    Args:
        f: the field, as for :func:`~fmkernels.log_prob`, the same in every process. It must not communicate: processes
            call it different numbers of times. Take ``ddp.module``, and gather the weights of a sharded model first.
        images: integer levels ``[N, …]``, or a map-style data set whose items are such ``[…]`` or tuples that begin
            with them; in each process the whole of it (another length is an error), of which only its share is read.
        batch: images in a batch.
        draws: K, the dequantisation draws of every image.
        key, generator, first_row: as for :func:`~fmkernels.evaluate_bits_per_dim`; rank 0's key serves all.
        device: to move batches to; None leaves them where they are. The group's backend must work on it.
        dtype: of the dequantised data, float32 or float64.
        group: a process group; None takes the default one, or this process alone where there is none.
        progress: show a bar of the batches of rank 0, in rank 0 (needs tqdm).
        options: of :func:`~fmkernels.evaluate_bits_per_dim`: bits, base, divergence, and those of the solver.

    Returns: :class:`DatasetScores`.

    Raises: TypeError, ValueError naming the argument. Where one process fails while it scores, it raises its error and
        the others a RuntimeError that quotes it: none waits for a score that does not come.

    Source: :func:`~fmkernels.bits_per_dim`.
    """
    device, key = together(lambda: checked(images, batch, key, generator, first_row, device), group)
    rank, world = place_in(group)
    given = {"images": len(images), "batch": batch, "draws": draws, "first_row": first_row}
    for other, theirs in enumerate(from_everyone(given, group)):
        for name, value in theirs.items():
            if value != given[name]:
                what = "the whole data set in every process, " if name == "images" else ""
                values = f"{given[name]} here in rank {rank} and {value} in rank {other}"
                raise ValueError(f"{name}: expected {what}the same in every process, got {values}")
    if world > 1:
        dist.broadcast(key, group=group, group_src=0)
    total = len(images)
    first, last = (min(total, batch * at) for at in shard_rows(-(-total // batch), rank, world))

    def share() -> list[BitsPerDim]:
        batches = batches_of(images, first, last, batch)
        options.update(device=device, dtype=dtype, progress=progress and rank == 0)
        results = list(evaluate_bits_per_dim(f, batches, draws=draws, key=key, first_row=first_row + first, **options))
        scored = sum(len(result.bits_per_dim) for result in results)
        if scored != last - first:
            raise ValueError(f"images: expected {last - first} in the share of rank {rank}, got {scored}")
        return results

    results = together(share, group)
    empty = {
        "bits_per_dim": torch.empty(0, dtype=dtype, device=device),
        "log_prob": torch.empty(0, draws, dtype=dtype, device=device),
        "stderr": torch.empty(0, draws, dtype=dtype, device=device),
        "nfe": torch.empty(0, draws, dtype=torch.int64, device=device),
        "status": torch.empty(0, dtype=torch.int8, device=device),
    }
    columns = {name: torch.cat([none, *(getattr(result, name) for result in results)]) for name, none in empty.items()}
    whole = {name: gather_rows(column, group).to("cpu") for name, column in columns.items()}
    scored = whole["bits_per_dim"].double()
    scored = scored[~scored.isnan()]
    count = len(scored)
    return DatasetScores(
        **whole,
        mean=float(scored.mean()),
        standard_error=float(scored.std() / math.sqrt(count)) if count > 1 else math.nan,
        images=len(whole["status"]),
        failed=len(whole["status"]) - count,
    )


def checked(
    images: Any, batch: int, key: Any, generator: Any, first_row: int, device: Any
) -> tuple[torch.device, torch.Tensor]:
    """The device with its number, and a key there that may be overwritten."""
    _checks.count("batch", batch, 1)
    _checks.count("first_row", first_row)
    if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        raise TypeError(f"images: expected a tensor or a map-style data set, got {type(images).__name__}")
    device = getattr(images, "device", "cpu") if device is None else device
    device = torch.empty(0, device=device).device
    return device, checked_key(device, key, generator, first_row).clone()


def batches_of(images: Any, first: int, last: int, batch: int) -> Sequence[Any] | torch.utils.data.DataLoader[Any]:
    """Images first … last − 1 in batches, with a length."""
    if isinstance(images, torch.Tensor):
        return images[first:last].split(batch) if last > first else ()
    return torch.utils.data.DataLoader(torch.utils.data.Subset(images, range(first, last)), batch)


def together(call: Callable[[], Any], group: dist.ProcessGroup | None) -> Any:
    """What ``call`` returns. Where it fails in one process it fails in all, so that none waits for the others."""
    value, failure, told = None, None, None
    try:
        value = call()
    except Exception as error:  # of whatever kind
        failure, told = error, f"{type(error).__name__}: {error}"
    for rank, text in enumerate(from_everyone(told, group)):
        if failure is not None:
            raise failure
        if text is not None:
            raise RuntimeError(f"rank {rank} failed: {text}")
    return value
