"""Pairs of two samples drawn from an optimal-transport plan: by POT on the host as in torchcfm, or on the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch

from .. import _checks

METHODS = ("exact", "sinkhorn", "unbalanced", "partial")
choice = np.random.choice  # of the global generator, which programs on torchcfm seed


class PlanSampler:
    """What a plan's sampler does with its plan; one of its own has ``get_map`` and ``sample_map``."""

    def get_map(self, x0: torch.Tensor, x1: torch.Tensor) -> Any:
        raise NotImplementedError

    def sample_map(self, pi: Any, batch_size: int, replace: bool = True) -> tuple[Any, Any]:
        raise NotImplementedError

    def sample_plan(
        self, x0: torch.Tensor, x1: torch.Tensor, replace: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x0[i], x1[j]) of as many pairs (i, j) of the plan as x0 has rows."""
        i, j = self.sample_map(self.get_map(x0, x1), x0.shape[0], replace=replace)
        return x0[i], x1[j]

    def sample_plan_with_labels(
        self,
        x0: torch.Tensor,
        x1: torch.Tensor,
        y0: torch.Tensor | None = None,
        y1: torch.Tensor | None = None,
        replace: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(x0[i], x1[j], y0[i], y1[j]); None stays None."""
        i, j = self.sample_map(self.get_map(x0, x1), x0.shape[0], replace=replace)
        return x0[i], x1[j], None if y0 is None else y0[i], None if y1 is None else y1[j]


class OTPlanSampler(PlanSampler):
    """Pairs from the optimal-transport plan of two samples under squared Euclidean cost, found on the host by POT.

    Draws come from NumPy's global generator, as many as in torchcfm. A plan that is not finite is warned of, where
    torchcfm prints it; drawing from it raises ValueError in both.

    Args:
        method: ``"exact"``, ``"sinkhorn"``, ``"unbalanced"`` or ``"partial"``.
        reg: entropic regularisation of all but the exact plan.
        reg_m: how strictly the unbalanced plan keeps its marginals.
        normalize_cost: divide the costs by the largest.
        num_threads: threads of the exact solver; "max" for all.
        warn: warn where the plan vanishes and the uniform one is taken.

    Raises: ValueError for an unknown method, ImportError without POT.
    """

    def __init__(
        self,
        method: str,
        reg: float = 0.05,
        reg_m: float = 1.0,
        normalize_cost: bool = False,
        num_threads: int | str = 1,
        warn: bool = True,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
        ot = pot()
        self.ot_fn: Callable[..., Any]
        if method == "exact":
            self.ot_fn = partial(ot.emd, numThreads=num_threads)
        elif method == "sinkhorn":
            self.ot_fn = partial(ot.sinkhorn, reg=reg)
        elif method == "unbalanced":
            self.ot_fn = partial(ot.unbalanced.sinkhorn_knopp_unbalanced, reg=reg, reg_m=reg_m)
        else:
            self.ot_fn = partial(ot.partial.entropic_partial_wasserstein, reg=reg)
        self.reg = reg
        self.reg_m = reg_m
        self.normalize_cost = normalize_cost
        self.warn = warn

    def get_map(self, x0: torch.Tensor, x1: torch.Tensor) -> np.ndarray:
        """The plan ``[B0, B1]``, a NumPy array that sums to 1 (of ``"unbalanced"`` and ``"partial"`` to less)."""
        marginals = [pot().unif(x.shape[0]) for x in (x0, x1)]
        cost = distances(x0, x1) ** 2
        if self.normalize_cost:
            cost = cost / cost.max()
        plan = self.ot_fn(*marginals, on_the_host(cost))
        if not np.isfinite(plan).all():
            warnings.warn("The OT plan is not finite: its costs are not, or too large for reg.", stacklevel=2)
        if np.abs(plan.sum()) < 1e-8:
            if self.warn:
                warnings.warn("Numerical errors in OT plan, reverting to uniform plan.", stacklevel=2)
            plan = np.ones_like(plan) / plan.size
        return plan

    def sample_map(self, pi: np.ndarray, batch_size: int, replace: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Indices (i, j) of pairs of a plan, each drawn with its probability."""
        probabilities = pi.flatten()
        probabilities = probabilities / probabilities.sum()
        drawn = choice(probabilities.size, p=probabilities, size=batch_size, replace=replace)
        return np.divmod(drawn, pi.shape[1])

    def sample_trajectory(self, X: torch.Tensor) -> np.ndarray:
        """Chains of samples ``[B, times, …]`` of populations X ``[B, times, …]``, by the plans from time to time."""
        times = X.shape[1]
        plans = [self.get_map(X[:, t], X[:, t + 1]) for t in range(times - 1)]
        chains = [np.arange(X.shape[0])]
        for plan in plans:
            rows = (plan[i] for i in chains[-1])
            chains.append(np.array([choice(plan.shape[1], p=row / row.sum()) for row in rows]))
        return np.stack([X[:, t][chains[t]] for t in range(times)], axis=1)


class SinkhornPlanSampler(PlanSampler):
    r"""Pairs from the entropic optimal-transport plan, found and drawn where the samples are: the host reads nothing.

    π_ij = exp((f_i + g_j − C_ij)/reg) minimises Σ πC + reg·Σ π log π among plans with uniform marginals, C squared
    Euclidean. f and g by a fixed number of Sinkhorn's iterations in the log domain, the first half of them while the
    regularisation falls from the largest cost to ``reg``. It stands for ``ot_sampler`` of a matcher. Under
    ``torch.compile(fullgraph=True)`` the iterations are unrolled, and compiling the default 200 takes many minutes:
    call it outside of what is compiled. No exact assignment is offered on the device: as ``reg`` falls the plan tends
    to it, and needs more iterations. On the CPU POT's exact plan is many times faster.

    Args:
        reg: regularisation above 0, in units of the cost, or of the largest cost with ``normalize_cost``.
        iterations: how many; more for a ``reg`` that is small beside the costs, see :meth:`marginal_error`: rows of the
            plan are always exact, its columns are not before it has converged.
        normalize_cost: divide the costs by the largest.
        generator: of the draws, on the samples' device; None for torch's own. Not for use under ``torch.compile``.

    Differs from :class:`OTPlanSampler` in the generator, in giving tensors for arrays, and in what would need the host
    to be an error: samples or squared distances that are not finite give arbitrary pairs, and without replacement pairs
    of probability 0 are drawn where no others are left.

    Raises: TypeError, ValueError naming the argument.

    Source: Cuturi, "Sinkhorn distances" (2013); Schmitzer, "Stabilized sparse scaling algorithms for entropy
    regularized transport problems" (2019), sections 3.1 and 3.2.
    """

    def __init__(
        self,
        reg: float = 0.05,
        iterations: int = 200,
        normalize_cost: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.reg = _checks.number("reg", reg, 0.0, open_low=True)
        _checks.count("iterations", iterations, 1)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        self.iterations = iterations
        self.normalize_cost = normalize_cost
        self.generator = generator

    def get_map(self, x0: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
        """The plan ``[B0, B1]``, float32 (float64 for float64 samples), its rows' sums exact to rounding."""
        for name, value in (("x0", x0), ("x1", x1)):
            _checks.tensor(name, value)
            _checks.floating(name, value)
            if value.dim() == 0 or value.shape[0] == 0:
                raise ValueError(f"{name}: expected samples [B, …], at least one, got shape {list(value.shape)}")
        _checks.same_device("x1", x1, "x0", x0)
        if x0.shape[1:] != x1.shape[1:]:
            raise ValueError(f"x1: expected samples of shape {list(x0.shape[1:])}, got {list(x1.shape[1:])}")
        compute = torch.float64 if torch.float64 in (x0.dtype, x1.dtype) else torch.float32
        x0, x1 = (x.detach().to(compute).reshape(x.shape[0], -1) for x in (x0, x1))
        cost = distances(x0, x1) ** 2
        largest = cost.max()
        tiny = torch.finfo(compute).tiny
        if self.normalize_cost:
            cost, largest = cost / largest.clamp_min(tiny), torch.ones_like(largest)
        log_a, log_b = -math.log(x0.shape[0]), -math.log(x1.shape[0])
        anneal = self.iterations // 2
        start = (largest / self.reg).clamp_min(1.0)
        f, g = cost.new_zeros(x0.shape[0], 1), cost.new_zeros(1, x1.shape[0])
        for k in range(self.iterations):
            reg = self.reg * start ** max(1 - (k + 1) / max(anneal, 1), 0.0)
            g = reg * (log_b - torch.logsumexp((f - cost) / reg, 0, keepdim=True))
            f = reg * (log_a - torch.logsumexp((g - cost) / reg, 1, keepdim=True))
        return torch.softmax((g - cost) / self.reg, 1) / x0.shape[0]  # f is what normalises rows; exp(f + …) cancels

    @staticmethod
    def marginal_error(pi: torch.Tensor) -> torch.Tensor:
        """Σ_i |Σ_j π_ij − 1/B0| + Σ_j |Σ_i π_ij − 1/B1|, a scalar tensor: 0 of a converged plan."""
        rows, columns = pi.sum(1) - 1 / pi.shape[0], pi.sum(0) - 1 / pi.shape[1]
        return rows.abs().sum() + columns.abs().sum()

    def sample_map(self, pi: torch.Tensor, batch_size: int, replace: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (i, j), int64, of pairs of a plan: by its inverse distribution function, or without replacement by
        the largest of perturbed logarithms."""
        probabilities = pi.flatten().double()
        if replace:
            cumulative = probabilities.cumsum(0)
            # In (0, 1], so that a pair of probability 0 is never drawn.
            u = 1 - torch.rand(batch_size, dtype=torch.float64, device=pi.device, generator=self.generator)
            drawn = torch.searchsorted(cumulative, u * cumulative[-1]).clamp_max(probabilities.numel() - 1)
        else:
            if batch_size > probabilities.numel():
                raise ValueError(f"batch_size: expected at most {probabilities.numel()} pairs, got {batch_size}")
            exponential = torch.empty_like(probabilities).exponential_(generator=self.generator)
            drawn = (probabilities / exponential).topk(batch_size).indices
        return torch.div(drawn, pi.shape[1], rounding_mode="floor"), drawn % pi.shape[1]


def wasserstein(
    x0: torch.Tensor,
    x1: torch.Tensor,
    method: str | None = None,
    reg: float = 0.05,
    power: int = 2,
    **kwargs: Any,
) -> float:
    """The Wasserstein distance of two samples ``[B, …]``, by POT on the host.

    Args:
        x0, x1: the samples.
        method: ``"exact"`` (also None), or ``"sinkhorn"`` with regularisation ``reg``.
        reg: see there.
        power: 1 or 2, of the Euclidean cost.
        kwargs: taken and left, as in torchcfm.
    """
    if power not in (1, 2):
        raise AssertionError(f"power: expected 1 or 2, got {power}")
    if method not in ("exact", "sinkhorn", None):
        raise ValueError(f"method: expected 'exact', 'sinkhorn' or None, got {method!r}")
    ot = pot()
    cost_of = partial(ot.sinkhorn2, reg=reg) if method == "sinkhorn" else ot.emd2
    cost = distances(x0, x1) ** 2 if power == 2 else distances(x0, x1)
    value = cost_of(ot.unif(x0.shape[0]), ot.unif(x1.shape[0]), on_the_host(cost), numItermax=int(1e7))
    return math.sqrt(value) if power == 2 else value


def distances(x0: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
    """Euclidean distances ``[B0, B1]`` of samples ``[B, …]``."""
    x0, x1 = (x.reshape(x.shape[0], -1) if x.dim() > 2 else x for x in (x0, x1))
    return torch.cdist(x0, x1)


def on_the_host(cost: torch.Tensor) -> np.ndarray:
    return cost.detach().to("cpu").numpy()


def pot() -> ModuleType:
    try:
        return import_module("ot")
    except ImportError as error:
        raise ImportError(
            "expected POT (pip install POT), which finds optimal-transport plans on the host; "
            "SinkhornPlanSampler needs none: pass ot_sampler=SinkhornPlanSampler()"
        ) from error
