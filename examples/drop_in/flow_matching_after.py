"""flow_matching's way: a path with a scheduler gives x_t and its velocity, ODESolver samples and scores."""

import torch
from stand_ins import ImageNetwork, batches, discs

from fmkernels.integrations.flow_matching import AffineProbPath, CondOTScheduler, ODESolver

path = AffineProbPath(scheduler=CondOTScheduler())


def head(x1, network):
    """Everything of a step but network and optimiser."""
    noise = torch.randn_like(x1)
    t = torch.rand(x1.shape[0])
    path_sample = path.sample(t=t, x_0=noise, x_1=x1)
    return torch.pow(network(x=path_sample.x_t, t=path_sample.t) - path_sample.dx_t, 2).mean()


def sample(x_init, network):
    """From noise to data."""
    return ODESolver(velocity_model=network).sample(x_init=x_init, method="midpoint", step_size=0.05)


def score(x1, network):
    """Log-densities by Hutchinson's estimator."""

    def log_p0(x):
        return torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)

    _, log_prob = ODESolver(velocity_model=network).compute_likelihood(x1, log_p0, step_size=0.1, method="midpoint")
    return log_prob


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
    print(f"log-density {score(samples, network).mean():.2f}")
