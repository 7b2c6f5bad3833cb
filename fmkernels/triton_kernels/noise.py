"""Triton kernel of ``noise``."""

import torch
import triton
import triton.language as tl

from ..ops.noise import DISTRIBUTIONS
from ._math import from_float, interleave, normals, philox_row, uniform
from ._tile import Tile, aligned, launch, program_column, program_rows

NORMAL = tl.constexpr(DISTRIBUTIONS["normal"])


@triton.jit(
    do_not_specialize=["rows", "columns", "first_row", "word"], do_not_specialize_on_alignment=["column_programs"]
)
def noise_kernel(
    key, out, rows: tl.int64, columns: tl.int64, first_row: tl.int64, word: tl.int64, column_programs,
    DISTRIBUTION: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 4 * BLOCK_GROUPS
    DTYPE: tl.constexpr = out.dtype.element_ty
    seed = tl.load(key)
    columns = aligned(columns, ALIGN)
    row = program_rows(column_programs, BLOCK_ROWS)
    first_column = program_column(column_programs, STEPS * BLOCK)
    out += row[:, None] * columns
    for step in range(STEPS):
        start = first_column + step * BLOCK
        group = start // 4 + tl.arange(0, BLOCK_GROUPS)
        column = start + tl.arange(0, BLOCK)
        if DISTRIBUTION == NORMAL:
            values = normals(seed, first_row + row, group, word, DTYPE)
        else:
            w0, w1, w2, w3 = philox_row(seed, (first_row + row)[:, None], group[None, :], word)
            COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
            values = from_float(interleave(uniform(w0), uniform(w1), uniform(w2), uniform(w3)).to(COMPUTE), DTYPE)
        tl.store(out + column[None, :], values, mask=(row < rows)[:, None] & (column < columns)[None, :])


def noise(key, rows, columns, first_row, stream, index, distribution, dtype):
    out = torch.empty((rows, columns), dtype=dtype, device=key.device)
    tile = Tile.of(rows, columns, dtype)
    launch(
        noise_kernel, tile.programs if columns else 0, key.contiguous(), out, rows, columns, first_row,
        stream | index << 8, tile.column_programs, DISTRIBUTION=distribution, device=key.device, **tile.constants,
    )  # fmt: skip
    return out
