"""diffusers' way, after its SD3 scripts: drawn timesteps, σ looked up, noising, weighting; Euler steps to sample."""

import copy

import torch
from stand_ins import ImageNetwork, batches, discs

from fmkernels.integrations.diffusers import (
    FlowMatchEulerDiscreteScheduler,
    flow_matching_loss,
    noise_for_training,
)

scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
sampling = copy.deepcopy(scheduler)  # set_timesteps changes its tables


def head(x1, network):
    """Everything of a step but network and optimiser."""
    noised = noise_for_training(scheduler, x1, weighting_scheme="logit_normal")
    prediction = network(noised.noisy_model_input, noised.timesteps / 1000)
    return flow_matching_loss(prediction, noised)


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
