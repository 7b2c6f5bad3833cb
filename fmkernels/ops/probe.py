"""Probes: random vectors z with E[z zᵀ] = I, from which a trace is estimated as the mean of zᵀJz."""

from __future__ import annotations

import torch

from .. import _checks, _registration
from .noise import DISTRIBUTIONS, MAX_COLUMNS, STREAMS, permute, philox

__all__ = ["probe"]

PROBES = {"rademacher": 0, "normal": 1, "hadamard": 2}
MAX_INDEX = 2**24  # probes: an index takes the upper three bytes of a counter word
MAX_ORDER = 2**30  # of a Hadamard matrix: the keyed bijection works on 31 bits
GROUP = 128  # signs of one call of the generator


def probe(
    key: torch.Tensor,
    rows: int,
    columns: int,
    *,
    distribution: str = "rademacher",
    probes: int = 1,
    first_probe: int = 0,
    first_row: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    r"""Probes z [probes, rows, columns] with E[z zᵀ] = I over the columns of every row, for estimates of a trace.

    They depend only on (key, global row, column, global probe), as :func:`~fmkernels.ops.noise` does.

    - ``"rademacher"``: ±1, a bit each. Philox at (column // 128, row mod 2³², row // 2³², 3 | probe·2⁸) gives 128
      signs; column j takes bit j mod 32 of word (j mod 128) // 32, and a 1 is −1.
    - ``"normal"``: ``noise(key, rows, columns, stream="probe", index=probe)``.
    - ``"hadamard"``: z_ij = s_j·(−1)^popcount(j & c_i): column c_i of the Hadamard matrix of order P = 2^⌈log₂ columns⌉
      under the signs s of Rademacher probe 0, which a row's probes share. c is a keyed permutation of [0, P), so that
      probes are distinct. All P of them give any trace exactly, and they are orthogonal where P = columns. Rows share
      c, but their signs differ: given c every row's estimate is unbiased, so errors of rows are uncorrelated.

    Args:
        key: int64 ``[1]``, see :func:`~fmkernels.key`; its device is the result's.
        rows, columns: the shape of a probe. Row i is global row ``first_row + i``.
        distribution: "rademacher", "normal" or "hadamard".
        probes: how many; probe i is global probe ``first_probe + i``, below 2²⁴ and below P for "hadamard".
        dtype: float32, float64, bfloat16 or float16; normals are rounded once, signs are exact.

    Returns: a contiguous tensor on the key's device; it carries no gradient.

    Raises: TypeError, ValueError naming the argument.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990); Avron and Toledo,
    "Randomized algorithms for estimating the trace" (2011).
    """
    _checks.key("key", key)
    _checks.count("rows", rows)
    _checks.count("columns", columns)
    _checks.count("probes", probes)
    if dtype not in _checks.FLOATING:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
    check(distribution, probes, first_probe, first_row, columns)
    return _registration.ops.probe(
        key, rows, columns, PROBES[distribution], probes, first_probe, first_row, dtype
    )  # fmt: skip


def check(distribution: str, probes: int, first_probe: int, first_row: int, columns: int) -> None:
    """Checks shared by the ops of probes; those of sizes hold where they are known."""
    _checks.choice("distribution", distribution, PROBES)
    _checks.count("first_probe", first_probe)
    _checks.count("first_row", first_row)
    if isinstance(columns, int) and columns > MAX_COLUMNS:
        raise ValueError(f"columns: expected at most 2**34, got {columns}")
    end = first_probe + probes
    if end > MAX_INDEX:
        raise ValueError(f"probes: expected at most 2**24 with first_probe, got {first_probe} + {probes}")
    # The order is at least the columns: sizes that are symbols are compared, not taken apart.
    if distribution != "hadamard" or (columns <= MAX_ORDER and end <= columns):
        return
    if columns > MAX_ORDER:
        raise ValueError(f"columns: expected at most 2**30 for 'hadamard', got {columns}")
    if end > hadamard_order(columns):
        raise ValueError(
            f"probes: expected at most {hadamard_order(columns)} with first_probe, the distinct probes that 'hadamard' "
            f"has for {columns} columns, got {first_probe} + {probes}"
        )


SCHEMA = (
    "probe(Tensor key, SymInt rows, SymInt columns, int distribution, SymInt probes, SymInt first_probe, "
    "SymInt first_row, ScalarType dtype) -> Tensor"
)


def hadamard_order(columns: int) -> int:
    """The least power of two that is not below ``columns``."""
    return 1 << max(columns - 1, 0).bit_length()


def parity(x: torch.Tensor) -> torch.Tensor:
    """popcount(x) mod 2 of 32-bit integers."""
    for shift in (16, 8, 4, 2, 1):
        x = x ^ (x >> shift)
    return x & 1


def sign_bits(key, rows, columns, index, first_row) -> torch.Tensor:
    """Bits [I, rows, columns] of Rademacher probes, whose indices are ``index`` [I]."""
    group = torch.arange((columns + GROUP - 1) // GROUP, device=key.device)
    row = (torch.arange(rows, device=key.device) + first_row).unsqueeze(1)
    word = (STREAMS["probe"] | (index << 8)).reshape(-1, 1, 1)
    counter = torch.broadcast_tensors(group, row & 0xFFFFFFFF, (row >> 32) & 0xFFFFFFFF, word)
    words = torch.stack(philox(counter, key), dim=-1)
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=key.device)) & 1
    return bits.reshape(len(index), rows, len(group) * GROUP)[..., :columns]


def probe_reference(key, rows, columns, distribution, probes, first_probe, first_row, dtype):
    if distribution == PROBES["normal"]:
        normal = (rows, columns, first_row, STREAMS["probe"])
        drawn = [
            _registration.ops.noise(key, *normal, first_probe + i, DISTRIBUTIONS["normal"], dtype)
            for i in range(probes)
        ]
        return torch.stack(drawn) if drawn else key.new_empty((0, rows, columns), dtype=dtype)
    index = torch.arange(probes, device=key.device) + first_probe
    if distribution == PROBES["rademacher"]:
        bits = sign_bits(key, rows, columns, index, first_row)
    else:
        picked = permute(key, hadamard_order(columns), index).reshape(-1, 1, 1)
        bits = sign_bits(key, rows, columns, index.new_zeros(1), first_row)
        bits = bits ^ parity(torch.arange(columns, device=key.device) & picked)
    return (1 - 2 * bits).to(dtype).contiguous()


def probe_fake(key, rows, columns, distribution, probes, first_probe, first_row, dtype):
    return key.new_empty((probes, rows, columns), dtype=dtype)


_registration.define(SCHEMA, probe_reference, probe_fake)
