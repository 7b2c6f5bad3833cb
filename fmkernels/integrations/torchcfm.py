r"""torchcfm's names: import from here what a program imports from ``torchcfm.conditional_flow_matching`` (or straight
from ``torchcfm``) and ``torchcfm.optimal_transport``.

The matchers have the signatures, attributes, hooks and random numbers of torchcfm 1.0, and on the CPU return its
numbers to the bit in float32 and float64; x_t and u_t are formed in one pass by
:func:`fmkernels.ops.conditional_flow`. Where that cannot be, they are formed by the hooks, operation by operation as in
torchcfm:

- where a subclass, a mixin or an instance has a hook of its own (``compute_mu_t``, ``compute_sigma_t``, ``sample_xt``,
  ``compute_conditional_flow``; ``sample_noise_like`` is called in either case);
- where x0, x1, t or the noise require a gradient, differ in dtype or shape, or are laid out otherwise than contiguous
  or channels-last;
- where σ is no Python number, or no plain attribute;
- where a batch of the independent or exact matcher has fewer than 16384 elements on the CPU: nothing is gained there;
- under ``torch.compile``, which fuses the hooks itself, ``torch.jit.trace``, and ``torch.func`` transforms.

In half precision the fused pass computes in float32 and rounds once, where torchcfm rounds every operation: the dtypes
are torchcfm's, the numbers are closer to the exact ones.

What is torchcfm's and not here: ``torchcfm.models`` (networks) and ``torchcfm.utils`` (toy data and plots). What is
here and not torchcfm's: :class:`SinkhornPlanSampler`, a plan without a host round trip, and the keyword ``ot_sampler``
of the two matchers that draw from a plan. They still draw t by torch's generator on the CPU, as torchcfm does, and move
it: a program that must not wait for the device passes ``t``.
"""

from __future__ import annotations

import math
import warnings
from types import MethodType
from typing import Any

import torch

from .. import _registration
from ..ops.conditional_flow import compute_dtype, conditional_flow
from ._optimal_transport import OTPlanSampler, PlanSampler, SinkhornPlanSampler, wasserstein

__all__ = [
    "ConditionalFlowMatcher",
    "ExactOptimalTransportConditionalFlowMatcher",
    "OTPlanSampler",
    "SchrodingerBridgeConditionalFlowMatcher",
    "SinkhornPlanSampler",
    "TargetConditionalFlowMatcher",
    "VariancePreservingConditionalFlowMatcher",
    "pad_t_like_x",
    "wasserstein",
]


def pad_t_like_x(t: Any, x: torch.Tensor) -> Any:
    """t ``[B]`` as ``[B, 1, …]``, with as many dimensions as x; a number stays one."""
    if isinstance(t, (float, int)):
        return t
    return t.reshape(-1, *(1,) * (x.dim() - 1))


class ConditionalFlowMatcher:
    """Independent conditional flow matching: x_t ~ N(t·x1 + (1 − t)·x0, σ²I), u_t = x1 − x0.

    Args:
        sigma: σ, a number.

    Source: Tong et al. (2024), equations 14 and 15.
    """

    def __init__(self, sigma: float | int = 0.0) -> None:
        self.sigma = sigma

    def compute_mu_t(self, x0: torch.Tensor, x1: torch.Tensor, t: Any) -> torch.Tensor:
        """t·x1 + (1 − t)·x0."""
        t = pad_t_like_x(t, x0)
        return t * x1 + (1 - t) * x0

    def compute_sigma_t(self, t: Any) -> Any:
        """σ."""
        return self.sigma

    def sample_xt(self, x0: torch.Tensor, x1: torch.Tensor, t: Any, epsilon: torch.Tensor) -> torch.Tensor:
        """μ_t + σ_t·ε."""
        mean = self.compute_mu_t(x0, x1, t)
        return mean + pad_t_like_x(self.compute_sigma_t(t), x0) * epsilon

    def compute_conditional_flow(self, x0: torch.Tensor, x1: torch.Tensor, t: Any, xt: torch.Tensor) -> torch.Tensor:
        """x1 − x0."""
        return x1 - x0

    def sample_noise_like(self, x: torch.Tensor) -> torch.Tensor:
        """ε ~ N(0, I) of x's shape, dtype and device."""
        return torch.randn_like(x)

    def sample_location_and_conditional_flow(
        self, x0: torch.Tensor, x1: torch.Tensor, t: Any = None, return_noise: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """(t, x_t, u_t) of the pairs (x0, x1), with ε after them where ``return_noise``.

        Args:
            x0, x1: source and target samples ``[B, …]``.
            t: times ``[B]``; None draws them uniformly, by torch's generator on the CPU as torchcfm does.
            return_noise: also return ε.

        Raises: AssertionError where t has another length than x0, as torchcfm.
        """
        if t is None:
            t = torch.rand(x0.shape[0]).type_as(x0)
        if len(t) != x0.shape[0]:
            raise AssertionError(f"t: expected {x0.shape[0]} times, one a sample of x0, got {len(t)}")
        epsilon = self.sample_noise_like(x0)
        form = form_of(self, x0)
        if form is not None and fusible(x0, x1, t, epsilon):
            xt, ut = fused(form, self.sigma, x0, x1, t, epsilon)
        else:
            xt = self.sample_xt(x0, x1, t, epsilon)
            ut = self.compute_conditional_flow(x0, x1, t, xt)
        return (t, xt, ut, epsilon) if return_noise else (t, xt, ut)

    def compute_lambda(self, t: Any) -> Any:
        """2σ_t/(σ² + 1e-8), the weight of the score's loss."""
        return 2 * self.compute_sigma_t(t) / (self.sigma**2 + 1e-8)


class ExactOptimalTransportConditionalFlowMatcher(ConditionalFlowMatcher):
    """OT-CFM: the pairs are drawn anew from the minibatch's exact optimal-transport plan.

    Args:
        sigma: σ, a number.
        ot_sampler: what draws the pairs, such as :class:`SinkhornPlanSampler`; None for POT's exact plan.

    Source: Tong et al. (2024), section 3.2.
    """

    def __init__(self, sigma: float | int = 0.0, *, ot_sampler: PlanSampler | None = None) -> None:
        super().__init__(sigma)
        self.ot_sampler = OTPlanSampler(method="exact") if ot_sampler is None else ot_sampler

    def sample_location_and_conditional_flow(
        self, x0: torch.Tensor, x1: torch.Tensor, t: Any = None, return_noise: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """As of :class:`ConditionalFlowMatcher`, of pairs drawn from the plan."""
        x0, x1 = self.ot_sampler.sample_plan(x0, x1)
        return super().sample_location_and_conditional_flow(x0, x1, t, return_noise)

    def guided_sample_location_and_conditional_flow(
        self,
        x0: torch.Tensor,
        x1: torch.Tensor,
        y0: torch.Tensor | None = None,
        y1: torch.Tensor | None = None,
        t: Any = None,
        return_noise: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """(t, x_t, u_t, y0, y1), with ε last where ``return_noise``; labels go with their samples."""
        x0, x1, y0, y1 = self.ot_sampler.sample_plan_with_labels(x0, x1, y0, y1)
        t, xt, ut, *epsilon = super().sample_location_and_conditional_flow(x0, x1, t, return_noise)
        return (t, xt, ut, y0, y1, *epsilon)


class TargetConditionalFlowMatcher(ConditionalFlowMatcher):
    """Lipman et al.'s path from noise: x_t ~ N(t·x1, (1 − (1 − σ)t)²I), u_t = (x1 − (1 − σ)x_t)/(1 − (1 − σ)t).

    Source: Lipman et al. (2023), equations 20 and 21.
    """

    def compute_mu_t(self, x0: torch.Tensor, x1: torch.Tensor, t: Any) -> torch.Tensor:
        """t·x1."""
        return pad_t_like_x(t, x1) * x1

    def compute_sigma_t(self, t: Any) -> Any:
        """1 − (1 − σ)·t."""
        return 1 - (1 - self.sigma) * t

    def compute_conditional_flow(self, x0: torch.Tensor, x1: torch.Tensor, t: Any, xt: torch.Tensor) -> torch.Tensor:
        """(x1 − (1 − σ)·x_t)/(1 − (1 − σ)·t)."""
        return (x1 - (1 - self.sigma) * xt) / (1 - (1 - self.sigma) * pad_t_like_x(t, x1))


class SchrodingerBridgeConditionalFlowMatcher(ConditionalFlowMatcher):
    """SB-CFM: pairs from an entropic plan of regularisation 2σ² (or the exact one), Brownian bridges between them.

    x_t ~ N(t·x1 + (1 − t)·x0, σ²t(1 − t)I), u_t = (1 − 2t)/(2t(1 − t) + 1e-8)·(x_t − μ_t) + x1 − x0.

    Args:
        sigma: σ > 0, a number.
        ot_method: "exact", "sinkhorn", "unbalanced" or "partial", of POT's plan.
        ot_sampler: what draws the pairs instead, such as ``SinkhornPlanSampler(reg=2 * sigma**2)``.

    Raises: ValueError where σ is not above 0. Below 1e-3 it warns.

    Source: Tong et al. (2024), section 3.3.
    """

    def __init__(
        self, sigma: float | int = 1.0, ot_method: str = "exact", *, ot_sampler: PlanSampler | None = None
    ) -> None:
        if sigma <= 0:
            raise ValueError(f"sigma: expected a number above 0, got {sigma}")
        if sigma < 1e-3:
            warnings.warn("Small sigma values may lead to numerical instability.", stacklevel=2)
        super().__init__(sigma)
        self.ot_method = ot_method
        self.ot_sampler = OTPlanSampler(method=ot_method, reg=2 * self.sigma**2) if ot_sampler is None else ot_sampler

    def compute_sigma_t(self, t: Any) -> Any:
        """σ·√(t(1 − t))."""
        return self.sigma * torch.sqrt(t * (1 - t))

    def compute_conditional_flow(self, x0: torch.Tensor, x1: torch.Tensor, t: Any, xt: torch.Tensor) -> torch.Tensor:
        """(1 − 2t)/(2t(1 − t) + 1e-8)·(x_t − μ_t) + x1 − x0."""
        t = pad_t_like_x(t, x0)
        mean = self.compute_mu_t(x0, x1, t)  # before the slope: gradients are summed in this order
        return bridge_slope(t) * (xt - mean) + x1 - x0

    def sample_location_and_conditional_flow(
        self, x0: torch.Tensor, x1: torch.Tensor, t: Any = None, return_noise: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """As of :class:`ExactOptimalTransportConditionalFlowMatcher`."""
        x0, x1 = self.ot_sampler.sample_plan(x0, x1)
        return super().sample_location_and_conditional_flow(x0, x1, t, return_noise)

    def guided_sample_location_and_conditional_flow(
        self,
        x0: torch.Tensor,
        x1: torch.Tensor,
        y0: torch.Tensor | None = None,
        y1: torch.Tensor | None = None,
        t: Any = None,
        return_noise: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """As of :class:`ExactOptimalTransportConditionalFlowMatcher`."""
        x0, x1, y0, y1 = self.ot_sampler.sample_plan_with_labels(x0, x1, y0, y1)
        t, xt, ut, *epsilon = super().sample_location_and_conditional_flow(x0, x1, t, return_noise)
        return (t, xt, ut, y0, y1, *epsilon)


class VariancePreservingConditionalFlowMatcher(ConditionalFlowMatcher):
    """Trigonometric interpolants: μ_t = cos(πt/2)·x0 + sin(πt/2)·x1, u_t = (π/2)(cos(πt/2)·x1 − sin(πt/2)·x0).

    Source: Albergo and Vanden-Eijnden (2023).
    """

    def compute_mu_t(self, x0: torch.Tensor, x1: torch.Tensor, t: Any) -> torch.Tensor:
        """cos(πt/2)·x0 + sin(πt/2)·x1."""
        t = pad_t_like_x(t, x0)
        return torch.cos(math.pi / 2 * t) * x0 + torch.sin(math.pi / 2 * t) * x1

    def compute_conditional_flow(self, x0: torch.Tensor, x1: torch.Tensor, t: Any, xt: torch.Tensor) -> torch.Tensor:
        """(π/2)(cos(πt/2)·x1 − sin(πt/2)·x0)."""
        t = pad_t_like_x(t, x0)
        return math.pi / 2 * (torch.cos(math.pi / 2 * t) * x1 - torch.sin(math.pi / 2 * t) * x0)


def bridge_slope(t: torch.Tensor) -> torch.Tensor:
    """(1 − 2t)/(2t(1 − t) + 1e-8)."""
    return (1 - 2 * t) / (2 * t * (1 - t) + 1e-8)


def channels_last(x: torch.Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


# The fused pass. Functions, not methods: a matcher's names are its user's.

FEW = 16384  # elements on the CPU, below which preparing the fused pass costs more than four of the hooks' operations
HOOKS = ("compute_mu_t", "compute_sigma_t", "sample_xt", "compute_conditional_flow")
# compute_conditional_flow -> (form of the op, the hooks that it stands for)
FORMS: dict[Any, tuple[str | None, dict[str, Any]]] = {
    cls.compute_conditional_flow: (form, {name: getattr(cls, name) for name in HOOKS})
    for form, cls in (
        ("linear", ConditionalFlowMatcher),
        ("target", TargetConditionalFlowMatcher),
        ("bridge", SchrodingerBridgeConditionalFlowMatcher),
        ("trigonometric", VariancePreservingConditionalFlowMatcher),
    )
}


def form_of(matcher: Any, x0: Any) -> str | None:
    """The form of the op that gives what a matcher's hooks would; None where one is its user's own, σ no number, or
    nothing gained."""
    form, hooks = FORMS.get(getattr(matcher.compute_conditional_flow, "__func__", None), (None, {}))
    if type(x0) is not torch.Tensor or (form == "linear" and x0.numel() < FEW and x0.device.type == "cpu"):
        return None
    if not all(getattr(matcher, name) == MethodType(hook, matcher) for name, hook in hooks.items()):
        return None
    sigma = vars(matcher).get("sigma")  # a property may be another number each time it is asked for
    return form if isinstance(sigma, (float, int)) and abs(sigma) < 1e30 else None  # what float32 holds


def fusible(x0: Any, x1: Any, t: Any, epsilon: Any) -> bool:
    """Whether the fused pass gives what the hooks would, and no later."""
    tensors = (x0, x1, epsilon, t)
    return (
        _registration.eager()
        and all(type(tensor) is torch.Tensor for tensor in tensors)  # hooks of one's own may take anything
        and x0.is_floating_point()
        and x0.dtype == x1.dtype == t.dtype == epsilon.dtype
        and x0.shape == x1.shape == epsilon.shape
        and t.shape == x0.shape[:1]
        and x0.device == x1.device == t.device == epsilon.device
        and (all(map(torch.Tensor.is_contiguous, tensors)) or all(map(channels_last, tensors[:3])))
        and not _registration.requires_grad(*tensors)
    )


def fused(
    form: str, sigma: float, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, epsilon: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and u_t in one pass."""
    coefficients = torch.stack(coefficients_of(form, sigma, t.to(compute_dtype(x0))), -1)
    if x0.is_contiguous():
        return conditional_flow(x0, x1, epsilon, coefficients, form)
    x0, x1, epsilon = (tensor.movedim(1, -1) for tensor in (x0, x1, epsilon))  # in the order of the memory
    xt, ut = conditional_flow(x0, x1, epsilon, coefficients, form)
    # .data: no views, which autograd would not let a program change in place as it may torchcfm's tensors
    return xt.movedim(-1, 1).data, ut.movedim(-1, 1).data


def coefficients_of(form: str, sigma: float, t: torch.Tensor) -> list[torch.Tensor]:
    """(a, b, s, c) of :func:`~fmkernels.ops.conditional_flow`, each formed as the hooks form it."""
    if form == "target":
        spread = 1 - (1 - sigma) * t
        return [t, torch.full_like(t, 1 - sigma), spread, spread]
    if form == "bridge":
        return [t, 1 - t, sigma * torch.sqrt(t * (1 - t)), bridge_slope(t)]
    if form == "trigonometric":
        angle = math.pi / 2 * t
        return [torch.sin(angle), torch.cos(angle), torch.full_like(t, sigma), t]
    return [t, 1 - t, torch.full_like(t, sigma), t]
