"""The ops of the solvers in the contract suite: see :mod:`contract`."""

from __future__ import annotations

import math

import torch
from contract_guided import GUIDED_EULER
from contract_op import (
    DTYPES,
    F32,
    F64,
    SHAPES,
    ULPS,
    Data,
    Expected,
    Function,
    Op,
    captured,
    eps,
    rows_of,
)
from torch.utils._pytree import tree_map_only

import fmkernels as fmk
from fmkernels import _registration
from fmkernels.ops import runge_kutta_step as step_op

# ---- runge_kutta_stage ------------------------------------------------------------------------------------------

KS = {"k1": 1, "k2": 2, "k5": 5, "k12": 12}


def eighths(data: Data, shape) -> torch.Tensor:
    """Times of either sign, often 0, whose sums and halves are exact in every precision."""
    return torch.round(data.uniform(shape, -8.5, 8.5, F64)) / 8


def make_stage(levels, device):
    shape, _ = levels["shape"]
    data, terms, step = Data(levels["seed"], device), levels["ks"], levels["step"]
    y, *k = (data.normal(shape, levels["dtype"]) for _ in range(1 + terms))
    times = eighths(data, (4, *(shape[:1] if levels["times"] == "per_row" else ())))
    if levels["node"] == 1:  # the time is t₁ itself, not t₀ + (t₁ − t₀)
        times = times * data.uniform(times.shape, 0.0, 1.0, F64) ** 8
    coefficients = data.normal((3, 1 + terms), F64)
    coefficients[:, 0] = torch.tensor([0.25, levels["node"], 0.75], dtype=F64)
    options = {"step": step, "row": 1, "nudge": levels["nudge"]}
    return captured("runge_kutta_stage", lambda: fmk.ops.runge_kutta_stage(y, k, times, coefficients, **options))


def stage_oracle(arguments, outputs):
    y, k, times, step, coefficients, row, nudge = arguments
    h = times[step + 1] - times[step]
    node, *weights = coefficients[row]
    terms = [y.double(), *(rows_of(h * a, y.dim()) * k_j.double() for a, k_j in zip(weights, k, strict=True))]
    compute = F64 if y.dtype == F64 else F32
    t = (times[step + 1] if node == 1 else times[step] + node * h).to(compute)  # the sum is exact
    if nudge:
        t = torch.nextafter(t, torch.copysign(torch.full_like(t, math.inf), (nudge * h).to(compute)))
    size = sum(term.abs() for term in terms)
    return [Expected(sum(terms), ULPS * eps(compute) * size), Expected(t.double(), exact=True)]


def stage_part(arguments, row):
    y, k, times, *rest = arguments
    one = slice(row, row + 1)
    return (y[one], [k_j[one] for k_j in k], times if times.dim() == 1 else times[:, one], *rest)


def stage_functions(device) -> list[Function]:
    data = Data(3, device)
    y, *k = (data.normal((2, 3), F64) for _ in range(4))
    coefficients = data.normal((2, 4), F64)
    coefficients[:, 0] = torch.tensor([0.3, 1.0], dtype=F64)

    def stage(row, nudge=0):
        def call(y, times, *k):
            weights = coefficients[:, : 1 + len(k)].contiguous()
            return fmk.ops.runge_kutta_stage(y, k, times, weights, step=1, row=row, nudge=nudge)

        return call

    shared, per_row = data.normal((4,), F64), data.normal((3, 2), F64)
    return [
        Function("per_row", stage(0), (y, per_row, *k)),
        Function("last_node", stage(1), (y, per_row, *k[:2])),
        Function("nudged", stage(0, -1), (y, per_row, *k[:1])),
        Function("shared", stage(1), (y, shared, *k)),
    ]


STAGE = Op(
    "runge_kutta_stage",
    {
        "shape": SHAPES,
        "dtype": DTYPES,
        "ks": KS,
        "times": {"shared": "shared", "per_row": "per_row"},
        "step": {"step0": 0, "step2": 2},
        "node": {"node0": 0.0, "node½": 0.5, "node1": 1.0},
        "nudge": {"plain": 0, "before": -1, "after": 1},
    },
    make_stage,
    stage_oracle,
    valid=lambda levels: levels["times"] == "shared" or len(levels["shape"][0]) > 0,
    functions=stage_functions,
    part=stage_part,
)


# ---- _runge_kutta_step_ -----------------------------------------------------------------------------------------

ROWS = {  # kind of a row -> error ratio, size of the step, end in steps from t
    "accepted": (0.75, 0.1, 7.0),
    "rejected": (4.0, 0.1, 7.0),
    "quiet": (2e-3, 0.1, 25.0),
    "wild": (60.0, 0.1, 7.0),
    "not_a_number": (0.3, 0.1, 7.0),
    "infinite": (0.3, 0.1, 7.0),
    "finished": (0.3, 0.0, 0.0),
    "last": (0.3, 0.1, 1.0),
    "clipped": (0.3, 0.1, 1.2),
    "snapped": (1e-8, 0.1, 1 + 10 * (1 + 5e-4)),  # a step of ten times the size ends just before
    "after_rejection": (2e-3, 0.1, 7.0),
    "limit": (0.3, 0.1, 7.0),
    "failed": (0.3, 0.1, 7.0),
    "small": (4.0, 0.015, 7.0),
    "underflow": (4.0, 2.0**-12, 40.0),  # from 2^40, so that half of it changes nothing
    "cornered": (4.0, 2.0**-12, 1.0),  # also from there: the end is so near that the step would be tried again
    "zero": (0.0, 0.1, 7.0),
}
SAFE = {"safety": 0.9, "min_factor": 0.2, "max_factor": 10.0, "beta1": 0.2, "accepted_floor": 0.2}
SAFE |= {"after_rejection_cap": 1.0, "max_step": math.inf, "clip": 1, "step_limit": 1000, "snap": 1e-3}
PID = SAFE | {"beta1": 0.14, "beta2": -0.08, "beta3": 0.02}
BOUNDED = SAFE | {"min_step": 0.02, "max_step": 0.25}
SETTINGS = {
    "integral": SAFE,
    "pid": PID,
    "torchdiffeq": SAFE | {"accepted_floor": 1.0, "after_rejection_cap": 10.0, "clip": 0, "step_limit": 2**31 - 1},
    "bounded": BOUNDED,
    "accept_at_min": BOUNDED | {"accept_at_min_step": 1},
}
TOLERANCES = {  # whether rtol, and atol, is one for each row, and for each element
    "scalar": ((0, 0), (0, 0)),
    "per_row": ((1, 0), (1, 0)),
    "per_element": ((0, 1), (0, 1)),
    "both": ((1, 1), (1, 1)),
    "mixed": ((0, 1), (1, 0)),
}
SEGMENTS = {
    "one_segment": lambda columns: [(0, columns)],
    "two_segments": lambda columns: [(0, columns // 3), (columns // 3, columns)],
    "leading": lambda columns: [(0, max(columns // 2, 1))],  # what is outside has no say
}
UNTOUCHED = 7.0


def cut(shape, dims, components) -> tuple[int, int]:
    """Rows and columns; a complex number is one column."""
    rows = shape[0] if dims else 1
    return rows, math.prod(shape) // max(rows, 1) // components


def step_valid(levels) -> bool:
    shape, dims = levels["shape"]
    rows, columns = cut(shape, dims, 1)
    components = levels["components"]
    if components == 2 and (columns == 0 or columns % 2):
        return False
    if levels["segments"] != "one_segment" and columns // components < 3:
        return False
    if columns == 0 and levels["tolerance"] in ("per_element", "both", "mixed"):
        return False
    return not (levels["t_eval"] == "shared" and levels["direction"] == "mixed" and rows > 1)


def make_step(levels, device):
    """Rows of every kind in turn, with error ratios far from 1: a rounding decides nothing."""
    (shape, dims), dtype, data = levels["shape"], levels["dtype"], Data(levels["seed"], device)
    components, terms = levels["components"], levels["ks"]
    rows, columns = cut(shape, dims, components)
    names = list(ROWS)
    kinds = [names[(i + names.index(levels["rows"])) % len(names)] for i in range(rows)]
    numbers = torch.tensor([ROWS[kind] for kind in kinds], dtype=F64, device=device)
    target, size, end = numbers.reshape(rows, 3).unbind(1)
    is_kind = {name: torch.tensor([kind == name for kind in kinds], dtype=torch.bool, device=device) for name in names}
    signs = {"forward": 1.0, "backward": -1.0, "mixed": 1.0 - 2.0 * (torch.arange(rows, device=device) % 2)}
    direction = signs[levels["direction"]] * torch.ones_like(target)

    control = torch.empty(step_op.CONTROL, rows, dtype=F64, device=device)
    t = data.uniform((rows,), -1.0, 1.0, F64)
    t = torch.where(is_kind["underflow"] | is_kind["cornered"], 2.0**40, t)
    control[step_op.T] = t
    control[step_op.T_NEXT] = t + direction * size
    control[step_op.END] = torch.where(end == 1, control[step_op.T_NEXT], t + direction * size * end)
    control[step_op.ERROR :] = data.uniform((step_op.CONTROL - step_op.ERROR, rows), 0.05, 0.9, F64)
    control[step_op.T_PREVIOUS] = t - 0.1
    counters = torch.zeros(step_op.COUNTERS, rows, dtype=torch.int32, device=device)
    counters[step_op.STATUS] = torch.where(is_kind["finished"], step_op.DONE, step_op.RUNNING_STATUS)
    counters[step_op.STATUS, is_kind["failed"]] = step_op.NON_FINITE
    counters[step_op.ACCEPTED] = torch.where(is_kind["limit"], 600, 5)
    counters[step_op.REJECTED] = torch.where(is_kind["limit"], 399, 2)
    counters[step_op.AFTER_REJECTION] = is_kind["after_rejection"]
    counters[step_op.RUNNING, :1] = (counters[step_op.STATUS] == step_op.RUNNING_STATUS).sum()

    t_eval, solution = levels["t_eval"], None
    t_eval = None if t_eval == "none" else make_t_eval(t_eval, data, control, direction)
    if t_eval is not None:
        if levels["t_eval"] == "shared":
            counters[step_op.CURSOR] = ((t_eval - t.unsqueeze(-1)) * direction.unsqueeze(-1) <= 0).sum(-1)
        else:
            counters[step_op.CURSOR] = min(1, t_eval.shape[-1])
        solution = torch.full((*(shape[:1] if dims else ()), t_eval.shape[-1], *shape[1 if dims else 0 :]), UNTOUCHED)
        solution = solution.to(device, dtype)

    weights = data.uniform((2 if t_eval is None else 5, 1 + terms), -0.5, 0.5, F64)
    settings = torch.zeros(step_op.SETTINGS, dtype=F64, device=device)
    for name, value in levels["settings"].items():
        settings[getattr(step_op, name.upper())] = value
    tolerances = [
        data.uniform((rows if by_row else 1, columns if by_element else 1), 0.5, 2.0, F64) * 1e-4
        for by_row, by_element in TOLERANCES[levels["tolerance"]]
    ]
    segments = torch.tensor(SEGMENTS[levels["segments"]](columns), device=device)

    y, k_first, *k = (data.normal((rows, columns * components), dtype) for _ in range(2 + terms))
    ratio = None
    if levels["ratio"] == "computed":
        h = control[step_op.T_NEXT] - control[step_op.T]
        k_first, *k = with_ratio(target, y, [k_first, *k], h, weights, *tolerances, segments, components)
    elif dims and levels["ratio"] == "given":
        ratio = target.to(F64 if dtype == F64 else F32)
    else:
        ratio = torch.tensor(0.4, device=device)
    if columns:
        k[0][is_kind["not_a_number"], 0] = math.nan
        k[-1][is_kind["infinite"], -1] = math.inf
        k[0][is_kind["finished"] | is_kind["failed"]] = math.nan
    y, k_first, *k = (value.reshape(shape) for value in (y, k_first, *k))
    if not dims:
        control, counters = control.squeeze(1), counters.squeeze(1)
        t_eval = t_eval if t_eval is None else t_eval.reshape(-1)
    return (
        y, k_first, k, control, counters, weights, settings, *tolerances, segments, components, ratio, t_eval, solution
    )  # fmt: skip


def make_t_eval(kind, data, control, direction):
    """Where output is asked for: before the step, in it, at its end or after it; NaN where a row has fewer."""
    if kind == "empty":
        return torch.empty(0, dtype=F64, device=data.device)
    if kind == "shared":
        return torch.sort(data.uniform((6,), -1.3, 1.3, F64)).values * direction[:1].sum()
    t, t_next = control[step_op.T], control[step_op.T_NEXT]
    h = t_next - t
    nan = torch.full_like(t, math.nan)
    fourth = torch.where(torch.arange(len(t), device=data.device) % 2 == 0, t_next, t + 1.7 * h)
    return torch.stack([t - 0.5 * h, t + 0.25 * h, t + 0.6 * h, fourth, nan], -1)


def with_ratio(target, y, k, h, weights, rtol, atol, segments, components):
    """The values of f so scaled, a row at a time, that its error ratio is about the target."""
    dtype, k = y.dtype, [k_j.double() for k_j in k]
    h = h.unsqueeze(-1)
    for _ in range(6):
        k = [k_j.to(dtype).double() for k_j in k]
        y1, e = (sum(h * w * k_j for w, k_j in zip(row, k)) for row in weights[:2])
        ratio = step_op._error_ratio(e, y.double(), y.double() + y1, rtol, atol, segments, components)
        scale = torch.where((ratio > 0) & ratio.isfinite(), target / ratio, 1.0)
        k = [k_j * scale.unsqueeze(-1) for k_j in k]
    return [k_j.to(dtype) for k_j in k]


def step_oracle(arguments, outputs):
    """The reference in fp64; a decision may not be another, nor a count."""
    y, k_first, k, control, counters, weights, _, rtol, atol, segments, components, ratio, t_eval, solution = arguments
    y, k_first, k, solution = tree_map_only(torch.Tensor, torch.Tensor.double, (y, k_first, k, solution))
    values = STEP.run((y, k_first, k, *arguments[3:-1], solution), _registration.references[STEP.name])

    rows = 1 if control.dim() == 1 else control.shape[1]
    few = ULPS * eps(F64 if arguments[0].dtype == F64 else F32)
    y, *ks = (value.reshape(rows, y.numel() // max(rows, 1)) for value in (y, k_first, *k))
    control, after = (value.reshape(step_op.CONTROL, rows) for value in (control, values[2]))
    counters, counted = (value.reshape(step_op.COUNTERS, rows) for value in (counters, values[3]))
    h = (control[step_op.T_NEXT] - control[step_op.T]).unsqueeze(-1)
    moved = (counted[step_op.ACCEPTED] > counters[step_op.ACCEPTED]).unsqueeze(-1)

    def combined(row):
        return sum(h * w * k_j for w, k_j in zip(row, ks))

    def size(row):
        return sum((h * w * k_j).abs() for w, k_j in zip(row, ks))

    control_slack = torch.zeros_like(after)
    if ratio is None:
        # Of e/tolerance: from the roundings of e, and of y1 in the tolerance. The RMS of a bound is a bound.
        e, y1, size_y = combined(weights[1]), y + combined(weights[0]), y.abs() + size(weights[0])
        wide_rtol, wide_atol = (v.repeat_interleave(components if v.shape[-1] > 1 else 1, -1) for v in (rtol, atol))
        tolerance = wide_atol + wide_rtol * torch.maximum(y.abs(), y1.abs())
        bound = size(weights[1]) + e.abs() * (1 + wide_rtol * size_y / tolerance)
        unit = step_op._error_ratio(bound, y, y1, rtol, atol, segments, components)
        control_slack[step_op.RATIO] = 2 * few * unit
        control_slack[step_op.ERROR] = 2 * few * unit * moved.squeeze(-1)
    relative = control_slack[step_op.RATIO] / after[step_op.RATIO].clamp_min(step_op.SMALLEST_RATIO) + 64 * eps(F64)
    control_slack[step_op.T_NEXT] = relative * (after[step_op.T_NEXT] - after[step_op.T]).abs()
    control_slack = control_slack.nan_to_num(0.0, 0.0)

    slack = torch.where(moved, few * (y.abs() + size(weights[0])), 0.0).nan_to_num(0.0)
    expected = [
        Expected(values[0], slack.reshape(values[0].shape)),
        Expected(values[1], exact=True),
        Expected(values[2], control_slack.reshape(values[2].shape)),
        Expected(values[3], exact=True),
    ]
    if solution is not None:
        slack = few * (y.abs() + size(weights.abs().sum(0))).nan_to_num(0.0)
        count = t_eval.shape[-1]
        slack = slack.unsqueeze(1).expand(rows, count, y.shape[1]).reshape(solution.shape)
        expected.append(Expected(values[4], torch.where(values[4] == UNTOUCHED, 0.0, slack)))
    return expected


def step_part(arguments, row):
    y, k_first, k, control, counters, weights, settings, rtol, atol, segments, components, ratio, t_eval, solution = (
        arguments
    )
    one = slice(row, row + 1)
    control, counters = control[:, one].contiguous(), counters[:, one].contiguous()
    counters[step_op.RUNNING] = counters[step_op.STATUS] == step_op.RUNNING_STATUS
    rtol, atol = (value[one] if value.shape[0] > 1 else value for value in (rtol, atol))
    ratio = ratio[one] if ratio is not None and ratio.dim() else ratio
    t_eval = t_eval[one] if t_eval is not None and t_eval.dim() == 2 else t_eval
    solution = None if solution is None else solution[one]
    return (
        y[one], k_first[one], [k_j[one] for k_j in k], control, counters, weights, settings, rtol, atol, segments,
        components, ratio, t_eval, solution,
    )  # fmt: skip


STEP = Op(
    "_runge_kutta_step_",
    {
        "shape": SHAPES,
        "rows": {name: name for name in ROWS},
        "dtype": DTYPES,
        "ks": KS,
        "settings": SETTINGS,
        "tolerance": {name: name for name in TOLERANCES},
        "segments": {name: name for name in SEGMENTS},
        "components": {"real": 1, "complex": 2},
        "ratio": {"computed": "computed", "given": "given", "one_given": "one_given"},
        "t_eval": {name: name for name in ("none", "shared", "each", "empty")},
        "direction": {name: name for name in ("forward", "backward", "mixed")},
    },
    make_step,
    step_oracle,
    valid=step_valid,
    part=step_part,
    sum_ulps=64,
    mutates=(0, 1, 3, 4, 13),
    paired=(12,),  # t_eval
)


OPS = (STAGE, STEP, GUIDED_EULER)
