"""The registry of the contract suite: every op of the library, how to sample it, and what its values must be.

A new op joins the tests by an :class:`Op` in ``OPS``. Its samples are the arguments with which the public function
reaches ``torch.ops.fmkernels.<name>``: one for every combination of a pairwise cover of its factors. Those of the
solvers are in :mod:`contract_ode`, the probes in :mod:`contract_probe`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import contract_conditional_flow
import contract_marginal
import contract_ode
import contract_probe
import torch
from contract_op import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    FIRST_ROWS,
    INTERPRETED,
    NORMAL_ERROR,
    SHAPES,
    ULPS,
    Data,
    Expected,
    Function,
    Op,
    captured,
    eps,
    pairwise,
    row_sums,
    rows_of,
)

import fmkernels as fmk
from fmkernels import _registration
from fmkernels.objectives import RHOS, TERM_X0, TERM_X1, TERM_Z, objective_table
from fmkernels.ops.matching_loss import MEAN, NONE, SUM
from fmkernels.ops.noise import DISTRIBUTIONS, STREAMS, noise_reference, timestep_uniform
from fmkernels.ops.sample_path import _rebuild_sampler, _rebuild_schedule, draw_times
from fmkernels.schedules import Coefficients

# ---- noise ------------------------------------------------------------------------------------------------------


def make_noise(levels, device):
    shape, dims = levels["shape"]
    key = torch.tensor([levels["key"] + levels["seed"]], device=device)
    rows, columns = math.prod(shape[:dims]), math.prod(shape[dims:])
    options = {name: levels[name] for name in ("stream", "index", "first_row", "dtype", "distribution")}
    return captured("noise", lambda: fmk.ops.noise(key, rows, columns, **options))


def noise_oracle(arguments, outputs):
    *description, distribution, dtype = arguments
    value = noise_reference(*description, distribution, F64)
    return [Expected(value, NORMAL_ERROR[F64 if dtype == F64 else F32] if distribution == 0 else 0.0)]


def noise_part(arguments, row):
    key, _, columns, first_row, *rest = arguments
    return (key, 1, columns, first_row + row, *rest)


NOISE = Op(
    "noise",
    {
        "shape": SHAPES,
        "dtype": DTYPES,
        "distribution": {name: name for name in DISTRIBUTIONS},
        "stream": {name: name for name in STREAMS},
        "index": {"index0": 0, "index7": 7, "index_last": 2**24 - 1},
        "first_row": FIRST_ROWS | {"first2^40": 2**40},
        "key": {"key0": 0, "key-1": -1, "key62": 2**62 + 12345},
    },
    make_noise,
    noise_oracle,
    part=noise_part,
)


# ---- sample_path ------------------------------------------------------------------------------------------------


def quadratic(t):
    return t * t, 1 - t


def smooth_bridge(t):
    return t, torch.cos(1.5 * t), 0.3 * t * (1 - t)


SCHEDULES = {
    "CondOT": fmk.CondOT(),
    "CondOT_floor": fmk.CondOT(0.02, t_range=(0.001, 1.0)),
    "VP": fmk.VP(),
    "VE": fmk.VE(),
    "Cosine": fmk.Cosine(t_range=(0.01, 1.0)),
    "LinearVP": fmk.LinearVP(),
    "SubVP": fmk.SubVP(0.2, 15.0),
    "Polynomial": fmk.Polynomial(2.5),
    "Polynomial_root": fmk.Polynomial(0.5),
    "ConstantNoise": fmk.ConstantNoise(0.1),
    "SchrodingerBridge": fmk.SchrodingerBridge(0.7),
    "Custom": fmk.Custom(quadratic, t_range=(0.05, 0.95)),
    "Custom_bridge": fmk.Custom(smooth_bridge, bridge=True),
}
OBJECTIVES = {
    "velocity": {},
    "noise": {"prediction": "noise"},
    "data": {"prediction": "data"},
    "score": {"prediction": "score"},
    "edm": {"prediction": "edm"},
    "noise_as_velocity": {"prediction": "noise", "compare": "velocity"},
    "data_as_velocity": {"prediction": "data", "compare": "velocity"},
    "score_as_velocity": {"prediction": "score", "compare": "velocity"},
    "velocity_min_snr": {"weight": "min_snr"},
    "noise_min_snr": {"prediction": "noise", "weight": fmk.MinSNR(2.0)},
    "data_min_snr": {"prediction": "data", "weight": fmk.MinSNR(2.0)},
    "sigma_sqrt": {"weight": "sigma_sqrt"},
    "cosmap": {"prediction": "data", "compare": "velocity", "weight": "cosmap"},
    "score_likelihood": {"prediction": "score", "weight": "likelihood"},
    "noise_likelihood": {"prediction": "noise", "weight": "likelihood"},
}
TIMES = {  # a sampler, or the dtype of given times
    "Uniform": fmk.Uniform(),
    "Uniform_part": fmk.Uniform(0.2, 0.9, shift=3.0),
    "LogitNormal": fmk.LogitNormal(0.3, 1.2),
    "LogitNormal_stratified": fmk.LogitNormal(stratified=True, shift=0.5),
    "Mode": fmk.Mode(),
    "CosMap": fmk.CosMap(stratified=True),
    "Beta": fmk.Beta(1.5, 0.999),
    "given32": F32,
    "given64": F64,
}


def edge_times(data: Data, shape, dtype) -> torch.Tensor:
    """Times of which the first are the ends and their neighbourhood."""
    edges = torch.tensor([0.0, 1.0, 1 - 2.0**-24, 1e-6, 0.5, 1 - 1e-5], dtype=dtype, device=data.device)
    t = data.uniform(shape, dtype=dtype)
    flat = t.reshape(-1)
    flat[: len(edges)] = edges[: len(flat)]
    return flat.reshape(shape)


def path_call(levels, device) -> Callable:
    """The public call of a combination."""
    shape, dims = levels["shape"]
    data, times = Data(levels["seed"], device), levels["times"]
    drawn = isinstance(times, fmk.TimestepSampler)
    first = levels["first_row"]
    options = {
        "x0": data.normal(shape, levels["dtype"]) if levels["source"] == "given" else None,
        "t": None if drawn else edge_times(data, shape[:dims], times),
        "key": data.key(),
        "objective": fmk.objectives.Objective(levels["schedule"], **levels["objective"]),
        "timesteps": times if drawn else None,
        "t_dims": dims,
        "first_row": first,
        "total_rows": first + max(math.prod(shape[:1]), 1) + 3 if drawn and times.stratified else None,
        "store": levels["store"],
    }
    x1 = data.normal(shape, levels["dtype"])
    return lambda: fmk.ops.sample_path(x1, **options)


def path_valid(levels) -> bool:
    times = levels["times"]
    if getattr(times, "stratified", False) and levels["first_row"] > 2**20:
        return False
    try:
        fmk.objectives.Objective(levels["schedule"], **levels["objective"])
    except ValueError:
        return False
    return True


def path_coefficients(t, coefficients, schedule, s0, s1, low, high) -> tuple[Callable, torch.Tensor]:
    """The schedule of the arguments as an fp64 function, and where it is evaluated: t clamped in its own precision."""
    if coefficients is not None:
        return lambda _: Coefficients(*coefficients.double().unbind(-1)), t.double()
    return _rebuild_schedule(schedule, s0, s1).coefficients, t.clamp(low, high).double()


def path_oracle(arguments, outputs):
    (
        x1, x0, given, coefficients, key, first_row, strata, dims, schedule, s0, s1, low, high, bridge, sampler, q0, q1,
        shift, prediction, compare, o0, weight, k, store,
    ) = arguments  # fmt: skip
    t = outputs[1]
    evaluate, at = path_coefficients(t, coefficients, schedule, s0, s1, low, high)

    def rows(time):
        v = evaluate(time)
        table, scale = objective_table(t.double(), v, prediction, compare, o0, weight, k)
        return table, torch.stack([v.alpha * scale, v.sigma * scale, v.gamma * scale], dim=-1)

    values, slopes = torch.func.jvp(rows, (at,), (torch.ones_like(at),))
    table, path = values
    # A rounding of t is among the few ulp: it is what, say, 1 − tⁿ near t = 1 amounts to.
    table_size, path_size = (v.abs() + (at.unsqueeze(-1) * s).abs() for v, s in zip(values, slopes))

    def drawn(stream):
        shape = x1.shape
        return torch.ops.fmkernels.noise(
            key, math.prod(shape[:dims]), math.prod(shape[dims:]), first_row, STREAMS[stream], 0, 0, x1.dtype
        ).reshape(shape)

    source = drawn("x0") if x0 is None else x0
    z = drawn("bridge") if bridge else torch.zeros_like(x1)
    parts = [part.double() for part in (x1, source, z)]
    x_t = sum(rows_of(c, x1.dim()) * part for c, part in zip(path.unbind(-1), parts))
    size = sum(rows_of(c, x1.dim()) * part.abs() for c, part in zip(path_size.unbind(-1), parts))
    compute = F64 if x1.dtype == F64 else F32
    few, few_t = ULPS * eps(compute), ULPS * eps(t.dtype)
    return [
        Expected(x_t, few * size),
        time_oracle(given, key, first_row, strata, t, _rebuild_sampler(sampler, q0, q1, shift), low, high),
        Expected(table, few_t * table_size),
        Expected(source.double()) if store & 1 else None,
        Expected(z.double()) if store & 2 else None,
    ]


def path_reference(arguments, outputs):
    """At the times that came out: a drawn time may round otherwise, and all that follows from it."""
    x1, x0, t, _, key, first_row, strata, dims, _, _, _, low, high, _, sampler, q0, q1, shift, *_ = arguments
    reference = _registration.references["sample_path"]
    x_t, given, *rest = reference(x1, x0, outputs[1], *arguments[3:])
    if t is None:
        given = draw_times(key, x1, dims, first_row, strata, _rebuild_sampler(sampler, q0, q1, shift), low, high)
    return x_t, given, *rest


def time_oracle(given, key, first_row, strata, t, sampler, low, high) -> Expected:
    if given is not None:
        return Expected(given.double())
    u = timestep_uniform(key, t.numel(), first_row, strata)
    value = sampler.inverse_cdf(u).clamp(low, high).reshape(t.shape)
    return Expected(value, 1e-13)  # inverse distribution functions agree to a few fp64 ulp


def path_part(arguments, row):
    x1, x0, t, coefficients, key, first_row, strata, dims, *rest = arguments
    assert dims == 1
    one = slice(row, row + 1)
    return (
        x1[one], *(None if v is None else v[one] for v in (x0, t, coefficients)), key, first_row + row, strata, dims,
        *rest,
    )  # fmt: skip


def path_functions(device) -> list[Function]:
    data = Data(1, device)
    key = data.key()
    x1, x0 = data.normal((2, 2), F64), data.normal((2, 2), F64)
    t = torch.tensor([0.3, 0.8], dtype=F64, device=device)
    functions = []
    for (name, schedule), objective in zip(SCHEDULES.items(), itertools.cycle(OBJECTIVES)):
        levels = {"schedule": schedule, "objective": OBJECTIVES[objective], "times": F64, "first_row": 0}
        objective = objective if path_valid(levels) else "velocity"

        def call(x1, x0, t, schedule=schedule, options=OBJECTIVES[objective]):
            chosen = fmk.objectives.Objective(schedule, **options)
            return fmk.ops.sample_path(x1, x0, t, key, objective=chosen)[:3:2]

        functions.append(Function(f"{name}-{objective}", call, (x1, x0, t)))

    def drawn(x1, t):
        return fmk.ops.sample_path(x1, None, t, key, schedule=fmk.SchrodingerBridge(0.7))[:3:2]

    def drawn_times(x1):
        return fmk.ops.sample_path(x1, None, None, key, timesteps=fmk.LogitNormal())[0]

    def learnable(x1, theta):
        schedule = fmk.Custom(lambda t: (t ** theta[0].exp(), 1 - theta[1] * t))
        return fmk.ops.sample_path(x1, None, None, key, schedule=schedule)[:3:2]

    theta = torch.tensor([0.2, 0.9], dtype=F64, device=device)
    return functions + [
        Function("learnable", learnable, (x1, theta)),
        Function("drawn_times", drawn_times, (x1,)),
        Function("drawn", drawn, (x1, t)),
    ]


SAMPLE_PATH = Op(
    "sample_path",
    {
        "schedule": SCHEDULES,
        "objective": OBJECTIVES,
        "times": TIMES,
        "shape": SHAPES,
        "dtype": DTYPES,
        "source": {"x0_drawn": "drawn", "x0_given": "given"},
        "store": {"recompute": False, "store": True},
        "first_row": FIRST_ROWS,
    },
    lambda levels, device: captured("sample_path", path_call(levels, device)),
    path_oracle,
    valid=path_valid,
    functions=path_functions,
    reference=path_reference,
    part=path_part,
)


# ---- matching_loss ----------------------------------------------------------------------------------------------

MASKS = ("no_mask", "elements", "rows", "trailing", "broadcast", "empty_row", "empty")
LOSS_DTYPES = {  # prediction, data, table
    "f32": (F32, F32, F32),
    "f64": (F64, F64, F64),
    "bf16": (BF16, BF16, F32),
    "f16": (F16, F16, F32),
    "bf16_f32": (BF16, F32, F32),
    "f16_f32": (F16, F32, F32),
    "f32_bf16": (F32, BF16, F32),
    "f32_t64": (F32, F32, F64),
    "f64_f32": (F64, F32, F32),
}


def make_mask(kind: str, data: Data, shape, dims):
    if kind == "no_mask":
        return None
    if kind == "rows":
        return data.boolean(shape[:dims]).reshape(shape[:dims] + (1,) * (len(shape) - dims))
    if kind == "trailing":
        return data.boolean(shape[:-1] + (1,)) if shape else data.boolean(())
    if kind == "broadcast":
        return data.boolean(shape[1:])
    mask = data.boolean(shape, 0.0 if kind == "empty" else 0.7)
    if kind == "empty_row" and mask.numel():
        mask.reshape(math.prod(shape[:dims]), -1)[0] = False
    return mask


def loss_call(levels, device) -> Callable:
    """The public call of a combination. What the mask leaves out is NaN: it must not reach any output."""
    (shape, dims), data = levels["shape"], Data(levels["seed"], device)
    prediction_dtype, dtype, table_dtype = levels["dtypes"]
    table = data.uniform((*shape[:dims], 6), 0.3, 1.5, table_dtype)
    table[..., 1:4] *= -1
    mask = make_mask(levels["mask"], data, shape, dims)
    x0, z = (data.normal(shape, dtype) for _ in range(2))
    weight = levels["weight"]
    options = {
        "x0": x0 if levels["source"] == "given" else None,
        "z": z if levels["source"] == "given" else None,
        "key": data.key(),
        "terms": levels["terms"],
        "weight": None if weight is None else data.uniform(shape[:dims] if weight == "rows" else (), 0.2, 2.0),
        "mask": mask,
        "reduction": levels["reduction"],
        "rho": levels["rho"],
        "first_row": levels["first_row"],
    }
    prediction, x1 = data.normal(shape, prediction_dtype), data.normal(shape, dtype)
    if mask is not None:
        prediction = prediction.masked_fill(~mask, math.nan)
    prediction.requires_grad_(levels["gradient"])
    return lambda: fmk.ops.matching_loss(prediction, x1, table, **options)


def make_forward(levels, device):
    return captured("_matching_loss_forward", loss_call(levels, device))


def residual_oracle(arguments):
    """(r, Σ|terms| of r, p) in fp64, with the noise that the noise op draws."""
    prediction, x1, x0, z, table, _, _, key, first_row, terms, *_ = arguments
    dims, shape = table.dim() - 1, x1.shape

    def source(given, stream):
        if given is not None:
            return given
        return torch.ops.fmkernels.noise(
            key, math.prod(shape[:dims]), math.prod(shape[dims:]), first_row, STREAMS[stream], 0, 0, x1.dtype
        ).reshape(shape)

    p, a, b, c = (rows_of(column, x1.dim()) for column in table.double().unbind(-1)[:4])
    parts = [p * prediction.double()]
    parts += [a * x1.double()] if terms & TERM_X1 else []
    parts += [b * source(x0, "x0").double()] if terms & TERM_X0 else []
    parts += [c * source(z, "bridge").double()] if terms & TERM_Z else []
    return sum(parts), sum(part.abs() for part in parts), p


def penalty_oracle(kind: int, k: float, r: torch.Tensor):
    """(ρ, ρ', bound of |ρ''|)."""
    if kind == RHOS["absolute"]:
        return r.abs(), r.sign(), torch.zeros_like(r)
    if kind == RHOS["pseudo_huber"]:
        root = (r.square() + k * k).sqrt()
        return root - k, r / root, 1 / root
    return r.square(), 2 * r, torch.full_like(r, 2.0)


def forward_oracle(arguments, outputs):
    prediction, x1, _, _, table, weight, mask, _, _, _, kind, k, reduction, gradient = arguments
    dims = table.dim() - 1
    r, size, p = residual_oracle(arguments)
    rho, slope, curvature = penalty_oracle(kind, k, r)
    kept = torch.ones_like(r, dtype=torch.bool)
    if mask is not None:
        kept = mask.reshape(mask.shape + (1,) * (r.dim() - mask.dim())).expand(r.shape)
    w = table[..., 4].double() * (1.0 if weight is None else weight.double())
    few = ULPS * eps(outputs[0].dtype)

    def total(values):
        sums = row_sums(torch.where(kept, values, 0.0), dims) * w
        return sums if reduction == NONE else sums.sum()

    count = row_sums(kept.double(), dims)
    count = (count if reduction == NONE else count.sum()).clamp_min(1)
    divisor = 1.0 if reduction == SUM else count
    loss = Expected(total(rho) / divisor, few * (total(rho) + total(slope.abs() * size)) / divisor)
    if not gradient:
        return [loss, None, None]
    early = mask is None and reduction == MEAN and prediction.dtype != F16
    factor = rows_of(w, r.dim()) * p * (1 / max(r.numel(), 1) if early else 1.0)
    stored = Expected(
        torch.where(kept, factor * slope, 0.0),
        torch.where(kept, few * factor.abs() * (slope.abs() + curvature * size), 0.0),
    )
    divides = mask is not None and reduction != SUM
    return [loss, stored, Expected(count) if divides else None]


def forward_part(arguments, row):
    prediction, x1, x0, z, table, weight, mask, key, first_row, *rest = arguments
    assert table.dim() == 2
    one = slice(row, row + 1)
    tensors = (prediction, x1, x0, z, table, weight, mask)
    return (*(None if v is None else v[one] for v in tensors), key, first_row + row, *rest)


def loss_functions(device) -> list[Function]:
    data, functions = Data(2, device), []
    key, mask = data.key(), torch.tensor([[True, False, True], [True, True, True]], device=device)
    prediction, x1, x0, z = (data.normal((2, 3), F64) for _ in range(4))
    table, weight = data.uniform((2, 6), 0.5, 1.5, F64), data.uniform((2,), 0.5, 1.5, F64)
    factors = {
        "reduction": dict.fromkeys(("mean", "sum", "none")),
        "mask": {"no_mask": None, "mask": mask, "row_mask": mask[:, 1:2]},
        "weight": {"unweighted": False, "weighted": True},
        "rho": {"square": "square", "pseudo_huber": fmk.PseudoHuber(0.5), "absolute": "absolute"},
    }
    for labels in pairwise(factors, lambda labels: True):
        options = {"mask": factors["mask"][labels["mask"]], "rho": factors["rho"][labels["rho"]]}
        options |= {"reduction": labels["reduction"], "key": key, "terms": 7}
        fixed = {"weight": weight} if factors["weight"][labels["weight"]] else {}

        def fused(prediction, options=options, fixed=fixed):
            return fmk.ops.matching_loss(prediction, x1, table, **options, **fixed)

        def every(prediction, x1, x0, z, table, weight, options=options):
            return fmk.ops.matching_loss(prediction, x1, table, x0, z, weight=weight, **options)

        name = "-".join(labels.values())
        functions.append(Function(f"fused-{name}", fused, (prediction,)))
        if fixed:
            functions.append(Function(f"all-{name}", every, (prediction, x1, x0, z, table, weight)))
    return functions


LOSS_FACTORS = {
    "shape": SHAPES,
    "dtypes": LOSS_DTYPES,
    "terms": {"x1": 1, "x0": 2, "x1x0": 3, "x1x0z": 7, "z": 4},
    "source": {"drawn": "drawn", "given": "given"},
    "weight": {"unweighted": None, "weighted": "rows", "one_weight": "scalar"},
    "mask": dict(zip(MASKS, MASKS)),
    "reduction": {name: name for name in ("mean", "sum", "none")},
    "rho": {"square": "square", "absolute": "absolute", "pseudo_huber": fmk.PseudoHuber(0.03)},
    "first_row": FIRST_ROWS,
}
FORWARD = Op(
    "_matching_loss_forward",
    LOSS_FACTORS | {"gradient": {"gradient": True, "loss_only": False}},
    make_forward,
    forward_oracle,
    part=forward_part,
    sum_ulps=16,
)
MATCHING_LOSS = Op(
    "matching_loss",
    LOSS_FACTORS,
    lambda levels, device: make_forward({**levels, "gradient": False}, device)[:-1],
    lambda arguments, outputs: forward_oracle((*arguments, False), outputs)[:1],
    sum_ulps=16,
    functions=loss_functions,
)


# ---- scaling of the stored gradient ------------------------------------------------------------------------------


def make_scale(levels, device):
    (shape, dims), data = levels["shape"], Data(levels["seed"], device)
    loss_dtype = F64 if levels["dtype"] == F64 else F32
    per_row = levels["scale"] == "rows"
    scale = data.uniform(shape[:dims] if per_row else (), 0.5, 3.0, loss_dtype)
    scale = torch.ones_like(scale) if levels["scale"] == "one" else scale
    counts = {"undivided": 0, "divided": scale.shape}[levels["denominator"]]
    denominator = torch.ceil(data.uniform(counts, 0.0, 9.0, loss_dtype))
    return data.normal(shape, levels["dtype"]), scale, denominator, levels["factor"]


def scale_oracle(arguments, outputs):
    gradient, scale, denominator, factor = arguments
    scale = scale.double() * factor
    scale = scale / denominator.double() if denominator.numel() else scale
    value = gradient.double() * rows_of(scale, gradient.dim())
    return [Expected(value, ULPS * eps(F64 if outputs[0].dtype == F64 else F32) * value.abs())]


SCALE_FACTORS = {
    "shape": SHAPES,
    "dtype": DTYPES,
    "scale": {"scalar": "scalar", "rows": "rows", "one": "one"},
    "denominator": {"undivided": "undivided", "divided": "divided"},
    "factor": {"factor1": 1.0, "factor": 1 / 12345},
}
SCALE = Op("_scale_gradient", SCALE_FACTORS, make_scale, scale_oracle)
SCALE_INPLACE = Op("_scale_gradient_", SCALE_FACTORS, make_scale, scale_oracle, mutates=(0,))


OPS = (
    NOISE, SAMPLE_PATH, FORWARD, MATCHING_LOSS, SCALE, SCALE_INPLACE, *contract_ode.OPS, *contract_probe.OPS,
    *contract_marginal.OPS, contract_conditional_flow.CONDITIONAL_FLOW,
)  # fmt: skip


def cases() -> Iterator[tuple[Op, dict[str, str], str]]:
    """(op, labels, id) of every sample; every eighth under the Triton interpreter, which is slow by the launch."""
    for op in OPS:
        for labels in op.cover()[:: 8 if INTERPRETED else 1]:
            yield op, labels, f"{op.name}-{'-'.join(labels.values())}"
