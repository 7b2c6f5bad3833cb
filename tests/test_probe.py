"""Probes: their bits, Hadamard's orthogonality, moments and variances, and the sums that draw them again."""

import math

import pytest
import torch
from contract_op import F64, INTERPRETED
from torch.autograd import gradcheck, gradgradcheck

from fmkernels import _registration
from fmkernels.ops import noise, probe, probe_dot
from fmkernels.ops.noise import STREAMS, permute, philox
from fmkernels.ops.probe import PROBES

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SEED = 0x5DEECE66D1234567
KEY, V = torch.tensor([SEED]), torch.randn(2, 3, 4)
ROWS = 100 if INTERPRETED else 2000  # of a sample
# Rows of every unrolled length, of a word, a group of words and a tile with and without tails, and of several tasks.
COLUMNS = [1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 1000, 1025, 4095, 4097, 16_385, 40_001]
if INTERPRETED:  # the interpreter's own tests have long rows
    COLUMNS = [1, 3, 33, 129]


def key(device, seed=SEED):
    return torch.tensor([seed], device=device)


def drawn_again(columns, index, row):
    """±1 of a row's Rademacher probe by Philox's words and Python's integers."""
    signs = []
    for group in range(-(-columns // 128)):
        counter = (group, row % 2**32, row // 2**32, STREAMS["probe"] | index << 8)
        words = [int(word) for word in philox([torch.tensor([word]) for word in counter], KEY)]
        signs += [1 - 2 * (words[j // 32] >> j % 32 & 1) for j in range(128)]
    return torch.tensor(signs[:columns])


# ---- what is drawn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 3, 40, 300])
def test_signs_are_the_bits_of_the_definition(columns, device):
    z = probe(key(device), 3, columns, probes=2, first_probe=2**24 - 2, first_row=2**32 - 1)
    want = [[drawn_again(columns, 2**24 - 2 + i, 2**32 - 1 + row) for row in range(3)] for i in range(2)]
    assert torch.equal(z.cpu().long(), torch.stack([torch.stack(rows) for rows in want]))


@pytest.mark.parametrize("columns", [1, 5, 12, 200])
def test_hadamard_is_a_column_under_the_signs_of_probe_0(columns, device):
    probes = min(columns, 3)
    z = probe(key(device), 2, columns, distribution="hadamard", probes=probes, first_row=7).cpu().long()
    signs = torch.stack([drawn_again(columns, 0, 7 + row) for row in range(2)])
    order = 2 ** math.ceil(math.log2(columns))
    for i, c in enumerate(permute(KEY, order, torch.arange(probes)).tolist()):
        column = torch.tensor([(-1) ** (j & c).bit_count() for j in range(columns)])
        assert torch.equal(z[i], signs * column)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_every_dtype_has_the_same_probes(dtype, device):
    for distribution in ("rademacher", "hadamard"):
        z = probe(key(device), 5, 300, distribution=distribution, probes=3, dtype=dtype)
        assert z.dtype == dtype and z.shape == (3, 5, 300) and z.is_contiguous()
        assert torch.equal(z.abs(), torch.ones_like(z))
        assert torch.equal(z.double(), probe(key(device), 5, 300, distribution=distribution, probes=3, dtype=F64))
    z = probe(key(device), 5, 300, distribution="normal", probes=2, first_probe=6, first_row=3, dtype=dtype)
    for i in range(2):
        assert torch.equal(z[i], noise(key(device), 5, 300, stream="probe", index=6 + i, first_row=3, dtype=dtype))


@pytest.mark.parametrize("distribution", PROBES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_short_long_and_ragged_rows(columns, distribution, device):
    """Every branch of a kernel against the reference, and the sums of each; many rows where they are short."""
    rows = 5 if INTERPRETED or columns > 200 else 5003 if columns < 6 else 301
    probes = 2 if columns > 1 or distribution != "hadamard" else 1
    how = {"distribution": distribution, "first_row": 2**32 - 20}
    arguments = (key(device), rows, columns, PROBES[distribution], probes, 0, 2**32 - 20, F64)
    want = _registration.references["probe"](*arguments)
    for dtype in (F32, BF16, F64):
        z = probe(key(device), rows, columns, probes=probes, dtype=dtype, **how)
        error = {F32: 4e-6, BF16: 1e-2, F64: 1e-13}[dtype] if distribution == "normal" else 0
        torch.testing.assert_close(z.double(), want, rtol=error, atol=error)
        last = probe(key(device), 1, columns, probes=probes, dtype=dtype, **how | {"first_row": 2**32 - 21 + rows})
        assert torch.equal(z[:, -1:], last)
        values = torch.randn(probes, rows, columns, device=device).to(dtype)
        terms = z.double() * values.double()
        error = (probe_dot(key(device), values, **how).double() - terms.sum(2)).abs()
        assert (error <= 8 * torch.finfo(F64 if dtype == F64 else F32).eps * terms.abs().sum(2)).all()


@pytest.mark.parametrize("distribution", PROBES)
def test_parts_are_the_whole(distribution, device):
    how = {"distribution": distribution, "dtype": BF16}
    whole = probe(key(device), 7, 130, probes=5, first_row=2**32 - 3, **how)
    rows = [probe(key(device), 1, 130, probes=5, first_row=2**32 - 3 + i, **how) for i in range(7)]
    probes = [probe(key(device), 7, 130, first_probe=i, first_row=2**32 - 3, **how) for i in range(5)]
    assert torch.equal(torch.cat(rows, 1), whole) and torch.equal(torch.cat(probes), whole)
    values = torch.randn(5, 7, 130, device=device)
    sums = probe_dot(key(device), values, distribution=distribution, first_row=3)
    part = probe_dot(key(device), values[2:4, 5:6], distribution=distribution, first_probe=2, first_row=8)
    torch.testing.assert_close(part, sums[2:4, 5:6])


# ---- Hadamard's ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 8, 64] + [256] * (not INTERPRETED))
def test_all_hadamard_probes_are_orthogonal(order, device):
    z = probe(key(device), 2, order, distribution="hadamard", probes=order, dtype=F64).transpose(0, 1)
    assert torch.equal(z @ z.mT, order * torch.eye(order, dtype=F64, device=device).expand(2, -1, -1))


@pytest.mark.parametrize("columns", [3, 5, 12, 33, 64])
def test_all_hadamard_probes_give_the_trace(columns, device):
    """For fewer columns than the order too, where probes differ but are not orthogonal; half of them do not."""
    order = 2 ** math.ceil(math.log2(columns))
    z = probe(key(device), 3, columns, distribution="hadamard", probes=order, dtype=F64)
    assert len({tuple(row.tolist()) for row in z[:, 0]}) == order
    a = torch.randn(columns, columns, dtype=F64, device=device)
    estimates = probe_dot(key(device), z @ a, distribution="hadamard")
    torch.testing.assert_close(estimates.mean(0), a.trace().expand(3), rtol=1e-12, atol=1e-12)
    assert (estimates[: order // 2].mean(0) - a.trace()).abs().min() > 1e-6


# ---- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", PROBES)
def test_mean_is_0_and_covariance_the_identity(distribution, device):
    z = probe(key(device), ROWS, 40, distribution=distribution, probes=3, dtype=F64)
    flat = z.flatten(0, 1) if distribution != "hadamard" else z[0]  # a row's Hadamard probes share their signs
    n = len(flat)
    assert flat.mean(0).abs().max() < 5 / math.sqrt(n)
    assert (flat.mT @ flat / n - torch.eye(40, dtype=F64, device=device)).abs().max() < 5 * math.sqrt(2 / n)


def test_rows_probes_and_keys_are_independent(device):
    bound = 5 / math.sqrt(ROWS * 40)
    for distribution in PROBES:
        z = probe(key(device), ROWS, 40, distribution=distribution, probes=2)
        others = {
            "row": probe(key(device), ROWS, 40, distribution=distribution, first_row=ROWS)[0],
            "row beyond 2^32": probe(key(device), ROWS, 40, distribution=distribution, first_row=2**32)[0],
            "next row": z[0].roll(1, 0),
            "key": probe(key(device) + 1, ROWS, 40, distribution=distribution)[0],
            "high half of the key": probe(key(device) + 2**32, ROWS, 40, distribution=distribution)[0],
        }
        if distribution != "hadamard":
            others |= {"probe": z[1], "next column": z[0].roll(1, 1)}
        for name, other in others.items():
            assert abs(float((z[0] * other).double().mean())) < bound, (distribution, name)


@pytest.mark.parametrize("distribution", PROBES)
def test_variances_of_the_trace(distribution, device):
    """(2/m)(‖S‖² − Σ s_ii²), (2/m)‖S‖², and the first times (P − m)/(P − 1); rows share Hadamard's columns, so keys."""
    columns, m = 11, 5  # P = 16
    a = torch.randn(columns, columns, dtype=F64, device=device)
    s = (a + a.T) / 2
    if distribution == "hadamard":
        drawn = [probe(key(device, i), 1, columns, distribution=distribution, probes=m) for i in range(ROWS)]
        z = torch.cat(drawn, 1).double()
    else:
        z = probe(key(device), ROWS, columns, distribution=distribution, probes=m, dtype=F64)
    estimates = ((z @ a) * z).sum(2).mean(0)
    off = s.square().sum() - s.diagonal().square().sum()
    want = {"rademacher": 2 / m * off, "normal": 2 / m * s.square().sum(), "hadamard": 2 / m * off * 11 / 15}
    assert abs(estimates.mean() - a.trace()) < 5 * (want[distribution] / ROWS).sqrt()
    assert float(estimates.var() / want[distribution]) == pytest.approx(1, abs=0.6 if INTERPRETED else 0.15)


# ---- probe_dot ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", PROBES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 5, 4, 3), (1, 2, 3, 20, 20), (2, 0, 3), (0, 3, 2), (2, 3, 0)])
def test_sums_of_trailing_dimensions(shape, distribution, device):
    probes, rows, *trailing = shape
    if distribution == "hadamard" and probes > 1 and math.prod(trailing) < 2:
        probes, shape = 1, (1, *shape[1:])
    z = probe(key(device), rows, math.prod(trailing), distribution=distribution, probes=probes, dtype=F64)
    for dtype in (F64, F32, F16):
        values = torch.randn(shape, device=device).to(dtype)
        sums = probe_dot(key(device), values, distribution=distribution)
        assert sums.dtype == (F64 if dtype == F64 else F32) and sums.shape == (probes, rows)
        exact = (z.to(dtype).double() * values.double().reshape(z.shape)).sum(2)
        torch.testing.assert_close(sums.double(), exact, rtol=0, atol=1e-12 if dtype == F64 else 5e-5)


@pytest.mark.parametrize("distribution", PROBES)
def test_values_of_any_strides(distribution, device):
    base = torch.randn(6, 8, 3, 10, device=device)
    for values in (base[::2, 1:7, :, ::3], base.transpose(0, 1), base[:2, :, :1, :1].expand(2, 8, 7, 9), base[1:].mT):
        sums = probe_dot(key(device), values, distribution=distribution)
        assert torch.equal(sums, probe_dot(key(device), values.contiguous(), distribution=distribution))


@pytest.mark.parametrize("distribution", PROBES)
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_the_gradient_is_the_probe(distribution, dtype, device):
    values = torch.randn(3, 4, 5, 2, device=device).to(dtype).requires_grad_()
    sums = probe_dot(key(device), values, distribution=distribution, first_probe=2, first_row=9)
    g = torch.randn_like(sums)
    (gradient,) = torch.autograd.grad(sums, values, g)
    z = probe(key(device), 4, 10, distribution=distribution, probes=3, first_probe=2, first_row=9, dtype=dtype)
    assert torch.equal(gradient, (z.to(sums.dtype) * g[:, :, None]).to(dtype).reshape(values.shape))
    assert probe_dot(key(device), values.detach()).requires_grad is False


@pytest.mark.parametrize("distribution", PROBES)
def test_derivatives_and_transforms(distribution, device):
    k, values = key(device), torch.randn(2, 2, 3, dtype=F64, device=device)

    def dot(values):
        return probe_dot(k, values, distribution=distribution)

    leaf = values.clone().requires_grad_()
    assert gradcheck(dot, leaf, check_forward_ad=True, check_batched_grad=True) and gradgradcheck(dot, leaf)
    tangent = torch.randn_like(values)
    _, derivative = torch.func.jvp(dot, (values,), (tangent,))
    torch.testing.assert_close(derivative, dot(tangent))
    batch = torch.randn(4, *values.shape, dtype=F64, device=device)
    torch.testing.assert_close(torch.func.vmap(dot)(batch), torch.stack([dot(each) for each in batch]))
    torch.testing.assert_close(
        torch.func.grad(lambda v: dot(v).square().sum())(values),
        torch.autograd.grad(dot(leaf).square().sum(), leaf)[0],
    )


@pytest.mark.compiles
@pytest.mark.parametrize("distribution", PROBES)
def test_compiled_for_sizes_that_vary(distribution):
    torch._dynamo.reset()

    def both(k, values):
        z = probe(k, values.shape[1], values.shape[2], distribution=distribution, probes=values.shape[0])
        return z, probe_dot(k, values, distribution=distribution)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 4), (3, 5, 8), (4, 2, 33)):
        values = torch.randn(shape)
        for got, want in zip(compiled(KEY, values), both(KEY, values), strict=True):
            torch.testing.assert_close(got, want)


# ---- bad inputs ---------------------------------------------------------------------------------------------------

PROBE = [
    ((None, 2, 3), {}, TypeError, "key: expected a torch.Tensor, got NoneType"),
    ((KEY.int(), 2, 3), {}, ValueError, "key: expected an int64 .*, got int32"),
    ((torch.zeros(2, dtype=torch.int64), 2, 3), {}, ValueError, r"key: expected .*\[1\].*, got .*\[2\]"),
    ((KEY, -1, 3), {}, ValueError, "rows: expected .*, got -1"),
    ((KEY, 2.0, 3), {}, TypeError, "rows: expected .*, got float"),
    ((KEY, 2, -3), {}, ValueError, "columns: expected .*, got -3"),
    ((KEY, 2, 2**34 + 1), {}, ValueError, r"columns: expected at most 2\*\*34, got 17179869185"),
    ((KEY, 2, 2**30 + 1), {"distribution": "hadamard"}, ValueError, r"columns: .* 2\*\*30 for 'hadamard', got 10737"),
    ((KEY, 2, 3), {"distribution": "sphere"}, ValueError, "distribution: expected .*rademacher.*, got 'sphere'"),
    ((KEY, 2, 3), {"distribution": 0}, (TypeError, ValueError), "distribution: expected .*, got "),
    ((KEY, 2, 3), {"probes": -1}, ValueError, "probes: expected .*, got -1"),
    ((KEY, 2, 3), {"probes": True}, TypeError, "probes: expected .*, got bool"),
    ((KEY, 2, 3), {"first_probe": -1}, ValueError, "first_probe: expected .*, got -1"),
    ((KEY, 2, 3), {"first_row": -1}, ValueError, "first_row: expected .*, got -1"),
    ((KEY, 2, 3), {"first_row": "0"}, TypeError, "first_row: expected .*, got str"),
    ((KEY, 2, 3), {"probes": 2, "first_probe": 2**24 - 1}, ValueError, r"probes: .* 2\*\*24 .*, got 16777215 \+ 2"),
    ((KEY, 2, 3), {"distribution": "hadamard", "probes": 5}, ValueError, r"probes: expected at most 4 .*, got 0 \+ 5"),
    ((KEY, 2, 3), {"distribution": "hadamard", "first_probe": 4}, ValueError, r"probes: .* at most 4 .*, got 4 \+ 1"),
    ((KEY, 2, 3), {"dtype": torch.int32}, TypeError, "dtype: expected float32, .*, got torch.int32"),
]
DOT = [
    ((None, V), {}, TypeError, "key: expected a torch.Tensor, got NoneType"),
    ((KEY, [1.0]), {}, TypeError, "values: expected a torch.Tensor, got list"),
    ((KEY, V.long()), {}, TypeError, "values: expected dtype float32, .*, got int64"),
    ((KEY, V.to(torch.complex64)), {}, TypeError, "values: expected dtype float32, .*, got complex64"),
    ((KEY, V[0, 0]), {}, ValueError, r"values: expected shape \[probes, rows, ...\], got \[4\]"),
    ((KEY.to("meta"), V), {}, ValueError, "(key|values): expected device .*, got (cpu|meta)"),
    ((KEY, V), {"distribution": "uniform"}, ValueError, "distribution: expected .*, got 'uniform'"),
    ((KEY, V), {"first_probe": 2**24 - 1}, ValueError, r"probes: .* 2\*\*24 with first_probe, got 16777215 \+ 2"),
    ((KEY, V), {"first_probe": 1.0}, TypeError, "first_probe: expected .*, got float"),
    ((KEY, V), {"first_row": -2}, ValueError, "first_row: expected .*, got -2"),
    ((KEY, V), {"distribution": "hadamard", "first_probe": 3}, ValueError, r"probes: .* at most 4 .*, got 3 \+ 2"),
]
BAD = [(probe, *case) for case in PROBE] + [(probe_dot, *case) for case in DOT]


@pytest.mark.parametrize(("function", "arguments", "more", "error", "message"), BAD, ids=map(str, range(len(BAD))))
def test_bad_input(function, arguments, more, error, message):
    with pytest.raises(error, match=message):
        function(*arguments, **more)
