"""The ops of probes in the contract suite: see :mod:`contract`."""

from __future__ import annotations

import math

from contract_op import (
    DTYPES,
    F32,
    F64,
    FIRST_ROWS,
    NORMAL_ERROR,
    SHAPES,
    ULPS,
    Data,
    Expected,
    Function,
    Op,
    captured,
    eps,
)

import fmkernels as fmk
from fmkernels import _registration
from fmkernels.ops.probe import PROBES, hadamard_order

FACTORS = {
    "shape": SHAPES,
    "dtype": DTYPES,
    "distribution": {name: name for name in PROBES},
    "probes": {"one_probe": 1, "three_probes": 3, "no_probe": 0},
    "first_probe": {"probe0": 0, "probe2": 2, "probe_last": 2**24 - 3},
    "first_row": FIRST_ROWS,
}


def sizes(levels) -> tuple[int, int]:
    """Rows and columns."""
    shape, dims = levels["shape"]
    return math.prod(shape[:dims]), math.prod(shape[dims:])


def valid(levels) -> bool:
    end = levels["first_probe"] + levels["probes"]
    return levels["distribution"] != "hadamard" or end <= hadamard_order(sizes(levels)[1])


def options(levels) -> dict:
    return {name: levels[name] for name in ("distribution", "first_probe", "first_row")}


# ---- probe --------------------------------------------------------------------------------------------------------


def make_probe(levels, device):
    key, (rows, columns) = Data(levels["seed"], device).key(), sizes(levels)
    more = {"probes": levels["probes"], "dtype": levels["dtype"], **options(levels)}
    return captured("probe", lambda: fmk.ops.probe(key, rows, columns, **more))


def probe_oracle(arguments, outputs):
    *description, dtype = arguments
    value = _registration.references["probe"](*description, F64)
    if arguments[3] == PROBES["normal"]:
        return [Expected(value, NORMAL_ERROR[F64 if dtype == F64 else F32])]
    return [Expected(value, exact=True)]


def probe_part(arguments, row):
    key, _, *rest, first_row, dtype = arguments
    return (key, 1, *rest, first_row + row, dtype)


PROBE = Op("probe", FACTORS, make_probe, probe_oracle, valid=valid, part=probe_part, row_dim=1)


# ---- probe_dot ----------------------------------------------------------------------------------------------------


def make_probe_dot(levels, device):
    (shape, dims), data = levels["shape"], Data(levels["seed"], device)
    key, rows = data.key(), math.prod(shape[:dims])
    values = data.normal((levels["probes"], rows, *shape[dims:]), levels["dtype"])
    return captured("probe_dot", lambda: fmk.ops.probe_dot(key, values, **options(levels)))


def probe_dot_oracle(arguments, outputs):
    key, values, distribution, first_probe, first_row = arguments
    probes, rows, *trailing = values.shape
    size = (rows, math.prod(trailing), distribution, probes, first_probe, first_row)
    z = _registration.overload("probe")(key, *size, values.dtype)  # itself tested
    terms = z.double() * values.double().reshape(z.shape)
    few = ULPS * eps(F64 if values.dtype == F64 else F32)
    return [Expected(terms.sum(2), few * terms.abs().sum(2))]


def probe_dot_part(arguments, row):
    key, values, *rest, first_row = arguments
    return (key, values[:, row : row + 1], *rest, first_row + row)


def probe_dot_functions(device) -> list[Function]:
    data = Data(5, device)
    key, values = data.key(), data.normal((2, 1, 2, 2), F64)

    def function(distribution):
        return lambda values: fmk.ops.probe_dot(key, values, distribution=distribution, first_probe=1, first_row=7)

    return [Function(name, function(name), (values,)) for name in PROBES]


PROBE_DOT = Op(
    "probe_dot",
    FACTORS,
    make_probe_dot,
    probe_dot_oracle,
    valid=valid,
    functions=probe_dot_functions,
    part=probe_dot_part,
    row_dim=1,
    sum_ulps=16,
)

OPS = (PROBE, PROBE_DOT)
