"""The same training head as people write it today: eager PyTorch, torch.compile, flow_matching and torchcfm.

A head takes the data x1 and the network's output ``prediction``, draws x0 and t by torch's own generators, and returns
(x_t, loss). Times are drawn in x1's dtype, which keeps a bf16 head in bf16 throughout: the fastest form, though not the
exact one. Draws come in the order x0, t, so that the eager heads agree under one seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

FAMILIES = ("eager", "torch.compile", "flow_matching", "torchcfm", "torch.randn")


def draw_path(x1: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    t = t.reshape(-1, *[1] * (x1.dim() - 1)).to(x1.dtype)
    return (1 - t) * x0 + t * x1


def velocity_loss(prediction: torch.Tensor, x1: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(prediction, x1 - x0)


def given_noise_head(x1, prediction, x0, t):
    return draw_path(x1, x0, t), velocity_loss(prediction, x1, x0)


def eager_head(x1: torch.Tensor, prediction: torch.Tensor):
    x0 = torch.randn_like(x1)
    t = torch.rand(x1.shape[0], dtype=x1.dtype, device=x1.device)
    return given_noise_head(x1, prediction, x0, t)


def compiled(function: Callable) -> Callable:
    """Compiled for the shapes at hand, without graph breaks.

    In a trainer the network stands between path and loss; here Inductor sees both in one region and may fuse across,
    which flatters it.
    """
    return torch.compile(function, dynamic=False, fullgraph=True)


def compiled_head_randn_outside() -> Callable:
    """Noise by torch.randn itself, everything else compiled."""
    inner = compiled(given_noise_head)

    def head(x1, prediction):
        x0 = torch.randn_like(x1)
        t = torch.rand(x1.shape[0], dtype=x1.dtype, device=x1.device)
        return inner(x1, prediction, x0, t)

    return head


def flow_matching_head() -> Callable:
    """As in its examples (2d_flow_matching.ipynb)."""
    from flow_matching.path import AffineProbPath
    from flow_matching.path.scheduler import CondOTScheduler

    path = AffineProbPath(scheduler=CondOTScheduler())

    def head(x1, prediction):
        x0 = torch.randn_like(x1)
        t = torch.rand(x1.shape[0], dtype=x1.dtype, device=x1.device)
        sample = path.sample(t=t, x_0=x0, x_1=x1)
        return sample.x_t, torch.pow(prediction - sample.dx_t, 2).mean()

    return head


def torchcfm_head() -> Callable:
    """As in its examples (train_cifar10.py)."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    matcher = ConditionalFlowMatcher(sigma=0.0)

    def head(x1, prediction):
        x0 = torch.randn_like(x1)
        _, x_t, u_t = matcher.sample_location_and_conditional_flow(x0, x1)
        return x_t, torch.mean((prediction - u_t) ** 2)

    return head


def heads() -> dict[str, Callable]:
    """Every head that can run here, by name; "family, variant" where a family has several."""
    found = {
        "eager": eager_head,
        "torch.compile, randn inside": compiled(eager_head),
        "torch.compile, randn outside": compiled_head_randn_outside(),
    }
    for name, make in (("flow_matching", flow_matching_head), ("torchcfm", torchcfm_head)):
        try:
            found[name] = make()
        except ImportError:  # not installed
            continue
    return found
