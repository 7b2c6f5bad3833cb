"""The three mirrors of one formula tied together: csrc/math (through _host), the torch reference, and fp64 autodiff."""

import math

import numpy as np
import pytest
import torch

import fmkernels as fmk
from fmkernels import objectives
from fmkernels.ops.noise import STREAMS, hash32, log_uniform, normal_pair, permute, philox
from fmkernels.ops.probe import PROBES, hadamard_order, parity

host = pytest.importorskip(
    "fmkernels._host", reason="csrc/math is evaluated by the compiled module _host, not built here"
)

SCHEDULES = {
    "SCHEDULE_COND_OT": fmk.CondOT(0.1),
    "SCHEDULE_VP": fmk.VP(0.2, 15.0),
    "SCHEDULE_VE": fmk.VE(0.02, 40.0),
    "SCHEDULE_COSINE": fmk.Cosine(),
    "SCHEDULE_LINEAR_VP": fmk.LinearVP(),
    "SCHEDULE_SUB_VP": fmk.SubVP(),
    "SCHEDULE_POLYNOMIAL": fmk.Polynomial(2.5),
    "SCHEDULE_CONSTANT_NOISE": fmk.ConstantNoise(0.3),
    "SCHEDULE_SCHRODINGER_BRIDGE": fmk.SchrodingerBridge(0.7),
}
SAMPLERS = {
    "TIMESTEP_UNIFORM": fmk.Uniform(0.1, 0.8),
    "TIMESTEP_LOGIT_NORMAL": fmk.LogitNormal(0.3, 1.2),
    "TIMESTEP_MODE": fmk.Mode(1.29),
    "TIMESTEP_COS_MAP": fmk.CosMap(),
    "TIMESTEP_BETA": fmk.Beta(1.5, scale=0.999),
}


def times(schedule, dtype=torch.float64):
    low, high = schedule.t_range
    return (
        torch.cat([torch.linspace(low, high, 301), torch.tensor([low + 1e-4, high - 1e-4])]).to(dtype).clamp(low, high)
    )


def close(actual, expected, eps, what):
    """Equal to `eps` relative to each value, with the column's size as the floor where values cross zero."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    finite = np.isfinite(expected)
    assert (np.isfinite(actual) == finite).all(), what
    scale = np.abs(expected) + 0.1 * np.abs(np.where(finite, expected, 0)).mean(axis=0)
    actual, expected, scale = (np.where(finite, x, 1) for x in (actual, expected, scale))
    error = np.abs(actual - expected) / np.maximum(scale, 1e-30)
    assert error.max() < eps, f"{what}: {error.max():.2e} at {np.unravel_index(error.argmax(), error.shape)}"


def test_codes_of_python_and_csrc_agree():
    codes = {**{name: schedule.code for name, schedule in SCHEDULES.items()}, "SCHEDULE_CUSTOM": fmk.Custom(abs).code}
    codes |= {name: sampler.code for name, sampler in SAMPLERS.items()}
    codes |= {f"STREAM_{name.upper()}": code for name, code in STREAMS.items()}
    codes |= {f"PROBE_{name.upper()}": code for name, code in PROBES.items()}
    codes |= {f"PREDICT_{name.upper()}": code for name, code in objectives.PREDICTIONS.items()}
    codes |= {f"COMPARE_{name.upper()}": code for name, code in objectives.COMPARES.items()}
    codes |= {f"WEIGHT_{name.upper().replace('COSMAP', 'COS_MAP')}": c for name, c in objectives.WEIGHTS.items()}
    codes |= {f"RHO_{name.upper()}": code for name, code in objectives.RHOS.items()}
    assert codes == host.codes


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("bits", [32, 64])
def test_schedules_of_csrc_equal_the_reference(name, bits):
    schedule = SCHEDULES[name]
    t = times(schedule, torch.float32 if bits == 32 else torch.float64)
    ours = getattr(host, f"schedule{bits}")(schedule.code, *schedule.parameters_, t.numpy())
    theirs = torch.stack(schedule.coefficients(t.double()), dim=-1).numpy()
    close(ours, theirs, 4e-6 if bits == 32 else 1e-13, name)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=lambda s: type(s).__name__)
def test_derivatives_are_those_of_autodiff(schedule):
    t = times(schedule)[1:-1]
    if schedule.bridge:
        t = t[(t > 1e-6) & (t < 1 - 1e-6)]
    values, tangents = torch.func.jvp(lambda s: tuple(schedule.coefficients(s)[:3]), (t,), (torch.ones_like(t),))
    for name, derivative, tangent in zip(("d_alpha", "d_sigma", "d_gamma"), schedule.coefficients(t)[3:], tangents):
        torch.testing.assert_close(derivative, tangent, rtol=1e-9, atol=1e-10, msg=f"{name} of {schedule}")


def test_fp32_numerics_near_the_data_end():
    t = torch.tensor([1 - 1e-5], dtype=torch.float32)
    for schedule in (fmk.VP(), fmk.SubVP(), fmk.Polynomial(3.0), fmk.LinearVP(), fmk.Cosine()):
        exact = schedule.coefficients(t.double()).sigma
        for sigma in (
            schedule.coefficients(t).sigma,
            torch.from_numpy(host.schedule32(schedule.code, *schedule.parameters_, t.numpy()))[:, 1],
        ):
            assert abs(sigma.double() / exact - 1) < 1e-5, schedule  # 1 − exp(−T) would be 1 % off
    for schedule in SCHEDULES.values():
        assert all(torch.isfinite(c).all() for c in schedule.coefficients(times(schedule, torch.float32))), schedule


def test_variance_preserving_schedules_preserve_variance():
    for schedule in (fmk.VP(), fmk.Cosine(), fmk.LinearVP()):
        v = schedule.coefficients(times(schedule))
        torch.testing.assert_close(v.alpha**2 + v.sigma**2, torch.ones_like(v.alpha), rtol=0, atol=1e-12)


OBJECTIVES = [
    (prediction, compare, weight)
    for prediction in objectives.PREDICTIONS
    for compare in objectives.COMPARES
    for weight in objectives.WEIGHTS
]


@pytest.mark.parametrize("name", ["SCHEDULE_COND_OT", "SCHEDULE_VP", "SCHEDULE_COSINE", "SCHEDULE_SCHRODINGER_BRIDGE"])
def test_objective_rows_of_csrc_equal_the_reference(name):
    schedule = SCHEDULES[name]
    t = times(schedule)
    v = schedule.coefficients(t)
    table = torch.stack(v, dim=-1).numpy()
    for prediction, compare, weight in OBJECTIVES:
        p, c, w = objectives.PREDICTIONS[prediction], objectives.COMPARES[compare], objectives.WEIGHTS[weight]
        rows, scale = objectives.objective_table(t, v, p, c, 0.3, w, 5.0)
        expected = torch.cat([rows, scale.unsqueeze(-1)], dim=-1)
        close(
            host.objective64(p, c, 0.3, w, 5.0, t.numpy(), table), expected, 1e-12, (name, prediction, compare, weight)
        )


@pytest.mark.parametrize("prediction", ["noise", "data", "score", "edm"])
@pytest.mark.parametrize("schedule", [fmk.VP(), fmk.CondOT(0.05), fmk.Cosine(t_range=(0.01, 0.99)), fmk.VE()], ids=repr)
def test_every_prediction_implies_the_same_velocity(prediction, schedule):
    """The exact prediction of a path, turned into a velocity, is the path's velocity; and its residual is 0."""
    generator = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 50, 4, dtype=torch.float64, generator=generator)
    low, high = max(schedule.t_range[0], 0.05), min(schedule.t_range[1], 0.95)
    t = torch.linspace(low, high, 50, dtype=torch.float64)
    v = schedule.coefficients(t)
    column = lambda c: c.unsqueeze(-1)  # noqa: E731
    x_t = column(v.alpha) * x1 + column(v.sigma) * x0
    velocity = column(v.d_alpha) * x1 + column(v.d_sigma) * x0
    exact = {"noise": x0, "data": x1, "score": -x0 / column(v.sigma)}
    if prediction == "edm":
        root = (v.sigma**2 + v.alpha**2 * 0.25).sqrt()
        exact["edm"] = column(v.sigma / (0.5 * root)) * x1 - column(0.5 * v.alpha / root) * x0
    fm = fmk.FlowMatching(schedule, prediction)
    given = []
    field = fm.velocity(lambda x, t: given.append((x, t)) or exact[prediction])
    torch.testing.assert_close(field(t, x_t), velocity, rtol=1e-9, atol=1e-9)
    for compare in (None, "velocity"):
        if (
            compare
            and prediction in ("noise", "score")
            and schedule.coefficients(torch.tensor(schedule.t_range[0])).alpha == 0
        ):
            continue
        fm = fmk.FlowMatching(schedule, prediction, compare, sigma_floor=1e-3)
        batch = fm.sample(x1, x0, t)
        torch.testing.assert_close(batch.x_t, given[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(batch.t, given[0][1], rtol=1e-12, atol=1e-12)
        assert fm.loss(exact[prediction], batch) < 1e-20


@pytest.mark.parametrize("prediction", ["noise", "data", "score"])
def test_velocity_losses_equal_the_velocity_error(prediction):
    """compare="velocity" is the squared error of the implied velocity, whatever is predicted."""
    schedule = fmk.VP(t_range=(0.1, 0.9))
    x1 = torch.randn(20, 6, dtype=torch.float64)
    fm = fmk.FlowMatching(schedule, prediction, "velocity", sigma_floor=1e-3)
    batch = fm.sample(x1)
    pred = torch.randn_like(x1)
    v = fm.velocity(lambda x, t: pred)(batch.t, batch.x_t)
    target = fmk.FlowMatching(schedule)
    expected = target.loss(v, target.sample(x1, batch.x0, batch.t, batch.key))
    torch.testing.assert_close(fm.loss(pred, batch), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_of_csrc_equal_the_reference(name):
    sampler = SAMPLERS[name]
    u = torch.cat(
        [
            torch.linspace(1e-3, 1 - 1e-3, 500, dtype=torch.float64),
            torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64),
        ]
    )
    for shift in (1.0, 3.0, 0.4):
        sampler = type(sampler)(**{n: getattr(sampler, n) for n in sampler._parameters_}, shift=shift)
        ours = host.timestep(sampler.code, *sampler.parameters_, shift, u.numpy())
        np.testing.assert_allclose(ours, sampler.inverse_cdf(u).numpy(), rtol=1e-12, atol=1e-14)
        steps = np.diff(ours[:500])
        assert (steps < 0).all() if name == "TIMESTEP_BETA" else (steps > 0).all()  # one time for every u


def test_inverse_normal_cdf():
    u = torch.cat(
        [torch.logspace(-12, -0.31, 400, dtype=torch.float64), 1 - torch.logspace(-9, -0.31, 400, dtype=torch.float64)]
    )
    np.testing.assert_allclose(
        host.inverse_normal_cdf(u.numpy()), torch.special.ndtri(u).numpy(), rtol=2e-14, atol=1e-15
    )


def test_philox_known_answers():
    """Vectors published with Random123 (kat_vectors, philox4x32-10)."""
    vectors = [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in vectors:
        assert host.philox(np.array([counter], dtype=np.uint32), *key)[0].tolist() == expected
        seed = key[0] | (key[1] << 32)
        seed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
        words = philox([torch.tensor([c]) for c in counter], seed)
        assert [int(w) for w in words] == expected


def test_vector_philox_equals_the_scalar_form():
    """The kernel's hand-written lanes, through the words of uniform noise, against philox of csrc/math."""
    seed, first_row, columns = 0x0123456789ABCDEF, 2**32 - 3, 1030
    uniforms = torch.ops.fmkernels.noise(torch.tensor([seed]), 7, columns, first_row, 3, 5, 1, torch.float64)
    words = (uniforms * 2.0**32 - 0.5).round().to(torch.int64).numpy()
    groups = -(-columns // 4)
    for row in range(7):
        at = first_row + row
        counter = np.stack(np.broadcast_arrays(np.arange(groups), at % 2**32, at >> 32, 3 | 5 << 8), axis=1)
        expected = host.philox(counter.astype(np.uint32), seed & 0xFFFFFFFF, seed >> 32).reshape(-1)[:columns]
        assert (words[row] == expected).all()


def test_normal_maps_agree_between_precisions_and_languages():
    generator = np.random.default_rng(0)
    w0, w1 = generator.integers(0, 2**32, (2, 200_000), dtype=np.uint32)
    edges = np.array([0, 1, 2, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
    w0, w1 = np.concatenate([w0, np.repeat(edges, 9)]), np.concatenate([w1, np.tile(edges, 9)])
    narrow, wide = host.normal_pair32(w0, w1), host.normal_pair64(w0, w1)
    assert np.abs(narrow - wide).max() < 1.5e-6  # 6.6 σ at fp32 resolution
    words = [torch.from_numpy(w.astype(np.int64)) for w in (w0, w1)]
    reference = torch.stack(normal_pair(*words, torch.float64), dim=-1)
    np.testing.assert_allclose(wide, reference.numpy(), rtol=0, atol=2e-15)
    assert np.abs(torch.stack(normal_pair(*words, torch.float32), dim=-1).numpy() - wide).max() < 1.5e-6
    assert 6.6 < np.abs(wide).max() < 6.7
    m = (w0 >> 1).astype(np.int32)
    exact = log_uniform(torch.from_numpy(m.astype(np.int64)), torch.float64).numpy()
    assert np.abs(host.log_uniform32(m) / exact - 1).max() < 3e-7  # relative, close to u = 1 too
    x = np.linspace(-0.5, 0.5, 10001)
    assert (
        np.abs(host.sin_pi32(x.astype(np.float32)) - np.sin(np.pi * x.astype(np.float32).astype(float))).max() < 1.5e-7
    )
    assert (
        np.abs(host.cos_pi32(x.astype(np.float32)) - np.cos(np.pi * x.astype(np.float32).astype(float))).max() < 1.5e-7
    )


def test_permutation():
    key = torch.tensor([0x0123456789ABCDEF])
    for n in (1, 2, 3, 7, 64, 1000):
        x = torch.arange(n)
        image = permute(key, n, x)
        assert sorted(image.tolist()) == list(range(n))
        assert host.permute(int(key), n, np.arange(n, dtype=np.uint32)).tolist() == image.tolist()
    images = permute(torch.arange(4000).unsqueeze(1), 8, torch.arange(8).expand(4000, 8))
    counts = torch.stack([(images == value).sum(0) for value in range(8)]).double()  # 500 each
    assert ((counts - 500) ** 2 / 500).sum() < 49 + 6 * math.sqrt(2 * 49)  # χ² of 7·7 degrees of freedom
    assert int(hash32(torch.tensor([1]))) == 0x514E28B7  # MurmurHash3's finaliser of 1


def test_rho_and_its_derivative():
    r = np.linspace(-4, 4, 1001)
    for name, kind in objectives.RHOS.items():
        for k in (0.3, 1.0):
            x = torch.from_numpy(r).requires_grad_()
            value = {"square": x**2, "absolute": x.abs(), "pseudo_huber": (x**2 + k**2).sqrt() - k}[name]
            (slope,) = torch.autograd.grad(value.sum(), x)
            np.testing.assert_allclose(host.rho64(kind, k, r), value.detach(), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(host.d_rho64(kind, k, r), slope, rtol=1e-12, atol=1e-14)
    small = np.float32(1e-5)
    assert abs(host.rho32(objectives.RHOS["pseudo_huber"], 1.0, small) / 5e-11 - 1) < 1e-5  # no cancellation


@pytest.mark.parametrize("kind,dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_precision_conversions_are_exact(kind, dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    ours = getattr(host, f"{kind}_value")(bits)
    nan = np.isnan(values)
    assert (np.isnan(ours) == nan).all() and (ours[~nan].view(np.uint32) == values[~nan].view(np.uint32)).all()
    generator = np.random.default_rng(0)
    floats = generator.integers(0, 2**32, 400_000, dtype=np.uint32).view(np.float32)
    halfway = ((values[~nan].astype(np.float64)[:-1] + values[~nan].astype(np.float64)[1:]) / 2).astype(np.float32)
    floats = np.concatenate(
        [floats, values[~nan], halfway, np.float32([65504, 65519.996, 65520, 1e-8, 6e-8, -0.0, np.inf])]
    )
    floats = floats[~np.isnan(floats)]
    expected = torch.from_numpy(floats).to(dtype).view(torch.int16).numpy().view(np.uint16)
    assert (getattr(host, f"{kind}_bits")(floats) == expected).all()
    assert np.isnan(getattr(host, f"{kind}_value")(getattr(host, f"{kind}_bits")(np.float32([np.nan])))).all()


def test_signs_of_probes():
    """Parity and the words of a Hadamard matrix against bits counted one by one; a sign is a bit of its word."""
    x = torch.randint(2**32, (500,))
    assert (host.parity(x.numpy().astype(np.uint32)) == parity(x).numpy()).all()
    assert parity(x).tolist() == [int(value).bit_count() % 2 for value in x]
    for column, word in ((0, 0), (21, 0), (31, 1), (2**30 - 1, 2**25 - 1), (2**29 + 12345, 77777)):
        bits = [((32 * word + lane) & column).bit_count() % 2 for lane in range(32)]
        assert host.hadamard_word(column, word) == sum(bit << lane for lane, bit in enumerate(bits))
        for one in (host.with_sign32, host.with_sign64):
            signs = one(2.5, host.hadamard_word(column, word), np.arange(32, dtype=np.int32))
            assert signs.tolist() == [2.5 - 5.0 * bit for bit in bits]


def test_the_order_of_a_hadamard_matrix():
    assert [hadamard_order(n) for n in (0, 1, 2, 3, 4, 5, 12288, 2**30)] == [1, 1, 2, 4, 4, 8, 16384, 2**30]
