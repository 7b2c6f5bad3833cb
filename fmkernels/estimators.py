"""Estimators of a field's divergence ∇·v = tr J, J = ∂v/∂x, with vectors drawn once and kept for a whole solve."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import _checks, _registration
from .ops.probe import PROBES, hadamard_order, probe
from .ops.probe_dot import probe_dot
from .solvers._state import State

__all__ = ["Deflated", "Exact", "Hutchinson", "VelocityAndDivergence"]

MODES = ("auto", "forward", "reverse")
# What `mode="auto"` means by device type; benchmarks/likelihood.py measures both.
FASTER_MODE = {"cpu": "reverse", "cuda": "reverse"}
EXACT_BATCH = 2**24  # numbers in a batch of unit vectors, unless Exact(chunk=…) says otherwise


class Directions(NamedTuple):
    """An estimator with its vectors drawn: it needs J, or its transpose, times each of them."""

    estimates: int  # m, how many a row
    chunks: int
    vectors: Callable[[int], torch.Tensor]  # i → [n, B, …], those of chunk i
    reduce: Callable[[int, torch.Tensor], torch.Tensor]  # (i, their products) → [B, m], to be summed over the chunks


@dataclass(frozen=True)
class Exact:
    r"""The trace itself, Σ_j e_jᵀ J e_j over the D unit vectors, batched.

    A field with a method ``velocity_and_divergence(t, x)`` is asked for the divergence instead of differentiated.

    Args:
        mode: "reverse" takes vector-Jacobian products, "forward" Jacobian-vector products, "auto" the faster on the
            device (reverse).
        chunk: unit vectors in a batch; None takes as many as keep it within 2²⁴ numbers. Reverse mode evaluates the
            field once whatever the chunk, forward mode once a chunk.
    """

    mode: str = "auto"
    chunk: int | None = None

    def __post_init__(self) -> None:
        _checks.choice("mode", self.mode, MODES)
        if self.chunk is not None:
            _checks.count("chunk", self.chunk, 1)

    def directions(self, x: torch.Tensor, key: torch.Tensor, first_row: int) -> Directions:
        D = math.prod(x.shape[1:])
        size = min(self.chunk or max(1, EXACT_BATCH // max(x.numel(), 1)), max(D, 1))

        def vectors(i: int) -> torch.Tensor:
            units = torch.zeros(min(size, D - i * size), D, dtype=x.dtype, device=x.device)
            units.diagonal(i * size).fill_(1)
            return units.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)

        def reduce(i: int, products: torch.Tensor) -> torch.Tensor:
            return products.flatten(2).diagonal(i * size, 0, 2).sum(-1, keepdim=True)

        return Directions(1, -(-D // size), vectors, reduce)

    def standard_error(self, estimates: torch.Tensor, columns: int) -> torch.Tensor:
        return torch.zeros_like(estimates[:, 0])


@dataclass(frozen=True)
class Hutchinson:
    r"""Hutchinson's estimate of the trace, (1/m) Σ_i z_iᵀ J z_i with m random vectors z, E[z zᵀ] = I.

    With S = (J + Jᵀ)/2 and r = ‖S‖² − Σ_j S_jj² its variance is

    - ``"rademacher"``: (2/m)·r, signs;
    - ``"normal"``: (2/m)·‖S‖²;
    - ``"hadamard"``: (2/m)·r·(P − m)/(P − 1), P = 2^⌈log₂ D⌉: m different random columns of a Hadamard matrix under
      random signs, exact for m = P.

    Args:
        probes: m. Two or more give a standard error.
        distribution: "rademacher", "normal" or "hadamard".
        mode: as for :class:`Exact`.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990); for flows Grathwohl et
    al., "FFJORD" (2019).
    """

    probes: int = 1
    distribution: str = "rademacher"
    mode: str = "auto"

    def __post_init__(self) -> None:
        _checks.count("probes", self.probes, 1)
        _checks.choice("distribution", self.distribution, PROBES)
        _checks.choice("mode", self.mode, MODES)

    def draw(self, x: torch.Tensor, key: torch.Tensor, first_row: int) -> torch.Tensor:
        """The probes, [m, B, D]."""
        return probe(
            key, x.shape[0], math.prod(x.shape[1:]), distribution=self.distribution, probes=self.probes,
            first_row=first_row, dtype=x.dtype,
        )  # fmt: skip

    def directions(self, x: torch.Tensor, key: torch.Tensor, first_row: int) -> Directions:
        z = self.draw(x, key, first_row).reshape(self.probes, *x.shape)
        drawn_slowly = _registration.answering("probe_dot", x.device.type) == "reference"

        def reduce(i: int, products: torch.Tensor) -> torch.Tensor:
            if drawn_slowly:
                return (z * products).flatten(2).sum(-1).mT
            return probe_dot(key, products, distribution=self.distribution, first_row=first_row).mT

        return Directions(self.probes, 1, lambda i: z, reduce)

    def standard_error(self, estimates: torch.Tensor, columns: int) -> torch.Tensor:
        m, unseen = self.probes, 1.0
        if self.distribution == "hadamard":
            unseen = 1 - m / hadamard_order(columns)
        if unseen == 0:
            return torch.zeros_like(estimates[:, 0])
        if m == 1:
            return torch.full_like(estimates[:, 0], torch.nan)
        return estimates.std(1) * math.sqrt(unseen / m)


class Deflated:
    r"""Exact on a subspace, Hutchinson on its complement: Σ_i q_iᵀ J q_i + (1/m) Σ_i w_iᵀ J w_i, w = (I − QᵀQ) z.

    Q has the basis, made orthonormal, as its rows. The variance is Hutchinson's for (I − QᵀQ) J (I − QᵀQ): what J does
    within the subspace, or between it and its complement, adds nothing. Good vectors are leading eigenvectors of J's
    symmetric part, or principal components of the data.

    Args:
        basis: k linearly independent vectors, ``[k, D]`` or ``[k, …]`` with a sample's shape, float32 or float64.
        probes, distribution, mode: as for :class:`Hutchinson`.

    Source: Meyer et al., "Hutch++: optimal stochastic trace estimation" (2021), with the subspace given, not sketched.
    """

    def __init__(
        self, basis: torch.Tensor, probes: int = 1, distribution: str = "rademacher", mode: str = "auto"
    ) -> None:  # fmt: skip
        self.complement = Hutchinson(probes, distribution, mode)
        _checks.tensor("basis", basis)
        if basis.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"basis: expected dtype float32 or float64, got {basis.dtype}")
        if basis.dim() < 2 or not basis.shape[0]:
            raise ValueError(f"basis: expected shape [k, D] with at least one vector, got {list(basis.shape)}")
        basis = basis.detach().flatten(1).to(torch.float64)
        k, D = basis.shape
        if k > D:
            raise ValueError(f"basis: expected at most {D} vectors of {D} numbers, got {k}")
        if not bool(basis.isfinite().all()):
            raise ValueError("basis: expected finite numbers, got others")
        q, r = torch.linalg.qr(basis.mT)
        if bool((r.diagonal().abs() <= 1e-6 * basis.norm(dim=1)).any()):  # of a vector next to nothing is new
            raise ValueError("basis: expected linearly independent vectors, got one that those before it span")
        self.basis = q.mT.contiguous()

    @property
    def mode(self) -> str:
        return self.complement.mode

    def directions(self, x: torch.Tensor, key: torch.Tensor, first_row: int) -> Directions:
        k, D = self.basis.shape
        columns = math.prod(x.shape[1:])
        if columns != D:
            raise ValueError(f"basis: expected vectors of {columns} numbers, as a sample has, got {D}")
        q = self.basis.to(x.device, x.dtype)
        z = self.complement.draw(x, key, first_row)
        w = torch.cat([q.unsqueeze(1).expand(k, x.shape[0], D), z - (z @ q.mT) @ q]).reshape(-1, *x.shape)

        def reduce(i: int, products: torch.Tensor) -> torch.Tensor:
            parts = (w * products).flatten(2).sum(-1)
            return parts[:k].sum(0).unsqueeze(-1) + parts[k:].mT

        return Directions(self.complement.probes, 1, lambda i: w, reduce)

    def standard_error(self, estimates: torch.Tensor, columns: int) -> torch.Tensor:
        return self.complement.standard_error(estimates, columns)

    def __repr__(self) -> str:
        c = self.complement
        return (
            f"Deflated({list(self.basis.shape)}, probes={c.probes}, distribution={c.distribution!r}, mode={c.mode!r})"
        )


class VelocityAndDivergence:
    """(t, x) → v(t, x) and m estimates of its divergence, [B, m], with the estimator's vectors drawn once.

    Both carry gradients where these are recorded and x, or anything in f, requires one.

    Args:
        f: f(t, x) → v; it must treat rows apart.
        x: ``[B, …]``, as every later x will be.
        estimator, key, first_row: what is drawn.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        x: torch.Tensor,
        estimator: Exact | Hutchinson | Deflated,
        key: torch.Tensor,
        first_row: int,
    ) -> None:
        if not callable(f):
            raise TypeError(f"f: expected a callable f(t, x), got {type(f).__name__}")
        refuse_batch_statistics(f)
        self.f: Any = f
        self.state = State("x", x, 1)
        self.analytic = isinstance(estimator, Exact) and hasattr(f, "velocity_and_divergence")
        with torch.no_grad():
            self.directions = estimator.directions(x, key, first_row)
        self.estimates = self.directions.estimates
        mode = FASTER_MODE.get(x.device.type, "reverse") if estimator.mode == "auto" else estimator.mode
        if estimator.mode == "auto" and _registration.within_torch_func():
            mode = "forward"  # the one that transforms differentiate by whatever they want
        self.differentiated = self.forward if mode == "forward" else self.reverse

    def __call__(self, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.analytic:
            return self.differentiated(t, x)
        value, divergence = self.f.velocity_and_divergence(t, x)
        self.state.check(value)
        return value, divergence.unsqueeze(-1)

    def reverse(self, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not (_registration.only_grad() and (x.requires_grad or not _registration.transforming())):
            # The gradient taken here would lose what transforms and dual numbers carry.
            raise RuntimeError(
                "divergence: expected mode='forward' within torch.func transforms, and no dual numbers around it: in "
                "mode='reverse' backward() takes derivatives, or torch.func.grad with respect to x; got others"
            )
        connected = torch.is_grad_enabled() and x.requires_grad
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if connected else x.detach().requires_grad_()
            value = self.f(t, x)
            self.state.check(value)
            recording = recording and (connected or has_other_leaves(value, x))
            _, chunks, vectors, reduce = self.directions
            traces: Any = sum(
                reduce(i, pulled(value, x, vectors(i), recording, i + 1 == chunks)) for i in range(chunks)
            )
        return (value, traces) if recording else (value.detach(), traces.detach())

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def f(x: torch.Tensor) -> torch.Tensor:
            value = self.f(t, x)
            self.state.check(value)
            return value

        _, chunks, vectors, reduce = self.directions
        traces: Any = 0
        for i in range(chunks):
            value, products = pushed(f, x, vectors(i))
            traces = traces + reduce(i, products)
        return value, traces


def pulled(value: torch.Tensor, x: torch.Tensor, vectors: torch.Tensor, record: bool, last: bool) -> torch.Tensor:
    """Jᵀ times each of the vectors [n, B, …]."""

    def pull(vector: torch.Tensor) -> torch.Tensor:
        (product,) = torch.autograd.grad(
            value, x, vector, retain_graph=record or not last, create_graph=record, allow_unused=True
        )
        if product is None:
            raise ValueError(NO_GRADIENT)
        return product

    if not value.requires_grad:
        raise ValueError(NO_GRADIENT)
    if len(vectors) == 1 and last:
        return pull(vectors[0]).unsqueeze(0)
    if any("CompiledFunction" in type(node).__name__ for node in graph_of(value)):
        raise ValueError(COMPILED)
    return torch.func.vmap(pull)(vectors)


def pushed(f: Callable[..., Any], x: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f(x), and J times each of the vectors [n, B, …]."""
    try:
        if len(vectors) == 1:
            value, product, *_ = torch.func.jvp(f, (x,), (vectors[0],), strict=True)
            return value, product.unsqueeze(0)
        of_all: Any = (None, 0)  # one value, a product a vector

        def push(vector: torch.Tensor) -> Any:
            return torch.func.jvp(f, (x,), (vector,), strict=True)

        value, products = torch.func.vmap(push, out_dims=of_all)(vectors)
        return value, products
    except RuntimeError as error:
        if "strict=True" in str(error):
            raise ValueError(NO_GRADIENT) from error
        raise


NO_GRADIENT = (
    "f: expected a value that depends on x through operations that torch differentiates, got one without a gradient to "
    "x (a constant field c can be written c + 0 * x; check f for detach() or no_grad())"
)
COMPILED = (
    "f: expected a field that is not compiled where several vectors go through one backward, which torch.compile makes "
    "for one vector and one use; pass the module itself, or Hutchinson(probes=1), or mode='forward'"
)


def graph_of(value: torch.Tensor) -> Iterator[Any]:
    """Every node of the graph that ends in ``value``."""
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
            yield node


def has_other_leaves(value: torch.Tensor, leaf: torch.Tensor) -> bool:
    """Whether ``value`` depends on a leaf besides this one that requires a gradient: on parameters, say."""
    return any(type(node).__name__ == "AccumulateGrad" and node.variable is not leaf for node in graph_of(value))


def refuse_batch_statistics(f: Callable[..., Any]) -> None:
    """A divergence a row makes no sense where a row's value depends on the others."""
    module = f if isinstance(f, torch.nn.Module) else getattr(f, "__self__", None)
    if not isinstance(module, torch.nn.Module):
        return
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None):
            advice = "call eval() first" if part.running_mean is not None else "it keeps no running statistics to use"
            raise ValueError(
                f"f: expected a field that treats rows apart, got {type(module).__name__} whose "
                f"{type(part).__name__} {name!r} takes its statistics over the batch ({advice})"
            )
