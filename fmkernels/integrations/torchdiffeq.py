"""torchdiffeq's names: import from here what a program imports from ``torchdiffeq``."""

from ..solvers.adjoint import odeint_adjoint
from ..solvers.odeint import odeint, odeint_dense, odeint_event

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
