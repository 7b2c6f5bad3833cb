"""The estimators of a divergence: the trace of the Jacobian, or a mean and a variance as the formulas have them."""

import itertools
import math

import pytest
import torch
from flows import F64, Linear, Net, frobenius, jacobian
from solving import one_thread  # noqa: F401 (an autouse fixture)

import fmkernels as fmk

KEY = torch.tensor([17])
ROWS = 2000
BASIS = torch.tensor([[1.0, 2.0, 0.0, 0.0, 1.0, 0.0], [0.0, 1.0, -1.0, 3.0, 0.0, 0.0]], dtype=F64)
MODES = ("forward", "reverse")


def matrix(D=6):
    return torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=F64)


def estimates(estimator, A, rows=ROWS, key=KEY, first_row=0):
    """Estimates of tr A by ``rows`` independent probes: rows of one and the same x."""
    x = torch.ones(rows, len(A), dtype=F64)
    return fmk.divergence(Linear(A), 0.5, x, estimator, key=key, first_row=first_row, return_stderr=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize("shape", [(3, 6), (2, 2, 3, 2), (1, 1)], ids=str)
def test_exact_is_the_trace_of_the_jacobian(mode, chunk, shape):
    f, x = Net(math.prod(shape[1:])), torch.randn(shape, dtype=F64)
    expected = jacobian(f, 0.3, x).diagonal(0, 1, 2).sum(1)
    value, stderr = fmk.divergence(f, 0.3, x, fmk.Exact(mode, chunk), return_stderr=True)
    torch.testing.assert_close(value, expected)
    assert value.dtype == F64 and stderr.tolist() == [0.0] * shape[0]


ESTIMATORS = [
    fmk.Hutchinson(1), fmk.Hutchinson(3), fmk.Hutchinson(2, "normal"), fmk.Hutchinson(1, "normal"),
    fmk.Hutchinson(5, "hadamard"), fmk.Hutchinson(1, "hadamard"), fmk.Deflated(BASIS), fmk.Deflated(BASIS, 3),
    fmk.Deflated(BASIS, 2, "normal"), fmk.Deflated(BASIS, 4, "hadamard"),
]  # fmt: skip


def in_mode(estimator, mode):
    if isinstance(estimator, fmk.Deflated):
        c = estimator.complement
        return fmk.Deflated(BASIS, c.probes, c.distribution, mode)
    return fmk.Hutchinson(estimator.probes, estimator.distribution, mode)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_forward_mode_is_reverse_mode(estimator, dtype):
    f, x = Net(6, dtype=dtype), torch.randn(4, 3, 2, dtype=dtype)
    values = [fmk.divergence(f, 0.3, x, in_mode(estimator, mode), key=KEY, return_stderr=True) for mode in MODES]
    assert values[0][0].dtype == dtype
    for forward, reverse in zip(*values, strict=True):
        torch.testing.assert_close(forward, reverse, equal_nan=True)


@pytest.mark.parametrize("estimator", ESTIMATORS[:6], ids=repr)
def test_an_estimate_is_the_mean_of_its_probes(estimator):
    A = matrix()
    m = estimator.probes
    z = fmk.ops.probe(KEY, 3, 6, distribution=estimator.distribution, probes=m, first_row=5, dtype=F64)
    each = torch.einsum("mbi,ij,mbj->bm", z, A, z)
    value, stderr = estimates(estimator, A, rows=3, first_row=5)
    torch.testing.assert_close(value, each.mean(1))
    share = 1 - m / 8 if estimator.distribution == "hadamard" else 1.0
    if m > 1:
        torch.testing.assert_close(stderr, each.std(1) * math.sqrt(share / m))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_unbiased_over_2000_probes_with_the_variance_of_the_formula(estimator):
    A = matrix()
    whole, off_diagonal = frobenius(A)
    m = estimator.complement.probes if isinstance(estimator, fmk.Deflated) else estimator.probes
    distribution = estimator.complement.distribution if isinstance(estimator, fmk.Deflated) else estimator.distribution
    if isinstance(estimator, fmk.Deflated):
        projection = torch.eye(6, dtype=F64) - torch.linalg.pinv(BASIS) @ BASIS
        whole, off_diagonal = frobenius(projection @ A @ projection)
    variance = 2 / m * (whole if distribution == "normal" else off_diagonal)
    if distribution == "hadamard":
        variance *= (8 - m) / 7
        keys = [torch.tensor([seed]) for seed in range(100)]  # the rows of a key share their columns of the matrix
        value = torch.cat([estimates(estimator, A, rows=ROWS // 100, key=key)[0] for key in keys])
    else:
        value, _ = estimates(estimator, A)
    assert abs(value.mean() - A.trace()) <= 4 * math.sqrt(variance / ROWS)
    assert abs(value.var() / variance - 1) <= 0.15


@pytest.mark.parametrize("distribution, m", [("rademacher", 16), ("normal", 16), ("hadamard", 6)])
def test_errors_are_as_large_as_their_standard_errors(distribution, m):
    A = matrix(16 if distribution != "hadamard" else 8)
    value, stderr = estimates(fmk.Hutchinson(m, distribution), A)
    scores = (value - A.trace()).square().mean() / stderr.square().mean()
    assert abs(scores - 1) <= 0.15
    assert stderr.isfinite().all()


def test_all_hadamard_vectors_give_the_trace():
    A = matrix(5)
    value, stderr = estimates(fmk.Hutchinson(8, "hadamard"), A, rows=3)
    torch.testing.assert_close(value, A.trace().expand(3))
    assert stderr.tolist() == [0.0] * 3


def test_deflation_of_what_matters_leaves_no_variance():
    A = matrix(6)
    low_rank = BASIS.T @ torch.tensor([[2.0, 1.0], [1.0, -3.0]], dtype=F64) @ BASIS
    for estimator, exact in ((fmk.Deflated(BASIS, 2), low_rank), (fmk.Deflated(torch.eye(6) + 0.1, 2), A)):
        value, stderr = estimates(estimator, exact, rows=3)
        torch.testing.assert_close(value, exact.trace().expand(3))
        torch.testing.assert_close(stderr, torch.zeros(3, dtype=F64), rtol=0, atol=1e-12)


def test_one_probe_has_no_standard_error():
    assert estimates(fmk.Hutchinson(), matrix(), rows=3)[1].isnan().all()


def test_rows_are_numbered_globally():
    f, x = Net(6), torch.randn(5, 6, dtype=F64)
    for estimator in ESTIMATORS:
        whole = fmk.divergence(f, 0.2, x, estimator, key=KEY, first_row=7)
        parts = [fmk.divergence(f, 0.2, x[a:b], estimator, key=KEY, first_row=7 + a) for a, b in ((0, 2), (2, 5))]
        torch.testing.assert_close(torch.cat(parts), whole)


def test_keys_and_generators():
    A = matrix()
    x, f, one = torch.ones(50, 6, dtype=F64), Linear(A), fmk.Hutchinson()
    first = fmk.divergence(f, 0, x, one, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, fmk.divergence(f, 0, x, one, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(first, fmk.divergence(f, 0, x, one))


def test_times_are_numbers_or_rows():
    x = torch.randn(3, 2, dtype=F64)

    def f(t, x):
        assert t.shape == (3,) and t.dtype == F64
        return t.unsqueeze(1) * x

    assert fmk.divergence(f, 0.5, x).tolist() == [1.0] * 3
    assert fmk.divergence(f, torch.tensor([0.0, 0.5, 1.0]), x).tolist() == [0.0, 1.0, 2.0]


def test_a_field_that_knows_its_divergence_is_asked():
    class Known(Linear):
        def velocity_and_divergence(self, t, x):
            return self(t, x), torch.full_like(x[:, 0], 42.0)

    x, f = torch.randn(3, 6, dtype=F64), Known(matrix())
    assert fmk.divergence(f, 0.0, x).tolist() == [42.0] * 3
    assert fmk.log_prob(f, x, divergence=fmk.Exact()).log_prob.isfinite().all()
    assert not (fmk.divergence(f, 0.0, x, fmk.Hutchinson()) == 42.0).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("estimator", [fmk.Exact(), fmk.Hutchinson(), fmk.Hutchinson(2), fmk.Deflated(BASIS)], ids=repr)
def test_gradients_of_the_divergence(mode, estimator):
    f, x = Net(6, width=4), torch.randn(2, 6, dtype=F64, requires_grad=True)
    estimator = fmk.Exact(mode, chunk=4) if isinstance(estimator, fmk.Exact) else in_mode(estimator, mode)
    names, parameters = zip(*f.named_parameters())

    def value(x, *parameters):
        def field(t, x):
            return torch.func.functional_call(f, dict(zip(names, parameters)), (t, x))

        return fmk.divergence(field, 0.3, x, estimator, key=KEY)

    assert torch.autograd.gradcheck(value, (x, *(p.detach().clone().requires_grad_() for p in parameters)))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_recorded_only_where_there_are_any(mode):
    f, x = Net(4), torch.randn(2, 4, dtype=F64)
    two = fmk.Hutchinson(2, mode=mode)
    assert fmk.divergence(f, 0.0, x, two).requires_grad
    with torch.no_grad():
        assert not fmk.divergence(f, 0.0, x, two).requires_grad
    assert fmk.divergence(f.requires_grad_(False), 0.0, x.requires_grad_(), two).requires_grad
    assert not fmk.divergence(f, 0.0, x.detach(), two).requires_grad, "frozen parameters"
    assert not fmk.divergence(lambda t, x: x.sin(), 0.0, x.detach(), two).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_differentiates_within_inference_mode(mode):
    f = Net(4)
    with torch.inference_mode():
        x = torch.randn(2, 4, dtype=F64)
        value = fmk.divergence(f, 0.0, x, fmk.Exact(mode))
        result = fmk.log_prob(f, x, divergence=fmk.Hutchinson(2, mode=mode))
    assert not value.requires_grad and not result.log_prob.requires_grad
    torch.testing.assert_close(value, jacobian(f, 0.0, x.clone()).diagonal(0, 1, 2).sum(1))


def test_one_evaluation_whatever_the_probes():
    calls = []

    def f(t, x):
        calls.append(1)
        return torch.sin(x)

    x = torch.randn(2, 8, dtype=F64)
    for estimator in (fmk.Hutchinson(7, mode="forward"), fmk.Hutchinson(7), fmk.Exact("reverse", chunk=3), fmk.Exact()):
        calls.clear()
        fmk.divergence(f, 0.0, x, estimator)
        assert len(calls) == 1, estimator


@pytest.mark.compiles
def test_compiled_fields():
    f, x = Net(4, dtype=torch.float32).requires_grad_(False), torch.randn(3, 4)
    compiled = torch.compile(f, backend="aot_eager")
    for estimator in (fmk.Hutchinson(), fmk.Hutchinson(3, mode="forward")):
        expected = fmk.divergence(f, 0.3, x, estimator, key=KEY)
        torch.testing.assert_close(fmk.divergence(compiled, 0.3, x, estimator, key=KEY), expected)
    torch.compiler.reset()
    for estimator in (fmk.Hutchinson(3), fmk.Exact(chunk=1)):
        with pytest.raises(ValueError, match=r"f: .* not compiled .* Hutchinson\(probes=1\), or mode='forward'"):
            fmk.divergence(compiled, 0.3, x, estimator, key=KEY)


class Attention(torch.nn.Module):
    """A network of images: convolutions, group norm, attention."""

    def __init__(self):
        super().__init__()
        self.first, self.last = (torch.nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 4), (4, 2)))
        self.norm = torch.nn.GroupNorm(2, 4)
        self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, t, x):
        h = torch.cat([x, t.view(-1, 1, 1, 1).expand_as(x[:, :1])], 1)
        h = torch.nn.functional.silu(self.norm(self.first(h)))
        tokens = h.view(len(x), 4, -1).mT
        return self.last(h + self.attention(tokens, tokens, tokens, need_weights=False)[0].mT.reshape(h.shape))


def test_networks_with_convolutions_norms_and_attention():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    f, x = Attention().double(), torch.randn(2, 2, 3, 3, dtype=F64)
    expected = jacobian(f, 0.3, x).diagonal(0, 1, 2).sum(1)
    torch.testing.assert_close(fmk.divergence(f, 0.3, x), expected)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no forward mode and no second derivatives
        torch.testing.assert_close(fmk.divergence(f, 0.3, x, fmk.Exact("forward")), expected)
        two = [fmk.divergence(f, 0.3, x, fmk.Hutchinson(2, mode=mode), key=KEY) for mode in MODES]
        torch.testing.assert_close(*two)
        grads = [torch.autograd.grad(value.sum(), f.first.weight)[0] for value in two]
        torch.testing.assert_close(*grads)


class WithBatchNorm(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4, **options))

    def forward(self, t, x):
        return self.layers(x)


def test_batch_statistics_are_refused():
    f, x = WithBatchNorm(), torch.randn(3, 4)
    for field in (f, f.forward, fmk.FlowMatching().velocity(lambda x, t: x)):
        if isinstance(field, torch.nn.Module) and field is not f:
            field.model = torch.nn.BatchNorm1d(4)
        with pytest.raises(ValueError, match=r"f: .* BatchNorm1d '.*' takes its statistics over the batch \(call eval"):
            fmk.divergence(field, 0.0, x)
    with pytest.raises(ValueError, match="keeps no running statistics"):
        fmk.log_prob(WithBatchNorm(track_running_stats=False).eval(), x)
    assert fmk.divergence(f.eval(), 0.0, x).shape == (3,)


X = torch.zeros(3, 4)
CONSTANT = r"f: .* depends on x through operations that torch differentiates.*c \+ 0 \* x"
BAD = [
    (lambda: fmk.Hutchinson(0), ValueError, "probes: expected an int of at least 1, got 0"),
    (lambda: fmk.Hutchinson(-3), ValueError, "probes"),
    (lambda: fmk.Hutchinson(2.0), TypeError, "probes: expected an int, got float"),
    (lambda: fmk.Hutchinson(True), TypeError, "probes"),
    (lambda: fmk.Hutchinson(1, "cauchy"), ValueError, "distribution: expected one of 'rademacher'"),
    (lambda: fmk.Hutchinson(mode="both"), ValueError, "mode"),
    (lambda: fmk.Exact(chunk=0), ValueError, "chunk"),
    (lambda: fmk.Exact("backward"), ValueError, "mode"),
    (lambda: fmk.divergence(torch.mul, 0, X[:, :1], fmk.Hutchinson(2, "hadamard")), ValueError, "probes: .*at most 1"),
    (lambda: fmk.divergence(torch.mul, 0, X, fmk.Hutchinson(5, "hadamard")), ValueError, "probes: .* at most 4"),
    (lambda: fmk.Deflated([[1.0]]), TypeError, "basis"),
    (lambda: fmk.Deflated(torch.ones(1, 3, dtype=torch.long)), TypeError, "basis"),
    (lambda: fmk.Deflated(torch.ones(3)), ValueError, r"basis: expected shape \[k, D\]"),
    (lambda: fmk.Deflated(torch.ones(0, 3)), ValueError, "basis"),
    (lambda: fmk.Deflated(torch.ones(4, 3)), ValueError, "basis: expected at most 3"),
    (lambda: fmk.Deflated(torch.ones(2, 3)), ValueError, "basis: expected linearly independent"),
    (lambda: fmk.Deflated(torch.tensor([[1.0, math.nan]])), ValueError, "basis: expected finite"),
    (lambda: fmk.Deflated(torch.zeros(1, 2)), ValueError, "basis: expected linearly independent"),
    (lambda: fmk.Deflated(torch.eye(4), probes=0), ValueError, "probes"),
    (lambda: fmk.divergence(torch.mul, 0, X, fmk.Deflated(torch.eye(3))), ValueError, "basis: expected vectors of 4"),
    (lambda: fmk.divergence(torch.mul, 0, X, "exact"), TypeError, "estimator: expected an Exact.*got str"),
    (lambda: fmk.divergence(torch.mul, 0, X, fmk.Hutchinson), TypeError, "estimator: .*got Hutchinson"),
    (lambda: fmk.divergence(3, 0, X), TypeError, "f: expected a callable"),
    (lambda: fmk.divergence(torch.mul, 0, X.long()), TypeError, "x: expected dtype float32.*, got int64 .*dequantise"),
    (lambda: fmk.divergence(torch.mul, 0, X.bfloat16()), TypeError, "x: expected dtype float32.*, got bfloat16$"),
    (lambda: fmk.divergence(torch.mul, 0, X[0]), ValueError, r"x: expected shape \[B, …\].*got \[4\]"),
    (lambda: fmk.divergence(torch.mul, 0, X[:, :0]), ValueError, "x: expected shape"),
    (lambda: fmk.divergence(torch.mul, torch.zeros(2), X), ValueError, r"t: expected a number or shape \[3\]"),
    (lambda: fmk.divergence(torch.mul, 0, X, key=KEY, generator=torch.Generator()), ValueError, "generator"),
    (lambda: fmk.divergence(torch.mul, 0, X, key=3), TypeError, "key"),
    (lambda: fmk.divergence(torch.mul, 0, X, first_row=-1), ValueError, "first_row"),
    (lambda: fmk.divergence(lambda t, x: x[:, :2], 0, X), ValueError, r"f: expected it to return shape \[3, 4\]"),
    (lambda: fmk.divergence(lambda t, x: x.double(), 0, X), ValueError, "f: expected it to return torch.float32"),
    (lambda: fmk.divergence(lambda t, x: (x,), 0, X), ValueError, "f: expected it to return a torch.Tensor, got tuple"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("mode, m", list(itertools.product(MODES, (1, 2))))
def test_a_field_without_a_gradient_to_x_is_an_error(mode, m):
    weight = torch.ones(4, requires_grad=True)
    fields = (
        lambda t, x: torch.ones_like(x),
        lambda t, x: weight.expand_as(x) * 2,  # a gradient, but not to x
        lambda t, x: x.detach().sin() + weight,
    )
    for f in fields:
        with pytest.raises(ValueError, match=CONSTANT):
            fmk.divergence(f, 0.0, X, fmk.Hutchinson(m, mode=mode))
    constant = fmk.divergence(lambda t, x: weight + 0 * x, 0.0, X, fmk.Hutchinson(m, mode=mode))
    assert constant.tolist() == [0.0] * 3
