"""Triton kernel of ``conditional_flow``: a point of a conditional path and its velocity, in one launch.

Compiled without the fusion of multiplications and additions and with a rounded division, so as to round as the
reference does.
"""

import math

import torch
import triton
import triton.language as tl

from ..ops.conditional_flow import FORMS
from ._math import from_float, scalar
from ._tile import Tile, aligned, launch, program_column, program_rows

LINEAR = tl.constexpr(FORMS["linear"])
TARGET = tl.constexpr(FORMS["target"])
BRIDGE = tl.constexpr(FORMS["bridge"])
TRIGONOMETRIC = tl.constexpr(FORMS["trigonometric"])
AFFINE = tl.constexpr(FORMS["affine"])
HALF_PI = tl.constexpr(math.pi / 2)


@triton.jit
def quotient(x, y):
    """x/y, rounded once; ``/`` in float32 is an approximation."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["column_programs"])
def conditional_flow_kernel(
    x0, x1, noise, coefficients, x_t, u_t, rows: tl.int64, columns: tl.int64, column_programs, FORM: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 4 * BLOCK_GROUPS
    DTYPE: tl.constexpr = x_t.dtype.element_ty
    COMPUTE: tl.constexpr = coefficients.dtype.element_ty
    columns = aligned(columns, ALIGN)
    row = program_rows(column_programs, BLOCK_ROWS)
    first_column = program_column(column_programs, STEPS * BLOCK)
    inside = row < rows
    coefficients += row * 4
    a = tl.load(coefficients, mask=inside, other=0.0)[:, None]
    b = tl.load(coefficients + 1, mask=inside, other=0.0)[:, None]
    s = tl.load(coefficients + 2, mask=inside, other=0.0)[:, None]
    c = tl.load(coefficients + 3, mask=inside, other=1.0)[:, None]
    base = row[:, None] * columns
    for step in range(STEPS):
        column = first_column + step * BLOCK + tl.arange(0, BLOCK)
        element = base + column[None, :]
        present = inside[:, None] & (column < columns)[None, :]
        data = tl.load(x1 + element, mask=present, other=0.0).to(COMPUTE)
        mean = a * data
        if FORM != TARGET:
            source = tl.load(x0 + element, mask=present, other=0.0).to(COMPUTE)
            mean = mean + b * source
        x = mean
        if FORM != AFFINE:
            x = mean + s * tl.load(noise + element, mask=present, other=0.0).to(COMPUTE)
        if FORM == LINEAR:
            u = data - source
        elif FORM == TARGET:
            u = quotient(data - b * x, c + tl.zeros_like(x))
        elif FORM == BRIDGE:
            u = c * (x - mean) + data - source
        elif FORM == TRIGONOMETRIC:
            u = scalar(HALF_PI, COMPUTE) * (b * data - a * source)
        else:
            u = s * data + c * source
        tl.store(x_t + element, from_float(x, DTYPE), mask=present)
        tl.store(u_t + element, from_float(u, DTYPE), mask=present)


def conditional_flow(x0, x1, noise, coefficients, form):
    x_t, u_t = (torch.empty(x1.shape, dtype=x1.dtype, device=x1.device) for _ in range(2))
    if x1.numel() == 0:
        return x_t, u_t
    rows = x1.shape[0]
    columns = x1.numel() // rows
    tile = Tile.of(rows, columns, x1.dtype)
    inputs = (None if tensor is None else tensor.contiguous() for tensor in (x0, x1, noise, coefficients))
    launch(
        conditional_flow_kernel, tile.programs, *inputs, x_t, u_t, rows, columns, tile.column_programs, FORM=form,
        device=x1.device, fp_fusion=False, **tile.constants,
    )  # fmt: skip
    return x_t, u_t
