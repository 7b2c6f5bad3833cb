"""Triton kernels of ``_runge_kutta_step_``: one launch where a row fits a program, two where it is split over several.

A dopri5 step is 6 stages and this: 7 launches, 8 for long rows. What a program reads of its rows a second time, once
the decision is known, comes from a cache. Of a long row, the first launch writes sums over its parts and a copy of its
step control; in the second every program of the row adds the sums up and decides alike, and the first of them writes
the decision, which none of the others reads.
"""

import torch
import triton
import triton.language as tl

from ..ops.runge_kutta_stage import state_time_dtype
from ..ops.runge_kutta_step import CONTROL, COUNTERS
from ._math import (
    ACCEPTED,
    AFTER_REJECTION,
    CURSOR,
    END,
    ERROR,
    OLDER_ERROR,
    RATIO,
    REJECTED,
    RUNNING,
    RUNNING_STATUS,
    STATUS,
    T_NEXT,
    T_PREVIOUS,
    T,
    decide,
    from_float,
    is_finite,
)
from ._tile import SHORT_ROW, Tile, aligned, cdiv, launch, next_power_of_2, program_column, program_rows

LONG_ROW = 8192  # elements beyond which a row is split
MAX_PARTS = 1024  # sums of a row, which each of its programs adds up
CONTROL_ROWS, COUNTER_ROWS = tl.constexpr(CONTROL), tl.constexpr(COUNTERS)


@triton.jit
def weighted(total, k, element, present, h, weights):
    """``total`` + h Σ_j w_j k_j, and the last k; h [R] in fp64."""
    for j in tl.static_range(len(k)):
        last = tl.load(k[j] + element, mask=present, other=0.0).to(total.dtype)
        total += (h * tl.load(weights + j)).to(total.dtype)[:, None] * last
    return total, last


@triton.jit
def magnitudes(x, COMPONENTS: tl.constexpr):
    """|x| of numbers, or of complex numbers whose two parts are neighbours."""
    if COMPONENTS == 1:
        return tl.abs(x)
    else:
        return tl.sqrt(tl.sum(tl.reshape(x * x, [x.shape[0], x.shape[1] // 2, 2]), axis=2))


@triton.jit
def tolerance(values, stride, row, column, present, BY_ELEMENT: tl.constexpr, COMPUTE: tl.constexpr):
    """rtol or atol of rows and columns; 1 elsewhere."""
    element = row[:, None] * stride
    if BY_ELEMENT:
        element += column[None, :]
    return tl.load(values + element, mask=present, other=1.0).to(COMPUTE)


@triton.jit
def squared_errors(
    y, k, weights, rtol, atol, rtol_stride, atol_stride, segments, row, h, running, columns, first_column,
    HAS_RATIO: tl.constexpr, RTOL_BY_ELEMENT: tl.constexpr, ATOL_BY_ELEMENT: tl.constexpr, COMPONENTS: tl.constexpr,
    SEGMENTS: tl.constexpr, SEGMENT_BLOCK: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Σ (e/(atol + rtol·max(|y|, |y₁|)))² over a program's columns in each segment, [R, SEGMENT_BLOCK]; NaN where y₁ or
    the last k is not finite."""
    sums = tl.zeros([row.shape[0], SEGMENT_BLOCK], COMPUTE)
    broken = tl.zeros([row.shape[0]], tl.int32)
    segment = tl.arange(0, SEGMENT_BLOCK)[None, :]
    for tile in range(STEPS):
        start = first_column + tile * BLOCK
        column = start + tl.arange(0, BLOCK)
        element = row[:, None] * columns + column[None, :]
        present = running[:, None] & (column < columns)[None, :]
        state = tl.load(y + element, mask=present, other=0.0).to(COMPUTE)
        if HAS_RATIO:
            y1, last = weighted(state, k, element, present, h, weights)
        else:
            y1, e = state, tl.zeros_like(state)
            for j in tl.static_range(len(k)):  # each k is read once
                last = tl.load(k[j] + element, mask=present, other=0.0).to(COMPUTE)
                y1 += (h * tl.load(weights + j)).to(COMPUTE)[:, None] * last
                e += (h * tl.load(weights + len(k) + j)).to(COMPUTE)[:, None] * last
            number = start // COMPONENTS + tl.arange(0, BLOCK // COMPONENTS)
            inside = running[:, None] & (number < columns // COMPONENTS)[None, :]
            largest = tl.maximum(magnitudes(state, COMPONENTS), magnitudes(y1, COMPONENTS))
            allowed = tolerance(atol, atol_stride, row, number, inside, ATOL_BY_ELEMENT, COMPUTE)
            allowed += tolerance(rtol, rtol_stride, row, number, inside, RTOL_BY_ELEMENT, COMPUTE) * largest
            scaled = magnitudes(e, COMPONENTS) / allowed
            for s in tl.static_range(SEGMENTS):
                counts = (number >= tl.load(segments + 2 * s)) & (number < tl.load(segments + 2 * s + 1))
                part = tl.sum(tl.where(inside & counts[None, :], scaled * scaled, 0.0), axis=1)
                sums += tl.where(segment == s, part[:, None], 0.0)
        broken += tl.sum((~(is_finite(y1) & is_finite(last))).to(tl.int32), axis=1)
    return tl.where((broken > 0)[:, None], float("nan"), sums)


@triton.jit(
    do_not_specialize=["rows", "columns", "rtol_stride", "atol_stride"],
    do_not_specialize_on_alignment=["column_programs"],
)
def runge_kutta_error_kernel(
    y, k, control, counters, old_control, old_counters, sums, weights, rtol, atol, segments,
    rows: tl.int64, columns: tl.int64, rtol_stride: tl.int64, atol_stride: tl.int64, column_programs,
    HAS_RATIO: tl.constexpr, RTOL_BY_ELEMENT: tl.constexpr, ATOL_BY_ELEMENT: tl.constexpr, COMPONENTS: tl.constexpr,
    SEGMENTS: tl.constexpr, SEGMENT_BLOCK: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Of a part of a long row its entries of ``sums`` [rows, segments, parts]; once a row, a copy of its control."""
    BLOCK: tl.constexpr = 4 * BLOCK_GROUPS
    columns = aligned(columns, ALIGN)
    row = program_rows(column_programs, BLOCK_ROWS)
    part = tl.program_id(0) % column_programs
    first = row < tl.where(part == 0, rows, 0)
    for i in tl.static_range(CONTROL_ROWS):
        tl.store(old_control + i * rows + row, tl.load(control + i * rows + row, mask=first), mask=first)
    for i in tl.static_range(COUNTER_ROWS):
        tl.store(old_counters + i * rows + row, tl.load(counters + i * rows + row, mask=first), mask=first)

    running = tl.load(counters + STATUS * rows + row, mask=row < rows, other=0) == RUNNING_STATUS
    if tl.max(running.to(tl.int32), axis=0) == 0:
        return
    h = tl.load(control + T_NEXT * rows + row, mask=running, other=0.0)
    h -= tl.load(control + T * rows + row, mask=running, other=0.0)
    total = squared_errors(
        y, k, weights, rtol, atol, rtol_stride, atol_stride, segments, row, h, running, columns,
        program_column(column_programs, STEPS * BLOCK), HAS_RATIO, RTOL_BY_ELEMENT, ATOL_BY_ELEMENT, COMPONENTS,
        SEGMENTS, SEGMENT_BLOCK, BLOCK, STEPS, sums.dtype.element_ty,
    )  # fmt: skip
    segment = tl.arange(0, SEGMENT_BLOCK)[None, :]
    place = (row[:, None] * SEGMENTS + segment) * column_programs + part
    tl.store(sums + place, total, mask=running[:, None] & (segment < SEGMENTS))


@triton.jit(
    do_not_specialize=["rows", "columns", "rtol_stride", "atol_stride", "ratio_stride", "t_eval_stride", "outputs"],
    do_not_specialize_on_alignment=["column_programs"],
)
def runge_kutta_step_kernel(
    y, k, control, counters, old_control, old_counters, sums, weights, settings, rtol, atol, segments, ratio, t_eval,
    solution, rows: tl.int64, columns: tl.int64, rtol_stride: tl.int64, atol_stride: tl.int64, ratio_stride: tl.int64,
    t_eval_stride: tl.int64, outputs: tl.int64, column_programs,
    RTOL_BY_ELEMENT: tl.constexpr, ATOL_BY_ELEMENT: tl.constexpr, COMPONENTS: tl.constexpr,
    SEGMENTS: tl.constexpr, SEGMENT_BLOCK: tl.constexpr, DEGREE: tl.constexpr, PARTS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 4 * BLOCK_GROUPS
    TERMS: tl.constexpr = len(k)
    DTYPE: tl.constexpr = y.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    columns = aligned(columns, ALIGN)
    row = program_rows(column_programs, BLOCK_ROWS)
    first_column = program_column(column_programs, STEPS * BLOCK)
    status = tl.load(old_counters + STATUS * rows + row, mask=row < rows, other=0)
    running = status == RUNNING_STATUS
    if tl.max(running.to(tl.int32), axis=0) == 0:
        return
    t = tl.load(old_control + T * rows + row, mask=running, other=0.0)
    t_next = tl.load(old_control + T_NEXT * rows + row, mask=running, other=0.0)
    h = t_next - t

    segment = tl.arange(0, SEGMENT_BLOCK)[None, :]
    if sums is None:
        total = squared_errors(
            y, k, weights, rtol, atol, rtol_stride, atol_stride, segments, row, h, running, columns, first_column,
            ratio is not None, RTOL_BY_ELEMENT, ATOL_BY_ELEMENT, COMPONENTS, SEGMENTS, SEGMENT_BLOCK, BLOCK, STEPS,
            COMPUTE,
        )  # fmt: skip
    else:
        total = tl.zeros([BLOCK_ROWS, SEGMENT_BLOCK], COMPUTE)
        part = tl.arange(0, PARTS)[None, :]
        for s in tl.static_range(SEGMENTS):
            place = (row[:, None] * SEGMENTS + s) * column_programs + part
            own = tl.load(sums + place, mask=running[:, None] & (part < column_programs), other=0.0)
            total += tl.where(segment == s, tl.sum(own, axis=1)[:, None], 0.0)
    if ratio is None:
        size = tl.load(segments + 2 * segment + 1, mask=segment < SEGMENTS, other=1)
        size -= tl.load(segments + 2 * segment, mask=segment < SEGMENTS, other=0)
        total = tl.sqrt(total / size.to(COMPUTE))
    finite = tl.sum((~is_finite(total)).to(tl.int32), axis=1) == 0
    if ratio is None:
        r = tl.max(total, axis=1).to(tl.float64)
    else:
        r = tl.load(ratio + row * ratio_stride, mask=running, other=1.0).to(tl.float64)
        finite = finite & is_finite(r)
    r = tl.where(finite, r, float("inf"))
    end = tl.load(old_control + END * rows + row, mask=running, other=0.0)
    error = tl.load(old_control + ERROR * rows + row, mask=running, other=1.0)
    older_error = tl.load(old_control + OLDER_ERROR * rows + row, mask=running, other=1.0)
    accepted_before = tl.load(old_counters + ACCEPTED * rows + row, mask=running, other=0)
    rejected_before = tl.load(old_counters + REJECTED * rows + row, mask=running, other=0)
    after_rejection = tl.load(old_counters + AFTER_REJECTION * rows + row, mask=running, other=0) > 0
    accepted, smallest, following, status = decide(
        settings, t, t_next, end, error, older_error, r, finite, accepted_before + rejected_before + 1, after_rejection
    )
    accepted = running & accepted

    cursor = tl.load(old_counters + CURSOR * rows + row, mask=running, other=0)
    tl.debug_barrier()  # no thread may still read what others overwrite
    writes = running & (row < tl.where(first_column == 0, rows, 0))
    now = tl.where(accepted, t_next, t)
    rejected = (~accepted).to(tl.int32)
    tl.store(control + T * rows + row, now, mask=writes)
    tl.store(control + T_NEXT * rows + row, tl.where(status == RUNNING_STATUS, following, now), mask=writes)
    kept = tl.where(finite, error, 1.0)
    tl.store(control + ERROR * rows + row, tl.where(accepted, smallest, kept), mask=writes)
    kept = tl.where(finite, older_error, 1.0)
    tl.store(control + OLDER_ERROR * rows + row, tl.where(accepted, error, kept), mask=writes)
    tl.store(control + T_PREVIOUS * rows + row, t, mask=writes & accepted)
    tl.store(control + RATIO * rows + row, r, mask=writes)
    tl.store(counters + STATUS * rows + row, status, mask=writes)
    tl.store(counters + ACCEPTED * rows + row, accepted_before + accepted.to(tl.int32), mask=writes)
    tl.store(counters + REJECTED * rows + row, rejected_before + rejected, mask=writes)
    tl.store(counters + AFTER_REJECTION * rows + row, rejected, mask=writes)
    stopped = tl.sum((writes & (status != RUNNING_STATUS)).to(tl.int32), axis=0)
    tl.atomic_add(counters + RUNNING * rows, -stopped, mask=stopped > 0, sem="relaxed")

    if t_eval is not None:
        forward = tl.where(end > t, 1.0, tl.where(end < t, -1.0, end - t))
        time = tl.load(t_eval + row * t_eval_stride + cursor, mask=accepted & (cursor < outputs), other=float("nan"))
        due = (time - t_next) * forward <= 0.0  # NaN is never due
        while tl.max(due.to(tl.int32), axis=0) > 0:
            theta = (time - t) / h
            output = row * outputs + cursor
            for tile in range(STEPS):
                column = first_column + tile * BLOCK + tl.arange(0, BLOCK)
                present = due[:, None] & (column < columns)[None, :]
                element = row[:, None] * columns + column[None, :]
                value = tl.load(y + element, mask=present, other=0.0).to(COMPUTE)
                for j in tl.static_range(TERMS):
                    polynomial = tl.zeros_like(theta)
                    for p in tl.static_range(DEGREE):
                        polynomial = (polynomial + tl.load(weights + (1 + DEGREE - p) * TERMS + j)) * theta
                    polynomial = tl.where(theta == 1.0, tl.load(weights + j), polynomial)  # there it is y₁
                    k_j = tl.load(k[j] + element, mask=present, other=0.0).to(COMPUTE)
                    value += (h * polynomial).to(COMPUTE)[:, None] * k_j
                tl.store(solution + output[:, None] * columns + column[None, :], from_float(value, DTYPE), mask=present)
            cursor += due.to(tl.int32)
            more = due & (cursor < outputs)
            time = tl.load(t_eval + row * t_eval_stride + cursor, mask=more, other=float("nan"))
            due = (time - t_next) * forward <= 0.0
        tl.store(counters + CURSOR * rows + row, cursor, mask=writes)

    tl.debug_barrier()
    for tile in range(STEPS):
        column = first_column + tile * BLOCK + tl.arange(0, BLOCK)
        present = accepted[:, None] & (column < columns)[None, :]
        element = row[:, None] * columns + column[None, :]
        y1, last = weighted(tl.load(y + element, mask=present, other=0.0).to(COMPUTE), k, element, present, h, weights)
        tl.store(y + element, from_float(y1, DTYPE), mask=present)
        tl.store(k[0] + element, from_float(last, DTYPE), mask=present)


def cut(rows: int, columns: int, terms: int, dtype: torch.dtype) -> Tile:
    """As ``Tile.of``, but a row's sums follow from its length alone, and one of up to LONG_ROW is in one program."""
    # Elements of a thread, so many that none spill: each has an address where rows are not aligned, and beside those
    # of short rows a thread holds their step control.
    each, warps = 2 >> (columns % 4 > 0), 4
    if columns > SHORT_ROW:
        each = 8 >> (terms > 8) >> (columns % 4 > 0)
        warps = min(max(next_power_of_2(columns) // (32 * each), 2), 8)
    each = max(each // 2, 1) if dtype == torch.float64 else each
    elements = 32 * warps * each
    block_groups = min(next_power_of_2(cdiv(columns, 4)), elements // 4)
    block_rows = elements // (4 * block_groups)
    tiles = max(cdiv(columns, 4 * block_groups), 1)
    steps = tiles if columns <= LONG_ROW else next_power_of_2(cdiv(tiles, MAX_PARTS))
    parts = cdiv(tiles, steps)
    align = min(columns & -columns, 16) or 16
    return Tile(block_rows, block_groups, steps, warps, align, parts, cdiv(rows, block_rows) * parts)


def runge_kutta_step_(
    y, k_first, k, control, counters, weights, settings, rtol, atol, segments, components, ratio, t_eval, solution
):  # fmt: skip
    """``counters[RUNNING]`` must begin with the number of running samples: those that stop are subtracted."""
    overwritten = (y, k_first, control, counters, solution)
    y, k_first, control, counters, solution = (v if v is None else v.contiguous() for v in overwritten)
    weights, settings, rtol, atol, segments = (v.contiguous() for v in (weights, settings, rtol, atol, segments))
    rows = 1 if control.dim() == 1 else control.shape[1]
    columns = y.numel() // max(rows, 1)
    tile, device = cut(rows, columns, 1 + len(k), y.dtype), y.device
    if t_eval is not None and t_eval.numel() == 0:
        t_eval = None
    data = y, (k_first, *(k_j.contiguous() for k_j in k))
    numbers = rows, columns, *(0 if v.shape[0] == 1 else v.shape[1] for v in (rtol, atol))
    parts = segments.shape[0] if ratio is None else 1
    constants = {
        "RTOL_BY_ELEMENT": rtol.shape[1] > 1, "ATOL_BY_ELEMENT": atol.shape[1] > 1, "COMPONENTS": components,
        "SEGMENTS": parts, "SEGMENT_BLOCK": next_power_of_2(parts), **tile.constants,
    }  # fmt: skip
    old_control, old_counters, sums = control, counters, None
    if tile.column_programs > 1:
        old_control, old_counters = torch.empty_like(control), torch.empty_like(counters)
        sums = torch.empty(rows * parts * tile.column_programs, dtype=state_time_dtype(y), device=device)
        launch(
            runge_kutta_error_kernel, tile.programs, *data, control, counters, old_control, old_counters, sums, weights,
            rtol, atol, segments, *numbers, tile.column_programs, HAS_RATIO=ratio is not None, device=device,
            **constants,
        )  # fmt: skip
    launch(
        runge_kutta_step_kernel, tile.programs, *data, control, counters, old_control, old_counters, sums, weights,
        settings, rtol, atol, segments, ratio if ratio is None else ratio.contiguous(),
        t_eval if t_eval is None else t_eval.contiguous(), solution, *numbers,
        0 if ratio is None or ratio.numel() == 1 else 1,
        0 if t_eval is None or t_eval.dim() == 1 else t_eval.shape[1],
        0 if t_eval is None else t_eval.shape[-1], tile.column_programs, DEGREE=weights.shape[0] - 2,
        PARTS=next_power_of_2(tile.column_programs), device=device, **constants,
    )  # fmt: skip
    for tensor, written in zip(overwritten, (y, k_first, control, counters, solution)):
        if written is not tensor:
            tensor.copy_(written)
