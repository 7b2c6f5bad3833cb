"""The exact marginal field: precision in every regime, closed forms, the continuity equation, neighbours, memory, and
the training target that is its expectation."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from contract import SCHEDULES

import fmkernels as fmk
from fmkernels import _registration
from fmkernels.marginal import nearest_points
from fmkernels.ops.marginal_field import measure, posterior_moments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import peak_bytes

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
END = 1 - 1e-5
SMOOTH = {name: s for name, s in SCHEDULES.items() if "Custom" not in name} | {
    "Custom": fmk.Custom(lambda t: (t * t, 1 - t)),
    "Custom_bridge": fmk.Custom(lambda t: (t, (1 - t).square() + 0.1, t * (1 - t)), bridge=True),
}


def noised(data, t, rows, device):
    """Rows x = αx_i + σε of CondOT, and α and σ, at the float32 t."""
    alpha = torch.full((rows,), t, dtype=F32, device=device).double()
    sigma = (1 - alpha).clamp_min(1e-5)
    source = data[torch.randint(len(data), (rows,), device=device)].double()
    noise = torch.randn(source.shape, dtype=F64, device=device)
    return (alpha[:, None] * source + sigma[:, None] * noise).to(data.dtype), alpha, sigma


def relative(value, want, least):
    """The error of each row relative to its norm, or to ``least`` where that is more, the largest."""
    return float(((value.double() - want).norm(dim=1) / want.norm(dim=1).maximum(least)).max())


def check_moments(data, x, alpha, sigma, log_weights=None, tolerance=1e-5, unit=1e-6):
    """Each moment near that of fp64: the mean relative to the data, the residual to itself or a part of the noise, as
    it may pass through 0, and κ as it enters the divergence."""
    if x.shape[1] <= 16 and _registration.answering("marginal_field", x.device.type) == "triton":
        tolerance *= 20  # takes products, not differences, in few dimensions
    got = fmk.ops.marginal_field(x, alpha, sigma, data, log_weights)
    mean, residual, log_sum, kappa = posterior_moments(x.double(), alpha, sigma, data.double(), log_weights)
    scale = data.double().norm(dim=1).max()
    assert float((got.mean.double() - mean).norm(dim=1).max() / scale) <= tolerance
    assert relative(got.residual, residual, 0.1 * sigma * math.sqrt(x.shape[1])) <= tolerance
    assert float(((got.log_sum - log_sum).abs() / (1 + unit * log_sum.abs())).max()) <= 5 * tolerance
    gain = (alpha / sigma).square() / x.shape[1]
    assert float(((got.kappa - kappa).abs() * gain / (1 + gain * kappa)).max()) <= tolerance


@pytest.mark.parametrize("t", [0.0, 0.02, 0.1, 0.5, 0.9, 0.999, END])
@pytest.mark.parametrize(("dims", "points"), [(1, 3000), (2, 3000), (64, 1500), (3072, 100)])
def test_float32_is_within_1e_5(dims, points, t, device):
    data = torch.randn(points, dims, device=device)
    check_moments(data, *noised(data, t, 8, device))


def spread_out(device):
    return torch.randn(2000, 24, device=device)


def clusters(device):
    centres = torch.randint(-3, 3, (20, 4), device=device)
    return centres.repeat(60, 1) + 0.01 * torch.randn(1200, 4, device=device)


REGIMES = {  # data, t
    "hundreds of competitors": (lambda device: torch.rand(6000, 2, device=device), 0.95),
    "far from the origin": (lambda device: 30 + torch.randn(2000, 2, device=device), 0.9),
    "clusters": (clusters, 0.98),
    "in order": (lambda device: torch.randn(6000, 1, device=device).sort(0).values, 0.9),
    "a tight cluster": (lambda device: 1 + 1e-3 * torch.randn(900, 48, device=device), 0.999),
    "clones, early": (lambda device: torch.randn(30, 48, device=device).repeat(40, 1), 0.3),
    "clones, late": (lambda device: torch.randn(30, 48, device=device).repeat(40, 1), END),
    "one point": (lambda device: torch.randn(1, 24, device=device), 0.7),
    "two points": (lambda device: torch.randn(2, 24, device=device), 0.01),
    "a dimension": (lambda device: torch.randn(700, 1, device=device), 0.6),
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_every_regime(regime, dtype, device):
    make, t = REGIMES[regime]
    data = make(device).to(dtype)
    check_moments(data, *noised(data, t, 8, device), tolerance=1e-5 if dtype == F32 else 1e-9)


def test_queries_far_from_the_data(device):
    data = spread_out(device)
    x, alpha, sigma = noised(data, 0.5, 8, device)
    check_moments(data, 1e4 * x, alpha, sigma)


def test_more_clones_than_any_list_holds(device):
    """Where products are far off, those that are added up must still weigh as much as those taken again."""
    data = torch.randn(3, 64, device=device).repeat(700, 1)
    x, alpha, sigma = noised(data, END, 8, device)
    got = fmk.ops.marginal_field(x, alpha, sigma, data)
    want = posterior_moments(x.double(), alpha, sigma, data.double(), None)
    torch.testing.assert_close(got.log_sum, want[2], rtol=0, atol=1e-4)
    torch.testing.assert_close(got.mean.double(), want[0], rtol=0, atol=1e-5)


def test_logits_that_are_all_equal(device):
    """α = 0: every point alike, whatever the number of tiles; weights by themselves."""
    data = torch.randn(3000, 5, device=device)
    x, alpha, sigma = noised(data, 0.0, 4, device)
    got = fmk.ops.marginal_field(x, alpha, sigma, data)
    torch.testing.assert_close(got.mean, data.mean(0).expand(4, 5), rtol=0, atol=1e-6)
    torch.testing.assert_close(got.residual, x, rtol=1e-7, atol=0)
    spread = (data.double() - data.double().mean(0)).square().sum(1).mean()
    torch.testing.assert_close(got.kappa, spread.expand(4), rtol=1e-6, atol=0)
    torch.testing.assert_close(got.log_sum, -0.5 * x.double().square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.99])
def test_weights(t, device):
    """A weight of zero leaves a point out, even the nearest; a weight of two is the point twice."""
    data = spread_out(device)
    x, alpha, sigma = noised(data, t, 8, device)
    log_weights = torch.rand(len(data), dtype=F64, device=device).log()
    log_weights[::3] = -INF
    check_moments(data, x, alpha, sigma, log_weights)
    twice = torch.ones(len(data), dtype=F64, device=device)
    twice[:100] = 2
    got = fmk.ops.marginal_field(x, alpha, sigma, data, (twice / twice.sum()).log())
    want = fmk.ops.marginal_field(x, alpha, sigma, torch.cat([data, data[:100]]))
    for value, other in zip(got, want):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_its_batch(device):
    data = torch.randn(1300, 20, device=device)
    rows = [noised(data, t, 6, device) for t in (0.0, 0.1, 0.6, 0.999)]
    x, alpha, sigma = (torch.cat(parts) for parts in zip(*rows))
    whole = fmk.ops.marginal_field(x, alpha, sigma, data)
    for row in (0, 7, 15, 23):
        one = fmk.ops.marginal_field(x[row : row + 1], alpha[row : row + 1], sigma[row : row + 1], data)
        for value, alone in zip(whole, one):
            torch.testing.assert_close(value[row : row + 1], alone, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("points", [70, 6000])  # differences, products
def test_a_row_that_is_not_finite_stays_alone(points, device):
    data = torch.randn(points, 20, device=device)
    x, alpha, sigma = noised(data, 0.4, 3, device)
    want = fmk.ops.marginal_field(x, alpha, sigma, data)
    x[1, 3] = NAN
    for value, before in zip(fmk.ops.marginal_field(x, alpha, sigma, data), want):
        assert value[1].isnan().all()
        torch.testing.assert_close(value[[0, 2]], before[[0, 2]])


def test_reduced_precision_products_are_never_used(device):
    data = spread_out(device)
    x, alpha, sigma = noised(data, 0.3, 8, device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        check_moments(data, x, alpha, sigma)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_nothing_of_the_size_of_queries_times_points_is_held(device):
    rows, points = 256, 30_000
    data = torch.randn(points, 8, device=device)
    x, alpha, sigma = noised(data, 0.3, rows, device)
    statistics = measure(data)
    fmk.ops.marginal_field(x[:1], alpha[:1], sigma[:1], data)  # the first call may load kernels
    peak = peak_bytes(lambda: fmk.ops.marginal_field(x, alpha, sigma, data, None, *statistics), device)
    products = rows * points * 4
    assert peak < products / 4 or _registration.answering("marginal_field", device.type) == "reference"
    field = fmk.MarginalField(data)
    assert peak_bytes(lambda: field.nearest(0.3, x[:64], 3), device) < 200e6


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 0.999])
def test_the_gradient_to_x_is_that_of_the_formulas(t, device, monkeypatch):
    """Of each moment by itself and of all, over several parts of the data; and twice."""
    monkeypatch.setattr(sys.modules[measure.__module__], "BACKWARD_ELEMENTS", 200)
    data = torch.randn(150, 6, dtype=F64, device=device)
    x, alpha, sigma = noised(data, t, 5, device)
    log_weights = torch.rand(150, dtype=F64, device=device).log_softmax(0)
    x.requires_grad_()
    for weights in (None, log_weights):
        got = fmk.ops.marginal_field(x, alpha, sigma, data, weights)
        assert type(got.mean.grad_fn).__name__ == "MomentsBackward"
        want = posterior_moments(x, alpha, sigma, data, weights)
        incoming = [torch.randn_like(value) for value in got]
        for chosen in ((0,), (1,), (2,), (3,), range(4)):
            pairs = [
                torch.autograd.grad([v[i] for i in chosen], x, [incoming[i] for i in chosen], retain_graph=True)[0]
                for v in (got, want)
            ]
            torch.testing.assert_close(*pairs, rtol=1e-7, atol=1e-12 + 1e-7 * float(pairs[1].abs().max()))


def test_second_gradients_to_x(device):
    data = torch.randn(9, 3, dtype=F64, device=device)
    x, alpha, sigma = noised(data, 0.4, 2, device)

    def moments(y):
        return tuple(fmk.ops.marginal_field(y, alpha, sigma, data))

    assert torch.autograd.gradcheck(moments, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(moments, (x,))


def test_the_gradient_to_x_holds_nothing_of_the_size_of_queries_times_points(device):
    rows, points = 256, 30_000
    x, alpha, sigma = noised(data := torch.randn(points, 8, device=device), 0.3, rows, device)
    x.requires_grad_()

    def call():
        torch.autograd.grad(fmk.ops.marginal_field(x, alpha, sigma, data).mean.sum(), x)

    call()
    reference = _registration.answering("marginal_field", device.type) == "reference"
    assert reference or peak_bytes(call, device) < rows * points * 8 / 2


# ---- the field ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(device):
    """Data, weights, and queries among them, in fp64."""
    data = torch.randn(6, 2, 2, dtype=F64, device=device)
    weights = torch.tensor([0.1, 0.3, 0.05, 0.15, 0.2, 0.2], dtype=F64, device=device)
    return data, weights, 1.3 * torch.randn(5, 2, 2, dtype=F64, device=device)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_density_and_the_field_obey_the_continuity_equation(name, mixture):
    """∂ ln p/∂t + u·∇ln p + ∇·u = 0, with ∂/∂t by differences."""
    data, weights, x = mixture
    field = fmk.MarginalField(data, SMOOTH[name], weights)
    low, high = field.t_range
    for t in (low + 0.11 * (high - low), 0.5 * (low + high), low + 0.8 * (high - low)):
        h = 1e-5
        rate = (field.log_prob(t + h, x) - field.log_prob(t - h, x)) / (2 * h)
        u, divergence = field.velocity_and_divergence(t, x)
        balance = rate + (u * field.score(t, x)).flatten(1).sum(1) + divergence
        torch.testing.assert_close(balance / (1 + rate.abs()), torch.zeros_like(rate), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", SMOOTH)
def test_score_and_divergence_are_the_derivatives(name, mixture):
    data, weights, x = mixture
    field = fmk.MarginalField(data, SMOOTH[name], weights)
    t = torch.linspace(0.1, 0.9, len(x), dtype=F64, device=x.device)
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(field.log_prob(t, x).sum(), x)
    torch.testing.assert_close(field.score(t, x), gradient, rtol=1e-9, atol=1e-9)
    basis = torch.eye(4, dtype=F64, device=x.device).reshape(4, 1, 2, 2).expand(4, *x.shape)
    trace = sum((torch.func.jvp(lambda y: field(t, y), (x,), (e,))[1] * e).flatten(1).sum(1) for e in basis)
    torch.testing.assert_close(field.divergence(t, x), trace, rtol=1e-9, atol=1e-9)
    u, divergence = field.velocity_and_divergence(t, x)
    assert torch.equal(divergence, field.divergence(t, x)) and torch.equal(u, field(t, x))


@pytest.mark.parametrize("name", SMOOTH)
def test_one_point_is_a_gaussian(name, device):
    schedule, point = SMOOTH[name], torch.randn(1, 3, dtype=F64, device=device)
    field, x = fmk.MarginalField(point, schedule), torch.randn(4, 3, dtype=F64, device=device)
    t = torch.linspace(0.1, 0.9, 4, dtype=F64, device=device)
    v = schedule.coefficients(t)
    square = v.sigma.square() + v.gamma.square()
    rate = (v.sigma * v.d_sigma + v.gamma * v.d_gamma) / square
    away = x - v.alpha[:, None] * point
    torch.testing.assert_close(field(t, x), rate[:, None] * away + v.d_alpha[:, None] * point)
    torch.testing.assert_close(field.divergence(t, x), 3 * rate)
    normal = torch.distributions.Normal(v.alpha[:, None] * point, square.sqrt()[:, None])
    torch.testing.assert_close(field.log_prob(t, x), normal.log_prob(x).sum(1))
    torch.testing.assert_close(field.posterior_mean(t, x), point.expand(4, 3))


def test_two_points_are_a_tanh(device):
    point = torch.randn(3, dtype=F64, device=device)
    field, x = fmk.MarginalField(torch.stack([point, -point])), torch.randn(4, 3, dtype=F64, device=device)
    t = 0.4
    mean = point * torch.tanh(t * (x @ point) / (1 - t) ** 2)[:, None]
    torch.testing.assert_close(field.posterior_mean(t, x), mean)
    torch.testing.assert_close(field(t, x), (mean - x) / (1 - t))


def test_velocity_of_noise_is_towards_the_mean(device):
    data, x = torch.randn(50, 3, device=device), torch.randn(4, 3, device=device)
    torch.testing.assert_close(fmk.MarginalField(data)(0.0, x), data.mean(0) - x)


@pytest.mark.parametrize("name", ["CondOT", "VP", "SchrodingerBridge"])
def test_the_density_integrates_to_one(name, device):
    data = torch.tensor([[-1.0], [0.5], [2.0]], dtype=F64, device=device)
    field = fmk.MarginalField(data, SMOOTH[name], torch.tensor([0.2, 0.5, 0.3], dtype=F64, device=device))
    grid = torch.linspace(-9, 9, 4001, dtype=F64, device=device)[:, None]
    for t in (0.05, 0.5, 0.95):
        total = torch.trapezoid(field.log_prob(t, grid).exp(), grid[:, 0])
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-9, rtol=0)


def test_float32_fields_at_their_ends(device):
    """Every method in float32, from noise to the last time at which the density exists, against float64."""
    data = torch.randn(800, 3, 4, device=device)
    for name, t in itertools.product(("CondOT", "VP", "Cosine", "VE", "ConstantNoise"), (0.0, 0.5, 0.999, END)):
        field, wide = (fmk.MarginalField(d, SMOOTH[name]) for d in (data, data.double()))
        t = torch.tensor(t, device=device)
        v = SMOOTH[name].coefficients(t.double().clamp(*field.t_range))
        x = (v.alpha * data[:5].double() + v.sigma * torch.randn(5, 3, 4, dtype=F64, device=device)).float()
        for method in ("forward", "posterior_mean", "score", "log_prob", "divergence"):
            got, want = (getattr(f, method)(t, x.to(f.points.dtype)) for f in (field, wide))
            got, want = (value.reshape(5, -1).double() for value in (got, want))
            assert float((got - want).norm() / want.norm().clamp_min(1e-2)) < 1e-5, (name, method)


def test_the_flow_of_the_field_ends_in_the_data(device):
    data = torch.randn(20, 3, device=device)
    field = fmk.MarginalField(data)
    with torch.no_grad():
        solution = fmk.solve(field, torch.randn(6, 3, device=device), t_span=field.t_range)
    assert (solution.status == 0).all()
    assert field.nearest(END, solution.y)[0].max() < 1e-6


def test_dtypes_and_devices(device):
    data, x = torch.randn(30, 2, 3), torch.randn(4, 2, 3, device=device)
    want = fmk.MarginalField(data.to(device))(0.4, x)
    field = fmk.MarginalField(data).to(device)
    assert not field.state_dict() and not list(field.parameters())
    torch.testing.assert_close(field(0.4, x), want)
    half = field(0.4, x.to(BF16))
    assert half.dtype == BF16 and field.log_prob(0.4, x.to(F16)).dtype == F32
    torch.testing.assert_close(half.float(), want, rtol=2e-2, atol=2e-2)
    assert field(0.4, x.double()).dtype == F64
    field = field.half()  # points survive as float32 of their halves, sums of squares are taken anew
    assert field.points.dtype == F32 and field.half_squares.dtype == F64
    torch.testing.assert_close(field(0.4, x), fmk.MarginalField(data.to(device).half())(0.4, x))
    assert fmk.MarginalField(data.double())(0.4, data[:2]).dtype == F32
    assert field.double().points.dtype == F64


def test_times_of_every_form(device):
    field, x = fmk.MarginalField(torch.randn(30, 3, device=device)), torch.randn(4, 3, device=device)
    want = field(0.25, x)
    for shape, dtype in (((), F32), ((1,), F32), ((4,), F64), ((4,), F16)):
        assert torch.equal(field(torch.full(shape, 0.25, dtype=dtype, device=device), x), want)
    assert torch.equal(field(1.0, x), field(field.t_range[1], x))  # clamped
    assert field(0.25, x[:0]).shape == (0, 3) and field.log_prob(0.25, x[:0]).shape == (0,)
    assert field.base() == fmk.StandardNormal()
    assert "data=[30, 3], schedule=CondOT(sigma_min=0), t_range=(0, 0.99999)" in repr(field)


def test_where_the_density_ends():
    """t_range ends where σe > 0 still."""
    data = torch.randn(3, 2)
    ends = {name: fmk.MarginalField(data, s).t_range for name, s in SMOOTH.items()}
    for name in ("CondOT", "VP", "Cosine", "LinearVP", "SubVP", "Polynomial", "SchrodingerBridge", "Custom"):
        assert ends[name][1] == END, name
    for name in ("CondOT_floor", "VE", "ConstantNoise"):
        assert ends[name][1] == 1.0, name
    assert ends["SchrodingerBridge"][0] == ends["Polynomial_root"][0] == 1e-5 and ends["CondOT"][0] == 0
    for method in ("score", "log_prob", "divergence"):
        for t in (1.0, torch.tensor(1.0), torch.tensor([0.5, 1.0])):
            with pytest.raises(ValueError, match=r"t: expected at most 0.99999, .* got 1"):
                getattr(fmk.MarginalField(data), method)(t, data[:2])
        assert getattr(fmk.MarginalField(data, fmk.VE()), method)(1.0, data).isfinite().all()


@pytest.mark.compiles
def test_compiles_whole(device):
    torch._dynamo.reset()
    field, x = fmk.MarginalField(torch.randn(30, 3, device=device)), torch.randn(4, 3, device=device)
    step = torch.compile(field.velocity_and_divergence, fullgraph=True, backend="aot_eager")
    t = torch.rand(4, device=device)
    for value, want in zip(step(t, x), field.velocity_and_divergence(t, x)):
        torch.testing.assert_close(value, want)


# ---- neighbours ---------------------------------------------------------------------------------------------------


def brute_force(data, alpha, x, k):
    squares = (x.double()[:, None] - alpha * data.double()).flatten(2).square().sum(2)
    order = squares.sort(dim=1, stable=True)
    return order.values[:, :k], order.indices[:, :k]


@pytest.mark.parametrize("t", [0.0, 0.3, END])
@pytest.mark.parametrize(("points", "dims", "k"), [(7, 3, 7), (1000, 2, 5), (1000, 1, 3), (300, 100, 4), (60, 1, 1)])
def test_nearest(points, dims, k, t, device, monkeypatch):
    """Against all distances, over several parts of the data, with ties by clones and, at α = 0, of all points."""
    monkeypatch.setattr("fmkernels.marginal.CHUNK", 500)
    data = torch.randn(points, dims, device=device)
    data[points // 2 :] = data[: points - points // 2].flip(0)  # clones in another order
    field, x = fmk.MarginalField(data), torch.randn(6, dims, device=device)
    squares, index = field.nearest(t, x, k)
    want, order = brute_force(data, t, x, k)
    torch.testing.assert_close(squares.double(), want, rtol=1e-6, atol=1e-12)
    assert torch.equal(index, order)
    assert index.dtype == torch.int64 and squares.dtype == F32


def test_nearest_where_many_are_almost_as_near(device):
    """In one dimension products in float32 would not tell them apart; in many, those of the spare candidates do."""
    dense = torch.linspace(-1, 1, 1_000_001, device=device)[:, None]
    offset = 1000 + 0.01 * torch.randn(300, 100, device=device)
    queries = offset[:6] + 0.02 * torch.randn(6, 100, device=device)
    for data, x in ((dense, dense[[123_456, 900_000]]), (offset, queries)):
        squares, index = fmk.MarginalField(data).nearest(END, x, 4)
        assert torch.equal(index, brute_force(data, END, x, 4)[1])


def test_nearest_of_none(device):
    data = torch.randn(5, 2, device=device)
    squares, index = nearest_points(data[:0], torch.empty(0, dtype=F64, device=device), data, *measure(data), 2)
    assert squares.shape == index.shape == (0, 2)


# ---- the target's expectation ---------------------------------------------------------------------------------------

OBJECTIVES = [
    (schedule, options)
    for schedule in (fmk.CondOT(), fmk.VP(), fmk.SchrodingerBridge(0.5))
    for options in ({}, {"prediction": "data"}, {"prediction": "noise"}, {"prediction": "score"}, {"prediction": "edm"})
    if not (schedule.bridge and options.get("prediction") in ("noise", "score", "edm"))
]


@pytest.mark.parametrize(("schedule", "options"), OBJECTIVES, ids=str)
@pytest.mark.parametrize("noise", ["store", "recompute"])
def test_the_loss_over_the_whole_dataset_is_that_of_the_marginal_field(schedule, options, noise, device):
    data = torch.randn(40, 3, 2, device=device)
    fm = fmk.FlowMatching(schedule, **options, noise=noise)
    field = fmk.MarginalField(data, schedule)
    batch = fm.sample(data[torch.randint(40, (64,), device=device)], key=torch.tensor([7], device=device))
    prediction = torch.randn(64, 3, 2, device=device, requires_grad=True)
    loss = fm.loss(prediction, batch, reference=data)
    v = schedule.coefficients(batch.time.double().clamp(*schedule.t_range))
    alpha, sigma = (c.reshape(-1, 1, 1) for c in (v.alpha, v.sigma))
    root = (sigma.square() + 0.25 * alpha.square()).sqrt()
    x_t = batch.x_t.double() * (root if options.get("prediction") == "edm" else 1)
    mean = field.posterior_mean(batch.time, x_t)
    target = {
        "velocity": lambda: field(batch.time, x_t),
        "data": lambda: mean,
        "noise": lambda: (x_t - alpha * mean) / sigma,
        "score": lambda: field.score(batch.time, x_t) * sigma,
        "edm": lambda: (sigma * mean - 0.25 * alpha * (x_t - alpha * mean) / sigma) / (0.5 * root),
    }[options.get("prediction", "velocity")]()
    scale = sigma if options.get("prediction") == "score" else 1
    want = (scale * prediction.double() - target).square().mean()
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=1e-6)
    assert torch.autograd.grad(loss, prediction)[0].isfinite().all()


def test_the_gradient_has_the_same_mean_and_less_variance(device):
    """Of θ in the model θ·x_t, over many samples: flow matching and conditional flow matching agree."""
    data = torch.tensor([[-2.0, 0.0], [1.0, 1.0], [0.5, -2.0]], device=device)
    fm, count = fmk.FlowMatching(timesteps=fmk.Uniform(0.0, 0.9)), 40_000
    batch = fm.sample(data[torch.arange(count, device=device) % 3], key=torch.tensor([3], device=device))

    def gradients(**options):
        theta = torch.full((count, 1), 0.3, device=device, requires_grad=True)
        loss = fm.loss(theta * batch.x_t, batch, reduction="none", **options)
        return torch.autograd.grad(loss.sum(), theta)[0][:, 0].double()

    conditional, marginal = gradients(), gradients(reference=data)
    difference = conditional - marginal
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(count)
    assert abs(conditional.mean()) > 8 * difference.std() / math.sqrt(count)
    assert marginal.var() < 0.85 * conditional.var()


def test_where_no_noise_is_left_the_target_is_finite(device):
    fm, x1 = fmk.FlowMatching(), torch.randn(3, 4, device=device)
    batch = fm.sample(x1, t=torch.tensor([1.0, 1 - 5e-6, 0.0], device=device))
    loss = fm.loss(torch.zeros(3, 4, device=device), batch, reference=x1, reduction="none")
    assert loss.isfinite().all()
    torch.testing.assert_close(loss[0], x1[0].square().mean())  # E[x0] = 0 where x_t says nothing of it


# ---- bad input ------------------------------------------------------------------------------------------------------

X, D, A = torch.randn(4, 3), torch.randn(6, 3), torch.full((4,), 0.5, dtype=F64)
Q = torch.zeros(6, dtype=F64)
FM = fmk.FlowMatching()
BATCH, P = FM.sample(X), torch.randn(4, 3)
FIELD = fmk.MarginalField(D)
op = fmk.ops.marginal_field
CASES = [
    (op, (None, A, A, D), {}, TypeError, "x: expected a torch.Tensor, got NoneType"),
    (op, (X.half(), A, A, D.half()), {}, TypeError, "x: expected dtype float32 or float64, got float16"),
    (op, (X[0], A, A, D), {}, ValueError, r"x: expected shape \[B, D\], got \[3\]"),
    (op, (X, A, A, 1.0), {}, TypeError, "data: expected a torch.Tensor, got float"),
    (op, (X, A, A, D.double()), {}, TypeError, "data: expected dtype float32, that of x, got float64"),
    (op, (X, A, A, D[:, :2]), {}, ValueError, r"data: expected shape \[N, 3\] with N of at least 1, got \[6, 2\]"),
    (op, (X, A, A, D[:0]), {}, ValueError, r"data: expected shape \[N, 3\] with N of at least 1, got \[0, 3\]"),
    (op, (X, A, A, D.to("meta")), {}, ValueError, "data: expected device cpu, that of x, got meta"),
    (op, (X, 0.5, A, D), {}, TypeError, "alpha: expected a torch.Tensor, got float"),
    (op, (X, A.float(), A, D), {}, TypeError, "alpha: expected dtype float64, got float32"),
    (op, (X, A, A[:3], D), {}, ValueError, r"sigma: expected shape \[4\], got \[3\]"),
    (op, (X, A, A, D, A), {}, ValueError, r"log_weights: expected shape \[6\], got \[4\]"),
    (op, (X, A, A, D, None, D[0]), {}, ValueError, "half_squares: expected with centre, or neither"),
    (op, (X, A, A, D, None, D[0, :2], Q), {}, ValueError, r"centre: expected shape \[3\], got \[2\]"),
    (fmk.MarginalField, ([[1.0]],), {}, TypeError, "data: expected a torch.Tensor, got list"),
    (fmk.MarginalField, (D.long(),), {}, TypeError, "data: expected dtype float32, .* got int64"),
    (fmk.MarginalField, (D[0],), {}, ValueError, r"data: expected at least two dimensions, .* got \[3\]"),
    (fmk.MarginalField, (D[:0],), {}, ValueError, r"data: expected at least two dimensions, .* got \[0, 3\]"),
    (fmk.MarginalField, (D * NAN,), {}, ValueError, "data: expected finite numbers, got some that are not"),
    (fmk.MarginalField, (D, "VP"), {}, TypeError, "schedule: expected a fmkernels schedule, got str"),
    (fmk.MarginalField, (D, None, [1.0]), {}, TypeError, "weights: expected a torch.Tensor, got list"),
    (fmk.MarginalField, (D, None, A), {}, ValueError, r"weights: expected shape \[6\], one a point, got \[4\]"),
    (fmk.MarginalField, (D, None, Q.long()), {}, TypeError, "weights: expected dtype float32, .* got int64"),
    (fmk.MarginalField, (D, None, Q + 1), {}, ValueError, "weights: expected a sum of 1, got 6; divide by it"),
    (fmk.MarginalField, (D, None, Q - 1), {}, ValueError, "weights: expected finite, non-negative numbers"),
    (fmk.MarginalField, (D, None, Q + INF), {}, ValueError, "weights: expected finite, non-negative numbers"),
    (FIELD, (0.5, None), {}, TypeError, "x: expected a torch.Tensor, got NoneType"),
    (FIELD, (0.5, X.long()), {}, TypeError, "x: expected dtype float32, .* got int64"),
    (FIELD, (0.5, X[:, :2]), {}, ValueError, r"x: expected shape \[B, 3\], rows like those of data, got \[4, 2\]"),
    (FIELD, (0.5, X[0]), {}, ValueError, r"x: expected shape \[B, 3\], .* got \[3\]"),
    (FIELD, (0.5, X.to("meta")), {}, ValueError, "x: expected device cpu, that of data, got meta"),
    (FIELD, ("0.5", X), {}, TypeError, "t: expected a real number, got str"),
    (FIELD, (NAN, X), {}, ValueError, "t: expected a finite number, got nan"),
    (FIELD, (torch.tensor(1), X), {}, TypeError, "t: expected a floating tensor, got int64"),
    (FIELD, (torch.rand(3), X), {}, ValueError, r"t: expected a number, or a tensor of shape \[\] or \[4\], got \[3\]"),
    (FIELD.nearest, (0.5, X, 0), {}, ValueError, "k: expected an int of at least 1, got 0"),
    (FIELD.nearest, (0.5, X, 7), {}, ValueError, "k: expected at most 6, the number of points, got 7"),
    (FM.loss, (P, BATCH), {"reference": [X]}, TypeError, "reference: expected a torch.Tensor, got list"),
    (FM.loss, (P, BATCH), {"reference": X.double()}, TypeError, "reference: expected dtype float32, that of x1"),
    (FM.loss, (P, BATCH), {"reference": X[:, :2]}, ValueError, r"reference: expected shape \[M, 3\], .* got \[4, 2\]"),
    (FM.loss, (P, BATCH), {"reference": X[:0]}, ValueError, r"reference: expected shape \[M, 3\], .* got \[0, 3\]"),
    (FM.loss, (P, BATCH), {"reference": X.to("meta")}, ValueError, "reference: expected device cpu, that of x1"),
    (FM.loss, (P, FM.sample(X, X)), {"reference": X}, ValueError, "reference: expected a batch whose x0 was drawn"),
    (FM.loss, (P, FM.sample(X, t_dims=2)), {"reference": X}, ValueError, "reference: .* one time a sample"),
]


@pytest.mark.parametrize("case", CASES, ids=map(str, range(len(CASES))))
def test_bad_input(case):
    call, arguments, options, error, message = case
    with pytest.raises(error, match=message):
        call(*arguments, **options)
