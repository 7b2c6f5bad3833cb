"""Triton kernels of ``marginal_field``: what a tile of products adds to each query, and the moments at the end.

The products are torch's: logits in float32 need IEEE products, for which cuBLAS is the fastest, and no tensor core
helps. Per tile of points one product, one kernel, one product; nothing is read on the host. The algorithm is that of
csrc/cpu/marginal_field.cpp, but for lists of one length and a second product for every tile.
"""

import contextlib
import math

import torch
import triton
import triton.language as tl

from ..ops.marginal_field import measure
from ._tile import launch, next_power_of_2

LIST = 32  # points a query keeps apart, whose logits are taken again from differences
TILE = 4096  # points of a tile, at most; half as many in float64
PRODUCTS = 2**23  # of a tile
QUERIES = 4096  # of a tile, at most
BLOCK = 32  # columns at once where a query meets the points of its list
ROW_BLOCK = 1024  # columns at once where a point is added up
REBASE = tl.constexpr(16.0)  # how far the largest logit may rise before what is added up is scaled anew
NOTHING = tl.constexpr(-math.inf)

# Columns of the tables: what holds for a query, and what becomes of it.
SCALE, SQUARE, CUT, SHIFT, ERROR, ALPHA, SIGMA, PARAMETERS = (tl.constexpr(i) for i in range(8))
PEAK, REFERENCE, WEIGHT, MOMENT, STATES = (tl.constexpr(i) for i in range(5))


@triton.jit
def visit_kernel(
    products, data, halves, log_weights, parameters, states, logits, points, sums, first: tl.int64, count: tl.int64,
    dims: tl.int64, LIST: tl.constexpr, TILE: tl.constexpr, ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Products become the weights of the points to be added up; those that weigh most go into the list instead."""
    T: tl.constexpr = products.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    present = column < count
    slot = tl.arange(0, LIST)
    parameters += row * PARAMETERS
    states += row * STATES
    sums += row * dims
    half = tl.load(halves + first + column, mask=present, other=0.0)
    bias = tl.load(parameters + SQUARE).to(T) * half
    if log_weights is not None:
        bias += tl.load(log_weights + first + column, mask=present, other=0.0)
    s = tl.load(products + row * count + column, mask=present, other=0.0)
    s = tl.where(present, tl.load(parameters + SCALE).to(T) * s + bias, NOTHING)
    best = tl.max(s, axis=0)
    old_peak = tl.load(states + PEAK).to(T)
    peak = tl.where(best > old_peak, best, old_peak)
    floor = peak - tl.load(parameters + CUT).to(T)
    reference = tl.load(states + REFERENCE).to(T)
    weight = tl.load(states + WEIGHT)
    moment = tl.load(states + MOMENT)

    if peak > reference + REBASE:
        factor = tl.exp(reference - peak)
        weight *= factor
        moment *= factor
        for start in range(0, dims, ROW_BLOCK):
            j = start + tl.arange(0, ROW_BLOCK)
            tl.store(sums + j, tl.load(sums + j, mask=j < dims, other=0.0) * factor, mask=j < dims)
        reference = peak

    kept = tl.load(logits + row * LIST + slot)
    index = tl.load(points + row * LIST + slot)
    least = tl.min(kept, axis=0)
    while (best > least) & (best > floor):
        position = tl.argmax(s, axis=0)
        worst = tl.argmin(kept, axis=0)
        evicted = tl.sum(tl.where(slot == worst, index, 0), axis=0)
        if least > floor:
            p = tl.exp(least - reference)
            weight += p
            moment += p * tl.load(halves + evicted)
            tl.debug_barrier()  # scaled above by other threads
            for start in range(0, dims, ROW_BLOCK):
                j = start + tl.arange(0, ROW_BLOCK)
                value = tl.load(data + evicted * dims + j, mask=j < dims, other=0.0)
                tl.store(sums + j, tl.load(sums + j, mask=j < dims, other=0.0) + p * value, mask=j < dims)
        kept = tl.where(slot == worst, best, kept)
        index = tl.where(slot == worst, first + position, index)
        s = tl.where(column == position, NOTHING, s)
        best = tl.max(s, axis=0)
        least = tl.min(kept, axis=0)
    tl.store(logits + row * LIST + slot, kept)
    tl.store(points + row * LIST + slot, index)

    p = tl.where(s > floor, tl.exp(s - reference), 0.0)
    tl.store(products + row * count + column, p, mask=present)
    tl.store(states + PEAK, peak.to(tl.float64))
    tl.store(states + REFERENCE, reference.to(tl.float64))
    tl.store(states + WEIGHT, weight + tl.sum(p, axis=0).to(tl.float64))
    tl.store(states + MOMENT, moment + tl.sum(p * half, axis=0).to(tl.float64))


@triton.jit
def conclude_kernel(
    x, data, centre, halves, log_weights, parameters, states, logits, points, mean, residual, log_sum, kappa,
    log_points, dims: tl.int64, LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The moments from the list, taken again from differences, and what was added up, which stands in ``mean``."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, LIST)
    parameters += row * PARAMETERS
    states += row * STATES
    alpha = tl.load(parameters + ALPHA)
    sigma = tl.load(parameters + SIGMA)
    reference = tl.load(states + REFERENCE)
    logit = tl.load(logits + row * LIST + slot).to(tl.float64)
    index = tl.load(points + row * LIST + slot)
    used = logit >= tl.load(states + PEAK) - tl.load(parameters + CUT)
    used = used & (logit > NOTHING)

    distance = tl.zeros([LIST], tl.float64)
    for start in range(0, dims, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < dims
        at = tl.load(x + row * dims + j, mask=inside, other=0.0).to(tl.float64)
        near = tl.load(data + index[:, None] * dims + j[None, :], mask=used[:, None] & inside[None, :], other=0.0)
        difference = at[None, :] - alpha * near.to(tl.float64)
        distance += tl.sum(difference * difference, axis=1)
    exact = -distance * (0.5 / (sigma * sigma))
    if log_weights is not None:
        exact += tl.load(log_weights + index, mask=used, other=0.0)
    exact = tl.where(used, exact, NOTHING)
    best = tl.max(exact, axis=0)
    star = tl.min(tl.where(used & (exact == best), index, 0x7FFFFFFFFFFFFFFF), axis=0)
    expected = tl.sum(tl.where(used & (index == star), logit, 0.0), axis=0)
    weights = tl.exp(exact - best)  # NaN where the list is empty: NaN or infinities came in
    star = tl.where(star == 0x7FFFFFFFFFFFFFFF, 0, star)
    # From logits of products to those of distances; where products are far off, those of near points are so alike.
    shift = tl.where(tl.load(parameters + ERROR) > 1.0, expected - best, tl.load(parameters + SHIFT))
    factor = tl.where(reference == NOTHING, 0.0, tl.exp(reference - shift - best))
    rest = factor * tl.load(states + WEIGHT)
    total = tl.sum(weights, axis=0) + rest

    spread = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    product = tl.zeros([BLOCK], tl.float64)
    for start in range(0, dims, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < dims
        at = tl.load(data + star * dims + j, mask=inside, other=0.0).to(tl.float64)
        near = tl.load(data + index[:, None] * dims + j[None, :], mask=used[:, None] & inside[None, :], other=0.0)
        difference = tl.where(used[:, None], near.to(tl.float64) - at[None, :], 0.0)
        weighted = weights[:, None] * difference
        spread += tl.sum(weighted * difference, axis=0)
        c = tl.load(centre + j, mask=inside, other=0.0).to(tl.float64)
        added = factor * tl.load(mean + row * dims + j, mask=inside, other=0.0).to(tl.float64)
        d = (tl.sum(weighted, axis=0) + (added - rest * at)) / total
        product += (added - rest * c) * (at - c)
        square += d * d
        here = tl.load(x + row * dims + j, mask=inside, other=0.0).to(tl.float64)
        tl.debug_barrier()  # no thread may still read what others overwrite
        tl.store(residual + row * dims + j, ((here - alpha * at) - alpha * d).to(x.dtype.element_ty), mask=inside)
        tl.store(mean + row * dims + j, (at + d).to(x.dtype.element_ty), mask=inside)
    apart = factor * tl.load(states + MOMENT) - tl.sum(product, axis=0) + rest * tl.load(halves + star)
    variance = (tl.sum(spread, axis=0) + 2.0 * apart) / total - tl.sum(square, axis=0)
    tl.store(kappa + row, tl.where(variance < 0.0, 0.0, variance))
    tl.store(log_sum + row, best + tl.log(total) - tl.load(log_points))


@contextlib.contextmanager
def ieee_products(device: torch.device):
    """Products of float32 tensors in float32, whatever torch.set_float32_matmul_precision says: no TF32."""
    settings = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def parameter_table(y, rounded, alpha, sigma, centre, halves, points: int) -> torch.Tensor:
    """What holds for each query, float64 ``[B, PARAMETERS]``: see ``query`` in csrc/cpu/marginal_field.cpp."""
    unit, rounding = torch.finfo(rounded.dtype).eps / 2, 25 if rounded.dtype == torch.float32 else 45
    variance, square = sigma.square(), y.square().sum(1)
    radius = (2 * halves.max()).sqrt()
    reach = alpha * radius
    error = 8 * unit * (square.sqrt() * alpha * (radius + centre.double().norm()) + reach.square()) / variance
    shift = (0.5 * square + alpha * (rounded.double() @ centre.double())) / variance
    columns = [alpha / variance, -alpha.square() / variance, rounding + math.log(points) + 2 * error, shift, error]
    return torch.stack([*columns, alpha, sigma], 1)


def marginal_field(x, alpha, sigma, data, log_weights, centre, half_squares):
    rows, dims = x.shape
    points, device = data.shape[0], x.device
    mean = torch.zeros(x.shape, dtype=x.dtype, device=device)  # begins as Σ p x_i
    residual = torch.empty(x.shape, dtype=x.dtype, device=device)
    log_sum, kappa = (torch.empty(rows, dtype=torch.float64, device=device) for _ in range(2))
    if rows == 0:
        return mean, residual, log_sum, kappa
    x, data = x.contiguous(), data.contiguous()
    centre, halves = measure(data) if centre is None else (centre.contiguous(), half_squares.contiguous())
    log_weights = None if log_weights is None else log_weights.contiguous()
    log_points = torch.full(
        (1,), 0.0 if log_weights is not None else math.log(points), dtype=torch.float64, device=device
    )
    queries = min(rows, QUERIES)
    tile = min(points, TILE * 4 // x.dtype.itemsize, max(PRODUCTS // queries, 128))
    products = torch.empty(queries * tile, dtype=x.dtype, device=device)
    for start in range(0, rows, queries):
        part = slice(start, min(start + queries, rows))
        query_tile(
            x[part], alpha[part], sigma[part], data, log_weights, centre, halves, log_points, products, tile,
            mean[part], residual[part], log_sum[part], kappa[part],
        )  # fmt: skip
    return mean, residual, log_sum, kappa


def query_tile(
    x, alpha, sigma, data, log_weights, centre, halves, log_points, products, tile, mean, residual, log_sum, kappa
):  # fmt: skip
    (rows, dims), points, device = x.shape, data.shape[0], x.device
    y = x.double() - alpha[:, None] * centre.double()
    residual.copy_(y)  # in x's dtype, where the residual will stand
    parameters = parameter_table(y, residual, alpha, sigma, centre, halves, points)
    del y
    near_halves, near_weights = halves.to(x.dtype), None if log_weights is None else log_weights.to(x.dtype)
    states = torch.zeros(rows, STATES.value, dtype=torch.float64, device=device)
    states[:, : WEIGHT.value] = -math.inf
    logits = torch.full((rows, LIST), -math.inf, dtype=x.dtype, device=device)
    index = torch.zeros(rows, LIST, dtype=torch.int64, device=device)
    with ieee_products(device):
        for first in range(0, points, tile):
            count = min(tile, points - first)
            part, here = products[: rows * count].view(rows, count), data[first : first + count]
            torch.mm(residual, here.T, out=part)
            launch(
                visit_kernel, rows, part, data, near_halves, near_weights, parameters, states, logits, index, mean,
                first, count, dims, LIST=LIST, TILE=next_power_of_2(tile), num_warps=8,
                ROW_BLOCK=min(ROW_BLOCK, next_power_of_2(dims)), device=device,
            )  # fmt: skip
            mean.addmm_(part, here)
    launch(
        conclude_kernel, rows, x, data, centre, halves, log_weights, parameters, states, logits, index, mean, residual,
        log_sum, kappa, log_points, dims, LIST=LIST, BLOCK=min(BLOCK, next_power_of_2(dims)), num_warps=4,
        device=device,
    )  # fmt: skip
