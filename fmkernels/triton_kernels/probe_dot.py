"""Triton kernels of ``probe_dot``: a row's sum in one launch, or in two where programs share a row; no atomics."""

import math

import torch
import triton
import triton.language as tl

from ..ops.probe_dot import compute_dtype
from ._math import normals
from ._probe_math import NORMAL, sign_words, with_sign
from ._tile import aligned, cdiv, launch, next_power_of_2
from .matching_loss import PARTS, total_kernel
from .probe import picked_columns, program_part, stream_of, tile_of


@triton.jit(
    do_not_specialize=["rows", "columns", "first_probe", "first_row"],
    do_not_specialize_on_alignment=["programs", "column_programs"],
)
def probe_dot_kernel(
    key, picked, data, sums, rows: tl.int64, columns: tl.int64, first_probe: tl.int64, first_row: tl.int64, programs,
    column_programs,
    DISTRIBUTION: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 4 * BLOCK_GROUPS
    LANES: tl.constexpr = min(BLOCK, 32)
    WORDS: tl.constexpr = BLOCK // LANES
    DTYPE: tl.constexpr = data.dtype.element_ty
    COMPUTE: tl.constexpr = sums.dtype.element_ty
    seed = tl.load(key)
    columns = aligned(columns, ALIGN)
    probe, row, first_column = program_part(programs, column_programs, BLOCK_ROWS, STEPS * BLOCK)
    stream, c = stream_of(picked, probe, first_probe, DISTRIBUTION)
    inside = row < rows
    base = (probe * rows + row) * columns
    if DISTRIBUTION == NORMAL:
        total = tl.zeros([BLOCK_ROWS, BLOCK], COMPUTE)
    else:
        total = tl.zeros([BLOCK_ROWS, WORDS, LANES], COMPUTE)
    for step in range(STEPS):
        start = first_column + step * BLOCK
        if DISTRIBUTION == NORMAL:
            column = start + tl.arange(0, BLOCK)
            present = inside[:, None] & (column < columns)[None, :]
            values = tl.load(data + base[:, None] + column[None, :], mask=present, other=0.0).to(COMPUTE)
            z = normals(seed, first_row + row, start // 4 + tl.arange(0, BLOCK_GROUPS), stream, DTYPE)
            total += z.to(COMPUTE) * values
        else:
            lane = tl.arange(0, LANES)
            column = start + (tl.arange(0, WORDS) * 32)[:, None] + lane[None, :]
            present = inside[:, None, None] & (column < columns)[None, :, :]
            values = tl.load(data + base[:, None, None] + column[None, :, :], mask=present, other=0.0).to(COMPUTE)
            words = sign_words(seed, first_row + row, start, stream, c, DISTRIBUTION, WORDS)[:, :, None]
            total += with_sign(values, words, lane[None, None, :])
    row_total = tl.sum(tl.reshape(total, [BLOCK_ROWS, BLOCK]), axis=1)
    part = (probe * rows + row) * column_programs + tl.program_id(0) % column_programs
    tl.store(sums + part, row_total, mask=inside)


def probe_dot(key, values, distribution, first_probe, first_row):
    probes, rows, *trailing = values.shape
    columns, dtype, device = math.prod(trailing), compute_dtype(values), values.device
    if values.numel() == 0:
        return torch.zeros((probes, rows), dtype=dtype, device=device)
    out = torch.empty((probes, rows), dtype=dtype, device=device)
    key, tile = key.contiguous(), tile_of(rows, columns, distribution, values.dtype)
    parts = tile.column_programs
    sums = out if parts == 1 else torch.empty(probes * rows * parts, dtype=dtype, device=device)
    picked = picked_columns(key, columns, distribution, probes, first_probe)
    launch(
        probe_dot_kernel, probes * tile.programs, key, picked, values.contiguous(), sums, rows, columns, first_probe,
        first_row, tile.programs, parts, DISTRIBUTION=distribution, device=device, **tile.constants,
    )  # fmt: skip
    if parts > 1:
        block_parts = min(next_power_of_2(parts), PARTS)
        block_rows = PARTS // block_parts
        launch(
            total_kernel, cdiv(probes * rows, block_rows), sums, None, out, None, probes * rows, parts, 1.0,
            BLOCK_ROWS=block_rows, BLOCK_PARTS=block_parts, STEPS=next_power_of_2(cdiv(parts, block_parts)),
            num_warps=4, device=device,
        )  # fmt: skip
    return out
