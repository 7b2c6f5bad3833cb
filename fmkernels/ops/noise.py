"""Counter-based noise: the same numbers from every backend, whatever the launch and however the batch is split."""

from __future__ import annotations

import math

import torch

from .. import _checks, _registration

__all__ = ["key", "noise"]

STREAMS = {"x0": 0, "bridge": 1, "time": 2, "probe": 3, "dequantisation": 4, "base": 5, "permutation": 6}
DISTRIBUTIONS = {"normal": 0, "uniform": 1}
MAX_COLUMNS = 2**34  # the column group is a 32-bit word of the counter


def key(device: torch.device | str | int | None = None, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw a key: an int64 tensor ``[1]`` on ``device``, by one ``torch.randint`` (``generator`` None: torch's own).

    ``torch.manual_seed`` and ``torch.compile`` work as for any torch draw, of which this is one; a Generator cannot be
    used inside ``torch.compile``. Outside compiled code a seed of your own is ``torch.tensor([seed])``. Draw the key
    outside checkpointed regions: their recomputation would draw another.
    """
    # generator=None is passed on explicitly so that compiled and eager code draw the same key.
    return torch.randint(0, 2**63 - 1, (1,), device=device, generator=generator)


def noise(
    key: torch.Tensor,
    rows: int,
    columns: int,
    *,
    stream: str = "x0",
    index: int = 0,
    first_row: int = 0,
    dtype: torch.dtype = torch.float32,
    distribution: str = "normal",
) -> torch.Tensor:
    r"""Random numbers [rows, columns] that depend only on (key, global row, column, stream, index).

    Philox4x32-10 keyed by the seed with counter (column // 4, row mod 2³², row // 2³², stream | index·2⁸) gives four
    words for four columns; Box–Muller turns the pairs (w0, w1), (w2, w3) into normals:
    u = ((w0 >> 1) + ½)·2⁻³¹, θ = π·int32(w1)·2⁻³², n0 = ±√(−2 ln u)·cos θ with the sign of w0's low bit,
    n1 = √(−2 ln u)·sin θ.
    ``distribution="uniform"`` gives (w + ½)·2⁻³².

    Args:
        key: int64 ``[1]``, see :func:`key`; its device is the result's.
        rows, columns: the shape. Row i is global row ``first_row + i``.
        stream: "x0", "bridge", "time", "probe", "dequantisation", "base" or "permutation".
        index: counts draws within a stream, below 2²⁴.
        dtype: float32, float64, bfloat16 or float16; computed in float32 (float64 for float64) and rounded once.

    Returns: a contiguous tensor on the key's device; it carries no gradient.

    Raises: TypeError, ValueError naming the argument.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Box and Muller (1958).
    """
    _checks.key("key", key)
    _checks.count("rows", rows)
    _checks.count("columns", columns)
    _checks.count("first_row", first_row)
    _checks.count("index", index)
    if isinstance(columns, int) and columns > MAX_COLUMNS:
        raise ValueError(f"columns: expected at most 2**34, got {columns}")
    if index >= 2**24:
        raise ValueError(f"index: expected an int below 2**24, got {index}")
    _checks.choice("stream", stream, STREAMS)
    _checks.choice("distribution", distribution, DISTRIBUTIONS)
    if dtype not in _checks.FLOATING:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
    return _registration.ops.noise(
        key, rows, columns, first_row, STREAMS[stream], index, DISTRIBUTIONS[distribution], dtype
    )


SCHEMA = (
    "noise(Tensor key, SymInt rows, SymInt columns, SymInt first_row, int stream, int index, int distribution, "
    "ScalarType dtype) -> Tensor"
)

MASK32 = 0xFFFFFFFF
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PERMUTATION_ROUNDS = 24


def multiply_high_low(constant: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32 × 32 bit product, by 16-bit halves: no int64 operation overflows."""
    low, high = constant * (x & 0xFFFF), constant * (x >> 16)
    carried = high + (low >> 16)
    return carried >> 16, ((carried & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 of four counter words by the int64 seed ``key``; all words are int64 tensors in [0, 2³²)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & MASK32, (key >> 32) & MASK32
    for _ in range(10):
        high0, low0 = multiply_high_low(PHILOX_M0, c0)
        high1, low1 = multiply_high_low(PHILOX_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_W0) & MASK32, (k1 + PHILOX_W1) & MASK32
    return c0, c1, c2, c3


def philox_row(key, row, group, stream: int, index: int = 0):
    """The four words of columns 4·group … 4·group + 3 of a row; ``row`` and ``group`` broadcast."""
    row, group = torch.broadcast_tensors(row, group)
    word = torch.full_like(row, (stream | (index << 8)) & MASK32)
    return philox((group & MASK32, row & MASK32, (row >> 32) & MASK32, word), key)


def log_uniform(m: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """ln((m + ½)·2⁻³¹) of 31-bit integers m, through log1p of the signed distance to 1 in the upper half."""
    u = (m.to(dtype) + 0.5) * 2.0**-31
    distance = -((0x7FFFFFFF - m).to(dtype) + 0.5) * 2.0**-31
    return torch.where(m < 2**30, u.log(), distance.log1p())


def normal_pair(w0: torch.Tensor, w1: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two standard normals from two words."""
    radius = (-2 * log_uniform(w0 >> 1, dtype)).sqrt()
    signed = torch.where(w1 < 2**31, w1, w1 - 2**32)
    angle = signed.to(dtype) * (math.pi * 2.0**-32)
    sign = (1 - 2 * (w0 & 1)).to(dtype)
    return sign * radius * angle.cos(), radius * angle.sin()


def noise_reference(key, rows, columns, first_row, stream, index, distribution, dtype):
    groups = (columns + 3) // 4
    row = (torch.arange(rows, device=key.device) + first_row).unsqueeze(1)
    group = torch.arange(groups, device=key.device).unsqueeze(0)
    w0, w1, w2, w3 = philox_row(key, row, group, stream, index)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    if distribution == DISTRIBUTIONS["uniform"]:
        values = [((w.to(torch.float64) + 0.5) * 2.0**-32).to(compute) for w in (w0, w1, w2, w3)]
    else:
        values = [*normal_pair(w0, w1, compute), *normal_pair(w2, w3, compute)]
    return torch.stack(values, dim=-1).reshape(rows, 4 * groups)[:, :columns].to(dtype).contiguous()


def noise_fake(key, rows, columns, first_row, stream, index, distribution, dtype):
    return key.new_empty((rows, columns), dtype=dtype)


def hash32(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser of MurmurHash3."""
    x = multiply_high_low(0x85EBCA6B, x ^ (x >> 16))[1]
    x = multiply_high_low(0xC2B2AE35, x ^ (x >> 13))[1]
    return x ^ (x >> 16)


def permute(key: torch.Tensor, n: int, x: torch.Tensor) -> torch.Tensor:
    """A keyed bijection of [0, n), n < 2³¹: the swap-or-not shuffle (Hoang, Morris and Rogaway, CRYPTO 2012)."""
    zero = torch.zeros_like(x)
    for pair in range(PERMUTATION_ROUNDS // 2):
        w0, w1, w2, w3 = philox_row(key, zero, zero + pair, STREAMS["permutation"])
        for pick, salt in ((w0, w1), (w2, w3)):
            k = (pick * n) >> 32
            partner = torch.where(k >= x, k - x, k + n - x)
            x = torch.where((hash32(torch.maximum(x, partner) ^ salt) >> 31) == 1, partner, x)
    return x


def timestep_uniform(key: torch.Tensor, rows: int, first_row: int, strata: int) -> torch.Tensor:
    """The uniform of each row in float64: its own word, or that word's place in stratum π(row) of ``strata`` > 0."""
    u = _registration.ops.noise(
        key, rows, 1, first_row, STREAMS["time"], 0, DISTRIBUTIONS["uniform"], torch.float64
    ).reshape(rows)
    if strata == 0:
        return u
    row = torch.arange(rows, device=key.device) + first_row
    return (permute(key, strata, row).to(torch.float64) + u) / strata


_registration.define(SCHEMA, noise_reference, noise_fake)
