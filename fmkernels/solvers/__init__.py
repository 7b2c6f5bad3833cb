"""Ordinary differential equations: `solve`, with a step size for every sample, and torchdiffeq's `odeint` family."""

from .adjoint import odeint_adjoint
from .odeint import odeint, odeint_dense, odeint_event
from .solve import PID, Solution, solve

__all__ = ["PID", "Solution", "odeint", "odeint_adjoint", "odeint_dense", "odeint_event", "solve"]
