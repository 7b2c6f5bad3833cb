"""torchcfm's way: the matcher draws t and noise and gives x_t with its velocity; torchdiffeq samples."""

import torch
from stand_ins import ImageNetwork, batches, discs
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
from torchdiffeq import odeint

matcher = ConditionalFlowMatcher(sigma=0.1)


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
