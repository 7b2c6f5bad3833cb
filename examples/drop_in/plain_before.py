"""A trainer written by hand: rectified flow on points, sampled by midpoint steps."""

import torch
from stand_ins import PointNetwork, batches, moons


def head(x1, network):
    """Everything of a step but network and optimiser."""
    x0 = torch.randn_like(x1)
    t = torch.rand(len(x1))
    s = t.view(-1, *[1] * (x1.dim() - 1))
    x_t = (1 - s) * x0 + s * x1
    return (network(x_t, t) - (x1 - x0)).square().mean()


@torch.no_grad()
def sample(x, network, steps=50):
    """From noise to data."""
    h = 1 / steps
    for n in range(steps):
        t = torch.full((len(x),), n * h)
        middle = x + h / 2 * network(x, t)
        x = x + h * network(middle, t + h / 2)
    return x


def train(steps, seed=0):
    """Losses and the network."""
    torch.manual_seed(seed)
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
    losses, network = train(1000)
    samples = sample(torch.randn(1000, 2), network)
    print(f"loss {losses[0]:.4f} -> {sum(losses[-100:]) / 100:.4f}, mean {samples.mean(0)}")
