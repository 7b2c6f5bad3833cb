"""The training helpers of the diffusers integration: against diffusers' own and against its scripts, written out."""

import numpy as np
import pytest
import torch
from schedulers import DTYPES, pair, same

from fmkernels.integrations import diffusers as ours

their_training = pytest.importorskip("diffusers.training_utils")


def script(scheduler, latents, scheme, precondition, noise=None, u=None):
    """What the scripts of SD3 and Flux compute, written out."""
    noise = torch.randn_like(latents) if noise is None else noise
    if u is None:
        u = their_training.compute_density_for_timestep_sampling(scheme, len(latents), 0.0, 1.0, 1.29)
    timesteps = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]
    indices = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    sigmas = scheduler.sigmas.to(latents.dtype)[indices].reshape(-1, *(1,) * (latents.dim() - 1))
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    weighting = their_training.compute_loss_weighting_for_sd3(scheme, sigmas)
    target = latents if precondition else noise - latents
    return noisy, timesteps, sigmas, target, weighting


def script_loss(prediction, noisy, timesteps, sigmas, target, weighting, precondition):
    if precondition:
        prediction = prediction * (-sigmas) + noisy
    squares = weighting.float() * (prediction.float() - target.float()) ** 2
    return squares.reshape(target.shape[0], -1).mean(1)


SCHEMES = ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap", None]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_density_and_weighting(scheme):
    for arguments in ((0.3, 1.2, 0.9), (-1.0, 0.5, 1.29)):
        for generator in (None, 7):
            results, after = [], []
            for module in (their_training, ours):
                torch.manual_seed(3)
                source = None if generator is None else torch.Generator().manual_seed(generator)
                u = module.compute_density_for_timestep_sampling(scheme, 64, *arguments, "cpu", source)
                results.append(u)
                after.append(torch.rand(1, generator=source).item())
            same(*results)
            assert after[0] == after[1]
    for dtype in DTYPES:
        sigmas = torch.rand(5, 1, 1).clamp_min(0.05).to(dtype)
        modules = (their_training, ours)
        same(*(module.compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas) for module in modules))


@pytest.mark.parametrize("precondition", [False, True], ids=["velocity", "preconditioned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES[:5])
def test_a_training_step_of_the_scripts(scheme, dtype, precondition):
    original, mine = pair(shift=3.0)
    latents = torch.randn(4, 3, 6, 5).to(dtype)
    torch.manual_seed(9)
    expected = script(original, latents, scheme, precondition)
    after = torch.rand(1)
    for scheduler in (original, mine):
        torch.manual_seed(9)
        noised = ours.noise_for_training(scheduler, latents, weighting_scheme=scheme, precondition_outputs=precondition)
        assert torch.equal(torch.rand(1), after), "other random numbers were consumed"
        found = noised.noisy_model_input, noised.timesteps, noised.sigmas, noised.target, noised.weighting
        for a, b in zip(expected, found):
            if dtype.itemsize > 2 or a.numel() == 4:
                same(a, b)
            else:
                assert a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=4 * torch.finfo(dtype).eps * 4)
    predictions = [torch.randn(4, 3, 6, 5).to(dtype).requires_grad_() for _ in range(1)] * 2
    rows = script_loss(predictions[0], *found, precondition)
    gradient = torch.autograd.grad(rows.mean(), predictions[0])[0]
    for reduction, value in (("none", rows), ("mean", rows.mean()), ("sum", rows.sum() * latents[0].numel())):
        loss = ours.flow_matching_loss(predictions[1], noised, reduction=reduction)
        tolerance = {"rtol": 3e-6 if dtype.itemsize > 2 else 1e-5, "atol": 0}
        if precondition and dtype.itemsize == 2:
            tolerance["rtol"] = 0.03  # the scripts round the preconditioned prediction
        torch.testing.assert_close(loss.float(), value.detach().float(), **tolerance)
    mean = ours.flow_matching_loss(predictions[1], noised)
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found_gradient = torch.autograd.grad(mean, predictions[1])[0]
    assert found_gradient.dtype == dtype
    size = gradient.float().abs().max()
    eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    assert ((found_gradient.float() - gradient.float()).abs() <= eps * (2 + 6 * precondition) * size).all()


@pytest.mark.parametrize("sigmas", [0.5, np.linspace(0, 1, 5)], ids=["number", "array"])
def test_weights_of_numbers(sigmas):
    ours_, theirs_ = (module.compute_loss_weighting_for_sd3("cosmap", sigmas) for module in (ours, their_training))
    np.testing.assert_array_equal(ours_, theirs_)


def test_given_noise_u_and_weights():
    original, mine = pair()
    latents, noise = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    u = torch.tensor([0.0, 0.25, 0.999, 0.5])
    expected = script(original, latents, "none", False, noise, u)
    noised = ours.noise_for_training(mine, latents, noise, u)
    same(expected[0], noised.noisy_model_input)
    same(expected[1], noised.timesteps)
    same(ours.get_sigmas(mine, noised.timesteps, 2, torch.float64), noised.sigmas)
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5])
    loss = ours.flow_matching_loss(latents, noised, weighting=weights, reduction="none")
    assert torch.allclose(loss, weights * (latents - noise + latents).square().mean(1))
    prior = ours.flow_matching_loss(latents, noised, reduction="none").chunk(2)
    assert torch.allclose(prior[1], script_loss(latents, *expected, False)[2:].double())


def test_noising_passes_gradients():
    _, mine = pair()
    latents, noise = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def noised(latents, noise):
        result = ours.noise_for_training(mine, latents, noise, torch.tensor([0.2, 0.7]))
        return result.noisy_model_input, result.target

    assert torch.autograd.gradcheck(noised, (latents, noise))


@pytest.mark.compiles
def test_a_training_step_compiles():
    _, mine = pair(shift=3.0)
    latents, noise, u = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.rand(4)

    def step(latents, noise, u, scale):
        noised = ours.noise_for_training(mine, latents, noise, u, weighting_scheme="cosmap")
        return ours.flow_matching_loss(scale * noised.noisy_model_input, noised)

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        scale = torch.ones(1, requires_grad=True)
        loss = function(latents, noise, u, scale)
        results.append((loss, *torch.autograd.grad(loss, scale)))
    torch.testing.assert_close(*results)
