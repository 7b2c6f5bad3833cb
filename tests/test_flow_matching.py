"""`integrations.flow_matching`: every call through the original and through ours, and all that they return compared."""

import dataclasses
import inspect
import math

import pytest
import torch
from paired import (
    NAMES,
    fails_alike,
    pair,
    pair_of_classes,
    same,
    scheduled,
    their_path,
    their_scheduler,
    their_solver,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fmkernels.integrations import flow_matching as ours

SHAPES = [(7, 3), (5,), (0, 4), (4, 3, 8, 9), (3, 2, 5, 4, 6), (6, 1), (2, 1000)]
CONVERSIONS = (
    "target_to_velocity",
    "epsilon_to_velocity",
    "velocity_to_target",
    "epsilon_to_target",
    "velocity_to_epsilon",
    "target_to_epsilon",
)


def same_samples(a, b):
    for name in ("x_1", "x_0", "t", "x_t", "dx_t"):
        same(getattr(a, name), getattr(b, name))


def times(batch, dtype=torch.float32):
    """Of every kind, the ends among them."""
    t = torch.rand(batch, dtype=torch.float64)
    t[:1], t[-1:] = 0.0, 1.0
    return t.to(dtype)


# names


def test_names_and_signatures():
    continuous = {*their_path.__all__, *their_scheduler.__all__, *their_solver.__all__} - set(ours.ABSENT)
    assert set(ours.__all__) == set(NAMES) == continuous
    for name, theirs in NAMES.items():
        mine = getattr(ours, name)
        assert [base.__name__ for base in mine.__mro__] == [base.__name__ for base in theirs.__mro__]
        methods = ["__init__", *(method for method in vars(theirs) if not method.startswith("_"))]
        if "__call__" in vars(theirs):
            methods.append("__call__")
        for method in methods:
            a, b = (inspect.signature(getattr(cls, method)).parameters.values() for cls in (theirs, mine))
            assert [(p.name, p.kind) for p in a] == [(p.name, p.kind) for p in b], (name, method)
            for p, q in zip(a, b):
                if isinstance(p.default, torch.Tensor):
                    same(p.default, q.default)
                else:
                    assert p.default == q.default, (name, method)
        if dataclasses.is_dataclass(theirs):
            assert [f.name for f in dataclasses.fields(theirs)] == [f.name for f in dataclasses.fields(mine)]
        assert getattr(mine, "__abstractmethods__", None) == getattr(theirs, "__abstractmethods__", None)


@pytest.mark.parametrize("name", ["MixtureDiscreteProbPath", "GeodesicProbPath", "RiemannianODESolver"])
def test_absent_names(name):
    with pytest.raises(ImportError, match=f"{name}.*import it from flow_matching"):
        exec(f"from fmkernels.integrations.flow_matching import {name}")
    with pytest.raises(AttributeError, match="no attribute 'AffinePath'"):
        ours.AffinePath  # noqa: B018


# schedulers


@scheduled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(200,), (), (3, 4, 1)])
def test_schedulers(name, arguments, dtype, shape):
    theirs, mine = pair(name, *arguments)
    t = torch.rand(shape, dtype=torch.float64).mul(1.02).clamp(0, 1).to(dtype)
    a, b = theirs(t), mine(t)
    for field in ("alpha_t", "sigma_t", "d_alpha_t", "d_sigma_t"):
        same(getattr(a, field), getattr(b, field))
    snr = torch.rand(shape, dtype=torch.float64).mul(4).to(dtype)
    same(theirs.snr_inverse(snr), mine.snr_inverse(snr))
    if hasattr(theirs, "kappa_inverse"):
        same(theirs.kappa_inverse(kappa=snr), mine.kappa_inverse(kappa=snr))


@scheduled
def test_gradients_of_schedulers(name, arguments):
    gradients = []
    for scheduler in pair(name, *arguments):
        t = torch.linspace(0.05, 0.95, 9, dtype=torch.float64, requires_grad=True)
        s = scheduler(t)
        gradients.append(torch.autograd.grad((s.alpha_t + 2 * s.sigma_t + 3 * s.d_alpha_t + s.d_sigma_t).sum(), t)[0])
    assert torch.allclose(*gradients, rtol=1e-13)


@pytest.mark.parametrize("n", ["2", 0, -1.5, None])
def test_polynomials_that_are_none(n):
    assert "n: expected" in str(fails_alike(lambda cls: cls(n), *pair_of_classes("PolynomialConvexScheduler")))


def test_a_scheduler_must_have_its_methods():
    for base in ("Scheduler", "ConvexScheduler"):
        fails_alike(lambda cls: type("Mine", (cls,), {"__call__": lambda self, t: None})(), *pair_of_classes(base))
    fails_alike(lambda cls: cls(), *pair_of_classes("ProbPath"))
    fails_alike(lambda cls: cls(), *pair_of_classes("Solver"))


# paths


@scheduled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample(name, arguments, dtype):
    theirs, mine = (cls(scheduler) for cls, scheduler in zip(pair_of_classes("AffineProbPath"), pair(name, *arguments)))
    for shape in SHAPES:
        x_0, x_1, t = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), times(shape[0], dtype)
        state = torch.get_rng_state()
        a, b = theirs.sample(x_0, x_1, t), mine.sample(x_0=x_0, x_1=x_1, t=t)
        same_samples(a, b)
        assert b.x_0 is x_0 and b.x_1 is x_1 and b.t is t
        assert torch.equal(state, torch.get_rng_state())


def test_sample_is_fused():
    """One op where it can be; else the tests of equality could pass without it."""
    x_0, x_1, t = torch.randn(4, 5), torch.randn(4, 5), torch.rand(4)

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names = {*getattr(self, "names", ()), function.name()}
            return function(*args, **(kwargs or {}))

    def ops(**changes):
        with Called() as called:
            ours.CondOTProbPath().sample(**dict(x_0=x_0, x_1=x_1, t=t) | changes)
        return "fmkernels::conditional_flow" in called.names

    assert ops() and ops(t=t.double()) and ops(x_0=x_0.bfloat16(), x_1=x_1.bfloat16())
    image = torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last)
    assert ops(x_0=torch.randn_like(image), x_1=image)
    assert not ops(x_0=x_0.double()) and not ops(x_1=x_1.requires_grad_())


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("other_dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_promotion(x_dtype, other_dtype, t_dtype):
    """The dtypes of the original, and its bits wherever x and t are not in half precision both."""
    x_0, x_1, t = torch.randn(8, 33).mul(5).to(other_dtype or x_dtype), torch.randn(8, 33).mul(5).to(x_dtype), times(8)
    for theirs, mine in (
        pair("CondOTProbPath"),
        [cls(ours.CosineScheduler()) for cls in pair_of_classes("AffineProbPath")],
    ):
        a, b = theirs.sample(x_0, x_1, t.to(t_dtype)), mine.sample(x_0, x_1, t.to(t_dtype))
        if x_dtype == t_dtype and x_dtype in (torch.bfloat16, torch.float16) and other_dtype in (None, x_dtype):
            exact = mine.sample(x_0.double(), x_1.double(), t.to(t_dtype))
            epsilon = torch.finfo(x_dtype).eps
            scale = x_0.abs().amax() + x_1.abs().amax()
            for name in ("x_t", "dx_t"):
                theirs_, mine_, oracle = (getattr(s, name) for s in (a, b, exact))
                assert mine_.dtype == theirs_.dtype == x_dtype
                assert ((mine_ - oracle).abs() <= epsilon * oracle.abs() + 1e-6).all()
                assert ((mine_ - theirs_).abs() <= 2 * epsilon * scale).all()
        else:
            same_samples(a, b)


LAYOUTS = {
    "channels_last": lambda: torch.randn(4, 3, 6, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 4, 6, 5).to(memory_format=torch.channels_last_3d),
    "tokens": lambda: torch.randn(4, 6, 5).transpose(1, 2),
    "transposed": lambda: torch.randn(5, 4).T,
    "sliced": lambda: torch.randn(4, 10)[:, ::2],
    "rows": lambda: torch.randn(8, 10)[::2],
    "expanded": lambda: torch.randn(4, 1, 3).expand(4, 5, 3),
    "permuted": lambda: torch.randn(3, 5, 4, 2).permute(2, 3, 0, 1),
    "contiguous": lambda: torch.randn(4, 3, 6, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", [True, False])
def test_layouts(layout, other):
    """Values and strides, x_0 being of x_1's layout or contiguous."""
    x_1 = LAYOUTS[layout]()
    x_0 = torch.randn_like(x_1) if other else torch.randn(x_1.shape)
    t = torch.rand(2 * x_1.shape[0])[::2]
    for theirs, mine in (pair("CondOTProbPath"),):
        same_samples(theirs.sample(x_0, x_1, t), mine.sample(x_0, x_1, t))
        same_samples(theirs.sample(x_1, x_0, t), mine.sample(x_1, x_0, t))


def test_samples_may_be_changed_in_place():
    x_0, x_1 = (LAYOUTS["channels_last"]() for _ in range(2))
    t, weight, results = torch.rand(4), torch.ones(1, requires_grad=True), []
    for path in pair("CondOTProbPath"):
        with torch.no_grad():
            sample = path.sample(x_0, x_1, t)
        results.append((sample.x_t.mul_(weight), sample.dx_t.detach_()))
    for a, b in zip(*results):
        same(a, b)


def test_schedulers_are_those_that_flow_matching_asks_for():
    from flow_matching.path import MixtureDiscreteProbPath

    x_0, x_1, t = torch.randint(5, (4, 3)), torch.randint(5, (4, 3)), torch.rand(4)
    results = []
    for module in (their_scheduler, ours):
        torch.manual_seed(1)
        path = MixtureDiscreteProbPath(module.PolynomialConvexScheduler(2.0))
        results.append(path.sample(x_0, x_1, t).x_t)
    assert torch.equal(*results)
    assert not isinstance(ours.VPScheduler(), their_scheduler.ConvexScheduler)


@pytest.mark.filterwarnings("ignore:__array_wrap__")
def test_an_array_as_source():
    x_0, x_1, t = torch.randn(4, 3).numpy(), torch.randn(4, 3), torch.rand(4)
    theirs, mine = (path.sample(x_0, x_1, t) for path in pair("CondOTProbPath"))
    same(theirs.x_t, mine.x_t)
    same(theirs.dx_t, mine.dx_t)


def test_shapes_that_broadcast():
    theirs, mine = pair("CondOTProbPath")
    t = torch.rand(4)
    for first, second in (((4, 1), (4, 3)), ((4, 3), (4, 1)), ((4, 3, 1), (4, 1, 5)), ((4, 1, 4), (4, 4))):
        x_0, x_1 = torch.randn(first), torch.randn(second)
        same_samples(theirs.sample(x_0, x_1, t), mine.sample(x_0, x_1, t))


@pytest.mark.parametrize(
    ("first", "second", "t"),
    [
        ((4, 2), (4, 2), ()),
        ((4, 2), (4, 2), (4, 1)),
        ((4, 2), (4, 2), (3,)),
        ((3, 2), (4, 2), (4,)),
        ((4, 2), (4, 3), (4,)),
    ],
)
def test_shapes_that_are_wrong(first, second, t):
    given = torch.randn(first), torch.randn(second), torch.rand(t)
    fails_alike(lambda path: path.sample(*given), *pair("CondOTProbPath"))
    if first[1] == second[1]:
        error = fails_alike(lambda path: path.assert_sample_shape(*given), *pair("CondOTProbPath"))
        assert str(error).startswith("t: expected")


@pytest.mark.parametrize("value", [lambda t: 1.0, lambda t: t[:, None], lambda t: t[1:], lambda t: t.sum()])
def test_schedules_of_wrong_shape(value):
    def sample(classes):
        path, scheduler, output = classes

        class Wrong(scheduler):
            def __call__(self, t):
                return output(alpha_t=t, sigma_t=1 - t, d_alpha_t=value(t), d_sigma_t=t)

            snr_inverse = None

        path(Wrong()).sample(torch.randn(3, 2), torch.randn(3, 2), torch.rand(3))

    fails_alike(sample, *zip(*(pair_of_classes(n) for n in ("AffineProbPath", "Scheduler", "SchedulerOutput"))))


@scheduled
@pytest.mark.parametrize("t_shape", [(), (6,), (6, 1)])
def test_conversions(name, arguments, t_shape):
    theirs, mine = (cls(scheduler) for cls, scheduler in zip(pair_of_classes("AffineProbPath"), pair(name, *arguments)))
    t = torch.rand(t_shape) * 0.9 + 0.05
    for method in CONVERSIONS:
        given, x_t = torch.randn(6, 6), torch.randn(6, 6)
        a, b = (getattr(path, method)(given, x_t=x_t, t=t) for path in (theirs, mine))
        same(a, b)


def test_conversions_are_inverse():
    path = ours.AffineProbPath(ours.CosineScheduler())
    x_0, x_1, t = torch.randn(5, 4).double(), torch.randn(5, 4).double(), torch.rand(5).double() * 0.9 + 0.05
    s = path.sample(x_0, x_1, t)
    known = {"target": s.x_1, "epsilon": s.x_0, "velocity": s.dx_t}
    for method in CONVERSIONS:
        source, target = method.split("_to_")
        torch.testing.assert_close(getattr(path, method)(known[source], s.x_t, t[:, None]), known[target])


# what users derive


def schedule_class(base, output, weight=None):
    """α = sin²(πt/2), with a learned exponent where a weight is given."""

    class Squared(base):
        def __call__(self, t):
            angle = math.pi / 2 * t
            alpha = torch.sin(angle) ** (2 if weight is None else weight)
            return output(
                alpha_t=alpha, sigma_t=1 - alpha, d_alpha_t=torch.sin(2 * angle), d_sigma_t=-torch.sin(2 * angle)
            )

        def snr_inverse(self, snr):
            return 2 / math.pi * torch.asin(torch.sqrt(snr / (1 + snr)))

    return Squared()


def test_own_schedulers():
    x_0, x_1, t = torch.randn(6, 5), torch.randn(6, 5), times(6)
    theirs, mine = (
        cls(schedule_class(base, output))
        for cls, base, output in zip(*(pair_of_classes(n) for n in ("AffineProbPath", "Scheduler", "SchedulerOutput")))
    )
    same_samples(theirs.sample(x_0, x_1, t), mine.sample(x_0, x_1, t))
    same_samples(theirs.sample(x_0, x_1, t), ours.AffineProbPath(theirs.scheduler).sample(x_0, x_1, t))  # duck-typed
    same(*(path.velocity_to_epsilon(x_0, x_1, torch.tensor(0.3)) for path in (theirs, mine)))


@pytest.mark.parametrize("one", ["alpha_t", "sigma_t", "d_alpha_t", "d_sigma_t"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_schedules_of_several_dtypes(one, dtype):
    class Mixed:
        def __call__(self, t):
            values = dict(alpha_t=t, sigma_t=1 - t, d_alpha_t=t.cos(), d_sigma_t=t.sin())
            return ours.SchedulerOutput(**values | {one: values[one].to(dtype)})

    x_0, x_1, t = torch.randn(6, 5), torch.randn(6, 5), times(6)
    theirs, mine = (cls(Mixed()) for cls in pair_of_classes("AffineProbPath"))
    same_samples(theirs.sample(x_0, x_1, t), mine.sample(x_0, x_1, t))


def test_overridden_methods():
    def derived(base):
        class Path(base):
            def assert_sample_shape(self, x_0, x_1, t):
                self.checked = True
                super().assert_sample_shape(x_0, x_1, t)

            def sample(self, x_0, x_1, t):
                s = super().sample(x_0=2 * x_0, x_1=x_1, t=t)
                s.dx_t = self.target_to_velocity(x_1, s.x_t, t[:, None])
                return s

            def target_to_velocity(self, x_1, x_t, t):
                return 3 * super().target_to_velocity(x_1, x_t, t)

        return Path()

    x_0, x_1, t = torch.randn(6, 5), torch.randn(6, 5), torch.rand(6)
    a, b = (derived(cls) for cls in pair_of_classes("CondOTProbPath"))
    same_samples(a.sample(x_0, x_1, t), b.sample(x_0, x_1, t))
    assert b.checked


# gradients, transforms


@pytest.mark.parametrize("wanted", ["x_0", "x_1", "t", "weight"])
def test_gradients_of_paths(wanted):
    results = []
    values = {"x_0": torch.randn(6, 5), "x_1": torch.randn(6, 5), "t": torch.rand(6), "weight": torch.tensor(2.0)}
    for cls, base, output in zip(*(pair_of_classes(n) for n in ("AffineProbPath", "Scheduler", "SchedulerOutput"))):
        given = {name: value.clone().requires_grad_(name == wanted) for name, value in values.items()}
        s = cls(schedule_class(base, output, given["weight"])).sample(given["x_0"], given["x_1"], given["t"])
        (gradient,) = torch.autograd.grad((s.x_t.sin() + s.dx_t**2).sum(), given[wanted])
        results.append((s, gradient))
    same_samples(results[0][0], results[1][0])
    same(results[0][1], results[1][1])


def test_no_grad_and_parameters():
    x_1 = torch.nn.Parameter(torch.randn(6, 5))
    x_0, t = torch.randn(6, 5), torch.rand(6)
    theirs, mine = pair("CondOTProbPath")
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            same_samples(theirs.sample(x_0, x_1, t), mine.sample(x_0, x_1, t))


def test_transforms():
    x_0, x_1, t = torch.randn(3, 6, 5), torch.randn(3, 6, 5), torch.rand(3, 6)
    theirs, mine = pair("CondOTProbPath")

    def both(path):
        def x_t(a, b, t):
            return path.sample(a, b, t).x_t

        mapped = torch.func.vmap(x_t)(x_0, x_1, t)
        tangent = torch.func.jvp(lambda t: x_t(x_0[0], x_1[0], t), (t[0],), (torch.ones(6),))[1]
        return mapped, tangent, torch.func.grad(lambda a: x_t(a, x_1[0], t[0]).sum())(x_0[0])

    for a, b in zip(both(theirs), both(mine)):
        same(a, b, strides=False)


@pytest.mark.compiles
def test_compiled():
    x_0, x_1, t = torch.randn(6, 5), torch.randn(6, 5), torch.rand(6)
    path = ours.AffineProbPath(ours.VPScheduler())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def sample(x_0, x_1, t):
        s = path.sample(x_0=x_0, x_1=x_1, t=t)
        return s.x_t, s.dx_t

    s = their_path.AffineProbPath(their_scheduler.VPScheduler()).sample(x_0, x_1, t)
    for a, b in zip(sample(x_0, x_1, t), (s.x_t, s.dx_t)):
        same(a, b)
