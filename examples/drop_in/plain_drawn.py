"""A trainer written by hand: rectified flow on points, sampled by midpoint steps."""

import torch
from stand_ins import PointNetwork, batches, moons

import fmkernels as fmk

fm = fmk.FlowMatching()


def head(x1, network):
    """Everything of a step but network and optimiser."""
    batch = fm.sample(x1)
    return fm.loss(network(batch.x_t, batch.t), batch)


@torch.no_grad()
def sample(x, network, steps=50):
    """From noise to data."""
    return fmk.solve(fm.velocity(network), x, method="midpoint", steps=steps).y


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
