"""Lightning's way: the arithmetic of a step in training_step, here of a variance-preserving path."""

import torch
from stand_ins import ImageNetwork, LightningModule, Trainer, batches, discs

import fmkernels as fmk


class FlowModule(LightningModule):
    """Velocities along x_t = sin(πt/2)·x1 + cos(πt/2)·x0, with times that favour the middle."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.fm = fmk.FlowMatching(fmk.Cosine())
        self.register_buffer("key", torch.tensor([0]))  # x0 and t are given: nothing is drawn from it

    def training_step(self, x1, batch_index):
        x0 = torch.randn_like(x1)
        t = torch.sigmoid(torch.randn(len(x1)))
        batch = self.fm.sample(x1, x0, t, self.key)
        loss = self.fm.loss(self.network(batch.x_t, batch.t), batch)
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
