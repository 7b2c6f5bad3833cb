"""Triton kernel of ``sample_path``: draw t and noise, form x_t and the row's table, in one launch."""

import math

import torch
import triton
import triton.language as tl

from ..ops.sample_path import STORE_X0, STORE_Z, time_dtype
from ._math import (
    STREAM_BRIDGE,
    STREAM_X0,
    clamp,
    from_float,
    normals,
    objective_row,
    objective_weight,
    scalar,
    schedule_coefficients,
    timestep_inverse_cdf,
    timestep_uniform,
)
from ._tile import Tile, aligned, launch, program_column, program_rows


@triton.jit(
    do_not_specialize=["rows", "columns", "first_row", "strata"], do_not_specialize_on_alignment=["column_programs"]
)
def sample_path_kernel(
    x1, x0, t, coefficients, key, x_t, t_out, table, x0_out, z_out,
    rows: tl.int64, columns: tl.int64, first_row: tl.int64, strata: tl.int64, column_programs,
    s0: tl.float64, s1: tl.float64, t_low: tl.float64, t_high: tl.float64, q0: tl.float64, q1: tl.float64,
    shift: tl.float64, o0: tl.float64, weight_k: tl.float64,
    SCHEDULE: tl.constexpr, BRIDGE: tl.constexpr, SAMPLER: tl.constexpr, STRATIFIED: tl.constexpr,
    SHIFTED: tl.constexpr, PREDICTION: tl.constexpr, COMPARE: tl.constexpr, WEIGHT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 4 * BLOCK_GROUPS
    DTYPE: tl.constexpr = x1.dtype.element_ty
    TIME: tl.constexpr = table.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    seed = tl.load(key)
    columns = aligned(columns, ALIGN)
    row = program_rows(column_programs, BLOCK_ROWS)
    first_column = program_column(column_programs, STEPS * BLOCK)
    inside = row < rows

    low, high = scalar(t_low, TIME), scalar(t_high, TIME)
    if t is None:
        u = timestep_uniform(seed, first_row + row, strata, STRATIFIED)
        drawn = timestep_inverse_cdf(
            SAMPLER, scalar(q0, tl.float64), scalar(q1, tl.float64), scalar(shift, tl.float64), SHIFTED, u
        )
        time = clamp(drawn.to(TIME), low, high)
    else:
        time = tl.load(t + row, mask=inside, other=0.0).to(TIME)
    if coefficients is None:
        alpha, sigma, gamma, d_alpha, d_sigma, d_gamma = schedule_coefficients(
            SCHEDULE, scalar(s0, TIME), scalar(s1, TIME), clamp(time, low, high)
        )
    else:
        own = coefficients + row * 6
        alpha, d_alpha = tl.load(own, mask=inside, other=0.0), tl.load(own + 3, mask=inside, other=0.0)
        sigma, d_sigma = tl.load(own + 1, mask=inside, other=0.0), tl.load(own + 4, mask=inside, other=0.0)
        gamma, d_gamma = tl.load(own + 2, mask=inside, other=0.0), tl.load(own + 5, mask=inside, other=0.0)
    p, a, b, c, network_time, scale = objective_row(
        PREDICTION, COMPARE, scalar(o0, TIME), time, alpha, sigma, d_alpha, d_sigma, d_gamma
    )
    w = objective_weight(WEIGHT, scalar(weight_k, TIME), PREDICTION, alpha, sigma, d_alpha, d_sigma)

    first = row < tl.where(first_column == 0, rows, 0)  # the first program of a row writes what the row has once
    table += row * 6
    tl.store(t_out + row, time, mask=first)
    tl.store(table, p, mask=first)
    tl.store(table + 1, a, mask=first)
    tl.store(table + 2, b, mask=first)
    tl.store(table + 3, c, mask=first)
    tl.store(table + 4, w, mask=first)
    tl.store(table + 5, network_time, mask=first)

    alpha = (alpha * scale).to(COMPUTE)[:, None]
    sigma = (sigma * scale).to(COMPUTE)[:, None]
    gamma = (gamma * scale).to(COMPUTE)[:, None]
    base = row[:, None] * columns
    for step in range(STEPS):
        start = first_column + step * BLOCK
        group = start // 4 + tl.arange(0, BLOCK_GROUPS)
        column = start + tl.arange(0, BLOCK)
        element = base + column[None, :]
        kept = inside[:, None] & (column < columns)[None, :]
        if x0 is None:
            source = normals(seed, first_row + row, group, scalar(STREAM_X0, tl.uint32), DTYPE)
        else:
            source = tl.load(x0 + element, mask=kept)
        value = alpha * tl.load(x1 + element, mask=kept).to(COMPUTE) + sigma * source.to(COMPUTE)
        if BRIDGE:
            z = normals(seed, first_row + row, group, scalar(STREAM_BRIDGE, tl.uint32), DTYPE)
            value += gamma * z.to(COMPUTE)
            if z_out is not None:
                tl.store(z_out + element, z, mask=kept)
        tl.store(x_t + element, from_float(value, DTYPE), mask=kept)
        if x0_out is not None:
            tl.store(x0_out + element, source, mask=kept)


def sample_path(
    x1, x0, t, coefficients, key, first_row, strata, t_dims, schedule, s0, s1, t_low, t_high, bridge, sampler, q0, q1,
    shift, prediction, compare, o0, weight, weight_k, store,
):  # fmt: skip
    times, prefix = time_dtype(x1, t), x1.shape[:t_dims]
    x_t = torch.empty(x1.shape, dtype=x1.dtype, device=x1.device)
    t_out = torch.empty(prefix, dtype=times, device=x1.device)
    table = torch.empty((*prefix, 6), dtype=times, device=x1.device)
    x0_out = torch.empty(x1.shape if store & STORE_X0 else 0, dtype=x1.dtype, device=x1.device)
    z_out = torch.empty(x1.shape if store & STORE_Z else 0, dtype=x1.dtype, device=x1.device)
    rows, columns = math.prod(prefix), math.prod(x1.shape[t_dims:])
    tile = Tile.of(rows, columns, x1.dtype)
    inputs = (None if tensor is None else tensor.contiguous() for tensor in (x1, x0, t, coefficients, key))
    launch(
        sample_path_kernel, tile.programs, *inputs, x_t, t_out, table,
        x0_out if store & STORE_X0 else None, z_out if store & STORE_Z else None,
        rows, columns, first_row, strata, tile.column_programs, s0, s1, t_low, t_high, q0, q1, shift, o0, weight_k,
        SCHEDULE=schedule, BRIDGE=bridge, SAMPLER=sampler, STRATIFIED=strata > 0, SHIFTED=shift != 1,
        PREDICTION=prediction, COMPARE=compare, WEIGHT=weight, device=x1.device, **tile.constants,
    )  # fmt: skip
    return x_t, t_out, table, x0_out, z_out
