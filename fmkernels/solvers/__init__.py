"""Runge–Kutta solvers of ordinary differential equations."""
