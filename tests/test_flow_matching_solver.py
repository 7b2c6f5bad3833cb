"""`integrations.flow_matching`'s solver: the same calls through the original and ours."""

from functools import partial

import pytest
import torch
from paired import fails_alike, pair, pair_of_classes, same, scheduled, their_solver

from fmkernels.integrations import _flow_matching_solver as ours_solver
from fmkernels.integrations import flow_matching as ours


class Network(torch.nn.Module):
    """A small field, its calls counted, that mixes the columns of a sample."""

    def __init__(self, dim=3, dtype=None):
        super().__init__()
        generator, dtype = torch.Generator().manual_seed(2), dtype or torch.get_default_dtype()
        self.weight = torch.nn.Parameter(torch.randn(dim, dim, generator=generator).to(dtype) / 2)
        self.bias = torch.nn.Parameter(torch.randn(dim, generator=generator).to(dtype))
        self.seen = []

    def forward(self, x, t, shift=0.0, label=None):
        self.seen.append((t.dtype, t.shape, x.dtype, x.shape, float(t.detach())))
        y = torch.tanh(x.flatten(1) @ self.weight + self.bias * torch.cos(3 * t)) - 0.4 * x.flatten(1) + shift
        if label is not None:
            y = y * label[:, None]
        return y.reshape(x.shape)


ADAPTIVE = ("dopri5", "adaptive_heun", "bosh3")
METHODS = [
    ("euler", 0.1),
    ("midpoint", 0.13),
    ("heun3", 0.2),
    ("rk4", 0.25),
    ("euler", None),
    *((m, None) for m in ADAPTIVE),
]
GRIDS = {
    "up": torch.tensor([0.0, 1.0]),
    "down": torch.tensor([1.0, 0.0]),
    "five": torch.linspace(0, 1, 5),
    "inside": torch.tensor([0.9, 0.55, 0.3, 0.05], dtype=torch.float64),
}
stepping = pytest.mark.parametrize(("method", "step_size"), METHODS, ids=[f"{m}-{s}" for m, s in METHODS])


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def default(request):
    """torch's default dtype, which both libraries take for probes and log-densities."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def rounding(method, dtype):
    """By how much solutions may differ.

    Adaptive steps feel float32's rounding in their error estimates: there solutions differ by as much as each is wrong.
    """
    if method in ADAPTIVE:
        return 1e-3 if dtype == torch.float32 else 1e-9
    return 5e-6 if dtype == torch.float32 else 1e-7  # the grid of times is in float32


def both_solvers(method, *arguments, network=Network, **keywords):
    """What a method of the original's solver and of ours returns from the same seed, and the models, which saw it."""
    results = []
    for cls in pair_of_classes("ODESolver"):
        model = network()
        torch.manual_seed(5)
        value = getattr(cls(velocity_model=model), method)(*arguments, **keywords)
        results.append((value, model, torch.get_rng_state()))
    (a, theirs, first), (b, mine, second) = results
    assert torch.equal(first, second)
    return a, b, theirs, mine


def saw_the_same(theirs, mine, method, dtype):
    if method in ADAPTIVE and dtype == torch.float32:
        assert {call[:4] for call in theirs.seen} == {call[:4] for call in mine.seen}
        assert abs(len(theirs.seen) - len(mine.seen)) <= 12  # two steps
    else:
        assert [call[:4] for call in theirs.seen] == [call[:4] for call in mine.seen]
        assert max(abs(a[4] - b[4]) for a, b in zip(theirs.seen, mine.seen)) <= 1e-6


def near(a, b, tolerance=2e-6):
    """Equal but for rounding."""
    assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and a.requires_grad == b.requires_grad
    assert float((a - b).detach().abs().max()) <= tolerance * max(1.0, float(a.detach().abs().max()))


@stepping
@pytest.mark.parametrize("grid", GRIDS)
def test_solver_samples(method, step_size, grid, default):
    options = dict(time_grid=GRIDS[grid], return_intermediates=grid in ("five", "inside"), atol=1e-4, rtol=1e-4)
    a, b, theirs, mine = both_solvers("sample", torch.randn(4, 3), step_size, method, **options)
    near(a, b, rounding(method, default))
    saw_the_same(theirs, mine, method, default)
    assert not b.requires_grad


@pytest.mark.parametrize("method", ["euler", "dopri5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_solver_dtypes(method, dtype):
    """A network in half precision is given times in half precision, as there."""
    x = torch.randn(4, 3, 1).to(dtype)
    step = 0.125 if method == "euler" else None
    network = partial(Network, dtype=dtype)
    a, b, theirs, mine = both_solvers("sample", x, step, method, atol=0.01, rtol=0.01, network=network)
    near(a, b, 0.1 if method == "dopri5" else 8 * torch.finfo(dtype).eps)
    assert mine.seen[0] == theirs.seen[0] and {call[0] for call in mine.seen} == {dtype}


def test_solver_passes_extras():
    x, label = torch.randn(4, 3), torch.tensor([1.0, 2.0, 0.5, -1.0])
    for extras in ({"label": label}, {"shift": 0.5, "label": label}):
        a, b, _, _ = both_solvers("sample", x_init=x, step_size=0.25, **extras)
        near(a, b)
        a, b, _, _ = both_solvers("compute_likelihood", x, log_p0, 0.25, **extras)
        near(a[1], b[1])
    fails_alike(lambda cls: cls(Network()).sample(x, 0.5, unknown=1), *pair_of_classes("ODESolver"))


@stepping
def test_gradients_of_samples(method, step_size):
    """With respect to parameters and x_init. Adaptive: the original differentiates its first step size too."""
    gradients = []
    x = torch.randn(4, 3).double()
    for cls in pair_of_classes("ODESolver"):
        model, start = Network(dtype=torch.float64), x.clone().requires_grad_()
        y = cls(model).sample(
            start, step_size, method, enable_grad=True, time_grid=GRIDS["five"].double(), atol=1e-4, rtol=1e-4
        )
        assert y.requires_grad
        gradients.append(torch.autograd.grad(y.square().sum(), [start, model.weight, model.bias]))
        assert not cls(model).sample(start, step_size, method).requires_grad
    for a, b in zip(*gradients):
        near(a, b, 1e-2 if method in ADAPTIVE else 1e-6)


def log_p0(x):
    return -0.5 * x.flatten(1).square().sum(1)


@stepping
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("intermediates", [False, True])
def test_likelihood(method, step_size, exact, intermediates, default):
    grid = torch.linspace(1, 0, 5) if intermediates else GRIDS["down"]
    options = dict(time_grid=grid, return_intermediates=intermediates, exact_divergence=exact, atol=1e-4, rtol=1e-4)
    a, b, theirs, mine = both_solvers("compute_likelihood", torch.randn(5, 3), log_p0, step_size, method, **options)
    for x, y in zip(a, b, strict=True):
        near(x, y, rounding(method, default))
    saw_the_same(theirs, mine, method, default)
    assert mine.weight.grad is None and not b[1].requires_grad


def test_likelihood_of_images():
    x = torch.randn(3, 2, 2, 3).to(memory_format=torch.channels_last)
    a, b, _, _ = both_solvers("compute_likelihood", x, log_p0, 0.25, "midpoint", network=partial(Network, 12))
    near(a[0], b[0])
    near(a[1], b[1], 5e-6)


def test_likelihood_in_double_precision():
    """Hutchinson's estimate, which the original refuses unless float64 is torch's default."""
    x = torch.randn(5, 3).double()
    with pytest.raises(RuntimeError):
        their_solver.ODESolver(Network(dtype=torch.float64)).compute_likelihood(x, log_p0, 0.25)
    A = torch.randn(3, 3, dtype=torch.float64)
    torch.manual_seed(1)
    z = (torch.randn_like(x) < 0).double() * 2 - 1
    torch.manual_seed(1)
    y, value = ours.ODESolver(lambda x, t: x @ A).compute_likelihood(x, log_p0, 0.25)
    assert torch.allclose(value, log_p0(y) - ((z @ A) * z).sum(1), rtol=1e-12)  # a linear field's estimate is zᵀAz


def test_exact_divergence_of_any_shape():
    x = torch.randn(3, 2, 2, 3)
    flat = ours.ODESolver(Network(12)).compute_likelihood(x.flatten(1), log_p0, 0.25, exact_divergence=True)
    for shaped in (x, x.to(memory_format=torch.channels_last)):
        y, value = ours.ODESolver(Network(12)).compute_likelihood(shaped, log_p0, 0.25, exact_divergence=True)
        near(flat[0].reshape(x.shape), y)
        near(flat[1], value)
    for solver in (cls(lambda x, t: x) for cls in pair_of_classes("ODESolver")):  # its gradient is what it is given
        _, value = solver.compute_likelihood(torch.ones(2, 3), log_p0, 1.0, exact_divergence=True)
        assert torch.equal(value, torch.tensor([-3.0, -3.0]))


class Layouts(Network):
    """Notes the strides that it is given, and answers in another layout."""

    def forward(self, x, t):
        self.seen.append((t.dtype, t.shape, x.dtype, x.stride(), float(t)))
        return torch.tanh(x.contiguous()) + t


@stepping
def test_the_layout_of_images_is_kept(method, step_size):
    for x in (
        torch.randn(3, 2, 5, 4).to(memory_format=torch.channels_last),
        torch.randn(5, 4, 3, 2).permute(2, 3, 0, 1),
        torch.randn(3, 2, 4, 5).transpose(2, 3),
        torch.randn(3, 1, 1, 4)[..., :2],
    ):
        for intermediates in (False, True):
            options = dict(time_grid=GRIDS["five"], return_intermediates=intermediates)
            a, b, theirs, mine = both_solvers("sample", x, step_size, method, network=Layouts, **options)
            near(a, b, 1e-4)
            assert a.stride() == b.stride()
            if x.permute(ours_solver._order_in_memory(x)).is_contiguous():
                assert {seen[3] for seen in mine.seen} == {seen[3] for seen in theirs.seen}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "step_size"), [(m, s) for m, s in METHODS if m not in ADAPTIVE])
def test_a_model_that_answers_in_single_precision(method, step_size, dtype):
    """As flow_matching's own image example does: the state goes on in single precision, or small steps would vanish."""

    class Widening(Network):
        def forward(self, x, t):
            return super().forward(x.float(), t.float()) + 1

    x = torch.randn(5, 3).to(dtype)
    for intermediates in (False, True):
        options = dict(time_grid=torch.linspace(0, 1, 5), return_intermediates=intermediates)
        size = None if step_size is None else 0.003
        a, b, theirs, mine = both_solvers("sample", x, size, method, network=Widening, **options)
        assert a.dtype == b.dtype == dtype and torch.allclose(a, b, rtol=2 * torch.finfo(dtype).eps)
        assert [seen[:4] for seen in theirs.seen] == [seen[:4] for seen in mine.seen]


@stepping
def test_a_model_that_overwrites_its_input(method, step_size):
    def overwriting(x, t):
        x.mul_(0.5)
        return x + 1

    x, options = torch.randn(4, 3), dict(time_grid=GRIDS["five"], return_intermediates=True)
    results = []
    for cls in pair_of_classes("ODESolver"):
        start = x.clone()
        results.append(cls(overwriting).sample(start, step_size, method, **options))
    near(results[0][0], results[1][0])
    if method not in ADAPTIVE:
        near(*results)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_gradients_of_likelihoods(method):
    """The values of the field carry none; x_1's way through the solve does."""
    gradients = []
    x = torch.randn(4, 3)
    for cls in pair_of_classes("ODESolver"):
        start, model = x.clone().requires_grad_(), Network()
        torch.manual_seed(3)
        step = 0.2 if method == "euler" else None
        y, value = cls(model).compute_likelihood(start, log_p0, step, method, enable_grad=True)
        assert y.requires_grad and value.requires_grad
        gradients.append(torch.autograd.grad(value.sum(), [start, model.weight], allow_unused=True))
    near(gradients[0][0], gradients[1][0], 1e-5 if method == "euler" else 0.1)
    assert gradients[0][1] is None and gradients[1][1] is None


@pytest.mark.parametrize("given", [[0.0, 1.0], [1.0, 0.5], [0.9, 0.0]])
def test_times_of_a_likelihood(given):
    error = fails_alike(
        lambda cls: cls(Network()).compute_likelihood(torch.randn(2, 3), log_p0, 0.5, time_grid=torch.tensor(given)),
        *pair_of_classes("ODESolver"),
    )
    assert str(error).startswith("time_grid: expected times from 1.0 to 0.0")


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "nope"},
        {"time_grid": torch.tensor([0, 1])},
        {"time_grid": torch.tensor([0.0, 0.5, 0.2])},
        {"time_grid": [0.0, 1.0]},
        {"time_grid": torch.tensor([[0.0, 1.0]])},
    ],
    ids=str,
)
def test_errors_of_samples(arguments):
    fails_alike(lambda cls: cls(Network()).sample(torch.randn(2, 3), None, **arguments), *pair_of_classes("ODESolver"))


@pytest.mark.parametrize("exact", [False, True])
def test_fields_without_divergence(exact):
    def likelihood(cls):
        cls(lambda x, t: torch.ones_like(x)).compute_likelihood(x, log_p0, 0.5, exact_divergence=exact)

    x = torch.randn(2, 3)
    fails_alike(likelihood, *pair_of_classes("ODESolver"))


def test_step_sizes_of_adaptive_methods_are_unused():
    for cls in pair_of_classes("ODESolver"):
        with pytest.warns(UserWarning, match="Dopri5Solver: Unexpected arguments {'step_size': 0.5}"):
            cls(Network()).sample(torch.randn(2, 3), 0.5, "dopri5")


def test_solver_is_a_module():
    for wrapper, solver in zip(pair_of_classes("ModelWrapper"), pair_of_classes("ODESolver")):
        network = Network()

        class Wrapped(wrapper):
            def forward(self, x, t, **extras):
                return self.model(x, t.reshape(()), **extras)

        s = solver(Wrapped(network))
        assert [name for name, _ in s.named_parameters()] == [
            "velocity_model.model.weight",
            "velocity_model.model.bias",
        ]
        assert isinstance(s.velocity_model, torch.nn.Module) and s.velocity_model.model is network
        same(wrapper(network)(x=torch.ones(1, 3), t=torch.tensor(0.5)), network(torch.ones(1, 3), torch.tensor(0.5)))


@scheduled
def test_transformed_schedules(name, arguments):
    x, t = torch.randn(6, 3), torch.rand(()) * 0.8 + 0.1
    values = []
    for scheduler, old, transformed in zip(
        pair(name, *arguments), pair("CosineScheduler"), pair_of_classes("ScheduleTransformedModel")
    ):
        model = transformed(velocity_model=Network(), original_scheduler=old, new_scheduler=scheduler)
        values.append(model(x, t, shift=0.1))
    same(*values)
    fails_alike(lambda cls: cls(Network(), object(), None), *pair_of_classes("ScheduleTransformedModel"))
