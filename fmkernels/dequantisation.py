"""Data of integer levels: dequantised into densities' domain, and scored in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch

from . import _checks
from .estimators import Deflated, Exact, Hutchinson
from .likelihood import ONE_PROBE, checked_key, log_prob
from .ops.noise import noise
from .solvers._integrator import progress_bar

__all__ = ["BitsPerDim", "bits_per_dim", "dequantise", "evaluate_bits_per_dim"]

DRAW_ROWS = 2**40  # the rows of one dequantisation draw; those of the next have other probes


def dequantise(
    x: torch.Tensor,
    bits: float = 8,
    *,
    draw: int = 0,
    key: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    first_row: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    r"""Integer levels as continuous data: y = 2(x + u)/2^bits − 1 in [−1, 1], u uniform on (0, 1).

    A density of y bounds the probability of the levels: log P(x) ≥ E_u[log p(y)] + D·ln(2/2^bits).

    Args:
        x: integers 0 … 2^bits − 1, ``[B, …]``.
        bits: log₂ of the number of levels, above 0; ``math.log2(17)`` for 17 levels.
        draw: counts the draws of one image: another number gives another u.
        key: int64 ``[1]`` of :func:`fmkernels.key`; None draws one with ``generator``.
        first_row: the global number of the first row; u depends on key, row, element and draw alone.
        dtype: of the result, float32 or float64.

    Returns: y, of x's shape.

    Raises: TypeError, ValueError naming the argument.

    Source: Theis, van den Oord and Bethge, "A note on the evaluation of generative models" (2016).
    """
    _checks.tensor("x", x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"x: expected integer levels, got {str(x.dtype).removeprefix('torch.')}")
    if x.dim() < 1:
        raise ValueError("x: expected shape [B, …], got a scalar")
    levels = 2 ** _checks.number("bits", bits, 0.0, open_low=True)
    _checks.count("draw", draw)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
    key = checked_key(x.device, key, generator, first_row)
    if not (x.dtype == torch.uint8 and levels >= 256) and x.numel():
        low, high = torch.stack(x.aminmax()).tolist()
        if low < 0 or high > round(levels) - 1:
            raise ValueError(f"x: expected levels from 0 to {round(levels) - 1}, got {low} to {high}")
    u = noise(
        key, x.shape[0], math.prod(x.shape[1:]), stream="dequantisation", index=draw, first_row=first_row, dtype=dtype,
        distribution="uniform",
    )  # fmt: skip
    return (x.to(dtype) + u.reshape(x.shape)) * (2 / levels) - 1


def bits_per_dim(log_prob: torch.Tensor, dims: int, bits: float = 8) -> torch.Tensor:
    r"""Bits per dimension of data with 2^bits levels, from log-densities of it dequantised into [−1, 1].

        bpd = −(logsumexp_k log p(y_k) − ln K) / (D ln 2) + log₂(2^bits / 2)

    Args:
        log_prob: ``[B]``, or ``[B, K]`` for K dequantisation draws an image.
        dims: D, the numbers of an image.
        bits: log₂ of the number of levels, above 0.

    Returns: ``[B]``. More draws lower it in expectation, towards the model's own −log₂ P(x)/D.

    Raises: TypeError, ValueError naming the argument.

    Source: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders" (2016); K draws as in Lipman et al.,
    "Flow matching for generative modeling" (2023).
    """
    _checks.tensor("log_prob", log_prob)
    _checks.floating("log_prob", log_prob)
    if log_prob.dim() not in (1, 2) or 0 in log_prob.shape[1:]:
        raise ValueError(f"log_prob: expected shape [B] or [B, K], got {list(log_prob.shape)}")
    _checks.count("dims", dims, 1)
    bits = _checks.number("bits", bits, 0.0, open_low=True)
    if log_prob.dim() == 2:
        log_prob = log_prob.logsumexp(1) - math.log(log_prob.shape[1])
    return -log_prob / (dims * math.log(2)) + (bits - 1)


@dataclass(frozen=True)
class BitsPerDim:
    """A batch of :func:`evaluate_bits_per_dim`; B images, K draws.

    Attributes:
        bits_per_dim: [B]; NaN where a solve of that image failed.
        log_prob: [B, K], of the dequantised data.
        stderr: [B, K], the probes' standard error of each.
        nfe: int64 [B, K].
        status: int8 [B], of the solves the worst.
        mean: of ``bits_per_dim`` over every image so far that did not fail.
        images, failed: images so far, and how many of them failed.
    """

    bits_per_dim: torch.Tensor
    log_prob: torch.Tensor
    stderr: torch.Tensor
    nfe: torch.Tensor
    status: torch.Tensor
    mean: float
    images: int
    failed: int


def evaluate_bits_per_dim(
    f: Callable[..., Any],
    batches: Iterable[Any],
    *,
    bits: float = 8,
    draws: int = 1,
    base: Any = None,
    divergence: Exact | Hutchinson | Deflated = ONE_PROBE,
    key: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    first_row: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    **options: Any,
) -> Iterator[BitsPerDim]:
    r"""Bits per dimension of a data set, batch by batch, as each is done; without gradients.

    An image's draws are solved one after the other, so that memory does not depend on their number. Noise and probes
    depend on the key, the image's place in the data set and the draw, not on the size of the batches.

    Args:
        f: the field, as for :func:`log_prob`.
        batches: integer levels ``[B, …]``, or tuples that begin with them, as a DataLoader yields.
        bits: log₂ of the number of levels.
        draws: K, the dequantisation draws of every image.
        base, divergence: as for :func:`log_prob`.
        key, generator, first_row: one key serves the whole data set; ``first_row`` is the first image's number.
        device: to move batches to; None leaves them where they are.
        dtype: of the dequantised data, float32 or float64.
        progress: show a bar of batches with the running mean (needs tqdm).
        options: of :func:`log_prob`: t_span, method, rtol, atol, norm, and those of the solver.

    Returns: an iterator of :class:`BitsPerDim`.

    Raises: TypeError, ValueError naming the argument.

    Source: :func:`bits_per_dim`.
    """
    _checks.count("draws", draws, 1)
    for option in ("gradient", "parameters", "t_eval"):
        if option in options:
            raise TypeError(f"{option}: expected no such option, since the evaluation takes no gradients and no times")
    if progress:
        size = len(batches) if isinstance(batches, Sized) else None
        batches = bar = progress_bar()(batches, total=size, desc="bits per dim", unit="batch")
    how = base, divergence
    return _evaluated(
        f, batches, bar if progress else None, bits, draws, how, key, generator, first_row, device, dtype, options
    )  # fmt: skip


def _evaluated(
    f: Callable[..., Any],
    batches: Iterable[Any],
    bar: Any,
    bits: float,
    draws: int,
    how: tuple[Any, Any],
    key: torch.Tensor | None,
    generator: torch.Generator | None,
    first_row: int,
    device: torch.device | str | None,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> Iterator[BitsPerDim]:
    total, images, failed = 0.0, 0, 0
    for batch in batches:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        _checks.tensor("batches", x)
        x = x if device is None else x.to(device)
        key = checked_key(x.device, key, generator, first_row)
        generator, columns = None, []  # of the results only what is a number a row
        with torch.no_grad():
            for draw in range(draws):
                y = dequantise(x, bits, draw=draw, key=key, first_row=first_row, dtype=dtype)
                result = log_prob(f, y, *how, key=key, first_row=first_row + draw * DRAW_ROWS, **options)
                columns.append((result.log_prob, result.stderr, result.nfe, result.status))
            logs, stderr, nfe, status = (torch.stack(column, 1) for column in zip(*columns))
            value = bits_per_dim(logs, math.prod(x.shape[1:]), bits)
            failures = value.isnan()
            total += float(value.where(~failures, 0).sum(dtype=torch.float64))
        failed += int(failures.sum())
        images += len(x)
        first_row += len(x)
        mean = total / (images - failed) if images > failed else math.nan
        if bar is not None:
            bar.set_postfix(mean=f"{mean:.4f}")
        yield BitsPerDim(value, logs, stderr, nfe, status.amax(1), mean, images, failed)
