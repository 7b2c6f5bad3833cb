"""torchdiffeq's way: a continuous normalising flow trained by maximum likelihood through the adjoint method."""

import torch
from stand_ins import PointNetwork, batches, moons
from torch import nn
from torchdiffeq import odeint, odeint_adjoint


class Flow(nn.Module):
    """Points along the flow, with the log-density that they gain."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, t, state):
        x, _ = state
        with torch.enable_grad():
            x = x.requires_grad_()
            v = self.network(x, t)
            rows = [torch.autograd.grad(v[:, i].sum(), x, create_graph=True)[0] for i in range(x.shape[1])]
        return v, sum(row[:, i] for i, row in enumerate(rows))


def nll(x1, flow):
    """Mean negative log-likelihood."""
    times = torch.tensor([1.0, 0.0])
    x, gained = odeint_adjoint(flow, (x1, x1.new_zeros(len(x1))), times, rtol=1e-4, atol=1e-4, method="dopri5")
    base = torch.distributions.Normal(0.0, 1.0).log_prob(x[-1]).sum(1)
    return -(base + gained[-1]).mean()


@torch.no_grad()
def sample(x0, network):
    """From noise to data."""
    times = torch.linspace(0, 1, 2)
    return odeint(lambda t, x: network(x, t), x0, times, rtol=1e-5, atol=1e-5, method="dopri5")[-1]


def train(steps, seed=0):
    """Losses and the network."""
    torch.manual_seed(seed)
    flow = Flow(PointNetwork())
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    losses = []
    for x1 in batches(moons, 64, steps):
        optimizer.zero_grad()
        loss = nll(x1, flow)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, flow.network


if __name__ == "__main__":
    losses, network = train(100)
    samples = sample(torch.randn(1000, 2), network)
    print(f"nll {losses[0]:.4f} -> {sum(losses[-10:]) / 10:.4f}, mean {samples.mean(0)}")
