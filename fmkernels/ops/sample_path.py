"""The fused path op: draw t, draw noise, form x_t and the table of per-row coefficients that the loss reads."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .. import _checks, _registration
from ..objectives import PREDICTIONS, WEIGHTS, Objective, objective_table
from ..schedules import CUSTOM, Coefficients, CondOT, Schedule
from ..timesteps import TimestepSampler, Uniform
from .noise import STREAMS, timestep_uniform
from .noise import key as draw_key

__all__ = ["PathArguments", "PathSample", "sample_path"]

STORE_X0, STORE_Z = 1, 2
MAX_STRATA = 2**31 - 1


class PathSample(NamedTuple):
    """What :func:`sample_path` returns; ``x0`` and ``z`` are None where they were not stored."""

    x_t: torch.Tensor
    t: torch.Tensor
    table: torch.Tensor
    x0: torch.Tensor | None
    z: torch.Tensor | None


class PathArguments(NamedTuple):
    """The scalars that describe schedule, sampler and objective to the kernels, computed once per description."""

    schedule: int
    s0: float
    s1: float
    t_low: float
    t_high: float
    bridge: bool
    sampler: int
    q0: float
    q1: float
    shift: float
    prediction: int
    compare: int
    o0: float
    weight: int
    weight_k: float

    @classmethod
    def of(cls, objective: Objective, timesteps: TimestepSampler) -> PathArguments:
        schedule = objective.schedule
        values: tuple[Any, ...] = (
            schedule.code,
            *map(float, schedule.parameters_),
            *map(float, schedule.t_range),
            schedule.bridge,
            timesteps.code,
            *map(float, timesteps.parameters_),
            timesteps.shift,
            PREDICTIONS[objective.prediction],
            objective.compare_code,
            objective.parameter,
            WEIGHTS[objective.weight_name],
            objective.weight_k,
        )
        return cls(*values)


def sample_path(
    x1: torch.Tensor,
    x0: torch.Tensor | None = None,
    t: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    *,
    schedule: Schedule | None = None,
    timesteps: TimestepSampler | None = None,
    objective: Objective | None = None,
    t_dims: int = 1,
    first_row: int = 0,
    total_rows: int | None = None,
    store: bool = False,
) -> PathSample:
    r"""x_t = α(t)·x1 + σ(t)·x0 + γ(t)·z and the table (p, a, b, c, w, network time) of each row, in one launch.

    Args:
        x1: data ``[*prefix, *rest]``, float32, float64, bfloat16 or float16.
        x0: source of x1's shape and dtype; None draws standard normal noise, rounded to x1's dtype.
        t: times, float32 or float64, of a shape that is a prefix of x1's; None draws them from ``timesteps``.
            Coefficients are evaluated at t clamped to ``schedule.t_range``; t is not checked on the host.
        key: int64 ``[1]``; needed where something is drawn; None draws one.
        schedule, timesteps, objective: what is sampled; default ``CondOT()``, ``Uniform()`` and its velocity.
        t_dims: how many leading dimensions of x1 a drawn t spans; ``[B]`` for 1, ``[B, L]`` for 2.
        first_row, total_rows: place of dimension 0 in a larger batch, in samples: a batch drawn in parts with these
            offsets has the numbers of the whole. Stratified times need ``total_rows`` where ``first_row`` > 0.
        store: also return drawn x0 and z instead of leaving them to be drawn again.

    Returns: x_t in x1's dtype, contiguous; t in float32 (float64 for float64 data or t); the table ``[*t.shape, 6]`` in
    t's dtype. For EDM x_t is scaled by 1/R, as the network wants it.

    Gradients flow to x1, x0, t and learnable coefficients, by the reference formula over the same noise.

    Raises: TypeError, ValueError naming the argument.

    Source: Lipman et al. (2023), equations 10 to 15.
    """
    if objective is None:
        objective = Objective(CondOT() if schedule is None else schedule)
    elif schedule is not None and schedule != objective.schedule:
        raise ValueError(f"schedule: expected {objective.schedule!r}, that of objective, got {schedule!r}")
    timesteps = Uniform() if timesteps is None else timesteps
    check(x1, x0, t, key, t_dims, first_row, total_rows)
    if key is None:
        key = draw_key(x1.device)
    arguments = PathArguments.of(objective, timesteps)
    bits = (STORE_X0 | STORE_Z) if store else 0
    return PathSample(
        *call(x1, x0, t, key, objective.schedule, timesteps, arguments, t_dims, first_row, total_rows, bits)
    )


def check(x1, x0, t, key, t_dims, first_row, total_rows) -> None:
    """Every error a user can make, found before any launch."""
    _checks.tensor("x1", x1)
    _checks.floating("x1", x1)
    if x0 is not None:
        _checks.tensor("x0", x0)
        _checks.same_shape("x0", x0, "x1", x1)
        _checks.same_dtype("x0", x0, "x1", x1)
        _checks.same_device("x0", x0, "x1", x1)
    if t is not None:
        _checks.tensor("t", t)
        _checks.full_precision("t", t)
        if t.shape != x1.shape[: t.dim()]:
            raise ValueError(
                f"t: expected a shape that is a prefix of x1's {list(x1.shape)} ([], [B], [B, L], …), "
                f"got {list(t.shape)}"
            )
        _checks.same_device("t", t, "x1", x1)
    else:
        _checks.count("t_dims", t_dims)
        if t_dims > x1.dim():
            raise ValueError(f"t_dims: expected at most {x1.dim()}, the dimensions of x1, got {t_dims}")
    if key is not None:
        _checks.key("key", key)
        _checks.same_device("key", key, "x1", x1)
    _checks.count("first_row", first_row)
    if total_rows is not None:
        _checks.count("total_rows", total_rows, 1)
        batch = x1.shape[0] if x1.dim() else 1
        if isinstance(total_rows, int) and first_row + batch > total_rows:
            raise ValueError(
                f"total_rows: expected at least first_row + {batch} = {first_row + batch}, got {total_rows}"
            )


def call(x1, x0, t, key, schedule, timesteps, arguments, t_dims, first_row, total_rows, bits) -> tuple[Any, ...]:
    """The op call behind the checks, returning the fields of a :class:`PathSample`; shared with FlowMatching."""
    dims = t_dims if t is None else t.dim()
    per_sample = math.prod(x1.shape[1:dims]) if dims > 1 else 1
    row = first_row * per_sample
    strata = 0
    if t is None and timesteps.stratified:
        strata = _strata(x1, dims, per_sample, first_row, total_rows)
    bits &= (STORE_X0 if x0 is None else 0) | (STORE_Z if arguments.bridge else 0)
    coefficients = None
    custom = schedule.code == CUSTOM
    if t is None and (custom or timesteps.code < 0):
        t = draw_times(key, x1, dims, row, strata, timesteps, *schedule.t_range)
    if t is not None and (custom or t.requires_grad or _registration.transforming()):
        low, high = schedule.t_range
        inside = _registration.clamp_time(t.to(time_dtype(x1, t)), low, high)
        coefficients = torch.stack(schedule.coefficients(inside), dim=-1)
    inputs = (x1, x0, t, coefficients, key, row, strata, dims, *arguments, bits)
    if _registration.eager() and not _registration.requires_grad(x1, x0, t, coefficients):
        with _registration.below_autograd():  # what the Autograd-key kernel would decide, without its cost
            x_t, t, table, drawn, z = _op(*inputs)
    else:
        x_t, t, table, drawn, z = _registration.ops.sample_path(*inputs)
    return x_t, t, table, drawn if bits & STORE_X0 else None, z if bits & STORE_Z else None


def _strata(x1, dims, per_sample, first_row, total_rows) -> int:
    if total_rows is None:
        if isinstance(first_row, int) and first_row > 0:
            raise ValueError(
                "total_rows: stratified times need the size of the whole batch where first_row > 0, got None"
            )
        total_rows = x1.shape[0] if dims else 1
    strata = total_rows * per_sample
    if isinstance(strata, int) and strata > MAX_STRATA:
        raise ValueError(f"total_rows: stratified times allow fewer than 2**31 rows, got {strata}")
    return strata


def time_dtype(x1: torch.Tensor, t: torch.Tensor | None) -> torch.dtype:
    """Times and coefficients are float32, or float64 where the data or the given times are."""
    return torch.float64 if x1.dtype == torch.float64 or (t is not None and t.dtype == torch.float64) else torch.float32


def draw_times(key, x1, dims, first_row, strata, timesteps, low, high) -> torch.Tensor:
    """Times of the rows x1.shape[:dims], drawn from ``timesteps`` in float64, rounded, and clamped to [low, high]."""
    u = timestep_uniform(key, math.prod(x1.shape[:dims]), first_row, strata)
    return timesteps.inverse_cdf(u).to(time_dtype(x1, None)).clamp(low, high).reshape(x1.shape[:dims])


SCHEMA = (
    "sample_path(Tensor x1, Tensor? x0, Tensor? t, Tensor? coefficients, Tensor key, SymInt first_row, SymInt strata, "
    "int t_dims, int schedule, float s0, float s1, float t_low, float t_high, bool bridge, int sampler, float q0, "
    "float q1, float shift, int prediction, int compare, float o0, int weight, float weight_k, int store) "
    "-> (Tensor x_t, Tensor t, Tensor table, Tensor x0, Tensor z)"
)


def _rebuild_schedule(code: int, s0: float, s1: float) -> Schedule:
    """The description of a schedule code, without the checks of its constructor."""
    (cls,) = [c for c in _subclasses(Schedule) if vars(c).get("code") == code]
    schedule = object.__new__(cls)
    for name, value in zip(cls._parameters_, (s0, s1)):
        setattr(schedule, name, value)
    return schedule


def _rebuild_sampler(code: int, q0: float, q1: float, shift: float) -> TimestepSampler:
    (cls,) = [c for c in _subclasses(TimestepSampler) if vars(c).get("code") == code]
    sampler = object.__new__(cls)
    for name, value in zip(cls._parameters_, (q0, q1)):
        if name:
            setattr(sampler, name, value)
    sampler.shift = shift
    return sampler


def _subclasses(cls):
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def sample_path_reference(
    x1, x0, t, coefficients, key, first_row, strata, t_dims, schedule, s0, s1, t_low, t_high, bridge, sampler, q0, q1,
    shift, prediction, compare, o0, weight, weight_k, store,
):  # fmt: skip
    if t is None:
        timesteps = _rebuild_sampler(sampler, q0, q1, shift)
        t = draw_times(key, x1, t_dims, first_row, strata, timesteps, t_low, t_high)
    t = t.to(time_dtype(x1, t))
    if coefficients is None:
        v = _rebuild_schedule(schedule, s0, s1).coefficients(_registration.clamp_time(t, t_low, t_high))
    else:
        v = Coefficients(*coefficients.unbind(-1))
    table, scale = objective_table(t, v, prediction, compare, o0, weight, weight_k)

    compute = torch.float64 if x1.dtype == torch.float64 else torch.float32

    def rowwise(coefficient):
        return coefficient.to(compute).reshape(coefficient.shape + (1,) * (x1.dim() - t_dims))

    def draw(stream):
        rows, columns = math.prod(x1.shape[:t_dims]), math.prod(x1.shape[t_dims:])
        drawn = _registration.ops.noise(key, rows, columns, first_row, stream, 0, 0, x1.dtype)
        return drawn.reshape(x1.shape)

    source = draw(STREAMS["x0"]) if x0 is None else x0
    x_t = rowwise(v.alpha * scale) * x1.to(compute) + rowwise(v.sigma * scale) * source.to(compute)
    z = None
    if bridge:
        z = draw(STREAMS["bridge"])
        x_t = x_t + rowwise(v.gamma * scale) * z.to(compute)
    empty = x1.new_empty(0)
    return (
        x_t.to(x1.dtype).contiguous(),
        t.clone(memory_format=torch.contiguous_format),
        table.contiguous(),
        source.clone() if store & STORE_X0 else empty,
        z.clone() if store & STORE_Z else empty.clone(),
    )


def sample_path_fake(x1, x0, t, coefficients, key, first_row, strata, t_dims, *arguments):
    dtype, shape, store = time_dtype(x1, t), x1.shape[:t_dims], arguments[-1]
    return (
        x1.new_empty(x1.shape),
        x1.new_empty(shape, dtype=dtype),
        x1.new_empty((*shape, 6), dtype=dtype),
        x1.new_empty(x1.shape if store & STORE_X0 else 0),
        x1.new_empty(x1.shape if store & STORE_Z else 0),
    )


def sample_path_autograd(x1, x0, t, coefficients, key, *rest):
    if _registration.transforming() or _registration.requires_grad(x1, x0, t, coefficients):
        return sample_path_reference(x1, x0, t, coefficients, key, *rest)
    with _registration.below_autograd():
        return _registration.ops.sample_path(x1, x0, t, coefficients, key, *rest)


_registration.define(SCHEMA, sample_path_reference, sample_path_fake)
_registration.autograd("sample_path", sample_path_autograd)

_op = _registration.overload("sample_path")
