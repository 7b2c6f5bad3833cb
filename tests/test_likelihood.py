"""Log-densities along flows against closed forms, and bits per dimension."""

import math

import pytest
import torch
from flows import F64, SCHEDULES, Gaussian, GaussianPath, Linear, Net
from solving import one_thread  # noqa: F401 (an autouse fixture)

import fmkernels as fmk
from fmkernels.dequantisation import DRAW_ROWS

KEY = torch.tensor([17])
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
EXACT = fmk.Exact()


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_gaussian_data_under_every_schedule(schedule):
    f = GaussianPath(schedule, mean=0.7, scale=0.4)
    low, high = schedule.t_range
    x1 = 0.7 + 0.5 * torch.randn(4, 3, dtype=F64)
    times = [low, (low + high) / 2, high]
    result = fmk.log_prob(f, x1, f.at(low), EXACT, t_eval=times, method="dopri8", **TIGHT).raise_for_status()
    close(result.log_prob, f.at(high).log_prob(x1))
    assert result.t_span == (low, high)
    for i, t in enumerate(times):
        close(result.log_prob_t[:, i], f.at(t).log_prob(result.x_t[:, i]))
    close(result.x_t[:, 0], result.x0, 0)


def matrix(D=4):
    return torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "bosh3", "rk4"])
@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 2, 2)], ids=str)
def test_linear_fields(method, shape):
    A = matrix()
    x1 = torch.randn(shape, dtype=F64)
    how = {"steps": 200} if method == "rk4" else {"rtol": 1e-7, "atol": 1e-7} if method == "bosh3" else TIGHT
    result = fmk.log_prob(Linear(A), x1, fmk.Normal(2.0), EXACT, method=method, t_span=(0.5, 2.0), **how)
    x0 = (x1.flatten(1) @ torch.linalg.matrix_exp(-1.5 * A).T).reshape(shape)
    close(result.x0, x0)
    close(result.log_prob, fmk.Normal(2.0).log_prob(x0) - 1.5 * A.trace(), 1e-5)
    assert result.status.tolist() == [0] * shape[0] and result.stderr.tolist() == [0.0] * shape[0]
    assert result.x1 is x1 or torch.equal(result.x1, x1)


def test_mixtures_through_the_marginal_field():
    data = torch.randn(5, 3, dtype=F64)
    weights = torch.rand(5, dtype=F64)
    f = fmk.MarginalField(data, fmk.CondOT(0.2), weights=weights / weights.sum())
    x1 = data[:4] + 0.2 * torch.randn(4, 3, dtype=F64)
    result = fmk.log_prob(f, x1, divergence=EXACT, t_eval=[0.3], **TIGHT)
    close(result.log_prob, f.log_prob(1.0, x1))
    close(result.log_prob_t[:, 0], f.log_prob(0.3, result.x_t[:, 0]))
    differentiated = fmk.log_prob(lambda t, x: f(t, x), x1, f.base(), EXACT, **TIGHT)
    close(differentiated.log_prob, result.log_prob)


def test_the_integrated_divergence_is_the_log_determinant_of_the_flow():
    f, x1 = Net(3).requires_grad_(False), torch.randn(2, 3, dtype=F64)

    def flow(x):
        return fmk.solve(f, x, (1.0, 0.0), **TIGHT).y

    whole = torch.autograd.functional.jacobian(lambda x: flow(x).sum(0), x1).permute(1, 0, 2)
    expected = fmk.StandardNormal().log_prob(flow(x1)) + torch.linalg.slogdet(whole).logabsdet
    close(fmk.log_prob(f, x1, divergence=EXACT, **TIGHT).log_prob, expected)


ESTIMATORS = [
    fmk.Hutchinson(),
    fmk.Hutchinson(3, "normal"),
    fmk.Hutchinson(2, "hadamard"),
    fmk.Deflated(torch.eye(6)[:2], 2),
]


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("shape", [(5, 6), (5, 40)], ids=str)
def test_evaluations_do_not_depend_on_the_probes(shape, dtype, method):
    f, x1 = Net(shape[1], dtype=dtype), torch.randn(shape, dtype=dtype)
    x1, tight = 10 ** torch.linspace(-3, 1, 5, dtype=dtype).unsqueeze(1) * x1, {"rtol": 1e-6, "atol": 1e-6}
    alone = fmk.solve(f, x1, (1.0, 0.0), method=method, **tight)
    assert alone.nfe.unique().numel() > 1
    for estimator in (fmk.Hutchinson(), fmk.Hutchinson(4), fmk.Hutchinson(2, "hadamard")):
        results = [
            fmk.log_prob(f, x1, divergence=estimator, method=method, key=torch.tensor([s]), **tight) for s in range(4)
        ]
        assert not torch.equal(results[0].log_prob, results[1].log_prob)
        for result in results:
            assert torch.equal(result.nfe, alone.nfe) and torch.equal(result.status, alone.status)
            assert torch.equal(result.x0, results[0].x0)
            torch.testing.assert_close(result.x0, alone.y)
    everything = [fmk.log_prob(f, x1, norm="all", method=method, key=torch.tensor([s]), **tight) for s in range(4)]
    assert not all(torch.equal(result.x0, everything[0].x0) for result in everything)


def test_the_log_density_is_held_to_the_tolerance_where_asked():
    def f(t, x):  # a divergence that oscillates, though x hardly moves
        return 1e-3 * torch.sin(1e3 * x) * torch.cos(40 * t).unsqueeze(1)

    x1 = torch.zeros(1, 1, dtype=F64)
    exact = fmk.StandardNormal().log_prob(x1) - math.sin(40) / 40
    tolerances = {"rtol": 1e-8, "atol": 1e-8}
    assert (fmk.log_prob(f, x1, divergence=EXACT, **tolerances).log_prob - exact).abs() > 1e-6
    close(fmk.log_prob(f, x1, divergence=EXACT, norm="all", **tolerances).log_prob, exact, 1e-7)


def test_unbiased_over_2000_probes_within_their_standard_errors():
    A = matrix(6)
    x1 = torch.randn(1, 6, dtype=F64).expand(2000, 6)
    exact = fmk.log_prob(Linear(A), x1[:1], divergence=EXACT).log_prob
    for estimator in ESTIMATORS:
        result = fmk.log_prob(Linear(A), x1, divergence=estimator, key=KEY)
        error = result.log_prob - exact
        assert error.mean().abs() <= 4 * error.std() / math.sqrt(2000)
        if estimator == ESTIMATORS[0]:
            assert result.stderr.isnan().all()
        elif estimator != ESTIMATORS[2]:  # whose rows share columns of the matrix: right on average over keys alone
            assert abs(result.stderr.square().mean() / error.square().mean() - 1) <= 0.15


@pytest.mark.parametrize("estimator", [fmk.Exact("forward"), fmk.Hutchinson(3, mode="forward"), *ESTIMATORS], ids=repr)
def test_forward_mode_and_rows_in_parts(estimator):
    f, x1 = Net(6), torch.randn(5, 6, dtype=F64)
    whole = fmk.log_prob(f, x1, divergence=estimator, key=KEY, first_row=2)
    parts = [fmk.log_prob(f, x1[i : i + 2], divergence=estimator, key=KEY, first_row=2 + i) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat([part.log_prob for part in parts]), whole.log_prob)
    if isinstance(estimator, fmk.Hutchinson) and estimator.mode == "forward":
        reverse = fmk.log_prob(f, x1, divergence=fmk.Hutchinson(3, mode="reverse"), key=KEY, first_row=2)
        torch.testing.assert_close(reverse.log_prob, whole.log_prob)
        torch.testing.assert_close(reverse.stderr, whole.stderr)


@pytest.mark.parametrize("direction", [1, -1])
def test_density_along_the_path(direction):
    A = matrix()
    f, x = Linear(A), torch.randn(3, 4, dtype=F64)
    times = torch.tensor([0.0, 0.1, 0.6, 0.6, 1.0], dtype=F64)
    times = times if direction == 1 else times.flip(0)
    down = fmk.log_prob(f, x, divergence=EXACT, t_eval=times, **TIGHT)
    up = fmk.sample_and_log_prob(f, down.x0, divergence=EXACT, t_eval=times, **TIGHT)
    for result in (down, up):
        assert torch.equal(result.t, times) and result.x_t.shape == (3, 5, 4) and result.log_prob_t.shape == (3, 5)
        for i, t in enumerate(times):
            x_t = x @ torch.linalg.matrix_exp((t - 1) * A).T
            close(result.x_t[:, i], x_t)
            expected = fmk.StandardNormal().log_prob(x_t @ torch.linalg.matrix_exp(-t * A).T) - t * A.trace()
            close(result.log_prob_t[:, i], expected)
    close(up.x1, x)
    close(up.log_prob, down.log_prob)
    assert down.log_prob_t[:, -1 if direction == 1 else 0].equal(down.log_prob)


def test_times_in_any_order_and_of_their_own():
    A = matrix()
    f, x = Linear(A), torch.randn(2, 4, dtype=F64)
    spans = torch.tensor([[0.0, 1.0], [2.0, 1.0]])  # the second row's base is above its data
    times = torch.tensor([[0.7, 0.2, 0.9], [1.5, 2.0, math.nan]], dtype=F64)
    result = fmk.log_prob(f, x, divergence=EXACT, t_span=spans, t_eval=times, **TIGHT)
    for row, i, t in ((0, 0, 0.7), (0, 1, 0.2), (0, 2, 0.9), (1, 0, 1.5), (1, 1, 2.0)):
        close(result.x_t[row, i], torch.linalg.matrix_exp((t - 1) * A) @ x[row])
        alone = fmk.log_prob(
            f, x[row : row + 1], divergence=EXACT, t_span=tuple(spans[row].tolist()), t_eval=[t], **TIGHT
        )
        close(result.log_prob_t[row, i], alone.log_prob_t[0, 0])
    assert result.log_prob_t[1, 2].isnan() and result.x_t[1, 2].isnan().all() and result.log_prob.isfinite().all()


def test_float32_times_reach_ends_that_float32_cannot_hold():
    f = GaussianPath(fmk.VP(), 0.0, 1.0)
    x = torch.randn(2, 3)
    times = torch.linspace(*f.t_range, 5)
    result = fmk.log_prob(f, x, divergence=EXACT, t_eval=times)
    assert result.log_prob_t.isfinite().all()
    torch.testing.assert_close(result.log_prob_t[:, -1], result.log_prob)


def test_a_field_brings_its_base_and_its_times():
    def model(x, t):
        return torch.zeros_like(x) + 0 * x

    x1 = torch.randn(3, 2, dtype=F64)
    for prediction, schedule in (("velocity", fmk.VE()), ("noise", fmk.CondOT()), ("data", fmk.VP())):
        field = fmk.FlowMatching(schedule, prediction).velocity(model)
        assert field.base() == schedule.base()
        result = fmk.log_prob(field, x1, divergence=EXACT)
        assert result.t_span == field.t_range
        if prediction == "velocity":
            close(result.log_prob, schedule.base().log_prob(x1))
    assert fmk.log_prob(Linear(matrix(2)), x1).t_span == (0.0, 1.0)


def test_samples_and_their_densities_from_noise():
    f = GaussianPath(fmk.CondOT(), 0.7, 0.4)
    result = fmk.sample_and_log_prob(f, (2000, 3), divergence=EXACT, key=KEY, dtype=F64, **TIGHT)
    assert result.x1.shape == (2000, 3) and result.x1.dtype == F64
    close(result.log_prob, f.at(1.0).log_prob(result.x1))
    assert (result.x1.mean() - 0.7).abs() < 0.02 and (result.x1.std() - 0.4).abs() < 0.02
    part = fmk.sample_and_log_prob(f, (5, 3), divergence=EXACT, key=KEY, dtype=F64, first_row=100, **TIGHT)
    torch.testing.assert_close(part.x0, result.x0[100:105], rtol=0, atol=0)
    assert part.x0.equal(fmk.ops.noise(KEY, 5, 3, stream="base", first_row=100, dtype=F64))
    wide = fmk.sample_and_log_prob(f, [500, 2, 3], fmk.Normal(50.0), generator=torch.Generator().manual_seed(0))
    assert wide.x0.dtype == torch.float32 and abs(wide.x0.std() - 50) < 2
    x0 = torch.randn(3, 2, 2, dtype=F64)
    again = fmk.sample_and_log_prob(Linear(matrix()), x0, divergence=fmk.Hutchinson(2), key=KEY)
    assert torch.equal(again.x0, x0)


def test_bases_of_torch_distributions():
    base = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=F64), 4 * torch.eye(4, dtype=F64))
    x1 = torch.randn(3, 4, dtype=F64)
    ours = fmk.log_prob(Linear(matrix()), x1, fmk.Normal(2.0), EXACT)
    close(fmk.log_prob(Linear(matrix()), x1, base, EXACT).log_prob, ours.log_prob)
    wide = torch.distributions.Normal(0.0, 2.0)
    with pytest.raises(ValueError, match=r"base: expected log_prob\(x0\) of shape \[3\].*got \[3, 4\]"):
        fmk.log_prob(Linear(matrix()), x1, wide)
    drawn = fmk.sample_and_log_prob(Linear(matrix()), (3, 4), torch.distributions.Independent(wide.expand([4]), 1))
    assert drawn.x0.shape == (3, 4)


def test_a_row_that_fails_fails_alone():
    def f(t, x):
        return torch.where((x[:, :1] > 5) & (t < 0.5).unsqueeze(1), math.nan, -x)

    x1 = torch.tensor([[1.0, 2.0], [9.0, 1.0], [math.nan, 0.0], [0.5, 0.5]], dtype=F64)
    for times in (None, [0.75, 0.25]):
        result = fmk.log_prob(f, x1, divergence=fmk.Hutchinson(2), key=KEY, t_eval=times)
        assert result.status.tolist() == [0, 3, 3, 0]
        assert result.log_prob.isnan().tolist() == [False, True, True, False]
        assert result.x0.isnan().all(1).tolist() == result.stderr.isnan().tolist() == [False, True, True, False]
        with pytest.raises(RuntimeError, match=r"4 rows, of which 2 non-finite \(rows 1, 2\)"):
            result.raise_for_status()
    alone = fmk.log_prob(f, x1[3:], divergence=fmk.Hutchinson(2), key=KEY, first_row=3)
    close(result.log_prob[3:], alone.log_prob, 1e-12)
    assert result.nfe[3] == alone.nfe[0]
    zero, one = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    base = torch.distributions.MultivariateNormal(zero, one, validate_args=True)  # refuses NaN
    for times in (None, [0.75]):
        assert fmk.log_prob(f, x1, base, t_eval=times).log_prob.isnan().tolist() == [False, True, True, False]
    limited = fmk.log_prob(Linear(matrix(2)), x1, max_steps=2, rtol=1e-9, atol=1e-9)
    assert limited.status.tolist() == [1, 1, 3, 1] and limited.log_prob.isnan().all()


@pytest.mark.parametrize("method", ["dopri5", "midpoint"])
def test_batches_without_rows(method):
    how = {"steps": 3} if method == "midpoint" else {}
    result = fmk.log_prob(Linear(matrix()), torch.zeros(0, 4), method=method, t_eval=[0.5], **how)
    assert result.log_prob.shape == (0,) and result.x_t.shape == (0, 1, 4) and result.stderr.shape == (0,)


def test_tolerances_of_rows_and_of_numbers():
    f, x1 = Net(4), 2 * torch.randn(3, 4, dtype=F64)
    reference = fmk.log_prob(f, x1, key=KEY, rtol=1e-6, atol=1e-6)
    for tolerance in (torch.tensor(1e-6), torch.full((3,), 1e-6), torch.full((1, 4), 1e-6), torch.full((3, 4), 1e-6)):
        result = fmk.log_prob(f, x1, key=KEY, rtol=tolerance.double(), atol=tolerance.double())
        assert torch.equal(result.nfe, reference.nfe)
        torch.testing.assert_close(result.log_prob, reference.log_prob)


@pytest.mark.parametrize("estimator", [fmk.Hutchinson(), fmk.Hutchinson(2, mode="forward"), EXACT], ids=repr)
def test_memory_does_not_grow_with_the_steps(estimator):
    from test_benchmarks import CPU, measure

    f, x1 = Net(8), torch.randn(64, 8, dtype=F64)

    @torch.no_grad()
    def peak(**how):
        return measure.peak_bytes(lambda: fmk.log_prob(f, x1, divergence=estimator, key=KEY, **how), CPU)

    few, many = ({"method": "rk4", "steps": n} for n in (3, 30))
    assert peak(**many) <= 2 * peak(**few)  # ten times the steps
    assert peak(rtol=1e-12, atol=1e-12) <= 2 * peak(rtol=1e-3, atol=1e-3)


def test_progress(capsys):
    fmk.log_prob(Linear(matrix()), torch.randn(3, 4), progress=True)
    assert "3/3" in capsys.readouterr().err
    list(fmk.evaluate_bits_per_dim(Linear(matrix()), [torch.zeros(2, 4, dtype=torch.uint8)] * 3, progress=True))
    shown = capsys.readouterr().err
    assert "3/3" in shown and "mean=" in shown


def test_bits_per_dim_by_hand():
    log_prob = torch.tensor([[-100.0, -90.0], [30.0, 30.0]], dtype=F64)
    single = fmk.bits_per_dim(log_prob[:, 0], dims=12)
    close(single, -log_prob[:, 0] / (12 * math.log(2)) + 7, 1e-12)
    both = fmk.bits_per_dim(log_prob, dims=12, bits=5)
    by_hand = math.log((math.exp(-100) + math.exp(-90)) / 2)
    close(both, torch.tensor([-by_hand / (12 * math.log(2)) + 4, -30 / (12 * math.log(2)) + 4], dtype=F64), 1e-12)
    uniform = torch.full((1,), 12 * math.log(1 / 2), dtype=F64)  # over [-1, 1]: every level is as likely
    close(fmk.bits_per_dim(uniform, 12, math.log2(17)), torch.tensor([math.log2(17)], dtype=F64), 1e-12)


def test_dequantised_levels():
    x = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16)
    y = fmk.dequantise(x, key=KEY)
    assert y.shape == x.shape and y.dtype == torch.float32 and y.min() >= -1 and y.max() <= 1
    assert torch.equal(((y.double() + 1) * 128).floor().to(torch.uint8), x)
    u = (y.double() + 1) * 128 - x
    assert abs(u.mean() - 0.5) < 0.06 and abs(u.var() - 1 / 12) < 0.02
    expected = fmk.ops.noise(
        KEY, 1, 128, stream="dequantisation", index=3, first_row=1, distribution="uniform", dtype=F64
    )
    drawn = fmk.dequantise(x[1:].int(), draw=3, key=KEY, first_row=1, dtype=F64)
    close((drawn + 1) * 128 - x[1:], expected.reshape(1, 8, 16), 1e-12)
    assert not torch.equal(y, fmk.dequantise(x, key=KEY, draw=1))
    digits = fmk.dequantise(torch.tensor([[0, 16]]), math.log2(17), key=KEY)
    assert -1 <= digits[0, 0] <= -1 + 2 / 17 + 1e-6 and 1 - 2 / 17 - 1e-6 <= digits[0, 1] <= 1


def test_evaluation_of_a_data_set():
    f = Net(6).requires_grad_(False)
    data = torch.randint(0, 32, (7, 2, 3), generator=torch.Generator().manual_seed(0))
    labelled = [(data[:3], "labels"), [data[3:6], "labels"], (data[6:], "labels")]
    options = {"bits": 5, "draws": 4, "divergence": fmk.Hutchinson(2), "key": KEY, "dtype": F64, "rtol": 1e-4}
    results = list(fmk.evaluate_bits_per_dim(f, labelled, **options))
    assert [len(result.bits_per_dim) for result in results] == [3, 3, 1]
    assert [result.images for result in results] == [3, 6, 7] and results[-1].failed == 0
    (whole,) = fmk.evaluate_bits_per_dim(f, [data], **options)
    logs = torch.cat([result.log_prob for result in results])
    assert logs.shape == (7, 4) and not logs.requires_grad
    torch.testing.assert_close(logs, whole.log_prob)
    torch.testing.assert_close(torch.cat([result.bits_per_dim for result in results]), fmk.bits_per_dim(logs, 6, 5))
    assert results[-1].mean == pytest.approx(float(whole.bits_per_dim.mean())) == pytest.approx(whole.mean)
    assert whole.nfe.shape == whole.stderr.shape == (7, 4) and whole.status.tolist() == [0] * 7
    for draw in range(4):
        y = fmk.dequantise(data, 5, draw=draw, key=KEY, dtype=F64)
        own = fmk.log_prob(f, y, divergence=fmk.Hutchinson(2), key=KEY, first_row=draw * DRAW_ROWS, rtol=1e-4)
        torch.testing.assert_close(own.log_prob, whole.log_prob[:, draw])


def test_evaluation_is_streamed_and_counts_failures():
    taken = []

    def batches():
        for i in range(3):
            taken.append(i)
            yield torch.full((2, 2), 100 * i, dtype=torch.uint8)

    def f(t, x):
        return torch.where((x[:, :1] > 0.5) & (t < 0.5).unsqueeze(1), math.nan, -x)

    stream = fmk.evaluate_bits_per_dim(f, batches(), divergence=EXACT)
    first = next(stream)
    assert taken == [0] and first.failed == 0
    *_, last = stream
    assert (last.images, last.failed, last.status.tolist()) == (6, 2, [3, 3]) and math.isfinite(last.mean)
    assert torch.is_grad_enabled()


X = torch.zeros(3, 4)
FIELD = Linear(torch.eye(4))
LEVELS = torch.zeros(2, 4, dtype=torch.uint8)
BAD = [
    (lambda: fmk.log_prob(3, X), TypeError, "f: expected a callable"),
    (lambda: fmk.log_prob(FIELD, [[0.0]]), TypeError, "x1: expected a torch.Tensor"),
    (lambda: fmk.log_prob(FIELD, X.int()), TypeError, "x1: expected dtype float32 or float64, got int32 .*dequantise"),
    (lambda: fmk.log_prob(FIELD, X.half()), TypeError, "x1: expected dtype float32 or float64, got float16"),
    (lambda: fmk.log_prob(FIELD, X[0]), ValueError, r"x1: expected shape \[B, …\]"),
    (lambda: fmk.sample_and_log_prob(FIELD, X[0]), ValueError, r"x0: expected shape \[B, …\]"),
    (lambda: fmk.sample_and_log_prob(FIELD, 3), TypeError, "x0: expected a tensor or a shape, got int"),
    (lambda: fmk.sample_and_log_prob(FIELD, (3,)), ValueError, r"x0: expected shape \[B, …\]"),
    (lambda: fmk.sample_and_log_prob(FIELD, (3, 0)), ValueError, "x0: expected shape"),
    (lambda: fmk.sample_and_log_prob(FIELD, (3, 4), Gaussian(0, 1)), TypeError, "base: .*sample"),
    (lambda: fmk.sample_and_log_prob(FIELD, (3, 4), Several()), ValueError, "base: expected samples of shape"),
    (lambda: fmk.log_prob(FIELD, X, base=torch.zeros(3)), TypeError, r"base: expected a distribution with log_prob"),
    (lambda: fmk.log_prob(FIELD, X, divergence="hutchinson"), TypeError, "divergence: expected an Exact"),
    (lambda: fmk.log_prob(FIELD, X, divergence=fmk.Hutchinson(9, "hadamard")), ValueError, "probes: expected at most"),
    (lambda: fmk.log_prob(FIELD, X, t_span=1.0), ValueError, "t_span: expected a pair"),
    (lambda: fmk.log_prob(FIELD, X, t_span=(0.0, math.inf)), ValueError, r"t_span\[.\]: expected finite"),
    (lambda: fmk.log_prob(FIELD, X, t_eval=[0.5, 1.5]), ValueError, "t_eval: expected times within t_span, got 1.5"),
    (lambda: fmk.log_prob(FIELD, X, t_eval="now"), TypeError, "t_eval"),
    (lambda: fmk.log_prob(FIELD, X, t_eval=[[0.5]]), ValueError, "t_eval: expected shape"),
    (lambda: fmk.log_prob(FIELD, X, method="rk5"), ValueError, "method"),
    (lambda: fmk.log_prob(FIELD, X, method="rk4"), ValueError, "steps"),
    (lambda: fmk.log_prob(FIELD, X, norm="x"), ValueError, "norm: expected one of 'state', 'all'"),
    (lambda: fmk.log_prob(FIELD, X, rtol=-1.0), ValueError, "rtol"),
    (lambda: fmk.log_prob(FIELD, X, atol=torch.ones(5, 5)), ValueError, r"atol: expected shape \[3\] or one"),
    (lambda: fmk.log_prob(FIELD, X, dense=True), TypeError, "dense: expected one of the solver's options controller"),
    (lambda: fmk.log_prob(FIELD, X, probes=3), TypeError, "probes"),
    (lambda: fmk.log_prob(FIELD, X, gradient="exact"), ValueError, "gradient"),
    (lambda: fmk.log_prob(FIELD, X, gradient="recorded"), ValueError, "parameters: expected the tensors"),
    (lambda: fmk.log_prob(FIELD, X, key=KEY, generator=torch.Generator()), ValueError, "generator"),
    (lambda: fmk.log_prob(lambda t, x: x[:1], X), ValueError, r"f: expected it to return shape \[3, 4\]"),
    (lambda: fmk.log_prob(lambda t, x: torch.zeros_like(x), X), ValueError, "f: expected a value that depends on x"),
    (lambda: fmk.solve(FIELD.__call__, X, norm_columns=0), ValueError, "norm_columns"),
    (lambda: fmk.solve(FIELD.__call__, X, norm_columns=5), ValueError, "norm_columns: expected at most 4"),
    (lambda: fmk.solve(FIELD.__call__, X, norm_columns=2, method="rk4", steps=2), ValueError, "norm_columns"),
    (lambda: fmk.bits_per_dim([1.0], 4), TypeError, "log_prob"),
    (lambda: fmk.bits_per_dim(torch.zeros(2, 3, 4), 4), ValueError, r"log_prob: expected shape \[B\] or \[B, K\]"),
    (lambda: fmk.bits_per_dim(torch.zeros(2, 0), 4), ValueError, "log_prob"),
    (lambda: fmk.bits_per_dim(torch.zeros(2), 0), ValueError, "dims"),
    (lambda: fmk.bits_per_dim(torch.zeros(2), 4, bits=0), ValueError, "bits"),
    (lambda: fmk.dequantise(X), TypeError, "x: expected integer levels, got float32"),
    (lambda: fmk.dequantise(LEVELS + 32, bits=5), ValueError, "x: expected levels from 0 to 31, got 32 to 32"),
    (lambda: fmk.dequantise(LEVELS.int() - 1), ValueError, "x: expected levels from 0 to 255, got -1 to -1"),
    (lambda: fmk.dequantise(LEVELS, dtype=torch.float16), TypeError, "dtype"),
    (lambda: fmk.dequantise(LEVELS, draw=-1), ValueError, "draw"),
    (lambda: fmk.evaluate_bits_per_dim(FIELD, [LEVELS], draws=0), ValueError, "draws"),
    (lambda: fmk.evaluate_bits_per_dim(FIELD, [LEVELS], gradient="recorded"), TypeError, "gradient"),
    (lambda: next(fmk.evaluate_bits_per_dim(FIELD, ["image"])), TypeError, "batches: expected a torch.Tensor"),
    (lambda: next(fmk.evaluate_bits_per_dim(FIELD, [X])), TypeError, "x: expected integer levels"),
]  # fmt: skip


class Several(Gaussian):
    def __init__(self):
        super().__init__(0.0, 1.0)

    def sample(self, shape):
        return torch.zeros(*shape, 4)


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
