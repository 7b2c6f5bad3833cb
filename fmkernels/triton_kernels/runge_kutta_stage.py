"""Triton kernel of ``runge_kutta_stage``: the state where the field is evaluated next, and its time, in one launch."""

import torch
import triton
import triton.language as tl

from ..ops.runge_kutta_stage import state_time_dtype
from ._math import from_float, nudged
from ._tile import Tile, aligned, launch, program_column, program_rows


@triton.jit(
    do_not_specialize=["rows", "columns", "step", "tableau_row"], do_not_specialize_on_alignment=["column_programs"]
)
def runge_kutta_stage_kernel(
    y, k, times, coefficients, stage, t_out, rows: tl.int64, columns: tl.int64, step: tl.int64, tableau_row: tl.int64,
    column_programs, NUDGE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 4 * BLOCK_GROUPS
    TERMS: tl.constexpr = len(k)
    COMPUTE: tl.constexpr = t_out.dtype.element_ty
    columns = aligned(columns, ALIGN)
    row = program_rows(column_programs, BLOCK_ROWS)
    first_column = program_column(column_programs, STEPS * BLOCK)
    inside = row < rows
    coefficients += tableau_row * (1 + TERMS)

    t0 = tl.load(times + step * rows + row, mask=inside, other=0.0)
    t1 = tl.load(times + (step + 1) * rows + row, mask=inside, other=0.0)
    h = t1 - t0
    node = tl.load(coefficients)
    t = tl.where(node == 1.0, t1, t0 + node * h).to(COMPUTE)
    if NUDGE != 0:
        t = nudged(t, NUDGE * h)
    # The first program of a row writes what the row has once.
    tl.store(t_out + row, t, mask=row < tl.where(first_column == 0, rows, 0))

    base = row[:, None] * columns
    for tile in range(STEPS):
        column = first_column + tile * BLOCK + tl.arange(0, BLOCK)
        element = base + column[None, :]
        present = inside[:, None] & (column < columns)[None, :]
        total = tl.load(y + element, mask=present).to(COMPUTE)
        for j in tl.static_range(TERMS):
            weight = (h * tl.load(coefficients + 1 + j)).to(COMPUTE)
            total += weight[:, None] * tl.load(k[j] + element, mask=present).to(COMPUTE)
        tl.store(stage + element, from_float(total, stage.dtype.element_ty), mask=present)


def runge_kutta_stage(y, k, times, step, coefficients, row, nudge):
    stage = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    t = torch.empty(times.shape[1:], dtype=state_time_dtype(y), device=y.device)
    rows = t.numel()
    columns = y.numel() // max(rows, 1)
    tile = Tile.of(rows, columns, y.dtype)
    launch(
        runge_kutta_stage_kernel, tile.programs, y.contiguous(), tuple(k_j.contiguous() for k_j in k),
        times.contiguous(), coefficients.contiguous(), stage, t, rows, columns, step, row, tile.column_programs,
        NUDGE=nudge, device=y.device, **tile.constants,
    )  # fmt: skip
    return stage, t
