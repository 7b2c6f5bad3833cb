"""What the tests of divergences and likelihoods share: flows whose densities are known, small networks."""

from __future__ import annotations

import math

import torch

import fmkernels as fmk

F64 = torch.float64


class Gaussian:
    """N(mean, variance·I)."""

    def __init__(self, mean, variance):
        self.mean, self.variance = mean, variance

    def log_prob(self, x):
        x = x.flatten(1)
        return -0.5 * ((x - self.mean) ** 2 / self.variance + math.log(2 * math.pi * self.variance)).sum(1)


class GaussianPath:
    """The field that carries p_t = N(αμ, (σ² + γ² + s²α²)I), the path of Gaussian data under a schedule."""

    def __init__(self, schedule, mean, scale):
        self.schedule, self.mean, self.scale, self.t_range = schedule, mean, scale, schedule.t_range

    def moments(self, t):
        c = self.schedule.coefficients(torch.as_tensor(t, dtype=F64))
        variance = c.sigma**2 + c.gamma**2 + (self.scale * c.alpha) ** 2
        half_slope = c.sigma * c.d_sigma + c.gamma * c.d_gamma + self.scale**2 * c.alpha * c.d_alpha
        return c, variance, half_slope

    def at(self, t):
        c, variance, _ = self.moments(t)
        return Gaussian(c.alpha * self.mean, variance)

    def __call__(self, t, x):
        c, variance, half_slope = self.moments(t)
        rate, alpha, d_alpha = (v.unsqueeze(1) for v in (half_slope / variance, c.alpha, c.d_alpha))
        return (d_alpha * self.mean + rate * (x.flatten(1) - alpha * self.mean)).reshape(x.shape).to(x.dtype)


class Linear:
    """dx/dt = A x."""

    def __init__(self, matrix):
        self.matrix = matrix

    def __call__(self, t, x):
        return (x.flatten(1) @ self.matrix.to(x.dtype).T).reshape(x.shape)


class Net(torch.nn.Module):
    """A field of D numbers a row, whatever the shape of a row."""

    def __init__(self, columns, width=16, dtype=F64):
        super().__init__()
        self.inner = torch.nn.Linear(columns + 1, width, dtype=dtype)
        self.outer = torch.nn.Linear(width, columns, dtype=dtype)

    def forward(self, t, x):
        h = torch.cat([x.flatten(1), t.to(x.dtype).reshape(-1, 1).expand(len(x), 1)], 1)
        return self.outer(torch.tanh(self.inner(h))).reshape(x.shape)


def jacobian(f, t, x):
    """[B, D, D] of a field that treats rows apart."""
    t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
    whole = torch.autograd.functional.jacobian(lambda flat: f(t, flat.reshape(x.shape)).flatten(1).sum(0), x.flatten(1))
    return whole.permute(1, 0, 2)


def frobenius(matrix):
    """‖S‖² and ‖S‖² − Σ s_jj² of the symmetric part of a matrix."""
    s = (matrix + matrix.mT) / 2
    return float(s.square().sum()), float(s.square().sum() - s.diagonal().square().sum())


SCHEDULES = (
    fmk.CondOT(), fmk.CondOT(0.1), fmk.VP(), fmk.SubVP(), fmk.VE(), fmk.Cosine(), fmk.LinearVP(), fmk.Polynomial(2),
    fmk.Polynomial(0.5), fmk.ConstantNoise(0.3), fmk.SchrodingerBridge(0.5, t_range=(1e-3, 1.0)),
)  # fmt: skip
