"""A matcher of one's own: a subclass of torchcfm's that bends the path and lets its noise swell in the middle."""

import torch
from stand_ins import ImageNetwork, batches, discs
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher, pad_t_like_x


class BentFlowMatcher(ConditionalFlowMatcher):
    """μ = t²x1 + (1 − t²)x0 with noise of σ·t(1 − t)."""

    def compute_mu_t(self, x0, x1, t):
        t = pad_t_like_x(t, x0)
        return t**2 * x1 + (1 - t**2) * x0

    def compute_sigma_t(self, t):
        return self.sigma * t * (1 - t)

    def compute_conditional_flow(self, x0, x1, t, xt):
        t = pad_t_like_x(t, x0)
        drift = 2 * t * (x1 - x0)
        return drift + (1 - 2 * t) / (t * (1 - t) + 1e-4) * (xt - self.compute_mu_t(x0, x1, t))


matcher = BentFlowMatcher(sigma=0.1)


def head(x1, network):
    """Everything of a step but network and optimiser."""
    t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
    return torch.mean((network(xt, t) - ut) ** 2)


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
    print(f"loss {losses[0]:.4f} -> {sum(losses[-20:]) / 20:.4f}")
