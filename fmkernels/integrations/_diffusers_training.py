"""What diffusers' flow-matching training scripts write between the autoencoder and the optimiser, in one pass each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _registration
from ..objectives import TERM_X1
from ..ops.conditional_flow import conditional_flow
from ..ops.matching_loss import matching_loss


def compute_density_for_timestep_sampling(
    weighting_scheme: str | None,
    batch_size: int,
    logit_mean: float | None = None,
    logit_std: float | None = None,
    mode_scale: float | None = None,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """u in [0, 1]: where in the training schedule each sample is noised, 0 at its first and noisiest step.

    Args:
        weighting_scheme: "logit_normal" is sigmoid(logit_mean + logit_std·n) with n normal; "mode"
            1 − w − mode_scale·(cos²(πw/2) − 1 + w) with w uniform; anything else, None too, is w itself.
        batch_size: how many.
        logit_mean, logit_std, mode_scale: numbers, needed by the schemes that have them.
        device, generator: of the random numbers, one normal or one uniform a sample, as in the original.

    Returns: ``[batch_size]``, float32 (torch's default dtype).

    Raises: TypeError for a number that is missing.

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (2024), section 3.1.
    """
    if weighting_scheme == "logit_normal":
        if logit_mean is None or logit_std is None:
            raise TypeError(f"logit_mean, logit_std: expected numbers, got {logit_mean} and {logit_std}")
        normal = torch.normal(mean=logit_mean, std=logit_std, size=(batch_size,), device=device, generator=generator)
        return normal.sigmoid()
    w = torch.rand(size=(batch_size,), device=device, generator=generator)
    if weighting_scheme == "mode":
        if mode_scale is None:
            raise TypeError("mode_scale: expected a number, got None")
        return 1 - w - mode_scale * (torch.cos(math.pi * w / 2) ** 2 - 1 + w)
    return w


def compute_loss_weighting_for_sd3(weighting_scheme: str | None, sigmas: Any = None) -> Tensor:
    """Weights of the loss, in the shape of σ.

    Args:
        weighting_scheme: "sigma_sqrt" is σ⁻², computed in σ's dtype and returned in float32; "cosmap"
            2/(π(1 − 2σ + 2σ²)) and anything else 1, in σ's dtype.
        sigmas: σ, any shape.

    Raises: TypeError without σ.

    Source: Esser et al. (2024), section 3.1.
    """
    if weighting_scheme != "cosmap" or sigmas is None:  # which takes numbers and arrays too
        _checks.tensor("sigmas", sigmas)
    weighting: Tensor
    if weighting_scheme == "sigma_sqrt":
        weighting = (sigmas**-2.0).float()
    elif weighting_scheme == "cosmap":
        weighting = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    else:
        weighting = torch.ones_like(sigmas)
    return weighting


def lookup_sigmas(sigmas: Tensor, schedule: Tensor, timesteps: Tensor) -> Tensor:
    """σ ``[B]`` of each timestep, that of the second where it occurs several times, NaN where the schedule lacks it."""
    same = timesteps.to(schedule.dtype)[:, None] == schedule
    occurrence = same.cumsum(1)
    best, place = (occurrence * (same & (occurrence < 3))).max(1)
    return sigmas[place].masked_fill(best == 0, math.nan)


def schedule_on(scheduler: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """σ and timesteps of this library's scheduler, which keeps copies, or of diffusers'."""
    if hasattr(scheduler, "_on"):
        sigmas, timesteps = scheduler._on(device)
    else:
        sigmas, timesteps = scheduler.sigmas.to(device), scheduler.timesteps.to(device)
    return sigmas, timesteps


def get_sigmas(
    scheduler: Any,
    timesteps: Tensor,
    n_dim: int = 4,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """σ of each timestep, as the scripts' function of this name, which reads the device once a sample; this never does.

    Args:
        scheduler: this module's or diffusers'.
        timesteps: ``[B]``, of the scheduler's; one that it lacks gives NaN.
        n_dim: dimensions of the result, ``[B, 1, …]``.
        dtype: of the result.
        device: of the result; None is that of ``timesteps``.
    """
    device = timesteps.device if device is None else device
    sigma = lookup_sigmas(*schedule_on(scheduler, torch.device(device)), timesteps.to(device)).to(dtype)
    return sigma.reshape(-1, *(1,) * (n_dim - 1))


def add_noise(sample: Tensor, noise: Any, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(1 − σ)·sample + σ·noise and noise − sample in one pass, σ ``[B]`` or ``[1]`` of the dtype to compute it in.

    Operation by operation in PyTorch where gradients, a transform or other layouts want it, or σ a wider dtype.
    """
    rest = 1.0 - sigma
    if fusable(sample, noise, sigma):
        compute = torch.promote_types(sample.dtype, torch.float32)
        one = torch.ones_like(rest)
        coefficients = torch.stack([sigma, rest, one, -one], -1).to(compute).expand(sample.shape[0], 4)
        return conditional_flow(sample, noise, None, coefficients, "affine")
    shape = (-1, *(1,) * (sample.dim() - 1))
    return sigma.reshape(shape) * noise + rest.reshape(shape) * sample, noise - sample


def fusable(sample: Tensor, noise: Any, sigma: Tensor) -> bool:
    """Whether the fused pass gives what the formula in PyTorch does."""
    return (
        type(sample) is type(noise) is Tensor  # a subclass has its own arithmetic
        and sample.dim() > 0
        and sample.shape == noise.shape
        and sample.dtype == noise.dtype == sigma.dtype
        and sample.dtype in _checks.FLOATING
        and sample.device == noise.device
        and noise.is_contiguous()  # whose layout the results would have
        and sigma.shape[0] in (1, sample.shape[0])
        and _registration.eager()
        and not _registration.requires_grad(sample, noise, sigma)
    )


@dataclass
class NoisedLatents:
    """What a training step needs of its noised latents; made by :func:`noise_for_training`.

    Attributes:
        noisy_model_input: (1 − σ)·latents + σ·noise ``[B, …]``, for the transformer.
        timesteps: ``[B]``, float32, N·σ of the training schedule.
        sigmas: ``[B, 1, …]``.
        target: what the prediction is compared with: noise − latents or, with ``precondition_outputs``, latents.
        weighting: ``[B, 1, …]``, of :func:`compute_loss_weighting_for_sd3`.
        precondition_outputs: whether the loss compares noisy_model_input − σ·prediction.
    """

    noisy_model_input: Tensor
    timesteps: Tensor
    sigmas: Tensor
    target: Tensor
    weighting: Tensor
    precondition_outputs: bool = False


def noise_for_training(
    scheduler: Any,
    latents: Tensor,
    noise: Tensor | None = None,
    u: Tensor | None = None,
    *,
    weighting_scheme: str | None = "none",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    precondition_outputs: bool = False,
) -> NoisedLatents:
    r"""The noising of diffusers' flow-matching training scripts (SD3, Flux and those made after them) in one call.

    index = ⌊u·N⌋, (timestep, σ) = those of the scheduler at it, (1 − σ)·latents + σ·noise and noise − latents in one
    pass over memory. σ is found by its index, so that nothing is searched for and nothing read from the device.

    Args:
        scheduler: this module's or diffusers' ``FlowMatchEulerDiscreteScheduler``, before ``set_timesteps``.
        latents: ``[B, …]``.
        noise: of latents' shape and dtype; None draws ``torch.randn_like(latents)``.
        u: ``[B]`` in [0, 1), on any device; None draws it on the CPU after the noise, by
            :func:`compute_density_for_timestep_sampling`. In this order the random numbers are those of the scripts.
        weighting_scheme: "none", "sigma_sqrt", "logit_normal", "mode" or "cosmap", of the draw and of the weights.
        logit_mean, logit_std, mode_scale: of the draw, with the defaults of the scripts.
        precondition_outputs: make ``target`` the latents, for a loss of noisy_model_input − σ·prediction.

    Returns: :class:`NoisedLatents`. σ is rounded to latents' dtype, as in the scripts. In float32 and float64 on the
    CPU every tensor is theirs to the bit; half precision is computed in float32 and rounded once.

    Gradients: to latents and noise, by the formula in PyTorch.
    """
    _checks.tensor("latents", latents)
    if noise is None:
        noise = torch.randn_like(latents)
    if u is None:
        u = compute_density_for_timestep_sampling(weighting_scheme, latents.shape[0], logit_mean, logit_std, mode_scale)
    _checks.tensor("u", u)
    if u.shape != latents.shape[:1]:
        raise ValueError(f"u: expected shape {list(latents.shape[:1])}, one a sample of latents, got {list(u.shape)}")
    if len(scheduler.timesteps) != scheduler.config.num_train_timesteps:
        raise ValueError(
            f"scheduler: expected its training schedule of {scheduler.config.num_train_timesteps} timesteps, "
            f"got {len(scheduler.timesteps)}: use one on which set_timesteps() was not called"
        )
    index = (u * scheduler.config.num_train_timesteps).long()
    on_host = index.device.type == scheduler.timesteps.device.type == "cpu"  # then only the [B] that are found move
    device = index.device if on_host else latents.device
    sigmas, timesteps = (values[index.to(device)].to(latents.device) for values in schedule_on(scheduler, device))
    sigma = sigmas.to(latents.dtype)
    noisy, velocity = add_noise(latents, noise, sigma)
    sigmas = sigma.reshape(-1, *(1,) * (latents.dim() - 1))
    weighting = compute_loss_weighting_for_sd3(weighting_scheme, sigmas)
    target = latents if precondition_outputs else velocity
    return NoisedLatents(noisy, timesteps, sigmas, target, weighting, precondition_outputs)


def flow_matching_loss(
    model_pred: Tensor, noised: NoisedLatents, *, weighting: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    r"""The mean over samples of w·mean (prediction − target)², with its gradient by :mod:`fmkernels.ops.matching_loss`.

    With ``precondition_outputs`` the prediction is first turned to noisy_model_input − σ·model_pred, in the same pass.

    Args:
        model_pred: the network's output, of the latents' shape; any floating dtype.
        noised: of :func:`noise_for_training`.
        weighting: one weight a sample, ``[B]`` or ``[B, 1, …]``, in place of ``noised.weighting``.
        reduction: "mean"; "sum" over elements; "none", ``[B]``, e.g. to weigh a prior-preservation half by itself.

    Returns: float32 (float64 for float64 inputs): a scalar, or ``[B]``. The scripts' formula up to the order of sums.

    Gradients: to model_pred by the fused kernel; to everything else by the reference formula.

    Raises: TypeError, ValueError naming the argument.
    """
    if not isinstance(noised, NoisedLatents):
        raise TypeError(f"noised: expected what noise_for_training() returned, got {type(noised).__name__}")
    w = noised.weighting if weighting is None else weighting
    _checks.tensor("weighting", w)
    if w.numel() != noised.target.shape[0]:
        expected = f"one weight a sample, shape [{noised.target.shape[0]}]"
        raise ValueError(f"weighting: expected {expected}, got shape {list(w.shape)}")
    compute = torch.promote_types(noised.target.dtype, torch.float32)
    w = w.to(compute).flatten()
    one, zero = torch.ones_like(w), torch.zeros_like(w)
    if noised.precondition_outputs:
        table = torch.stack([-noised.sigmas.to(compute).flatten(), one, -one, zero, w, zero], -1)
        return matching_loss(model_pred, noised.noisy_model_input, table, noised.target, reduction=reduction)
    table = torch.stack([one, -one, zero, zero, w, zero], -1)
    return matching_loss(model_pred, noised.target, table, terms=TERM_X1, reduction=reduction)
