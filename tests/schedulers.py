"""diffusers' scheduler and ours, side by side, for the tests of the integration."""

from importlib import metadata

import numpy as np
import pytest
import torch

from fmkernels.integrations import diffusers as ours

theirs = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")

CONFIGS = {
    "plain": {},
    "shift": {"shift": 3.0},
    "long": {"num_train_timesteps": 500, "shift": 0.7},
    "dynamic": {"use_dynamic_shifting": True},
    "dynamic linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift_terminal": 0.1},
    "dynamic terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    "karras": {"use_karras_sigmas": True, "shift": 2.0},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "inverted": {"invert_sigmas": True},
    "stochastic": {"stochastic_sampling": True, "shift": 3.0},
}
STEPS = {
    "one": {"num_inference_steps": 1},
    "ten": {"num_inference_steps": 10},
    "sigmas": {"sigmas": [1.0, 0.7, 0.45, 0.2]},
    "sigmas and count": {"sigmas": np.linspace(1, 0.1, 5), "num_inference_steps": 5},
}
if metadata.version("diffusers") >= "0.42":  # earlier ones drop the timesteps they are given
    STEPS["timesteps"] = {"timesteps": [900.0, 500.0, 77.0]}
    STEPS["both"] = {"sigmas": [0.9, 0.5, 0.3], "timesteps": [900, 500, 77]}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pair(**config):
    return theirs.FlowMatchEulerDiscreteScheduler(**config), ours.FlowMatchEulerDiscreteScheduler(**config)


def scheduled(config, steps="ten"):
    """Original and ours with their timesteps set."""
    schedulers = pair(**config)
    for scheduler in schedulers:
        scheduler.set_timesteps(**STEPS[steps], mu=0.8)
    return schedulers


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)  # a schedule of one step stretched to its end is NaN


def loop(scheduler, x, dtype=None, **arguments):
    """A sampling loop with a field that is nonlinear and depends on the timestep."""
    for t in scheduler.timesteps:
        v = torch.tanh(x.float() * 1.3 + t / 1000 - 0.2).to(dtype or x.dtype)
        x = scheduler.step(v, t, x, return_dict=False, **arguments)[0]
    return x
