"""What is special to conditional_flow: the bits of plain PyTorch on the CPU, values that are not finite, and errors."""

import math

import pytest
import torch

import fmkernels as fmk
from fmkernels import _registration
from fmkernels.ops import conditional_flow
from fmkernels.ops.conditional_flow import FORMS

F32, F64 = torch.float32, torch.float64
INTEGERS = {F32: torch.int32, F64: torch.int64}
NAN, INF = math.nan, math.inf


def eager(x0, x1, noise, coefficients, form):
    """The formulas as a program writes them, one operation after the other."""
    a, b, s, c = (column.reshape(-1, *[1] * (x1.dim() - 1)) for column in coefficients.T)
    if form == "linear":
        return a * x1 + b * x0 + s * noise, x1 - x0
    if form == "target":
        x_t = a * x1 + s * noise
        return x_t, (x1 - b * x_t) / c
    if form == "bridge":
        mean = a * x1 + b * x0
        x_t = mean + s * noise
        return x_t, c * (x_t - mean) + x1 - x0
    if form == "trigonometric":
        return a * x1 + b * x0 + s * noise, math.pi / 2 * (b * x1 - a * x0)
    return a * x1 + b * x0, s * x1 + c * x0


def sample(shape, dtype, form):
    x0, x1, noise = torch.randn(3, *shape, dtype=dtype) * 10 ** (4 * torch.rand(3, *shape, dtype=dtype) - 2)
    return x0, x1, None if form == "affine" else noise, torch.randn(shape[0], 4, dtype=dtype)


def assert_same_bits(values, expected):
    for value, want in zip(values, expected, strict=True):
        nan = want.isnan()
        assert torch.equal(value.isnan(), nan)
        bits, wanted = (each.view(INTEGERS[want.dtype]).masked_fill(nan, 0) for each in (value, want))
        assert torch.equal(bits, wanted), f"{int((bits != wanted).sum())} of {want.numel()} differ"


SHAPES = [(1,), (5,), (1, 1), (3, 7), (37, 2), (1000, 3), (5, 4), (2, 1031), (3, 4, 5, 7), (2, 40_001), (0, 4), (3, 0)]


@pytest.mark.sanitize
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_plain_pytorch(shape, dtype, form):
    arguments = sample(shape, dtype, form)
    values = conditional_flow(*arguments, form)
    assert all(value.is_contiguous() and value.dtype == dtype and value.shape == shape for value in values)
    assert_same_bits(values, eager(*arguments, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_what_is_not_finite_stays_so(dtype, form):
    tiny, huge = torch.finfo(dtype).smallest_normal / 8, torch.finfo(dtype).max
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, tiny, -tiny, huge, 1.0, -3.0], dtype=dtype)
    x0, x1, noise = (special[torch.randint(len(special), (64, 33))] for _ in range(3))
    coefficients = special[torch.randint(len(special), (64, 4))]
    coefficients[:32] = torch.rand(32, 4, dtype=dtype)
    arguments = (x0, x1, None if form == "affine" else noise, coefficients)
    assert_same_bits(conditional_flow(*arguments, form), eager(*arguments, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype, form):
    x0, x1, noise, coefficients = sample((7, 129), F32, form)
    x0, x1, noise = (None if x is None else x.clamp(-50, 50).to(dtype) for x in (x0, x1, noise))
    wide = (None if x is None else x.float() for x in (x0, x1, noise))
    values, expected = conditional_flow(x0, x1, noise, coefficients, form), eager(*wide, coefficients, form)
    for value, want in zip(values, expected, strict=True):
        assert torch.equal(value, want.to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_formula(form):
    """To the bit: autograd through the reference; and a gradient is asked for by any one of the tensors."""
    arguments, weight = sample((5, 3), F32, form), torch.randn(5, 3)
    for i, leaf in enumerate(arguments):
        if leaf is None:
            continue
        gradients = []
        for function in (conditional_flow, eager):
            fresh = [None if x is None else x.clone() for x in arguments]
            fresh[i].requires_grad_()
            wanted = [output for output in function(*fresh, form) if output.requires_grad]
            gradients.append([torch.autograd.grad(output, fresh[i], weight, retain_graph=True) for output in wanted])
        assert len(gradients[0]) == len(gradients[1]) > 0 or (i, form) == (0, "target")
        for (ours,), (theirs,) in zip(*gradients, strict=True):
            assert torch.equal(ours, theirs)


def test_without_gradients_the_kernel_answers_and_leaves_no_graph():
    arguments = sample((5, 3), F32, "linear")
    arguments[1].requires_grad_()
    with torch.no_grad():
        values = conditional_flow(*arguments)
    assert not any(value.requires_grad for value in values)
    assert_same_bits(values, eager(*(x.detach() for x in arguments), "linear"))
    assert _registration.requires_grad(*arguments) and conditional_flow(*arguments)[0].requires_grad


X, C = torch.randn(4, 3), torch.rand(4, 4)
CASES = [
    (lambda: conditional_flow(X, X, X, C, "cubic"), ValueError, "form: expected one of 'linear', .*, got 'cubic'"),
    (lambda: conditional_flow(X, X, X, C, 1), TypeError, "form: expected one of .*, got int"),
    (lambda: conditional_flow(X, 1.0, X, C), TypeError, "x1: expected a torch.Tensor, got float"),
    (lambda: conditional_flow(X, X.long(), X, C), TypeError, "x1: expected dtype float32.*, got int64"),
    (lambda: conditional_flow(C[0, 0], C[0, 0], C[0, 0], C), ValueError, "x1: expected at least one dimension"),
    (lambda: conditional_flow(None, X, X, C), TypeError, "x0: expected a torch.Tensor, got NoneType"),
    (lambda: conditional_flow(X[:2], X, X, C), ValueError, r"x0: expected shape \[4, 3\], that of x1, got \[2, 3\]"),
    (lambda: conditional_flow(X.double(), X, X, C), TypeError, "x0: expected dtype float32, that of x1, got float64"),
    (lambda: conditional_flow(X, X, None, C), TypeError, "noise: expected a torch.Tensor, got NoneType"),
    (lambda: conditional_flow(X, X, X, C, "affine"), TypeError, "noise: expected None, form 'affine' has none, got Te"),
    (lambda: conditional_flow(X, X, X.half(), C), TypeError, "noise: expected dtype float32, .* got float16"),
    (lambda: conditional_flow(X, X, X.to("meta"), C), ValueError, "noise: expected device cpu, that of x1, got meta"),
    (lambda: conditional_flow(X, X, X, 0.5), TypeError, "coefficients: expected a torch.Tensor, got float"),
    (lambda: conditional_flow(X, X, X, C[:, :3]), ValueError, r"coefficients: expected shape \[4, 4\], got \[4, 3\]"),
    (
        lambda: conditional_flow(X, X, X, C.double()),
        TypeError,
        "coefficients: expected dtype float32 for x1 of float32",
    ),
    (lambda: conditional_flow(*[X.bfloat16()] * 3, C.bfloat16()), TypeError, "coefficients: .* got bfloat16"),
    (lambda: conditional_flow(X, X, X, C.to("meta")), ValueError, "coefficients: expected device cpu"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=range(len(CASES)))
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_compiled_op_guards_memory():
    """Called below the public checks, with sizes that do not fit."""
    if _registration.answering("conditional_flow", "cpu") != "cpp":
        return
    op = torch.ops.fmkernels.conditional_flow
    bad = [
        (X, X, X, C[:2], 0),
        (X[:2], X, X, C, 0),
        (X, X, X[:1], C, 0),
        (X, X, None, C, 0),
        (X, X, X, C, 4),
        (X, X, X, C, 9),
    ]
    for arguments in bad:
        with pytest.raises(RuntimeError, match="fmkernels: "):
            op(*arguments)


def test_it_is_exported():
    assert fmk.ops.conditional_flow is conditional_flow
