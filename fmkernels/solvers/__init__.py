"""Ordinary differential equations: `solve`, with a step size for every sample, and torchdiffeq's `odeint` family."""

from .solve import PID, Solution, solve

__all__ = ["PID", "Solution", "solve"]
