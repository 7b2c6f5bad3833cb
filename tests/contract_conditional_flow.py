"""The conditional flow in the contract suite: see :mod:`contract`."""

from __future__ import annotations

import math

from contract_op import DTYPES, F32, F64, SHAPES, ULPS, Data, Expected, Function, Op, captured, eps, rows_of

import fmkernels as fmk
from fmkernels.ops.conditional_flow import FORMS


def make_flow(levels, device):
    (shape, _), data, dtype = levels["shape"], Data(levels["seed"], device), levels["dtype"]
    x0, x1, noise = (data.normal(shape, dtype) for _ in range(3))
    coefficients = data.uniform((shape[0], 4), 0.2, 1.0, F64 if dtype == F64 else F32)
    form = levels["form"]
    noise = None if form == "affine" else noise
    return captured("conditional_flow", lambda: fmk.ops.conditional_flow(x0, x1, noise, coefficients, form))


def flow_oracle(arguments, outputs):
    """With |·| of every term: what the roundings of a sum are relative to."""
    x0, x1, noise, coefficients, form = arguments
    few = ULPS * eps(coefficients.dtype)
    x0, x1 = x0.double(), x1.double()
    noise = 0 * x0 if noise is None else noise.double()
    a, b, s, c = (rows_of(value, x1.dim()) for value in coefficients.double().unbind(-1))
    drift = a * x1 + (form != FORMS["target"]) * b * x0
    blur = (form != FORMS["affine"]) * s * noise
    size = (a * x1).abs() + (b * x0).abs() + blur.abs()
    u, around = {
        FORMS["linear"]: (x1 - x0, x1.abs() + x0.abs()),
        FORMS["target"]: ((x1 - b * (drift + blur)) / c, (x1.abs() + b * size) / c),
        FORMS["bridge"]: (c * blur + x1 - x0, c * size + x1.abs() + x0.abs()),
        FORMS["trigonometric"]: (math.pi / 2 * (b * x1 - a * x0), 2 * (b * x1).abs() + 2 * (a * x0).abs()),
        FORMS["affine"]: (s * x1 + c * x0, (s * x1).abs() + (c * x0).abs()),
    }[form]
    return [Expected(drift + blur, few * size), Expected(u, few * around)]


def flow_part(arguments, row):
    *tensors, form = arguments
    return (*(None if tensor is None else tensor[row : row + 1] for tensor in tensors), form)


def flow_functions(device) -> list[Function]:
    data = Data(4, device)
    x0, x1, noise = (data.normal((2, 3), F64) for _ in range(3))
    coefficients = data.uniform((2, 4), 0.2, 1.0, F64)

    def function(form):
        return lambda x0, x1, noise, coefficients: fmk.ops.conditional_flow(x0, x1, noise, coefficients, form)

    def target(x1, noise, coefficients):  # takes nothing from x0
        return fmk.ops.conditional_flow(x0, x1, noise, coefficients, "target")

    def affine(x0, x1, coefficients):
        return fmk.ops.conditional_flow(x0, x1, None, coefficients, "affine")

    return [
        *(Function(form, function(form), (x0, x1, noise, coefficients)) for form in ("linear", "bridge")),
        Function("trigonometric", function("trigonometric"), (x0, x1, noise, coefficients)),
        Function("target", target, (x1, noise, coefficients)),
        Function("affine", affine, (x0, x1, coefficients)),
    ]


CONDITIONAL_FLOW = Op(
    "conditional_flow",
    {"shape": SHAPES, "dtype": DTYPES, "form": {form: form for form in FORMS}},
    make_flow,
    flow_oracle,
    valid=lambda levels: len(levels["shape"][0]) > 0,
    functions=flow_functions,
    part=flow_part,
)
