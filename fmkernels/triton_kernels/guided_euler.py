"""Triton kernels of ``guided_euler``: the step in one launch; with rescaling the moments of each row in another before.

Formulas mirror csrc/math/guidance.h.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..ops.guided_euler import compute_dtype
from ._math import from_float, scalar
from ._tile import Tile, aligned, cdiv, launch, next_power_of_2, program_column, program_rows

PARTS = 128  # programs that measure a row, at most: each program of the step joins their moments anew


@triton.jit
def guided_velocity(w, c, u):
    """v_u + w·(v_c − v_u), from the nearer end; an explicit multiply-add, so that equal inputs give equal bits."""
    near_u = w < 0.5
    return tl.fma(tl.where(near_u, w, w - 1.0) + tl.zeros_like(c), c - u, tl.where(near_u, u, c))


@triton.jit
def coefficient(tensor, value, row, inside, DTYPE: tl.constexpr, PER_ROW: tl.constexpr):
    """A number, or one of each row, as [R, 1]."""
    if tensor is None:
        loaded = tl.zeros_like(row).to(DTYPE) + scalar(value, DTYPE)
    else:
        loaded = tl.load(tensor + (row if PER_ROW else row * 0), mask=inside, other=0.0).to(DTYPE)
    return loaded[:, None]


@triton.jit
def tile_moments(values, first, present, count):
    """(mean, sum of squared deviations) of rows; deviations from ``first``, then the mean: 0 for equal values."""
    deviation = tl.where(present, values - first[:, None], 0.0)
    mean = tl.sum(deviation, axis=1) / tl.maximum(count, 1.0)
    deviation = tl.where(present, deviation - mean[:, None], 0.0)
    return first + mean, tl.sum(deviation * deviation, axis=1)


@triton.jit
def joined(count, mean, squares, other_count, other_mean, other_squares):
    """Mean and squares of two sets together (Chan, Golub and LeVeque 1979)."""
    share = other_count / tl.maximum(count + other_count, 1.0)
    difference = other_mean - mean
    return mean + difference * share, squares + other_squares + difference * difference * count * share


@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["column_programs"])
def moments_kernel(
    conditional, unconditional, scale, moments, rows: tl.int64, columns: tl.int64, column_programs,
    scale_value: tl.float64, SCALE_PER_ROW: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """(mean, squares) of v_c and of the guided velocity, a program's part of its rows."""
    BLOCK: tl.constexpr = 4 * BLOCK_GROUPS
    COMPUTE: tl.constexpr = moments.dtype.element_ty
    columns = aligned(columns, ALIGN)
    row = program_rows(column_programs, BLOCK_ROWS)
    first_column = program_column(column_programs, STEPS * BLOCK)
    inside = row < rows
    w = coefficient(scale, scale_value, row, inside, COMPUTE, SCALE_PER_ROW)
    base = row[:, None] * columns
    first = base + first_column
    first_c = tl.load(conditional + first, mask=inside[:, None], other=0.0).to(COMPUTE)
    first_u = tl.load(unconditional + first, mask=inside[:, None], other=0.0).to(COMPUTE)
    first_v = tl.sum(guided_velocity(w, first_c, first_u), axis=1)  # one column: the sum is the value
    first_c = tl.sum(first_c, axis=1)
    count = tl.zeros([BLOCK_ROWS], COMPUTE)
    mean_c, mean_v, squares_c, squares_v = first_c, first_v, count, count
    for step in range(STEPS):
        start = first_column + step * BLOCK
        column = start + tl.arange(0, BLOCK)
        present = inside[:, None] & (column < columns)[None, :]
        c = tl.load(conditional + base + column[None, :], mask=present, other=0.0).to(COMPUTE)
        u = tl.load(unconditional + base + column[None, :], mask=present, other=0.0).to(COMPUTE)
        here = tl.zeros([BLOCK_ROWS], COMPUTE) + tl.minimum(tl.maximum(columns - start, 0), BLOCK).to(COMPUTE)
        tile_mean, tile_squares = tile_moments(c, first_c, present, here)
        mean_c, squares_c = joined(count, mean_c, squares_c, here, tile_mean, tile_squares)
        tile_mean, tile_squares = tile_moments(guided_velocity(w, c, u), first_v, present, here)
        mean_v, squares_v = joined(count, mean_v, squares_v, here, tile_mean, tile_squares)
        count += here
    part = row * column_programs + tl.program_id(0) % column_programs
    plane = rows * column_programs
    tl.store(moments + part, mean_c, mask=inside)
    tl.store(moments + plane + part, squares_c, mask=inside)
    tl.store(moments + 2 * plane + part, mean_v, mask=inside)
    tl.store(moments + 3 * plane + part, squares_v, mask=inside)


@triton.jit
def joined_squares(moments, at, present, count, total):
    """Sum of squared deviations of whole rows from the moments of their parts [R, P]."""
    mean = tl.load(moments + at, mask=present, other=0.0)
    first = tl.sum(tl.where(tl.arange(0, at.shape[1])[None, :] == 0, mean, 0.0), axis=1)
    difference = tl.where(present, mean - first[:, None], 0.0)
    difference -= (tl.sum(difference * count, axis=1) / total)[:, None]
    return difference * difference * count


@triton.jit
def rescale_factor(
    moments, rescale, row, inside, rows, columns, parts, SPAN: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """φ·std(v_c)/std(v) + 1 − φ of each row; 1 where v is constant."""
    COMPUTE: tl.constexpr = moments.dtype.element_ty
    part = tl.arange(0, PARTS)
    at = row[:, None] * parts + part[None, :]
    present = inside[:, None] & (part < parts)[None, :]
    count = tl.minimum(columns - part.to(tl.int64) * SPAN, SPAN).to(COMPUTE)[None, :]
    count = tl.where(present, count, 0.0)
    total = columns.to(COMPUTE)
    plane = rows * parts
    squares_c = tl.load(moments + plane + at, mask=present, other=0.0)
    squares_c = tl.sum(squares_c + joined_squares(moments, at, present, count, total), axis=1)
    squares_v = tl.load(moments + 3 * plane + at, mask=present, other=0.0)
    squares_v = tl.sum(squares_v + joined_squares(moments + 2 * plane, at, present, count, total), axis=1)
    constant = squares_v == 0.0
    phi = scalar(rescale, COMPUTE)
    return tl.where(constant, 1.0, phi * tl.sqrt(squares_c / tl.where(constant, 1.0, squares_v)) + (1.0 - phi))


@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["column_programs", "parts"])
def guided_euler_kernel(
    x, conditional, unconditional, h, scale, moments, out, rows: tl.int64, columns: tl.int64, column_programs, parts,
    h_value: tl.float64, scale_value: tl.float64, rescale: tl.float64,
    H_PER_ROW: tl.constexpr, SCALE_PER_ROW: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 4 * BLOCK_GROUPS
    DOUBLE: tl.constexpr = x.dtype.element_ty == tl.float64 or conditional.dtype.element_ty == tl.float64
    COMPUTE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    columns = aligned(columns, ALIGN)
    row = program_rows(column_programs, BLOCK_ROWS)
    first_column = program_column(column_programs, STEPS * BLOCK)
    inside = row < rows
    step_size = coefficient(h, h_value, row, inside, COMPUTE, H_PER_ROW)
    w = coefficient(scale, scale_value, row, inside, COMPUTE, SCALE_PER_ROW)
    if moments is not None:
        factor = rescale_factor(moments, rescale, row, inside, rows, columns, parts, SPAN, PARTS)
        step_size *= factor[:, None]
    base = row[:, None] * columns
    for step in range(STEPS):
        column = first_column + step * BLOCK + tl.arange(0, BLOCK)
        element = base + column[None, :]
        present = inside[:, None] & (column < columns)[None, :]
        c = tl.load(conditional + element, mask=present).to(COMPUTE)
        u = tl.load(unconditional + element, mask=present).to(COMPUTE)
        stepped = tl.load(x + element, mask=present).to(COMPUTE) + step_size * guided_velocity(w, c, u)
        tl.store(out + element, from_float(stepped, out.dtype.element_ty), mask=present)


def guided_euler(x, conditional, unconditional, h, scale, h_value, scale_value, rescale):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    per_row = {"h": h is not None and h.dim() > 0, "scale": scale is not None and scale.dim() > 0}
    # Numbers alike for every row and nothing summed by row: one long row.
    rows = x.shape[0] if x.dim() and (rescale or any(per_row.values())) else 1
    elements = x.numel()
    if elements == 0:
        return out
    columns, compute = elements // rows, compute_dtype(x, conditional)
    x, conditional, unconditional, h, scale = (
        None if tensor is None else tensor.contiguous() for tensor in (x, conditional, unconditional, h, scale)
    )
    tile = Tile.of(rows, columns, compute if compute == torch.float64 else x.dtype)
    moments, measuring = None, tile
    if rescale:
        measuring = few_parts(tile, columns)
        moments = torch.empty((4, rows, measuring.column_programs), dtype=compute, device=x.device)
        launch(
            moments_kernel, measuring.programs, conditional, unconditional, scale, moments, rows, columns,
            measuring.column_programs, scale_value, SCALE_PER_ROW=per_row["scale"], device=x.device,
            **measuring.constants,
        )  # fmt: skip
    launch(
        guided_euler_kernel, tile.programs, x, conditional, unconditional, h, scale, moments, out, rows, columns,
        tile.column_programs, measuring.column_programs, h_value, scale_value, rescale,
        H_PER_ROW=per_row["h"], SCALE_PER_ROW=per_row["scale"],
        SPAN=4 * measuring.block_groups * measuring.steps if rescale else 1,
        PARTS=next_power_of_2(measuring.column_programs) if rescale else 1, device=x.device, **tile.constants,
    )  # fmt: skip
    return out


def few_parts(tile: Tile, columns: int) -> Tile:
    """The tile with programs long enough that at most PARTS of them share a row."""
    row_programs, steps = tile.programs // tile.column_programs, tile.steps
    tiles = cdiv(columns, 4 * tile.block_groups)
    while cdiv(tiles, steps) > PARTS:
        steps *= 2
    return replace(tile, steps=steps, column_programs=cdiv(tiles, steps), programs=row_programs * cdiv(tiles, steps))
