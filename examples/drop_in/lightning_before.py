"""Lightning's way: the arithmetic of a step in training_step, here of a variance-preserving path."""

import math

import torch
from stand_ins import ImageNetwork, LightningModule, Trainer, batches, discs


class FlowModule(LightningModule):
    """Velocities along x_t = sin(πt/2)·x1 + cos(πt/2)·x0, with times that favour the middle."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, x1, batch_index):
        x0 = torch.randn_like(x1)
        t = torch.sigmoid(torch.randn(len(x1)))
        angle = (math.pi / 2 * t).view(-1, *[1] * (x1.dim() - 1))
        x_t = angle.sin() * x1 + angle.cos() * x0
        velocity = math.pi / 2 * (angle.cos() * x1 - angle.sin() * x0)
        loss = (self.network(x_t, t) - velocity).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def train(steps, seed=0):
    """Losses and the network."""
    torch.manual_seed(seed)
    module = FlowModule(ImageNetwork())
    Trainer(max_steps=steps).fit(module, batches(discs, 64, steps))
    return module.logged, module.network


if __name__ == "__main__":
    losses, network = train(200)
    print(f"loss {losses[0]:.4f} -> {sum(losses[-20:]) / 20:.4f}")
