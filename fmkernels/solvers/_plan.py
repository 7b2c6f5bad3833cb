"""A tableau as what the ops take: coefficient tensors on a device, and which k's each of them uses."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch

from .. import _registration
from ..ops.runge_kutta_step import SETTINGS
from .tableaus import Tableau

STAGE = _registration.ops.runge_kutta_stage.default
STEP = _registration.ops._runge_kutta_step_.default


class StagePlan(NamedTuple):
    """How an evaluation point is formed: ``STAGE(y, [k[j] for j in used], times, step, coefficients, 0, nudge)``."""

    coefficients: torch.Tensor
    used: tuple[int, ...]
    nudge: int


class Plan(NamedTuple):
    """A method on a device.

    Attributes:
        tableau: what it was made from.
        stages: of the second and later evaluations.
        solution: the end of a step.
        weights: those of the op that ends an adaptive step.
        used: the k's it takes after the first.
        interpolant: float64 ``[s, degree]``.
    """

    tableau: Tableau
    stages: tuple[StagePlan, ...]
    solution: StagePlan
    weights: torch.Tensor
    used: tuple[int, ...]
    interpolant: torch.Tensor

    @property
    def evaluations(self) -> int:
        """Calls of f in a step, its first being the last of the step before."""
        return len(self.stages)


@functools.lru_cache(maxsize=64)
def plan(tableau: Tableau, device: torch.device, nudged: bool = False) -> Plan:
    """``nudged``: evaluate just before the end of a step, on this side of a discontinuity there, like torchdiffeq."""
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _registration.outside_of_modes():
        return _plan(tableau, device, nudged)


def _plan(tableau: Tableau, device: torch.device, nudged: bool) -> Plan:
    def tensor(rows) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.float64, device=device)

    def stage(c, weights) -> StagePlan:
        used = tuple(j for j, weight in enumerate(weights) if weight != 0)
        return StagePlan(tensor([[c, *(weights[j] for j in used)]]), used, -1 if nudged and c == 1 else 0)

    s = len(tableau.b)
    error = tableau.error or (0.0,) * s
    columns = [
        j
        for j in range(s)
        if j in (0, s - 1) or tableau.b[j] != 0 or error[j] != 0 or any(p != 0 for p in tableau.interpolant[j])
    ]
    rows = [tableau.b, error, *zip(*tableau.interpolant, strict=True)]
    return Plan(
        tableau,
        tuple(stage(c, a) for c, a in zip(tableau.c[1:], tableau.a[1:], strict=True)),
        stage(1.0, tableau.b)._replace(nudge=0),
        tensor([[row[j] for j in columns] for row in rows]),
        tuple(columns[1:]),
        tensor(tableau.interpolant),
    )


def settings_tensor(device: torch.device, **entries: float) -> torch.Tensor:
    """The settings of step control from their names in :mod:`fmkernels.ops.runge_kutta_step`, in lower case."""
    from ..ops import runge_kutta_step

    values = [0.0] * SETTINGS
    for name, value in entries.items():
        values[getattr(runge_kutta_step, name.upper())] = float(value)
    return torch.tensor(values, dtype=torch.float64, device=device)
