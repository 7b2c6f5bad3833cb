"""Bad input: each error names the argument, what was expected and what came."""

import pytest
import torch

import fmkernels as fmk
from fmkernels.ops import matching_loss, noise, sample_path

X = torch.randn(4, 3)
KEY = torch.tensor([1])
FM = fmk.FlowMatching()
BATCH = FM.sample(X)
NAN, INF = float("nan"), float("inf")

CASES = [
    # schedules, samplers, objectives
    (lambda: fmk.CondOT(sigma_min=-0.1), ValueError, "sigma_min: expected a finite number of at least 0 and at most 1, got -0.1"),
    (lambda: fmk.CondOT(sigma_min="0"), TypeError, "sigma_min: expected a real number, got str"),
    (lambda: fmk.CondOT(sigma_min=True), TypeError, "sigma_min: expected a real number, got bool"),
    (lambda: fmk.CondOT(t_range=(0.5, 0.1)), ValueError, "t_range: expected low < high"),
    (lambda: fmk.CondOT(t_range=(0.0, 1.5)), ValueError, r"t_range\[1\]: expected .* at most 1, got 1.5"),
    (lambda: fmk.CondOT(t_range=0.5), TypeError, "t_range: expected a pair"),
    (lambda: fmk.VP(t_range=(0.0, 1.0)), ValueError, "t_range: expected a part of .* infinite derivatives"),
    (lambda: fmk.VP(beta_min=NAN), ValueError, "beta_min: expected a finite number"),
    (lambda: fmk.VP(beta_max=INF), ValueError, "beta_max: expected a finite number"),
    (lambda: fmk.VP(5.0, 1.0), ValueError, "beta_max: expected a finite number of at least 5, got 1"),
    (lambda: fmk.VE(sigma_min=0.0), ValueError, "sigma_min: expected a finite number above 0, got 0"),
    (lambda: fmk.Polynomial(-1.0), ValueError, "n: expected a finite number above 0"),
    (lambda: fmk.SchrodingerBridge(-1.0), ValueError, "s: expected a finite number of at least 0"),
    (lambda: fmk.Custom(3), TypeError, "fn: expected a callable"),
    (lambda: fmk.FlowMatching(fmk.Custom(lambda t: (t,))).sample(X), ValueError, "fn: expected 2, 3 or 6 coefficients, got 1"),
    (lambda: fmk.FlowMatching(fmk.Custom(lambda t: (t, t, t))).sample(X), ValueError, "fn: returned γ, which needs .*bridge=True"),
    (lambda: fmk.FlowMatching(fmk.Custom(lambda t: (1.0, t))).sample(X), TypeError, "fn: expected tensors of t's shape, got float"),
    (lambda: fmk.Uniform(0.5, 0.2), ValueError, "hi: expected a finite number of at least 0.5 and at most 1, got 0.2"),
    (lambda: fmk.LogitNormal(std=0.0), ValueError, "std: expected a finite number above 0"),
    (lambda: fmk.LogitNormal(mean=INF), ValueError, "mean: expected a finite number"),
    (lambda: fmk.Mode(2.0), ValueError, "scale: expected .* at most 1.75"),
    (lambda: fmk.Beta(0.0), ValueError, "a: expected a finite number above 0"),
    (lambda: fmk.Uniform(shift=0.0), ValueError, "shift: expected a finite number above 0"),
    (lambda: fmk.Uniform(stratified=1), TypeError, "stratified: expected a bool, got int"),
    (lambda: fmk.MinSNR(-1.0), ValueError, "k: expected a finite number above 0"),
    (lambda: fmk.PseudoHuber(0.0), ValueError, "k: expected a finite number above 0"),
    (lambda: fmk.FlowMatching("vp"), TypeError, "schedule: expected a fmkernels schedule, got str"),
    (lambda: fmk.FlowMatching(prediction="flow"), ValueError, "prediction: expected one of 'velocity', .*, got 'flow'"),
    (lambda: fmk.FlowMatching(compare="noise"), ValueError, "compare: expected None, 'velocity' or .*, got 'noise'"),
    (lambda: fmk.FlowMatching(weight="snr"), ValueError, "weight: expected one of 'min_snr', .*, got 'snr'"),
    (lambda: fmk.FlowMatching(weight=3), TypeError, "weight: expected None, a name .* got int"),
    (lambda: fmk.FlowMatching(weight="likelihood"), ValueError, "weight: 'likelihood' needs prediction"),
    (lambda: fmk.FlowMatching(fmk.VP(), "score", weight="min_snr"), ValueError, "weight: 'min_snr' is defined for"),
    (lambda: fmk.FlowMatching(rho="huber"), ValueError, "rho: expected 'square', .* got 'huber'"),
    (lambda: fmk.FlowMatching(timesteps="uniform"), TypeError, "timesteps: expected a fmkernels timestep sampler, got str"),
    (lambda: fmk.FlowMatching(noise="keep"), ValueError, "noise: expected one of 'auto', 'recompute', 'store', got 'keep'"),
    (lambda: fmk.FlowMatching(sigma_data=0.0), ValueError, "sigma_data: expected a finite number above 0"),
    (lambda: fmk.FlowMatching.named("edm2"), ValueError, "name: expected one of .*, got 'edm2'"),
    (lambda: fmk.FlowMatching.named("scoreflow"), ValueError, "schedule: .* divides by α, which is 0 at t = 0 of CondOT"),
    (lambda: fmk.FlowMatching(prediction="noise", compare="velocity"), ValueError, "expected a t_range that starts above 0"),
    (lambda: fmk.FlowMatching(fmk.ConstantNoise(0.1), "noise"), ValueError, "prediction: 'noise' is not defined for ConstantNoise"),
    # sample
    (lambda: FM.sample([1.0]), TypeError, "x1: expected a torch.Tensor, got list"),
    (lambda: FM.sample(torch.ones(4, 3, dtype=torch.int64)), TypeError, "x1: expected dtype float32.*, got int64"),
    (lambda: FM.sample(torch.ones(4, 3, dtype=torch.complex64)), TypeError, "x1: expected dtype float32.*, got complex64"),
    (lambda: FM.sample(X, x0=X[:2]), ValueError, r"x0: expected shape \[4, 3\], that of x1, got \[2, 3\]"),
    (lambda: FM.sample(X, x0=X.double()), TypeError, "x0: expected dtype float32, that of x1, got float64"),
    (lambda: FM.sample(X, x0=X.to("meta")), ValueError, "x0: expected device cpu, that of x1, got meta"),
    (lambda: FM.sample(X, t=torch.rand(3)), ValueError, r"t: expected a shape that is a prefix of x1's \[4, 3\]"),
    (lambda: FM.sample(X, t=torch.rand(4, 1)), ValueError, r"t: expected a shape that is a prefix"),
    (lambda: FM.sample(X, t=torch.rand(4).bfloat16()), TypeError, "t: expected dtype float32 or float64 .*, got bfloat16"),
    (lambda: FM.sample(X, t=0.5), TypeError, "t: expected a torch.Tensor, got float"),
    (lambda: FM.sample(X, t_dims=3), ValueError, "t_dims: expected at most 2"),
    (lambda: FM.sample(X, t_dims=-1), ValueError, "t_dims: expected an int of at least 0, got -1"),
    (lambda: FM.sample(X, key=torch.tensor(1)), ValueError, r"key: expected an int64 tensor of shape \[1\]"),
    (lambda: FM.sample(X, key=torch.tensor([1.0])), ValueError, "key: expected an int64 tensor"),
    (lambda: FM.sample(X, key=KEY, generator=torch.Generator()), ValueError, "generator: expected None where key is given"),
    (lambda: FM.sample(X, first_row=-1), ValueError, "first_row: expected an int of at least 0, got -1"),
    (lambda: FM.sample(X, first_row=1.0), TypeError, "first_row: expected an int, got float"),
    (lambda: FM.sample(X, first_row=2, total_rows=5), ValueError, "total_rows: expected at least first_row \\+ 4 = 6, got 5"),
    (
        lambda: fmk.FlowMatching(timesteps=fmk.Uniform(stratified=True)).sample(X, first_row=4),
        ValueError,
        "total_rows: stratified times need the size of the whole batch",
    ),
    # loss
    (lambda: FM.loss(X, X), TypeError, "batch: expected the Batch that sample"),
    (lambda: FM.loss(X[:2], BATCH), ValueError, r"prediction: expected shape \[4, 3\], that of x1, got \[2, 3\]"),
    (lambda: FM.loss(X.unsqueeze(1), BATCH), ValueError, "prediction: expected shape"),
    (lambda: FM.loss(X.long(), BATCH), TypeError, "prediction: expected dtype float32.*, got int64"),
    (lambda: FM.loss(None, BATCH), TypeError, "prediction: expected a torch.Tensor, got NoneType"),
    (lambda: FM.loss(X.to("meta"), BATCH), ValueError, "prediction: expected device cpu, that of x1, got meta"),
    (lambda: FM.loss(X, BATCH, reduction="avg"), ValueError, "reduction: expected one of 'none', 'sum', 'mean', got 'avg'"),
    (lambda: FM.loss(X, BATCH, weight=torch.ones(3)), ValueError, r"weight: expected a shape that broadcasts to t's \[4\]"),
    (lambda: FM.loss(X, BATCH, weight=torch.ones(4, 3)), ValueError, "weight: expected a shape that broadcasts to t's"),
    (lambda: FM.loss(X, BATCH, weight=2.0), TypeError, "weight: expected a torch.Tensor, got float"),
    (lambda: FM.loss(X, BATCH, weight=torch.ones(4).long()), TypeError, "weight: expected dtype float32.*, got int64"),
    (lambda: FM.loss(X, BATCH, mask=torch.ones(4, 3)), TypeError, "mask: expected dtype bool .*, got float32"),
    (lambda: FM.loss(X, BATCH, mask=torch.ones(4, dtype=torch.bool)), ValueError, "mask: expected a shape that broadcasts"),
    # velocity
    (lambda: FM.velocity(3), TypeError, "model: expected a callable"),
    (lambda: FM.velocity(lambda x, t: x)(torch.rand(3), X), ValueError, r"t: expected a scalar or shape \[4\], got \[3\]"),
    (lambda: FM.velocity(lambda x, t: x)(0.5, [1.0]), TypeError, "x: expected a torch.Tensor, got list"),
    # functional ops
    (lambda: noise(KEY, -1, 3), ValueError, "rows: expected an int of at least 0, got -1"),
    (lambda: noise(KEY, 2, 2**34 + 1), ValueError, r"columns: expected at most 2\*\*34"),
    (lambda: noise(KEY, 2, 3, stream="y"), ValueError, "stream: expected one of 'x0', .*, got 'y'"),
    (lambda: noise(KEY, 2, 3, index=2**24), ValueError, r"index: expected an int below 2\*\*24"),
    (lambda: noise(KEY, 2, 3, dtype=torch.int32), TypeError, "dtype: expected float32"),
    (lambda: noise(KEY, 2, 3, distribution="cauchy"), ValueError, "distribution: expected one of 'normal', 'uniform'"),
    (lambda: sample_path(X, schedule=fmk.VP(), objective=fmk.Objective(fmk.CondOT())), ValueError, "schedule: expected CondOT"),
    (lambda: matching_loss(X, X, BATCH.table), ValueError, "key: expected the key of the path, from which x0 is drawn again"),
    (lambda: matching_loss(X, X, X), ValueError, r"table: expected shape \[\*t.shape, 6\]"),
    (lambda: matching_loss(X, X, BATCH.table, X, terms=9), ValueError, "terms: expected a sum of 1"),
    (lambda: matching_loss(X, X, BATCH.table, X, rho="x"), ValueError, "rho: expected one of"),
    # distributions
    (lambda: fmk.Normal(0.0), ValueError, "scale: expected a finite number above 0"),
    (lambda: fmk.StandardNormal().log_prob(torch.tensor(1.0)), ValueError, "x: expected at least one dimension"),
]  # fmt: skip


@pytest.mark.parametrize("call,error,message", CASES, ids=[str(i) for i in range(len(CASES))])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_unknown_backend(monkeypatch):
    from fmkernels import _registration

    monkeypatch.setenv("FMK_BACKEND", "gpu")
    with pytest.raises(ValueError, match="FMK_BACKEND: expected one of auto, reference, cpp, triton, cuda, got 'gpu'"):
        _registration.backend()
