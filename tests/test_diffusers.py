"""diffusers' flow-matching scheduler: call by call against diffusers, without a host read, and without diffusers."""

import copy
import importlib
import itertools
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from schedulers import CONFIGS, DTYPES, STEPS, loop, pair, same, scheduled, theirs
from torch.utils._python_dispatch import TorchDispatchMode

from fmkernels.integrations import diffusers as ours
from fmkernels.integrations._diffusers_base import Configuration

SHAPES = [(2, 4, 8, 8), (3, 7), (5,), (1, 3, 2, 5, 5), (0, 4)]


def same_state(original, mine):
    assert set(vars(mine)) - {"_host", "__module__"} == set(vars(original))
    for name, value in vars(original).items():
        if isinstance(value, torch.Tensor):
            same(value, getattr(mine, name))
        elif name != "_internal_dict":
            assert type(value) is type(getattr(mine, name)) and value == getattr(mine, name), name
    for scheduler in (original, mine):
        scheduler.config["_use_default_values"] = sorted(scheduler.config.get("_use_default_values", []))
    assert mine.config == original.config


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("config", CONFIGS)
def test_schedules(config):
    original, mine = pair(**CONFIGS[config])
    same_state(original, mine)
    assert len(original) == len(mine) and original.order == mine.order and original._compatibles == mine._compatibles
    for steps in STEPS.values():
        for scheduler in (original, mine):
            scheduler.set_timesteps(**steps, mu=1.1)
        same_state(original, mine)
    for scheduler in (original, mine):
        scheduler.set_shift(1.7)
        scheduler.set_timesteps(7, mu=0.3)
    same_state(original, mine)
    assert original.shift == mine.shift


def test_the_shifts_by_themselves():
    for config, t in itertools.product(CONFIGS.values(), (np.linspace(1, 0.1, 5), torch.linspace(1, 0.1, 5))):
        original, mine = pair(**config)
        assert np.array_equal(original.time_shift(0.7, 1.5, t), mine.time_shift(0.7, 1.5, t))
        if config.get("shift_terminal"):
            assert np.array_equal(original.stretch_shift_to_terminal(t), mine.stretch_shift_to_terminal(t))


def test_a_config_may_name_the_ends_of_the_schedule():
    for config in ("karras", "exponential", "beta"):
        schedulers = pair(**CONFIGS[config])
        for scheduler in schedulers:
            scheduler.register_to_config(sigma_min=0.03, sigma_max=0.9)
            scheduler.set_timesteps(6)
        same_state(*schedulers)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("config", CONFIGS)
def test_sampling_loop(config, steps):
    if "terminal" in config and steps == "one":
        steps = "ten"  # one step has no schedule to stretch
    x = torch.randn(2, 4, 8, 9)
    results = []
    for scheduler in scheduled(CONFIGS[config], steps):
        generator = torch.Generator().manual_seed(3)
        results.append(loop(scheduler, x, generator=generator))
        assert scheduler.step_index == len(scheduler.timesteps)
    same(*results)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", ["shift", "stochastic"])
def test_shapes(config, shape):
    results = []
    for scheduler in scheduled(CONFIGS[config]):
        torch.manual_seed(5)
        results.append(loop(scheduler, torch.randn(shape)))
    same(*results)


@pytest.mark.parametrize("config", ["shift", "stochastic"])
@pytest.mark.parametrize("sample_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_dtype", DTYPES, ids=str)
def test_dtypes_of_a_step(config, output_dtype, sample_dtype):
    """In half precision no further from the exact step than the original, elsewhere the same."""
    torch.manual_seed(1)
    v, x = torch.randn(2, 3, 50, dtype=torch.float64).to(output_dtype), torch.randn(2, 3, 50).to(sample_dtype)
    results, exact = [], None
    for scheduler in scheduled(CONFIGS[config]):
        t = scheduler.timesteps[3]
        torch.manual_seed(2)
        results.append(scheduler.step(v, t, x).prev_sample)
        torch.manual_seed(2)
        wide = copy.deepcopy(scheduler)
        wide._step_index = None
        exact = wide.step(v.double(), t, x.float()).prev_sample
    assert results[0].dtype == results[1].dtype == output_dtype and results[0].shape == results[1].shape
    if output_dtype.itemsize > 2 or sample_dtype == torch.float64:
        same(*results)
    else:
        errors = [(result.double() - exact).abs() for result in results]
        rounding = torch.finfo(output_dtype).eps / 2 * exact.abs() + 1e-6
        assert (errors[1] <= rounding).all() and errors[1].mean() <= errors[0].mean()
        assert not torch.equal(*results), "then say so in the docstring"


@pytest.mark.parametrize("make", [torch.Tensor.t, lambda x: x[:, ::2], lambda x: x.expand(3, 6, 6)], ids="tse")
def test_layouts(make):
    x, v = make(torch.randn(6, 6)), make(torch.randn(6, 6))
    same(*(scheduler.step(v, scheduler.timesteps[0], x)[0] for scheduler in scheduled({})))
    same(*(scheduler.step(v[:1], scheduler.timesteps[0], x)[0] for scheduler in scheduled({})))
    same(*(scheduler.scale_noise(x, scheduler.timesteps[2:3], v) for scheduler in scheduled({})))
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for a, b in ((image, image), (image, image.contiguous()), (image.contiguous(), image)):
        same(*(scheduler.step(a, scheduler.timesteps[0], b)[0] for scheduler in scheduled({})))
        same(*(scheduler.scale_noise(a, scheduler.timesteps[2:3], b) for scheduler in scheduled({})))
        results = []
        for scheduler in scheduled(CONFIGS["stochastic"]):
            torch.manual_seed(3)
            results.append(scheduler.step(a, scheduler.timesteps[0], b)[0])
        same(*results)


@pytest.mark.parametrize("config", ["shift", "stochastic"])
def test_generators(config):
    generators = {
        "none": lambda: None,
        "one": lambda: torch.Generator().manual_seed(1),
        "list of one": lambda: [torch.Generator().manual_seed(1)],
        "list": lambda: [torch.Generator().manual_seed(i) for i in range(3)],
    }
    for make in generators.values():
        results, after = [], []
        for scheduler in scheduled(CONFIGS[config]):
            torch.manual_seed(4)
            generator = make()
            results.append(loop(scheduler, torch.ones(3, 5), generator=generator))
            used = generator if isinstance(generator, list) else [generator]
            after.append([torch.rand(1, generator=g).item() for g in used])
        same(*results)
        assert after[0] == after[1], "other random numbers were consumed"


@pytest.mark.parametrize("config", ["shift", "stochastic", "inverted"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_per_token_timesteps(config, dtype):
    x, v = torch.randn(2, 5, 3), torch.randn(2, 5, 3).to(dtype)
    results = []
    for scheduler in scheduled(CONFIGS[config]):
        torch.manual_seed(6)
        between = torch.rand(2, 3) * 1000
        tokens = torch.cat([scheduler.timesteps[[0, 4, 9, 2]].reshape(2, 2), between], 1).to(dtype)
        tokens[0, 0] = 0
        out = scheduler.step(v, scheduler.timesteps[0], x.to(dtype), per_token_timesteps=tokens, return_dict=False)
        results.append(out[0])
        assert scheduler.step_index == 1
    same(*results)


def test_per_token_timesteps_of_other_shapes():
    for shape, tokens in (((2, 5, 3), (1, 5)), ((1, 5, 3), (2, 5)), ((5, 3), (1, 5)), ((2, 0, 3), (2, 0))):
        x, t = torch.randn(shape), torch.rand(tokens) * 1000
        same(*(s.step(x.cos(), s.timesteps[0], x, per_token_timesteps=t)[0] for s in scheduled({})))
    x, t = torch.randn(1, 3, 2), torch.tensor([[50.0, 150.0, 950.0]])
    schedulers = scheduled({})
    for scheduler in schedulers:
        scheduler.sigmas = scheduler.sigmas + 0.1  # ends above 0, where the first token goes
    same(*(s.step(x, s.timesteps[0], x, per_token_timesteps=t)[0] for s in schedulers))


def test_what_step_returns():
    for scheduler in scheduled({}):
        x = torch.randn(2, 3)
        t = scheduler.timesteps[0]
        output = scheduler.step(x, t, x, 0.5, 0.1, 2.0, 1.5)
        assert output.prev_sample is output["prev_sample"] is output[0] is output.to_tuple()[0]
        assert isinstance(output, ours.FlowMatchEulerDiscreteSchedulerOutput)
        plain = scheduler.step(x, t, x, return_dict=False)
        assert type(plain) is tuple and len(plain) == 1


def test_begin_index_and_image_to_image():
    x, noise = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    results = []
    for scheduler in scheduled({"shift": 3.0}):
        steps = scheduler.timesteps[4:]
        scheduler.set_begin_index(4)
        assert scheduler.begin_index == 4 and scheduler.step_index is None
        z = scheduler.scale_noise(x, steps[:1].repeat(2), noise)
        stages = [z, scheduler.scale_noise(x, steps[:1], noise)]
        for i, t in enumerate(steps):
            z = scheduler.step(torch.sin(z), t, z)[0]
            stages.append(z)
            if i < len(steps) - 1:
                stages.append(scheduler.scale_noise(x, torch.tensor([steps[i + 1]]), noise))  # inpainting
        results.append(stages)
    for a, b in zip(*results):
        same(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 2, 3, 3), (4,)], ids=str)
def test_scale_noise(shape, dtype):
    x, noise = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    for config in ("plain", "shift", "inverted", "karras"):
        original, mine = scheduled(CONFIGS[config])
        for t in (original.timesteps[[3, 0, 9, 3]], original.timesteps[5:6], original.timesteps[[1, 2, 3, 4]].double()):
            a, b = original.scale_noise(x, t, noise), mine.scale_noise(x, t, noise)
            if dtype.itemsize > 2:
                same(a, b)
            else:  # each of the original's three operations is rounded
                size = torch.finfo(dtype).eps * (noise.float().abs() + x.float().abs())
                assert a.dtype == b.dtype and ((a.float() - b.float()).abs() <= 2 * size).all()
    original, mine = pair(shift=3.0)  # a training schedule, every one of its steps
    t = original.timesteps[torch.randperm(1000)[:4]]
    same(original.scale_noise(x.double(), t, noise.double()), mine.scale_noise(x.double(), t, noise.double()))
    same(original.scale_noise(x.float(), t, noise.double()), mine.scale_noise(x.float(), t, noise.double()))


def test_gradients_pass():
    for scheduler in scheduled({}):
        x, v = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
        step = scheduler.step(v, scheduler.timesteps[2], x)[0]
        noised = scheduler.scale_noise(x, scheduler.timesteps[2:3], v)
        for value, weight in ((step, scheduler.sigmas[3] - scheduler.sigmas[2]), (noised, scheduler.sigmas[2])):
            dx, dv = torch.autograd.grad(value.sum(), (x, v))
            assert torch.equal(dv, weight.expand(2, 3))
            assert torch.equal(dx, torch.ones(2, 3) if value is step else (1 - weight).expand(2, 3))


@pytest.mark.parametrize(
    "kind", [float, np.float64, torch.Tensor.double, torch.Tensor.clone, lambda t: t[None], lambda t: t]
)
def test_the_first_index(kind):
    for at in (0, 4, 9):
        indices = [s.index_for_timestep(kind(s.timesteps[at])) for s in scheduled({"shift": 3.0})]
        assert indices == [at, at] and type(indices[1]) is int
        results = []
        for scheduler in scheduled({"shift": 3.0}):
            results.append(scheduler.step(torch.ones(2, 3), kind(scheduler.timesteps[at]), torch.ones(2, 3))[0])
            assert scheduler.step_index == at + 1
        same(*results)


def test_repeated_timesteps_start_at_the_second():
    sigmas = [1.0, 0.6, 0.6, 0.6, 0.2, 0.2]
    for scheduler in pair():
        scheduler.set_timesteps(sigmas=sigmas)
        assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps] == [0, 2, 2, 2, 5, 5]
        schedule = torch.tensor([3.0, 2.0, 2.0])
        assert [scheduler.index_for_timestep(t, schedule) for t in (3.0, torch.tensor(2.0))] == [0, 1] or 1
    assert [s.index_for_timestep(2.0, schedule) for s in pair()] == [2, 2]
    x, timesteps = torch.randn(6, 2), scheduler.timesteps
    original, mine = pair()
    for s in (original, mine):
        s.set_timesteps(sigmas=[0.9, 0.6, 0.6, 0.5, 0.5, 0.5])
    same(*(s.scale_noise(x, s.timesteps, x + 1) for s in (original, mine)))
    assert (
        torch.equal(ours.get_sigmas(mine, mine.timesteps, 1), mine.sigmas[[0, 2, 2, 4, 4, 4]]) and len(timesteps) == 6
    )


def changed(how, scheduler):
    if how == "written":
        scheduler.sigmas[-1] = scheduler.sigmas[-2]
        scheduler.sigmas[2] = 0.55
    elif how == "replaced":
        scheduler.sigmas = scheduler.sigmas * 0.9
        scheduler.timesteps = scheduler.timesteps + 1
    elif how == "written unseen":
        scheduler.sigmas.data[-1] = 0.2
        scheduler.sigmas.numpy()[3] = 0.5
        scheduler.timesteps.numpy()[3] = 77.0
    elif how == "inference":
        with torch.inference_mode():
            scheduler.sigmas = scheduler.sigmas * 0.9
            scheduler.sigmas[3] = 0.5
    elif how == "double":
        scheduler.sigmas, scheduler.timesteps = scheduler.sigmas.double() / 3, scheduler.timesteps.double() / 3
    elif how == "copied":
        return copy.deepcopy(scheduler)
    elif how == "pickled":
        return pickle.loads(pickle.dumps(scheduler))
    elif how == "counted back":
        scheduler._step_index -= 1
    elif how == "negative":
        scheduler._step_index = -3
    return scheduler


@pytest.mark.parametrize(
    "how",
    ["written", "written unseen", "replaced", "inference", "double", "copied", "pickled", "counted back", "negative"],
)
def test_a_schedule_that_a_program_changes(how):
    results = []
    for scheduler in scheduled({"shift": 3.0}):
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
        x = scheduler.step(x.cos(), scheduler.timesteps[0], x)[0]
        scheduler = changed(how, scheduler)
        for t in scheduler.timesteps[1:3]:
            x = scheduler.step(x.cos(), t, x)[0]
            x = x + scheduler.scale_noise(x, scheduler.timesteps[3:4], x.cos())
        results.append(x)
    same(*results)


@pytest.mark.parametrize("make", [torch.Tensor.numpy, torch.Tensor.tolist])
@pytest.mark.parametrize("config", ["plain", "stochastic"])
def test_levels_that_are_no_tensor(config, make):
    x, results = torch.ones(2, 3), []
    for scheduler in scheduled(CONFIGS[config]):
        scheduler.sigmas = make(scheduler.sigmas)
        torch.manual_seed(1)
        results.append(loop(scheduler, x))
    same(*results)


def test_noise_of_a_double_schedule():
    x, results = torch.randn(3, 5), []
    for scheduler in scheduled(CONFIGS["stochastic"]):
        scheduler.sigmas = scheduler.sigmas.double() * 0.9
        torch.manual_seed(1)
        results.append(loop(scheduler, x))
    same(*results)


def test_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        original, mine = scheduled({"shift": 3.0})
        same_state(original, mine)
        x, tokens = torch.randn(2, 3, 4).float(), torch.rand(2, 3).float() * 1000
        for t in original.timesteps:
            same(*(s.step(x.cos(), t, x, per_token_timesteps=tokens)[0] for s in (original, mine)))
        same(*(loop(s, x) for s in scheduled(CONFIGS["stochastic"]) if torch.manual_seed(1)))
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_to_the_schedule():
    x, results = torch.randn(2, 3, 4), []
    for scheduler in scheduled({"shift": 3.0}):
        before = [scheduler.sigmas.clone(), scheduler.timesteps.clone()]
        mine = scheduler if isinstance(scheduler, ours.FlowMatchEulerDiscreteScheduler) else None
        if mine is not None:
            mine._on(torch.device("cpu"))  # a copy that does not ask for gradients
        scheduler.sigmas.requires_grad_()
        noised = scheduler.scale_noise(x, before[1][2:4], x.cos())
        (of_noise,) = torch.autograd.grad(noised.sin().sum(), scheduler.sigmas)
        (of_steps,) = torch.autograd.grad(loop(scheduler, x).sin().sum(), scheduler.sigmas)
        results.append((of_noise, of_steps))
        assert mine is None or ours.get_sigmas(mine, before[1][:2]).requires_grad
    torch.testing.assert_close(*results)


def test_within_transforms():
    _, mine = scheduled({"shift": 3.0})
    training, network = ours.FlowMatchEulerDiscreteScheduler(), torch.nn.Linear(3, 3)
    weights = dict(network.named_parameters())
    latents, noise, u = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)

    def loss(weights, u=u, latents=latents, noise=noise):
        noised = ours.noise_for_training(training, latents, noise, u)
        return ours.flow_matching_loss(torch.func.functional_call(network, weights, noised.noisy_model_input), noised)

    plain = torch.autograd.grad(loss(weights), list(weights.values()))
    torch.testing.assert_close(list(torch.func.grad(loss)(weights).values()), list(plain))
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(
        weights, u[:, None], latents[:, None], noise[:, None]
    )
    torch.testing.assert_close([one.mean(0) for one in each.values()], list(plain))
    x = latents.clone().requires_grad_()
    for call in (
        lambda x: loop(mine, x).sum(),
        lambda x: mine.scale_noise(x, mine.timesteps[2:3], noise).square().sum(),
    ):
        mine.set_timesteps(10)
        (expected,) = torch.autograd.grad(call(x), x)
        mine.set_timesteps(10)
        torch.testing.assert_close(torch.func.grad(call)(latents), expected)
    sigmas, tangents = mine.sigmas, []
    for scheduler in scheduled({"shift": 3.0}):
        with torch.autograd.forward_ad.dual_level():
            scheduler.sigmas = torch.autograd.forward_ad.make_dual(sigmas, sigmas.cos())
            value = scheduler.scale_noise(latents, scheduler.timesteps[2:3], noise)
            tangents.append(torch.autograd.forward_ad.unpack_dual(value).tangent)
    torch.testing.assert_close(*tangents)


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    x = torch.ones(2, 3)
    for scheduler in scheduled({}):
        scheduler.set_begin_index(0)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert scheduler.step(torch.ones(2, 3), scheduler.timesteps[0], torch.ones(2, 3))[0].shape == x.shape


def test_a_schedule_with_the_negative_bit():
    results = []
    for scheduler in scheduled({}):
        scheduler.sigmas = torch._neg_view(-scheduler.sigmas)
        results.append(loop(scheduler, torch.ones(2, 3)))
    same(*results)


@pytest.mark.parametrize("timestep", [[[123.0]], [[900.0], [900.0]]])
def test_a_timestep_of_two_dimensions(timestep):
    x = torch.ones(2)
    for scheduler in scheduled({}):
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            scheduler.step(x, torch.tensor(timestep), x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
def test_a_copy_of_a_schedule_that_was_written_to(copied):
    x, results = torch.ones(2, 3), []
    for scheduler in scheduled({}):
        scheduler = copied(scheduler)
        scheduler.step(x, scheduler.timesteps[0], x)
        scheduler.sigmas[2] = 0.55
        results.append(copied(scheduler).step(x, scheduler.timesteps[1], x)[0])
    same(*results)


def test_a_schedule_set_by_a_subclass_alone():
    x, results = torch.ones(2, 3), []
    for module in (theirs, ours):

        class Own(module.FlowMatchEulerDiscreteScheduler):
            def __init__(self):
                self.register_to_config(num_train_timesteps=1000, stochastic_sampling=False)
                self.sigmas, self._step_index, self._begin_index = torch.linspace(1, 0, 5), None, None
                self.timesteps = torch.tensor([500.0]).expand(4)

        scheduler = Own()
        results.append(scheduler.step(x, scheduler.timesteps[1:2], x)[0])
    same(*results)


def test_inference_mode():
    with torch.inference_mode():
        schedulers = scheduled({})
        results = []
        for scheduler in schedulers:
            scheduler.sigmas[4] = 0.5
            results.append(loop(scheduler, torch.ones(2, 3)))
        same(*results)
    assert not schedulers[1].sigmas.is_inference(), "a write would go unnoticed"


def own(base):
    """A user's subclass of either class."""

    class Own(base):
        def index_for_timestep(self, timestep, schedule_timesteps=None):
            return min(base.index_for_timestep(self, timestep, schedule_timesteps) + 1, 9)

        def time_shift(self, mu, sigma, t):
            return base.time_shift(self, mu, sigma, t) ** 2

        def _convert_to_karras(self, in_sigmas, num_inference_steps):
            return np.sort(in_sigmas)

    return Own


@pytest.mark.parametrize("config", [{"use_dynamic_shifting": True}, {"use_karras_sigmas": True}], ids=str)
def test_overridden_methods_are_called(config):
    x, results = torch.randn(3, 4), []
    for module in (theirs, ours):
        scheduler = own(module.FlowMatchEulerDiscreteScheduler)(**config)
        scheduler.set_timesteps(10, mu=0.4)
        noised = scheduler.scale_noise(x, scheduler.timesteps[[1, 5, 8]], x.sin())
        moved = scheduler.step(x.cos(), scheduler.timesteps[3], x)[0]
        results.append((noised, moved, scheduler.timesteps))
    for a, b in zip(*results):
        same(a, b)


ERRORS = {
    "two spacings": (lambda s: type(s)(use_karras_sigmas=True, use_beta_sigmas=True), ValueError, "at most one"),
    "unknown shift": (lambda s: type(s)(time_shift_type="cubic"), ValueError, "time_shift_type"),
    "unknown argument": (lambda s: type(s)(shifts=2), TypeError, "shifts"),
    "no mu": (lambda s: type(s)(use_dynamic_shifting=True).set_timesteps(5), ValueError, "mu"),
    "no number of steps": (lambda s: s.set_timesteps(), TypeError, ""),
    "lengths differ": (lambda s: s.set_timesteps(sigmas=[1.0, 0.5], timesteps=[1000.0]), ValueError, "timesteps"),
    "count differs": (lambda s: s.set_timesteps(3, sigmas=[1.0, 0.5]), ValueError, "sigmas"),
    "integer timestep": (lambda s: s.step(torch.ones(2), 3, torch.ones(2)), ValueError, "timestep"),
    "integer tensor": (lambda s: s.step(torch.ones(2), torch.tensor(3), torch.ones(2)), ValueError, "timestep"),
    "unknown timestep": (lambda s: s.step(torch.ones(2), 999.5, torch.ones(2)), IndexError, ""),
    "unknown tensor": (lambda s: s.step(torch.ones(2), torch.tensor([1.5]), torch.ones(2)), IndexError, ""),
    "unknown of scale_noise": (
        lambda s: s.scale_noise(torch.ones(2), torch.tensor([1.5, 2]), torch.ones(2)),
        IndexError,
        "",
    ),
    "no noise": (lambda s: s.scale_noise(torch.ones(2), s.timesteps[:2]), TypeError, ""),
    "scalar timestep": (lambda s: s.scale_noise(torch.ones(2), s.timesteps[0], torch.ones(2)), TypeError, ""),
    "rows": (lambda s: s.scale_noise(torch.ones(2, 2), s.timesteps[:3], torch.ones(2, 2)), RuntimeError, "size"),
    "shapes": (lambda s: s.step(torch.ones(2), s.timesteps[0], torch.ones(3)), RuntimeError, "size"),
    "past the end": (lambda s: [loop(s, torch.ones(2)), s.step(torch.ones(2), 1.0, torch.ones(2))], IndexError, ""),
    "no config": (lambda s: type(s).from_config(None), ValueError, "config"),
    "a file": (lambda s: s.save_config(__file__), AssertionError, "file"),
    "an empty folder": (lambda s: type(s).from_pretrained("/"), OSError, "scheduler_config.json"),
    "no such scheme": (
        lambda s: ours.compute_density_for_timestep_sampling("logit_normal", 2),
        TypeError,
        "logit_mean",
    ),
    "not latents": (lambda s: ours.noise_for_training(s, [1.0]), TypeError, "latents"),
    "u": (lambda s: ours.noise_for_training(s, torch.ones(2, 3), u=torch.rand(1)), ValueError, "u: expected shape [2]"),
    "a sampling schedule": (
        lambda s: ours.noise_for_training(s, torch.ones(2, 3)),
        ValueError,
        "scheduler: expected its training schedule of 1000 timesteps, got",
    ),
    "weighting": (
        lambda s: ours.flow_matching_loss(torch.ones(2), training_of(2), weighting=torch.ones(3)),
        ValueError,
        "weighting: expected one weight a sample, shape [2], got shape [3]",
    ),
    "no tensor": (
        lambda s: ours.flow_matching_loss(torch.ones(2), training_of(2), weighting=0.5),
        TypeError,
        "weighting",
    ),
    "not noised": (lambda s: ours.flow_matching_loss(torch.ones(2), torch.ones(2)), TypeError, "noised"),
}


def training_of(rows):
    return ours.noise_for_training(ours.FlowMatchEulerDiscreteScheduler(), torch.ones(rows))


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input(case):
    call, error, message = ERRORS[case]
    for scheduler in scheduled({}):
        with pytest.raises(error) as raised:
            call(scheduler)
    assert message in str(raised.value)


def test_warnings_follow_the_verbosity_of_diffusers():
    from diffusers.utils import logging

    level = logging.get_verbosity()
    try:
        for set_level in (logging.set_verbosity_error, logging.set_verbosity_info):
            set_level()
            assert ours.logger.getEffectiveLevel() == logging.get_verbosity()
    finally:
        logging.set_verbosity(level)


def test_a_warning_for_timesteps_alone(monkeypatch):
    said = []
    monkeypatch.setattr(ours.logger, "warning", said.append)
    mine = ours.FlowMatchEulerDiscreteScheduler()
    mine.set_timesteps(timesteps=[900.0, 100.0])
    assert len(said) == 1 and "sigmas" in said[0]
    mine.set_timesteps(timesteps=[900.0, 100.0], sigmas=[0.9, 0.1])
    assert len(said) == 1


class NoReads(TorchDispatchMode):
    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "unique", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.rstrip("_") in self.READS:
            raise AssertionError(f"{func} reads from the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", CONFIGS)
def test_no_host_reads(config):
    """Tensors on "meta" hold nothing: whatever reads one, or copies it to the host, raises."""
    mine = ours.FlowMatchEulerDiscreteScheduler(**CONFIGS[config])
    mine.set_timesteps(10, device="meta", mu=0.5)
    assert mine.timesteps.device.type == mine.sigmas.device.type == "meta"
    x = torch.empty(4, 3, 5, device="meta")
    with NoReads():
        noised = mine.scale_noise(x, mine.timesteps[[1, 2, 3, 4]], x)
        for i, t in enumerate(mine.timesteps[2:]):
            out = mine.step(x, t, x).prev_sample
            assert mine.step_index == i + 3
        tokens = mine.step(x, t, x, per_token_timesteps=torch.empty(4, 3, device="meta"))
        mine._step_index = None
        mine.set_begin_index(3)
        mine.step(x, torch.empty((), device="meta"), x)
        mine.scale_noise(x, torch.empty(4, device="meta"), x)
        mine.sigmas[-1] = 0.5  # now only the device knows the schedule
        mine.step(x, t, x)
        training = ours.FlowMatchEulerDiscreteScheduler(**CONFIGS[config])
        noised_for_training = ours.noise_for_training(training, x, torch.empty_like(x), torch.empty(4, device="meta"))
        ours.flow_matching_loss(x, noised_for_training)
        ours.get_sigmas(mine, torch.empty(4, device="meta"))
    assert out.device.type == noised.device.type == tokens.prev_sample.device.type == "meta"
    with pytest.raises((NotImplementedError, RuntimeError)):  # the one that is said to read
        mine._begin_index = None
        mine.index_for_timestep(torch.empty((), device="meta") + 1)


def test_lookup_on_a_device_is_the_hosts():
    _, mine = scheduled({"shift": 3.0})
    t = torch.cat([mine.timesteps[[4, 0, 9, 4]], torch.tensor([5.0])])
    found = ours.lookup_sigmas(mine.sigmas, mine.timesteps, t)
    assert torch.equal(found[:4], mine.sigmas[[4, 0, 9, 4]]) and found[4].isnan()
    sigmas, schedule = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.0]), torch.tensor([3.0, 2.0, 2.0, 2.0])
    assert torch.equal(ours.lookup_sigmas(sigmas, schedule, torch.tensor([2.0, 3.0])), sigmas[[2, 0]])


def test_schedule_copies_follow_the_schedule():
    mine = ours.FlowMatchEulerDiscreteScheduler()
    cpu = torch.device("cpu")
    first = mine._on(cpu)
    assert mine._on(cpu)[0] is first[0]
    mine.sigmas.mul_(0.5)
    assert torch.equal(mine._on(cpu)[0], mine.sigmas)
    mine.set_timesteps(5)
    assert len(mine._on(cpu)[0]) == 6


@pytest.mark.compiles
def test_step_compiles():
    results = []
    for scheduler in scheduled({"shift": 3.0}):
        scheduler.set_begin_index(2)
        x = torch.ones(2, 3)
        step = torch.compile(scheduler.step, backend="aot_eager") if scheduler is not results else None
        results.append(step(x.cos(), scheduler.timesteps[2], x, return_dict=False)[0])
    same(*results)


def test_configuration_files(tmp_path):
    config = {"shift": 3.0, "use_dynamic_shifting": True, "shift_terminal": 0.02, "max_image_seq_len": 8192}
    original, mine = pair(**config)
    classes = type(original), type(mine)
    for writer, reader in itertools.product((original, mine), classes):
        folder = tmp_path / f"{type(writer).__module__}{reader.__module__}"
        writer.save_pretrained(folder)
        loaded = reader.from_pretrained(folder)
        assert {name: loaded.config[name] for name in config} == config
        again, unused = reader.from_config(writer.config, return_unused_kwargs=True, shift=2.0, other=5)
        assert again.config.shift == 2.0 and unused["other"] == 5 and type(again) is reader
        same(loaded.sigmas, original.sigmas)
    files = [json.loads(scheduler.to_json_string()) for scheduler in (original, mine)]
    assert files[0] == files[1]
    assert mine.compatibles == original.compatibles


def test_pipelines_take_and_keep_it(tmp_path):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    class Pipeline(DiffusionPipeline):
        def __init__(self, scheduler: theirs.FlowMatchEulerDiscreteScheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

    original, mine = pair(shift=3.0)
    assert isinstance(mine, theirs.FlowMatchEulerDiscreteScheduler)
    Pipeline(original).save_pretrained(tmp_path / "original")
    pipeline = Pipeline.from_pretrained(tmp_path / "original", scheduler=mine)
    assert pipeline.scheduler is mine
    pipeline.save_pretrained(tmp_path / "ours")
    saved = [json.loads((tmp_path / who / "model_index.json").read_text()) for who in ("original", "ours")]
    assert saved[0]["scheduler"] == saved[1]["scheduler"], "what is saved loads without fmkernels"
    loaded = Pipeline.from_pretrained(tmp_path / "ours").scheduler
    assert type(loaded) is theirs.FlowMatchEulerDiscreteScheduler and loaded.config.shift == 3.0
    for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), type(mine).from_config(loaded.config)):
        assert type(copied) is type(mine) and copied.config.shift == 3.0

    class Own(type(mine)):
        pass

    assert Own().__module__ == __name__
    pipeline.scheduler = type(mine).from_config(original.config)
    assert Pipeline.from_pipe(pipeline).scheduler is pipeline.scheduler


# Without diffusers


@pytest.fixture
def alone(monkeypatch):
    """The module as it is imported where diffusers is not installed."""
    with monkeypatch.context() as patch:
        for name in [
            name for name in sys.modules if name.startswith("fmkernels.integrations.") and "diffusers" in name
        ]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "diffusers", None)
        module = importlib.import_module("fmkernels.integrations.diffusers")
    sys.modules["fmkernels.integrations"].diffusers = ours
    return module


@pytest.mark.parametrize("config", CONFIGS)
def test_without_diffusers(alone, tmp_path, config):
    assert alone.FlowMatchEulerDiscreteScheduler.__mro__[1].__name__ == "ConfiguredScheduler"
    original = theirs.FlowMatchEulerDiscreteScheduler(**CONFIGS[config])
    mine = alone.FlowMatchEulerDiscreteScheduler(**CONFIGS[config])
    entries = [{k: v for k, v in s.config.items() if not k.startswith("_")} for s in (original, mine)]
    assert entries[0] == entries[1]
    results = []
    for scheduler in (original, mine):
        scheduler.set_timesteps(6, mu=0.8)
        torch.manual_seed(2)
        results.append(loop(scheduler, torch.ones(2, 3)))
        scheduler.save_pretrained(tmp_path / type(scheduler).__module__)
    same(*results)
    same(original.sigmas, mine.sigmas)
    same(original.from_pretrained(tmp_path / type(mine).__module__).sigmas, original.from_config(mine.config).sigmas)
    loaded = type(mine).from_pretrained(tmp_path, subfolder=type(original).__module__, shift=4.0)
    assert loaded.config.shift == 4.0 and "_diffusers_version" in loaded.config
    assert {**entries[0], "shift": 4.0} == {k: v for k, v in loaded.config.items() if not k.startswith("_")}
    assert copy.deepcopy(loaded).config == pickle.loads(pickle.dumps(Configuration(loaded.config))) == loaded.config


def test_a_subclass_with_arguments_of_its_own(alone, tmp_path):
    class Own(alone.FlowMatchEulerDiscreteScheduler):
        @alone.register_to_config
        def __init__(self, extra: int = 3, **kwargs):
            super().__init__(**kwargs)

    made = Own(extra=5, shift=2.0)
    assert Own.from_config(made.config).config.extra == 5 and "kwargs" not in made.config
    made.register_to_config(folder=tmp_path)
    made.save_pretrained(tmp_path, push_to_hub=False)
    loaded = Own.from_pretrained(pretrained_model_name_or_path=tmp_path)
    assert loaded.config.extra == 5 and loaded.config.folder == str(tmp_path)
    with pytest.raises(ValueError, match="push_to_hub"):
        made.save_pretrained(tmp_path, push_to_hub=True)


def test_the_configuration_of_its_own(alone):
    scheduler = alone.FlowMatchEulerDiscreteScheduler(1000, 2.0, use_beta_sigmas=False)
    assert scheduler.config.shift == scheduler.config["shift"] == scheduler.config.get("shift") == 2.0
    assert "shift" not in scheduler.config._use_default_values and "base_shift" in scheduler.config._use_default_values
    assert not hasattr(scheduler.config, "sigma_min") and scheduler.compatibles == [type(scheduler)]
    for change in (lambda c: c.update(shift=1), lambda c: c.__setitem__("shift", 1), lambda c: setattr(c, "shift", 1)):
        with pytest.raises(TypeError, match="register_to_config"):
            change(scheduler.config)
    with pytest.raises(TypeError, match="dict"):
        type(scheduler).from_config("some/folder")
    with pytest.raises(ValueError, match="None"):
        type(scheduler).from_config(None)
    with pytest.raises(OSError, match="scheduler_config.json"):
        type(scheduler).from_pretrained("stabilityai/some-model")
    again, unused = type(scheduler).from_config(
        {**scheduler.config, "extra": 3}, return_unused_kwargs=True, shift=5.0, more=1
    )
    assert again.config.shift == 5.0 and again.config.extra == 3 and unused["more"] == 1
    loose = {**scheduler.config, "base_shift": 9.0, "_class_name": "EulerDiscreteScheduler"}
    configs = [kind.from_config(loose).config for kind in (theirs.FlowMatchEulerDiscreteScheduler, type(scheduler))]
    for name in ("base_shift", "shift", "_class_name"):  # a default is not taken from the configuration
        assert configs[0][name] == configs[1][name]
    output = again.step(torch.ones(2), again.timesteps[0], torch.ones(2))
    assert output.prev_sample is output[0] is output["prev_sample"] is output.to_tuple()[0]
