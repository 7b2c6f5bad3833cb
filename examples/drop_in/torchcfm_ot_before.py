"""torchcfm's minibatch optimal transport: noise and data are paired by an exact plan before the path is formed."""

import numpy
import torch
from stand_ins import PointNetwork, batches, moons
from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
from torchdiffeq import odeint

matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.1)


def head(x1, network):
    """Everything of a step but network and optimiser."""
    x0 = torch.randn_like(x1)
    t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
    vt = network(xt, t)
    return torch.mean((vt - ut) ** 2)


@torch.no_grad()
def sample(x0, network):
    """From noise to data."""
    times = torch.linspace(0, 1, 2)
    return odeint(lambda t, x: network(x, t), x0, times, rtol=1e-4, atol=1e-4, method="dopri5")[-1]


def train(steps, seed=0):
    """Losses and the network."""
    torch.manual_seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 - pairs are drawn by numpy's global generator
    network = PointNetwork()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    losses = []
    for x1 in batches(moons, 256, steps):
        optimizer.zero_grad()
        loss = head(x1, network)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, network


if __name__ == "__main__":
    losses, network = train(500)
    samples = sample(torch.randn(1000, 2), network)
    print(f"loss {losses[0]:.4f} -> {sum(losses[-50:]) / 50:.4f}, mean {samples.mean(0)}")
