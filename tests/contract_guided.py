"""The guided Euler step in the contract suite: see :mod:`contract`."""

from __future__ import annotations

import math

import torch
from contract_op import BF16, F16, F32, F64, SHAPES, ULPS, Data, Expected, Function, Op, captured, eps, rows_of

import fmkernels as fmk

GUIDED_DTYPES = {  # state, velocities
    "f32": (F32, F32),
    "f64": (F64, F64),
    "bf16": (BF16, BF16),
    "f16": (F16, F16),
    "f32_bf16": (F32, BF16),
    "f32_f16": (F32, F16),
    "bf16_f32": (BF16, F32),
    "f64_f32": (F64, F32),
    "f32_f64": (F32, F64),
}
STEPS = {"number": -0.07, "one32": F32, "one64": F64, "rows32": F32, "rows64": F64}
SCALES = {"w0": 0.0, "w1": 1.0, "w0.4": 0.4, "w7.5": 7.5, "one32": F32, "rows32": F32, "rows64": F64}


def coefficient(level, per_row: bool, data: Data, shape, low: float, high: float):
    """A number, or a tensor of the level's dtype."""
    if isinstance(level, float):
        return level
    return data.uniform(shape[:1] if per_row else (), low, high, level)


def make_guided(levels, device):
    (shape, _), data = levels["shape"], Data(levels["seed"], device)
    dtype, velocity_dtype = levels["dtypes"][:2]
    h = coefficient(levels["h"][1], levels["h"][0], data, shape, -0.2, 0.2)
    scale = coefficient(levels["scale"][1], levels["scale"][0], data, shape, -1.0, 8.0)
    x, c, u = data.normal(shape, dtype), data.normal(shape, velocity_dtype), data.normal(shape, velocity_dtype)
    return captured("guided_euler", lambda: fmk.ops.guided_euler(x, c, u, h, scale, levels["rescale"]))


def guided_oracle(arguments, outputs):
    x, c, u, h, scale, h_value, scale_value, rescale = arguments
    few = ULPS * eps(F64 if F64 in (x.dtype, c.dtype) else F32)
    h = x.new_tensor(h_value, dtype=F64) if h is None else h.double()
    w = x.new_tensor(scale_value, dtype=F64) if scale is None else scale.double()
    h, w, x, c, u = rows_of(h, x.dim()), rows_of(w, x.dim()), x.double(), c.double(), u.double()
    v = (1 - w) * u + w * c
    size = u.abs() + w.abs() * (c.abs() + u.abs())  # what the roundings of v are relative to
    slack = few * (x.abs() + h.abs() * size)
    if rescale and x.numel():
        dims = tuple(range(1, x.dim()))
        std_c, std_v = ((value - value.mean(dims, True)).square().mean(dims, True).sqrt() for value in (c, v))
        factor = torch.where(std_v == 0, 1.0, rescale * std_c / std_v.clamp_min(1e-300) + 1 - rescale)
        # Where a row hardly varies, its std is made of roundings.
        blurred = few * (size.amax(dims, True) / std_v.clamp_min(1e-300) + c.abs().amax(dims, True) / std_c)
        v, slack = v * factor, factor * slack + few * x.abs() + (h * v * factor).abs() * (few + blurred)
    return [Expected(x + h * v, slack)]


def guided_part(arguments, row):
    one = slice(row, row + 1)
    x, c, u, h, scale, *rest = arguments
    return (
        x[one], c[one], u[one], *(v if v is None or v.dim() == 0 else v[one] for v in (h, scale)), *rest,
    )  # fmt: skip


def guided_functions(device) -> list[Function]:
    data = Data(3, device)
    x, c, u = (data.normal((2, 3), F64) for _ in range(3))
    h, scale = data.uniform((2,), 0.1, 0.3, F64), torch.tensor([0.3, 4.0], dtype=F64, device=device)

    def step(*inputs):
        return fmk.ops.guided_euler(*inputs)

    def numbers(x, c, u):
        return fmk.ops.guided_euler(x, c, u, -0.2, 3.0)

    def rescaled(*inputs):
        return fmk.ops.guided_euler(*inputs, rescale=0.7)

    return [
        Function("rows", step, (x, c, u, h, scale)),
        Function("one", step, (x, c, u, h[0], scale[1])),
        Function("numbers", numbers, (x, c, u)),
        Function("rescaled", rescaled, (x, c, u, h, scale)),
    ]


GUIDED_EULER = Op(
    "guided_euler",
    {
        "shape": SHAPES,
        "dtypes": GUIDED_DTYPES,
        "h": {f"h_{name}": (name.startswith("rows"), level) for name, level in STEPS.items()},
        "scale": {f"scale_{name}": (name.startswith("rows"), level) for name, level in SCALES.items()},
        "rescale": {"plain": 0.0, "rescaled": 0.7, "rescaled_whole": 1.0},
    },
    make_guided,
    guided_oracle,
    valid=lambda levels: levels["rescale"] == 0 or math.prod(levels["shape"][0][1:]) > 1,
    functions=guided_functions,
    part=guided_part,
    sum_ulps=16,
)
