"""The posterior of a dataset given a noisy point: moments of a softmax over N points, streamed past the queries."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .. import _checks, _registration

__all__ = ["PosteriorMoments", "marginal_field"]

REFERENCE_ELEMENTS = 2**24  # differences that the reference holds at once where nothing is to be differentiated
BACKWARD_ELEMENTS = 2**19  # weights that the backward holds at once


class PosteriorMoments(NamedTuple):
    """What a point x says of the data point that it came from; a value per row of x.

    Attributes:
        mean: m = Σ λ_i x_i, ``[B, D]``.
        residual: x − αm, ``[B, D]``, without the cancellation of the difference.
        log_sum: ln Σ q_i exp(−‖x − αx_i‖²/(2σ²)), ``[B]``, float64.
        kappa: Σ λ_i ‖x_i − m‖², the trace of the posterior covariance, ``[B]``, float64.
    """

    mean: torch.Tensor
    residual: torch.Tensor
    log_sum: torch.Tensor
    kappa: torch.Tensor


def marginal_field(
    x: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    data: torch.Tensor,
    log_weights: torch.Tensor | None = None,
    centre: torch.Tensor | None = None,
    half_squares: torch.Tensor | None = None,
) -> PosteriorMoments:
    r"""Mean and spread of x_i given x = αx_i + σε, i drawn with weight q_i and ε standard normal.

    λ_i = softmax_i(ln q_i − ‖x − αx_i‖²/(2σ²)), m = Σ λ_i x_i, κ = Σ λ_i ‖x_i − m‖². The data are streamed past the
    queries in tiles with a running maximum, so that nothing of size B × N is held. Logits come from matrix products
    in full precision; those that matter most are taken again from the differences x − αx_i in float64, and the mean
    about the point that weighs most, so that σ may be small against the data.

    Args:
        x: queries ``[B, D]``, float32 or float64.
        alpha, sigma: α and σ of each row, float64 ``[B]``; σ > 0 (it is not checked, and 0 gives NaN).
        data: points x_i ``[N, D]`` of x's dtype, N ≥ 1.
        log_weights: ln q_i, float64 ``[N]``; −inf leaves a point out. None is 1/N each.
        centre, half_squares: c ``[D]`` of x's dtype, near the mean of the data, and ½‖x_i − c‖², float64 ``[N]``, where
            they are known already (:func:`measure`); the products are taken about c. None computes them.

    Returns: :class:`PosteriorMoments`; mean and residual in x's dtype, log_sum and kappa in float64.

    Gradients: to x alone by another pass over the data in float64; to alpha, sigma, data and log_weights too, in
    forward mode, twice, and compiled, by the reference formula, which holds B × N × D differences in float64.

    Raises: TypeError, ValueError naming the argument.

    Source: Lipman et al. (2023), equation 8, with a dataset for q(x1); the weights are those of Xu et al., "Stable
    Target Field for Reduced Variance Score Estimation in Diffusion Models" (2023); the running maximum is that of
    Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
    """
    check(x, alpha, sigma, data, log_weights, centre, half_squares)
    return PosteriorMoments(*call(x, alpha, sigma, data, log_weights, centre, half_squares))


def measure(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean c of points ``[N, D]``, in their dtype, and ½‖x_i − c‖² in float64, a part of the data at a time."""
    parts = data.split(max(1, REFERENCE_ELEMENTS // max(data.shape[1], 1)))
    centre = (sum(part.sum(0, dtype=torch.float64) for part in parts) / data.shape[0]).to(data.dtype)
    return centre, torch.cat([0.5 * (part.double() - centre.double()).square().sum(1) for part in parts])


def check(x, alpha, sigma, data, log_weights, centre, half_squares) -> None:
    _checks.tensor("x", x)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: expected dtype float32 or float64, got {str(x.dtype).removeprefix('torch.')}")
    if x.dim() != 2:
        raise ValueError(f"x: expected shape [B, D], got {list(x.shape)}")
    _checks.tensor("data", data)
    _checks.same_dtype("data", data, "x", x)
    _checks.same_device("data", data, "x", x)
    if data.dim() != 2 or data.shape[1] != x.shape[1] or data.shape[0] == 0:
        raise ValueError(f"data: expected shape [N, {x.shape[1]}] with N of at least 1, got {list(data.shape)}")
    rows, points = x.shape[0], data.shape[0]
    for name, value, count in (
        ("alpha", alpha, rows),
        ("sigma", sigma, rows),
        ("log_weights", log_weights, points),
        ("half_squares", half_squares, points),
    ):
        if value is None and count is points:
            continue
        _checks.tensor(name, value)
        if value.dtype != torch.float64:
            raise TypeError(f"{name}: expected dtype float64, got {str(value.dtype).removeprefix('torch.')}")
        if value.shape != (count,):
            raise ValueError(f"{name}: expected shape [{count}], got {list(value.shape)}")
        _checks.same_device(name, value, "x", x)
    if (centre is None) != (half_squares is None):
        raise ValueError("half_squares: expected with centre, or neither")
    if centre is not None:
        _checks.tensor("centre", centre)
        _checks.same_dtype("centre", centre, "x", x)
        _checks.same_device("centre", centre, "x", x)
        if centre.shape != x.shape[1:]:
            raise ValueError(f"centre: expected shape [{x.shape[1]}], got {list(centre.shape)}")


def call(x, alpha, sigma, data, log_weights, centre=None, half_squares=None) -> tuple[torch.Tensor, ...]:
    """The op call behind the checks; shared by :func:`marginal_field` and ``MarginalField``."""
    arguments = (x, alpha, sigma, data, log_weights, centre, half_squares)
    if _registration.eager() and not _registration.requires_grad(*arguments[1:5]):
        if _registration.requires_grad(x):
            return Moments.apply(x, arguments[1:])
        with _registration.below_autograd():  # what the Autograd-key kernel would decide, without its cost
            return _op(*arguments)
    return _registration.ops.marginal_field(*arguments)


SCHEMA = (
    "marginal_field(Tensor x, Tensor alpha, Tensor sigma, Tensor data, Tensor? log_weights, Tensor? centre, "
    "Tensor? half_squares) -> (Tensor mean, Tensor residual, Tensor log_sum, Tensor kappa)"
)


def posterior_moments(x, alpha, sigma, data, log_weights):
    """The formulas as they stand, in float64 from the differences of every query and every point."""
    points = data.double()
    alpha, sigma = alpha[:, None], sigma[:, None]
    difference = x.double()[:, None] - alpha[..., None] * points  # [B, N, D]
    logits = -difference.square().sum(-1) / (2 * sigma.square())
    logits = logits + (-math.log(data.shape[0]) if log_weights is None else log_weights)
    log_sum = torch.logsumexp(logits, 1)
    weights = torch.softmax(logits, 1)
    mean = weights @ points
    residual = (weights[..., None] * difference).sum(1)
    kappa = (weights * (points - mean[:, None]).square().sum(-1)).sum(1)
    return mean.to(x.dtype), residual.to(x.dtype), log_sum, kappa


def marginal_field_reference(x, alpha, sigma, data, log_weights, centre, half_squares):
    """:func:`posterior_moments` of a few rows at a time."""
    rows = max(1, REFERENCE_ELEMENTS // max(data.numel(), 1))
    if x.shape[0] <= rows:
        return posterior_moments(x, alpha, sigma, data, log_weights)
    parts = (posterior_moments(*part, data, log_weights) for part in zip(*(v.split(rows) for v in (x, alpha, sigma))))
    return tuple(torch.cat(values) for values in zip(*parts))


def marginal_field_fake(x, *arguments):
    row = x.new_empty(x.shape[:1], dtype=torch.float64)
    return x.new_empty(x.shape), x.new_empty(x.shape), row, row.new_empty(row.shape)


def marginal_field_autograd(x, alpha, sigma, data, log_weights, centre, half_squares):
    if _registration.transforming() or _registration.requires_grad(x, alpha, sigma, data, log_weights):
        return posterior_moments(x, alpha, sigma, data, log_weights)
    with _registration.below_autograd():
        return _registration.ops.marginal_field(x, alpha, sigma, data, log_weights, centre, half_squares)


class Moments(torch.autograd.Function):
    """The moments with a gradient to x alone; ``arguments`` are the op's others, past autograd's bookkeeping."""

    @staticmethod
    def forward(ctx, x, arguments):
        with _registration.below_autograd():
            outputs = _op(x, *arguments)
        ctx.save_for_backward(x, *outputs[:3])
        ctx.arguments = arguments
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *gradients):
        x, *moments = ctx.saved_tensors
        alpha, sigma, data, log_weights, *_ = ctx.arguments
        if torch.is_grad_enabled():  # create_graph: the formulas themselves, differentiable again
            outputs = posterior_moments(x, alpha, sigma, data, log_weights)
            outputs, gradients = zip(*((o, g) for o, g in zip(outputs, gradients) if g is not None))
            return torch.autograd.grad(outputs, x, gradients, create_graph=True)[0], None
        return gradient_to_x(x, *moments, *ctx.arguments, *gradients).to(x.dtype), None


def gradient_to_x(
    x, mean, residual, log_sum, alpha, sigma, data, log_weights, centre, half_squares,
    to_mean, to_residual, to_log_sum, to_kappa,
):  # fmt: skip
    """∂/∂x of the moments, by ∂λ_i/∂x = λ_i (α/σ²)(x_i − m), in float64: with s_i = g·(x_i − m) + g_κ ‖x_i − m‖² and g
    what comes to m, less α times what comes to x − αm, it is (α/σ²) Σ λ_i s_i (x_i − m)."""
    if centre is None:
        centre, half_squares = measure(data)
    centre, alpha, precision = centre.double(), alpha[:, None], sigma[:, None] ** -2
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    given = [zero if g is None else g.double() for g in (to_mean, to_residual)]
    g, gradient = given[0] - alpha * given[1], given[1]
    if to_log_sum is not None:
        gradient = gradient - to_log_sum[:, None] * precision * residual.double()
    y, m = x.double() - alpha * centre, mean.double() - centre
    g = g.expand(y.shape)
    sums, total = zero, zero
    part = max(1, BACKWARD_ELEMENTS // max(x.shape[0], data.shape[1], 1))
    for first in range(0, data.shape[0], part):
        here = slice(first, first + part)
        z, halves = data[here].double() - centre, half_squares[here]
        logits = -precision * (0.5 * y.square().sum(1, keepdim=True) - alpha * (y @ z.T) + alpha.square() * halves)
        logits = logits + (-math.log(data.shape[0]) if log_weights is None else log_weights[here])
        slope = g @ z.T - (g * m).sum(1, keepdim=True)
        if to_kappa is not None:
            slope = slope + to_kappa[:, None] * (2 * halves - 2 * m @ z.T + m.square().sum(1, keepdim=True))
        slope = slope * torch.exp(logits - log_sum[:, None])
        sums, total = sums + slope @ z, total + slope.sum(1, keepdim=True)
    return gradient + alpha * precision * (sums - total * m)


_registration.define(SCHEMA, marginal_field_reference, marginal_field_fake)
_registration.autograd("marginal_field", marginal_field_autograd)

_op = _registration.overload("marginal_field")
