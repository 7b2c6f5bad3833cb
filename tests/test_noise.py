"""The statistics of the noise, and its independence of how it is asked for."""

import math

import pytest
import torch
from contract_op import DEVICES, INTERPRETED

import fmkernels as fmk
from fmkernels.ops import noise

ROWS, COLUMNS = (8, 512) if INTERPRETED else (256, 4096)


def key(device, seed=0x5DEECE66D1234567):
    return torch.tensor([seed], device=device)


def correlation(a, b):
    return float((a.double() * b.double()).mean())


def test_moments_and_tails(device):
    x = noise(key(device), ROWS, COLUMNS).double().flatten()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(x.pow(power).mean() - moment) < 5 * math.sqrt(variance / n), power
    for bound in (1.0, 2.0, 3.0):
        share = math.erfc(bound / math.sqrt(2))
        assert abs((x.abs() > bound).double().mean() - share) < 5 * math.sqrt(share * (1 - share) / n)
    assert x.abs().max() < 6.7


@pytest.mark.skipif(INTERPRETED, reason="needs a million draws, the interpreter takes 20 ms for a thousand")
def test_distribution_is_normal(device):
    """Kolmogorov–Smirnov at level 1e-4, over each of the four places of a column group."""
    x = noise(key(device), ROWS, COLUMNS, dtype=torch.float64).cpu().reshape(-1, 4)
    for place in x.unbind(1):
        cdf = torch.special.ndtr(place.sort().values)
        ranks = torch.arange(len(cdf) + 1, dtype=torch.float64) / len(cdf)
        distance = torch.maximum((cdf - ranks[:-1]).abs().max(), (cdf - ranks[1:]).abs().max())
        assert distance < 2.23 / math.sqrt(len(cdf))


def test_independence(device):
    """Columns, rows, streams, indices and seeds give uncorrelated numbers, and so do their squares."""
    k = key(device)
    x = noise(k, ROWS, COLUMNS)
    others = {
        "stream": noise(k, ROWS, COLUMNS, stream="bridge"),
        "index": noise(k, ROWS, COLUMNS, index=1),
        "seed": noise(k + 1, ROWS, COLUMNS),
        "high half of the seed": noise(k + 2**32, ROWS, COLUMNS),
        "row": noise(k, ROWS, COLUMNS, first_row=ROWS),
        "row beyond 2^32": noise(k, ROWS, COLUMNS, first_row=2**32),
        "next column": x.roll(1, 1),
        "next row": x.roll(1, 0),
    }
    bound = 5 / math.sqrt(x.numel())
    for name, y in others.items():
        assert abs(correlation(x, y)) < bound, name
        assert abs(correlation(x.square() - 1, y.square() - 1)) < 2 * bound, name


def test_rows_are_global(device):
    k = key(device)
    whole = noise(k, 7, 10, first_row=2**32 - 3)
    parts = [noise(k, 1, 10, first_row=2**32 - 3 + i) for i in range(7)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[:, :7], noise(k, 7, 7, first_row=2**32 - 3))  # columns too


def test_half_precision_is_the_rounded_normal(device):
    k = key(device)
    x = noise(k, 5, 37)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(noise(k, 5, 37, dtype=dtype), x.to(dtype))
    assert (noise(k, 5, 37, dtype=torch.float64) - x).abs().max() < 4e-6


def test_uniform(device):
    u = noise(key(device), ROWS, COLUMNS, distribution="uniform", dtype=torch.float64)
    assert 0 < u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * u.numel())
    assert abs(u.var() - 1 / 12) < 5 / math.sqrt(180 * u.numel())


def test_key_follows_manual_seed_and_generator():
    torch.manual_seed(3)
    first = fmk.key()
    torch.manual_seed(3)
    assert torch.equal(first, fmk.key())
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(fmk.key(generator=generator), first) and first.dtype == torch.int64 and first.shape == (1,)


@pytest.mark.parametrize("sampler", [
    fmk.Uniform(0.2, 0.7), fmk.LogitNormal(-0.4, 0.8), fmk.Mode(1.29), fmk.Mode(-0.5), fmk.CosMap(), fmk.Beta(1.5),
    fmk.Uniform(shift=3.0), fmk.LogitNormal(shift=0.5),
], ids=repr)  # fmt: skip
def test_times_follow_their_distribution(sampler):
    """Kolmogorov–Smirnov of drawn times against the densities' own integrals."""
    n = 20_000
    t = fmk.FlowMatching(timesteps=sampler).sample(torch.zeros(n, 1, dtype=torch.float64)).t.sort().values
    inverse_shift = sampler.shift * t / (1 + (sampler.shift - 1) * t)
    cdf = {
        "Uniform": lambda s: (s - 0.2) / 0.5 if sampler.shift == 1 else s,
        "LogitNormal": lambda s: torch.special.ndtr((torch.logit(s) - sampler.mean) / sampler.std),
        "CosMap": lambda s: 2 / math.pi * torch.atan(s / (1 - s)),
        "Beta": lambda s: 1 - (1 - s) ** sampler.a,
    }.get(type(sampler).__name__)
    if cdf is None:  # Mode has no closed form: bisect its monotone inverse
        grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
        values = cdf = sampler.inverse_cdf(grid)
        probabilities = grid[torch.searchsorted(values, t).clamp_max(100_000)]
    else:
        probabilities = cdf(inverse_shift)
    ranks = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (probabilities - ranks).abs().max() < 2.23 / math.sqrt(n)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_stratified_times_fill_every_stratum_once(device):
    fm = fmk.FlowMatching(timesteps=fmk.Uniform(stratified=True))
    x1 = torch.zeros(60, 3, 2, dtype=torch.float64, device=device)
    t = fm.sample(x1, t_dims=2).t
    assert sorted((t.flatten() * 180).long().tolist()) == list(range(180))
    assert (t.flatten().diff() > 0).any() and (t.flatten().diff() < 0).any()  # shuffled


def test_drawn_times_stay_inside_the_range():
    for schedule in (fmk.VP(), fmk.LinearVP(), fmk.Polynomial(0.5), fmk.CondOT(t_range=(0.25, 0.5))):
        t = fmk.FlowMatching(schedule).sample(torch.zeros(20_000, 1)).t
        low, high = (torch.tensor(bound, dtype=torch.float32) for bound in schedule.t_range)
        assert t.min() >= low and t.max() <= high
