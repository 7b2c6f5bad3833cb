"""A user's code as mypy sees it: `make lint` checks these types, tests/test_packaging.py that the code runs."""

from __future__ import annotations

import torch
from typing_extensions import assert_type

import fmkernels as fmk


def train(model: torch.nn.Module, x1: torch.Tensor) -> torch.Tensor:
    fm = fmk.FlowMatching(schedule=fmk.CondOT(sigma_min=1e-4), timesteps=fmk.LogitNormal(), weight=fmk.MinSNR(5.0))
    batch = assert_type(fm.sample(x1, key=fmk.key()), fmk.Batch)
    assert_type(batch.x0, torch.Tensor | None)
    return assert_type(fm.loss(model(batch.x_t, batch.t), batch), torch.Tensor)


def sample(fm: fmk.FlowMatching, model: torch.nn.Module, noise: torch.Tensor) -> torch.Tensor:
    field = fm.velocity(model)
    solution = fmk.solve(field, noise, field.t_range, method="tsit5", rtol=1e-4)
    assert_type(solution, fmk.Solution[torch.Tensor])
    assert_type(solution.nfe, torch.Tensor)
    pair = fmk.solve(lambda t, y: (y[1], -y[0]), (noise, noise), steps=2, method="euler")
    assert_type(pair.y, tuple[torch.Tensor, torch.Tensor])
    return assert_type(solution.raise_for_status().y, torch.Tensor)


def score(fm: fmk.FlowMatching, model: torch.nn.Module, x1: torch.Tensor) -> torch.Tensor:
    scored = fmk.log_prob(fm.velocity(model), x1, divergence=fmk.Hutchinson(probes=2), t_eval=[0.5])
    assert_type(scored, fmk.LogProb)
    assert_type(fmk.divergence(fm.velocity(model), 0.5, x1), torch.Tensor)
    assert_type(fmk.divergence(fm.velocity(model), 0.5, x1, return_stderr=True), tuple[torch.Tensor, torch.Tensor])
    return assert_type(fmk.bits_per_dim(scored.log_prob, dims=x1[0].numel(), bits=8), torch.Tensor)


def exact(x1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    field = fmk.MarginalField(x1)
    return assert_type(field.nearest(0.5, x1, k=2), tuple[torch.Tensor, torch.Tensor])


class Power(fmk.Schedule):
    def coefficients(self, t: torch.Tensor) -> fmk.Coefficients:
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return fmk.Coefficients(t**2, 1 - t, zero, 2 * t, -one, zero)


def ops(key: torch.Tensor) -> torch.Tensor:
    drawn = assert_type(fmk.ops.noise(key, 4, 3), torch.Tensor)
    return assert_type(fmk.layers.GuidedEuler()(drawn, drawn, drawn, 0.1, 2.0), torch.Tensor)  # type: ignore[assert-type]
