"""Triton kernels of ``matching_loss``: partial sums and the gradient, then the total; and the gradient's scaling.

Sums are taken in a fixed order, without atomics: a program writes the sum of its elements, one program adds the parts.
"""

import math

import torch
import triton
import triton.language as tl

from ..objectives import REDUCTIONS, TERM_X0, TERM_X1, TERM_Z
from ..ops.matching_loss import compute_dtype
from ._math import STREAM_BRIDGE, STREAM_X0, d_rho, from_float, interleave, normals, rho, scalar
from ._tile import TILE, Tile, aligned, cdiv, launch, next_power_of_2, program_column, program_rows

NONE, SUM, MEAN = REDUCTIONS["none"], REDUCTIONS["sum"], REDUCTIONS["mean"]
MASK_ROWS = tl.constexpr(-1)  # MASK where a value covers rows; else the elements, 1 or 4, for which one is read; 0 none
PARTS = 1024  # partial sums that the total adds at a time


@triton.jit(
    do_not_specialize=["rows", "columns", "first_row"], do_not_specialize_on_alignment=["column_programs", "covered"]
)
def matching_loss_kernel(
    prediction, x1, x0, z, table, weight, mask, key, gradient, partial_sum, partial_count,
    rows: tl.int64, columns: tl.int64, first_row: tl.int64, column_programs, covered, rho_k: tl.float64,
    factor: tl.float64,
    HAS_X1: tl.constexpr, HAS_X0: tl.constexpr, HAS_Z: tl.constexpr, RHO: tl.constexpr, MASK: tl.constexpr,
    BY_ROW: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 4 * BLOCK_GROUPS
    DTYPE: tl.constexpr = x1.dtype.element_ty
    COMPUTE: tl.constexpr = partial_sum.dtype.element_ty
    columns = aligned(columns, ALIGN)
    row = program_rows(column_programs, BLOCK_ROWS)
    first_column = program_column(column_programs, STEPS * BLOCK)
    inside = row < rows
    k = scalar(rho_k, COMPUTE)

    own = table + row * 6
    p = tl.load(own, mask=inside, other=0.0).to(COMPUTE)
    w = tl.load(own + 4, mask=inside, other=0.0)
    if weight is not None:
        w *= tl.load(weight + row, mask=inside, other=0.0)
    w = w.to(COMPUTE)
    if HAS_X1:
        a = tl.load(own + 1, mask=inside, other=0.0).to(COMPUTE)
    if HAS_X0:
        b = tl.load(own + 2, mask=inside, other=0.0).to(COMPUTE)
    if HAS_Z:
        c = tl.load(own + 3, mask=inside, other=0.0).to(COMPUTE)
    if (HAS_X0 and x0 is None) or (HAS_Z and z is None):
        seed = tl.load(key)
    if MASK == MASK_ROWS:
        row_kept = tl.load(mask + row // covered, mask=inside, other=0) != 0
    slope = w * p * scalar(factor, COMPUTE)

    # Four neighbours are added at once: they are one thread's own.
    total = tl.zeros([BLOCK_ROWS, BLOCK_GROUPS], COMPUTE)
    count = tl.zeros([BLOCK_ROWS, BLOCK_GROUPS], tl.int32)
    base = row[:, None] * columns
    for step in range(STEPS):
        start = first_column + step * BLOCK
        group = start // 4 + tl.arange(0, BLOCK_GROUPS)
        column = start + tl.arange(0, BLOCK)
        element = base + column[None, :]
        present = inside[:, None] & (column < columns)[None, :]
        kept = present
        if MASK == MASK_ROWS:
            kept = present & row_kept[:, None]
        elif MASK > 0:
            offset = MASK * tl.arange(0, BLOCK // MASK)
            run = start // covered + ((start % covered).to(tl.int32) + offset) // covered  # divided in 32 bits
            read = inside[:, None] & (start + offset < columns)[None, :]
            value = tl.load(mask + row[:, None] * (columns // covered) + run[None, :], mask=read, other=0)
            if MASK == 4:
                value = interleave(value, value, value, value)
            kept = present & (value != 0)

        r = p[:, None] * tl.load(prediction + element, mask=present).to(COMPUTE)
        if HAS_X1:
            r += a[:, None] * tl.load(x1 + element, mask=present).to(COMPUTE)
        if HAS_X0:
            if x0 is None:
                source = normals(seed, first_row + row, group, scalar(STREAM_X0, tl.uint32), DTYPE)
            else:
                source = tl.load(x0 + element, mask=present)
            r += b[:, None] * source.to(COMPUTE)
        if HAS_Z:
            if z is None:
                bridge = normals(seed, first_row + row, group, scalar(STREAM_BRIDGE, tl.uint32), DTYPE)
            else:
                bridge = tl.load(z + element, mask=present)
            r += c[:, None] * bridge.to(COMPUTE)

        if gradient is not None:
            derivative = tl.where(kept, slope[:, None] * d_rho(RHO, k, r), 0.0)
            tl.store(gradient + element, from_float(derivative, gradient.dtype.element_ty), mask=present)
        # Selected, never multiplied: NaN in an element that is left out stays out.
        loss = tl.where(kept, rho(RHO, k, r), 0.0)
        total += tl.sum(tl.reshape(loss, [BLOCK_ROWS, BLOCK_GROUPS, 4]), axis=2)
        if partial_count is not None:
            count += tl.sum(tl.reshape(kept.to(tl.int32), [BLOCK_ROWS, BLOCK_GROUPS, 4]), axis=2)

    row_total = tl.where(inside, w * tl.sum(total, axis=1), 0.0)
    if BY_ROW:
        part = row * column_programs + tl.program_id(0) % column_programs
        tl.store(partial_sum + part, row_total, mask=inside)
        if partial_count is not None:
            tl.store(partial_count + part, tl.sum(count, axis=1), mask=inside)
    else:
        tl.store(partial_sum + tl.program_id(0), tl.sum(row_total, axis=0))
        if partial_count is not None:
            tl.store(partial_count + tl.program_id(0), tl.sum(tl.sum(count, axis=1), axis=0))


@triton.jit(do_not_specialize=["rows", "parts"])
def total_kernel(
    partial_sum, partial_count, loss, denominator, rows: tl.int64, parts: tl.int64, divisor: tl.float64,
    BLOCK_ROWS: tl.constexpr, BLOCK_PARTS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Adds the parts of each row in fp64, always in the same order, and divides by the count of what was added."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    total = tl.zeros([BLOCK_ROWS, BLOCK_PARTS], tl.float64)
    count = tl.zeros([BLOCK_ROWS, BLOCK_PARTS], tl.int64)
    for step in range(STEPS):
        part = step * BLOCK_PARTS + tl.arange(0, BLOCK_PARTS)
        element = row[:, None] * parts + part[None, :]
        present = inside[:, None] & (part < parts)[None, :]
        total += tl.load(partial_sum + element, mask=present, other=0.0).to(tl.float64)
        if partial_count is not None:
            count += tl.load(partial_count + element, mask=present, other=0).to(tl.int64)
    row_total = tl.sum(total, axis=1)
    if partial_count is None:
        divided = row_total / scalar(divisor, tl.float64)
    else:
        selected = tl.maximum(tl.sum(count, axis=1), 1).to(tl.float64)
        divided = row_total / selected
        if denominator is not None:
            tl.store(denominator + row, selected.to(denominator.dtype.element_ty), mask=inside)
    tl.store(loss + row, divided.to(loss.dtype.element_ty), mask=inside)


def matching_loss_forward(
    prediction, x1, x0, z, table, weight, mask, key, first_row, terms, rho, rho_k, reduction, gradient
):  # fmt: skip
    device, dtype, prefix = prediction.device, compute_dtype(prediction, x1, table), table.shape[:-1]
    rows, columns = math.prod(prefix), math.prod(x1.shape[len(prefix) :])
    by_row, counted = reduction == NONE, mask is not None and reduction != SUM
    shape = prefix if by_row else ()
    slope = torch.empty(x1.shape if gradient else 0, dtype=prediction.dtype, device=device)
    if rows * columns == 0:
        denominator = torch.ones(shape if counted and gradient else 0, dtype=dtype, device=device)
        return torch.zeros(shape, dtype=dtype, device=device), slope, denominator
    loss = torch.empty(shape, dtype=dtype, device=device)
    denominator = torch.empty(shape if counted and gradient else 0, dtype=dtype, device=device)

    tile = Tile.of(rows, columns, torch.float64 if dtype == torch.float64 else x1.dtype)
    parts = rows * tile.column_programs if by_row else tile.programs
    partial_sum = torch.empty(parts, dtype=dtype, device=device)
    partial_count = torch.empty(parts, dtype=torch.int32, device=device) if counted else None
    mask, mask_mode, covered = _mask(mask, rows, columns)
    # In float16 the quotient by the element count would underflow: its backward divides.
    divides = mask is None and reduction == MEAN and prediction.dtype != torch.float16
    inputs = (
        None if tensor is None else tensor.contiguous() for tensor in (prediction, x1, x0, z, table, weight, mask, key)
    )
    launch(
        matching_loss_kernel, tile.programs, *inputs, slope if gradient else None, partial_sum, partial_count,
        rows, columns, first_row, tile.column_programs, covered, rho_k, 1 / (rows * columns) if divides else 1.0,
        HAS_X1=bool(terms & TERM_X1), HAS_X0=bool(terms & TERM_X0), HAS_Z=bool(terms & TERM_Z), RHO=rho,
        MASK=mask_mode, BY_ROW=by_row, device=device, **tile.constants,
    )  # fmt: skip

    divisor = {NONE: float(columns), SUM: 1.0, MEAN: float(rows * columns)}[reduction]
    rows, parts = (rows, tile.column_programs) if by_row else (1, tile.programs)
    block_parts = min(next_power_of_2(parts), PARTS)
    block_rows = PARTS // block_parts if by_row else 1
    launch(
        total_kernel, cdiv(rows, block_rows), partial_sum, partial_count, loss,
        denominator if counted and gradient else None, rows, parts, divisor,
        BLOCK_ROWS=block_rows, BLOCK_PARTS=block_parts,
        STEPS=next_power_of_2(cdiv(parts, block_parts)), num_warps=4, device=device,
    )  # fmt: skip
    return loss, slope, denominator


def _mask(mask, rows: int, columns: int):
    """The mask as the kernel reads it, its MASK, and how many rows or elements of a row a value covers."""
    if mask is None:
        return None, 0, 1
    covered = rows * columns // mask.numel()
    if covered >= columns:
        return mask, MASK_ROWS.value, covered // columns
    if covered >= 2**31 - TILE:  # more than the kernel's division takes
        mask, covered = mask.reshape(-1, 1).expand(-1, covered), 1
    return mask, 1 if covered % 4 else 4, covered


def matching_loss(*arguments):
    return matching_loss_forward(*arguments, False)[0]


@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["column_programs"])
def scale_gradient_kernel(
    gradient, out, scale, denominator, rows: tl.int64, columns: tl.int64, column_programs, factor: tl.float64,
    IN_PLACE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 4 * BLOCK_GROUPS
    DOUBLE: tl.constexpr = scale.dtype.element_ty == tl.float64 or gradient.dtype.element_ty == tl.float64
    COMPUTE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    columns = aligned(columns, ALIGN)
    row = program_rows(column_programs, BLOCK_ROWS)
    first_column = program_column(column_programs, STEPS * BLOCK)
    inside = row < rows
    multiplier = tl.load(scale + row, mask=inside).to(COMPUTE) * scalar(factor, COMPUTE)
    if denominator is not None:
        multiplier /= tl.load(denominator + row, mask=inside, other=1.0).to(COMPUTE)
    multiplier = tl.where(inside, multiplier, 1.0)
    if IN_PLACE:  # a multiplier of 1 leaves the gradient as it is: the usual case of loss.backward()
        if tl.sum((multiplier != 1.0).to(tl.int32), axis=0) == 0:
            return
    for step in range(STEPS):
        column = first_column + step * BLOCK + tl.arange(0, BLOCK)
        element = row[:, None] * columns + column[None, :]
        present = inside[:, None] & (column < columns)[None, :]
        scaled = multiplier[:, None] * tl.load(gradient + element, mask=present).to(COMPUTE)
        tl.store(out + element, from_float(scaled, out.dtype.element_ty), mask=present)


def scale_gradient(gradient, scale, denominator, factor):
    out = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    _scale(gradient.contiguous(), out, scale, denominator, factor, in_place=False)
    return out


def scale_gradient_(gradient, scale, denominator, factor):
    if gradient.is_contiguous():
        _scale(gradient, gradient, scale, denominator, factor, in_place=True)
    else:
        gradient.copy_(scale_gradient(gradient, scale, denominator, factor))


def _scale(gradient, out, scale, denominator, factor, *, in_place):
    rows = scale.numel()
    columns = gradient.numel() // max(rows, 1)
    tile = Tile.of(rows, columns, gradient.dtype)
    launch(
        scale_gradient_kernel, tile.programs if columns else 0, gradient, out, scale.contiguous(),
        denominator.expand(scale.shape).contiguous() if denominator.numel() else None, rows, columns,
        tile.column_programs, factor, IN_PLACE=in_place, device=gradient.device, **tile.constants,
    )  # fmt: skip
