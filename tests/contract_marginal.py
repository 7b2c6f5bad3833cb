"""The posterior moments of a dataset in the contract suite: see :mod:`contract`."""

from __future__ import annotations

import math

import torch
from contract_op import F32, F64, INTERPRETED, SHAPES, ULPS, Data, Expected, Function, Op, captured, eps

import fmkernels as fmk
from fmkernels.ops.marginal_field import measure, posterior_moments

TIMES = {"noise": (0.0, 0.05), "middle": (0.1, 0.7), "late": (0.9, 0.99), "data": (0.999, 1 - 1e-5), "all": (0.0, 1.0)}
POINTS = {"N1": 1, "N7": 7, "N530": 530}  # more than a tile of the CPU, and than any list
CLONES = {"distinct": 1, "clones": 3}


def make_marginal(levels, device):
    (shape, dims), data = levels["shape"], Data(levels["seed"], device)
    rows, columns, count, dtype = math.prod(shape[:dims]), math.prod(shape[dims:]), levels["points"], levels["dtype"]
    points = data.normal((count, columns), dtype)
    points = points[torch.arange(count, device=device) // levels["clones"]] + levels["offset"]
    alpha = data.uniform((rows,), *levels["times"], F64)
    sigma = (1 - alpha).clamp_min(1e-5)
    source = points[(torch.arange(rows, device=device) * 17) % count].double()
    x = (alpha[:, None] * source + sigma[:, None] * data.normal((rows, columns), F64)).to(dtype)
    log_weights = data.uniform((count,), 0.01, 1.0, F64).log() if levels["weights"] != "equal" else None
    if levels["weights"] == "some":
        log_weights[1::2] = -math.inf
    statistics = measure(points) if levels["statistics"] else (None, None)
    return captured("marginal_field", lambda: fmk.ops.marginal_field(x, alpha, sigma, points, log_weights, *statistics))


def marginal_valid(levels):
    (shape, dims) = levels["shape"]
    rows = math.prod(shape[:dims])
    if INTERPRETED and rows > 12:  # a program a row
        return False
    return rows * math.prod(shape[dims:]) * levels["points"] <= 2**24


def marginal_oracle(arguments, outputs):
    """The formulas in fp64, with the error of a logit from products allowed for all that competes."""
    x, alpha, sigma, data, log_weights, *_ = arguments
    wide = posterior_moments(x.double(), alpha, sigma, data.double(), log_weights)
    mean, residual, log_sum, kappa = wide
    few = ULPS * eps(x.dtype)
    centre = data.double().mean(0)
    norm = data.double().norm(dim=1).amax()
    radius = (data.double() - centre).norm(dim=1).amax()
    y = (x.double() - alpha[:, None] * centre).norm(dim=1)
    error = few * (1 + alpha * (y * norm + alpha * radius.square()) / sigma.square())
    spread = kappa.clamp_min(0).sqrt()
    # Equal numbers add up with roundings that are all alike.
    column = (torch.where(radius < 1e-3 * norm, 16 * few, few) * norm + error.clamp_max(1) * spread)[:, None]
    # Nothing of the mean's own rounding reaches the residual where one point outweighs the others.
    competing = alpha * (error.clamp_max(1) * spread + few * radius * (spread > 1e-3 * radius) + 1e-9 * spread)
    competing = competing + 16 * few * alpha * norm * (radius < 1e-3 * norm)
    place = ULPS * eps(F64) * (norm + x.double().norm(dim=1))  # the oracle's own rounding of x − αx_i
    slack = (competing + few * residual.norm(dim=1) + place)[:, None]
    left_out = {F32: 1e-10, F64: 1e-19}[x.dtype] * norm.square()  # weights too small to be added up
    moment = left_out + few * radius.square() * (spread > 1e-3 * radius) + 4 * error.clamp_max(1) * kappa
    numbers = (
        torch.where(spread > 1e-6 * radius, error, few * (radius == 0))
        + place / sigma * (1 + log_sum.abs())
        + 1e-9 * (few > 1e-9)
    )
    return [
        Expected(mean, column), Expected(residual, slack), Expected(log_sum, numbers),
        Expected(kappa, moment),
    ]  # fmt: skip


def marginal_functions(device) -> list[Function]:
    data = Data(3, device)
    x, points = data.normal((2, 3), F64), data.normal((4, 3), F64)
    alpha, sigma = data.uniform((2,), 0.2, 0.6, F64), data.uniform((2,), 0.5, 1.0, F64)
    log_weights = data.uniform((4,), 0.1, 1.0, F64).log()

    def moments(*inputs):
        return tuple(fmk.ops.marginal_field(*inputs))

    return [Function("weighted", moments, (x, alpha, sigma, points, log_weights))]


MARGINAL_FIELD = Op(
    "marginal_field",
    {
        "shape": SHAPES,
        "dtype": {"f32": F32, "f64": F64},
        "points": POINTS,
        "times": TIMES,
        "clones": CLONES,
        "offset": {"centred": 0.0, "offset": 3.0},
        "weights": {"equal": "equal", "weighted": "weighted", "some": "some"},
        "statistics": {"measured": False, "given": True},
    },
    make_marginal,
    marginal_oracle,
    valid=marginal_valid,
    functions=marginal_functions,
    sum_ulps=64,
    paired=(3, 5, 6),  # data and what was measured of them
)

OPS = (MARGINAL_FIELD,)
