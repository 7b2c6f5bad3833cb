"""Triton kernel of ``probe``. A tile of signs is [rows, words, lanes]; a call of the generator gives four words."""

import torch
import triton
import triton.language as tl

from ..ops.probe import PROBES, hadamard_order
from ._math import from_float, normals, permute
from ._probe_math import HADAMARD, NORMAL, STREAM_PROBE, sign_words, with_sign
from ._tile import Tile, aligned, cdiv, launch, next_power_of_2


@triton.jit(do_not_specialize=["probes", "first_probe", "order"])
def picked_kernel(key, picked, probes: tl.int64, first_probe: tl.int64, order: tl.int64, BLOCK: tl.constexpr):
    """The columns of the Hadamard matrix that the probes take."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = permute(tl.load(key), order.to(tl.uint32), (first_probe + index).to(tl.uint32))
    tl.store(picked + index, column.to(tl.int32), mask=index < probes)


@triton.jit
def program_part(programs, column_programs, BLOCK_ROWS: tl.constexpr, SPAN: tl.constexpr):
    """A program's probe, its rows [BLOCK_ROWS] and its first column, int64; ``programs`` is how many a probe has."""
    index = tl.program_id(0) % programs
    row = (index // column_programs).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return (tl.program_id(0) // programs).to(tl.int64), row, (index % column_programs).to(tl.int64) * SPAN


@triton.jit
def stream_of(picked, probe, first_probe, DISTRIBUTION: tl.constexpr):
    """The counter's stream word of a probe and its Hadamard column, uint32."""
    if DISTRIBUTION == HADAMARD:
        return tl.full([], STREAM_PROBE, tl.uint32), tl.load(picked + probe).to(tl.uint32)
    else:
        return (((first_probe + probe) << 8) + STREAM_PROBE).to(tl.uint32), tl.full([], 0, tl.uint32)


@triton.jit(
    do_not_specialize=["rows", "columns", "first_probe", "first_row"],
    do_not_specialize_on_alignment=["programs", "column_programs"],
)
def probe_kernel(
    key, picked, out, rows: tl.int64, columns: tl.int64, first_probe: tl.int64, first_row: tl.int64, programs,
    column_programs,
    DISTRIBUTION: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 4 * BLOCK_GROUPS
    LANES: tl.constexpr = min(BLOCK, 32)
    WORDS: tl.constexpr = BLOCK // LANES
    DTYPE: tl.constexpr = out.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    seed = tl.load(key)
    columns = aligned(columns, ALIGN)
    probe, row, first_column = program_part(programs, column_programs, BLOCK_ROWS, STEPS * BLOCK)
    stream, c = stream_of(picked, probe, first_probe, DISTRIBUTION)
    inside = row < rows
    base = (probe * rows + row) * columns
    for step in range(STEPS):
        start = first_column + step * BLOCK
        if DISTRIBUTION == NORMAL:
            column = start + tl.arange(0, BLOCK)
            values = normals(seed, first_row + row, start // 4 + tl.arange(0, BLOCK_GROUPS), stream, DTYPE)
            tl.store(out + base[:, None] + column[None, :], values, mask=inside[:, None] & (column < columns)[None, :])
        else:
            lane = tl.arange(0, LANES)
            column = start + (tl.arange(0, WORDS) * 32)[:, None] + lane[None, :]
            words = sign_words(seed, first_row + row, start, stream, c, DISTRIBUTION, WORDS)[:, :, None]
            one = tl.full([BLOCK_ROWS, WORDS, LANES], 1.0, COMPUTE)
            values = from_float(with_sign(one, words, lane[None, None, :]), DTYPE)
            present = inside[:, None, None] & (column < columns)[None, :, :]
            tl.store(out + base[:, None, None] + column[None, :, :], values, mask=present)


def picked_columns(key, columns, distribution, probes, first_probe):
    """The Hadamard column of each probe, or None."""
    if distribution != PROBES["hadamard"]:
        return None
    picked = torch.empty(probes, dtype=torch.int32, device=key.device)
    block = min(next_power_of_2(probes), 128)
    launch(
        picked_kernel, cdiv(probes, block), key, picked, probes, first_probe, hadamard_order(columns), BLOCK=block,
        num_warps=4, device=key.device,
    )  # fmt: skip
    return picked


def tile_of(rows, columns, distribution, dtype) -> Tile:
    """Wide where a tile's few words are signs: a call of the generator a thread serves more of them."""
    return Tile.of(rows, columns, dtype, widened=1 if distribution == PROBES["normal"] else 2)


def probe(key, rows, columns, distribution, probes, first_probe, first_row, dtype):
    out = torch.empty((probes, rows, columns), dtype=dtype, device=key.device)
    if out.numel() == 0:
        return out
    key, tile = key.contiguous(), tile_of(rows, columns, distribution, dtype)
    picked = picked_columns(key, columns, distribution, probes, first_probe)
    launch(
        probe_kernel, probes * tile.programs, key, picked, out, rows, columns, first_probe, first_row, tile.programs,
        tile.column_programs, DISTRIBUTION=distribution, device=key.device, **tile.constants,
    )  # fmt: skip
    return out
