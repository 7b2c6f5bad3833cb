"""diffusers' way, after its SD3 scripts: drawn timesteps, σ looked up, noising, weighting; Euler steps to sample."""

import copy

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from stand_ins import ImageNetwork, batches, discs

scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
sampling = copy.deepcopy(scheduler)  # set_timesteps changes its tables


def get_sigmas(timesteps, n_dim, dtype):
    """σ of each timestep, as the scripts look it up."""
    step_indices = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    sigma = scheduler.sigmas.to(dtype)[step_indices].flatten()
    while len(sigma.shape) < n_dim:
        sigma = sigma.unsqueeze(-1)
    return sigma


def head(x1, network):
    """Everything of a step but network and optimiser."""
    noise = torch.randn_like(x1)
    u = compute_density_for_timestep_sampling("logit_normal", len(x1), logit_mean=0.0, logit_std=1.0)
    timesteps = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]
    sigmas = get_sigmas(timesteps, x1.ndim, x1.dtype)
    noisy = (1.0 - sigmas) * x1 + sigmas * noise
    prediction = network(noisy, timesteps / 1000)
    weighting = compute_loss_weighting_for_sd3("logit_normal", sigmas=sigmas)
    target = noise - x1
    return torch.mean((weighting.float() * (prediction - target) ** 2).reshape(len(x1), -1), 1).mean()


@torch.no_grad()
def sample(x, network, steps=20):
    """From noise to data."""
    sampling.set_timesteps(steps)
    for t in sampling.timesteps:
        velocity = network(x, t / 1000)
        x = sampling.step(velocity, t, x, return_dict=False)[0]
    return x


def train(steps, seed=0):
    """Losses and the network."""
    torch.manual_seed(seed)
    network = ImageNetwork()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    losses = []
    for x1 in batches(discs, 64, steps):
        optimizer.zero_grad()
        loss = head(x1, network)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, network


if __name__ == "__main__":
    losses, network = train(200)
    samples = sample(torch.randn(64, 1, 16, 16), network)
    print(f"loss {losses[0]:.4f} -> {sum(losses[-20:]) / 20:.4f}, brightness {samples.mean():.4f}")
