"""Workloads in the format of `kernels benchmark`, for a build on the Hugging Face hub; `make bench` measures all ops.

kernels benchmark <folder or repository>
"""

import torch
from kernels.benchmark import Benchmark


class GuidedEuler(Benchmark):
    """A guided Euler step against the same in eager PyTorch."""

    seed = 0

    def setup(self):
        self.x, self.conditional, self.unconditional = torch.randn(3, 128, 12288, device=self.device)
        self.out = None

    def benchmark_step(self):
        self.out = self.kernel.ops.guided_euler(self.x, self.conditional, self.unconditional, 0.02, 4.0)

    def verify_step(self):
        return self.x + 0.02 * (self.unconditional + 4.0 * (self.conditional - self.unconditional))


class MatchingLoss(Benchmark):
    """t, noise, x_t and the loss of a given prediction against the same in eager PyTorch."""

    seed = 0

    def setup(self):
        self.flow = self.kernel.FlowMatching()
        self.x1, self.prediction = torch.randn(2, 128, 12288, device=self.device)
        self.batch = self.flow.sample(self.x1, torch.zeros_like(self.x1))
        self.out = None

    def benchmark_loss(self):
        self.out = self.flow.loss(self.prediction, self.batch)

    def verify_loss(self):
        return (self.prediction - self.x1).square().mean()
