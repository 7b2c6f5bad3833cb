"""torchcfm's names against torchcfm itself: the same calls from the same seeds, and everything returned compared."""
# ruff: noqa: B023 (what is given to assert_same is called at once)

import copy
import inspect
import itertools
import math
import pickle
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch

import fmkernels.integrations.torchcfm as ours

pytest.importorskip("ot")
theirs = pytest.importorskip("torchcfm.conditional_flow_matching")
their_plans = pytest.importorskip("torchcfm.optimal_transport")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MATCHERS = {  # a matcher of either module
    "independent": lambda m, sigma=0.3: m.ConditionalFlowMatcher(sigma),
    "exact": lambda m, sigma=0.3: m.ExactOptimalTransportConditionalFlowMatcher(sigma),
    "target": lambda m, sigma=0.3: m.TargetConditionalFlowMatcher(sigma),
    "bridge": lambda m, sigma=0.3: m.SchrodingerBridgeConditionalFlowMatcher(sigma),
    "bridge_sinkhorn": lambda m, sigma=0.9: m.SchrodingerBridgeConditionalFlowMatcher(sigma, "sinkhorn"),
    "preserving": lambda m, sigma=0.3: m.VariancePreservingConditionalFlowMatcher(sigma),
}
CLASSES = [name for name in ours.__all__ if name.endswith("Matcher")]
OVERRIDING = [name for name in CLASSES if name != "ConditionalFlowMatcher"]
FUSED = {
    "independent": "linear",
    "exact": "linear",
    "target": "target",
    "bridge": "bridge",
    "preserving": "trigonometric",
}
each_matcher = pytest.mark.parametrize("matcher", MATCHERS)
each_fused = pytest.mark.parametrize("matcher", FUSED)


# NumPy's global generator, which torchcfm draws from.
seed_numpy, numpy_state = np.random.seed, np.random.get_state


def numpy_words():
    return numpy_state()[1].copy()


def outcome(call, module, seed=0):
    """What a call returns, or the class of its error, the warnings, and both generators' states after it."""
    torch.manual_seed(seed)
    seed_numpy(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = call(module)
        except Exception as error:  # the class is what is compared
            value = type(error)
    kinds = [warning.category for warning in caught if "torch.jit" not in str(warning.message)]
    return value, kinds, torch.get_rng_state(), (numpy_words(), numpy_state()[2])


def same(a, b, exact=True) -> bool:
    """Equal to the bit, NaN included, in dtype, shape, strides and structure."""
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        if not exact or not alike:
            return alike
        return a.stride() == b.stride() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y, exact) for x, y in zip(a, b))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return type(a) is type(b) and (a == b or a != a)


def assert_same(call, seed=0, exact=True):
    """A call of the module given does the same in both; returns what ours did."""
    value, kinds, *states = outcome(call, ours, seed)
    want, wanted_kinds, *wanted_states = outcome(call, theirs, seed)
    assert same(value, want, exact), f"{value} instead of {want}"
    assert kinds == wanted_kinds
    assert same(states, wanted_states), "another number of draws"
    return value


@pytest.fixture(autouse=True)
def fuse_small_batches(monkeypatch):
    monkeypatch.setattr(ours, "FEW", 0)


@pytest.fixture
def fused(monkeypatch):
    """The forms of the fused passes taken."""
    taken, run = [], ours.conditional_flow
    monkeypatch.setattr(ours, "conditional_flow", lambda *arguments: (taken.append(arguments[-1]), run(*arguments))[1])
    return taken


def sample(shape, dtype=F32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x0, x1 = (torch.randn(shape, dtype=F64, generator=generator).to(dtype) for _ in range(2))
    return x0, 2 * x1 + 1, torch.rand(shape[0], dtype=F64, generator=generator).to(dtype)


# ---- values -------------------------------------------------------------------------------------------------------

SHAPES = [(5, 3), (1, 2), (7, 1), (16, 33), (4, 3, 5, 6), (3, 2, 2, 3, 2), (33, 2)]


@each_matcher
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_numbers(matcher, dtype, shape):
    x0, x1, t = sample(shape, dtype)
    for seed, times, return_noise in itertools.product((0, 1), (None, t), (False, True)):
        value = assert_same(
            lambda m: MATCHERS[matcher](m).sample_location_and_conditional_flow(x0, x1, times, return_noise), seed
        )
        assert len(value) == 3 + return_noise and (times is None or value[0] is times)


@pytest.mark.parametrize("matcher", ["exact", "bridge", "bridge_sinkhorn"])
@pytest.mark.parametrize("shape", [(6, 3), (1, 2), (4, 2, 3, 3)], ids=str)
def test_the_same_guided_numbers(matcher, shape):
    x0, x1, t = sample(shape)
    labels = [None, torch.arange(shape[0]), torch.randn(shape[0], 2, dtype=F64)]
    for y0, y1, times, return_noise in itertools.product(labels, labels[:2], (None, t), (False, True)):
        value = assert_same(
            lambda m: MATCHERS[matcher](m).guided_sample_location_and_conditional_flow(
                x0, x1, y0, y1, t=times, return_noise=return_noise
            )
        )
        assert len(value) == 5 + return_noise and (value[3] is None) == (y0 is None)


def test_small_batches_are_not_fused_where_nothing_is_gained(monkeypatch):
    monkeypatch.undo()
    taken = []
    monkeypatch.setattr(ours, "fused", lambda form, *rest: (taken.append(form), 0))
    for rows in (1023, 1024):
        x0, x1, t = sample((rows, 16))
        for name in ("independent", "target"):
            MATCHERS[name](ours).sample_location_and_conditional_flow(x0, x1, t)
    assert taken == ["target", "linear", "target"]


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "rows_last": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "empty": lambda x: x[:0],
}


@each_fused
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_layout(matcher, layout, fused):
    """Strides too: a network in channels-last gets channels-last."""
    x0, x1, t = sample((4, 3, 5, 6))
    if layout == "empty" and matcher in ("exact", "bridge"):
        return  # no plan
    both, one = [LAYOUTS[layout](x) for x in (x0, x1)], [x0, LAYOUTS[layout](x1)]
    for pair in (both, one[: 2 * (layout != "empty")]):
        if pair:
            times = t[: len(pair[0])]
            assert_same(lambda m: MATCHERS[matcher](m).sample_location_and_conditional_flow(*pair, times))
    if layout in ("channels_last", "empty"):
        assert fused
    assert_same(
        lambda m: MATCHERS[matcher](m).sample_location_and_conditional_flow(x0, x1, torch.stack([t, t], 1)[:, 0])
    )


def test_what_is_returned_may_be_changed_in_place(fused):
    x0, x1 = (LAYOUTS["channels_last"](x) for x in sample((4, 3, 5, 6))[:2])
    weight = torch.ones(1, requires_grad=True)

    def call(m):
        with torch.no_grad():
            _, x_t, u_t = m.ConditionalFlowMatcher(0.3).sample_location_and_conditional_flow(x0, x1)
        return x_t.mul_(weight), u_t.detach_()

    assert_same(call)
    assert fused == ["linear"]


@each_fused
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_half_precision_keeps_dtypes_and_is_nearer(matcher, dtype, fused):
    x0, x1, t = sample((64, 40), dtype)
    t = (t * 0.8 + 0.1).to(dtype)

    def call(m):  # of given pairs: POT takes no half precision
        plain = m.ConditionalFlowMatcher.sample_location_and_conditional_flow
        return plain(MATCHERS[matcher](m), x0, x1, t, True)

    value, (want, *_) = assert_same(call, exact=False), outcome(call, theirs)
    assert fused == [FUSED[matcher]]
    noise = value[3]
    assert torch.equal(noise, want[3])
    exact = MATCHERS[matcher](theirs)
    x_t = exact.sample_xt(x0.double(), x1.double(), t.double(), noise.double())
    u_t = exact.compute_conditional_flow(x0.double(), x1.double(), t.double(), x_t)
    for i, truth in ((1, x_t), (2, u_t)):
        error, their_error = ((result[i].double() - truth).norm() for result in (value, want))
        assert error <= their_error * 1.01
        assert error <= torch.finfo(dtype).eps * truth.norm()


@each_matcher
@pytest.mark.parametrize("dtype", [BF16, F16, torch.int64, torch.complex64], ids=str)
def test_other_dtypes_do_or_fail_alike(matcher, dtype):
    x0, x1, _ = sample((5, 3), F32)
    for times in (None, torch.rand(5), torch.rand(5, dtype=F64)):
        assert_same(
            lambda m: MATCHERS[matcher](m).sample_location_and_conditional_flow(x0.to(dtype), x1.to(dtype), times),
            exact=times is not None,  # where t's dtype is another nothing is fused
        )


ODD = {
    "t_64": lambda x0, x1, t: (x0, x1, t.double()),
    "t_16": lambda x0, x1, t: (x0, x1, t.half()),
    "t_int": lambda x0, x1, t: (x0, x1, torch.tensor([0, 1, 0, 1, 1, 0])),
    "t_column": lambda x0, x1, t: (x0, x1, t[:, None]),
    "t_short": lambda x0, x1, t: (x0, x1, t[:3]),
    "t_scalar": lambda x0, x1, t: (x0, x1, t[0]),
    "t_number": lambda x0, x1, t: (x0, x1, 0.5),
    "t_list": lambda x0, x1, t: (x0, x1, t.tolist()),
    "t_array": lambda x0, x1, t: (x0, x1, t.numpy()),
    "x1_64": lambda x0, x1, t: (x0, x1.double(), t),
    "x1_array": lambda x0, x1, t: (x0, x1.numpy(), t),
    "x1_one": lambda x0, x1, t: (x0, x1[:1], t),
    "x1_few": lambda x0, x1, t: (x0, x1[:4], t),
    "x1_wide": lambda x0, x1, t: (x0, x1[..., :2], t),
    "x1_none": lambda x0, x1, t: (x0, None, t),
    "x0_few": lambda x0, x1, t: (x0[:4], x1, t),
    "x0_array": lambda x0, x1, t: (x0.numpy(), x1, t),
    "flat": lambda x0, x1, t: (x0[:, 0], x1[:, 0], t),
    "scalars": lambda x0, x1, t: (x0[0, 0], x1[0, 0], t[0]),
    "nan": lambda x0, x1, t: (x0 / 0 * 0, x1, t),
    "ends": lambda x0, x1, t: (x0, x1, t.round()),
    "subclass": lambda x0, x1, t: (x0, torch.nn.Parameter(x1), t),
    "none": lambda x0, x1, t: (None, x1, t),
}


@each_fused
@pytest.mark.parametrize("odd", ODD)
def test_odd_input_does_or_fails_alike(matcher, odd, capsys):
    arguments = ODD[odd](*sample((6, 3)))
    for return_noise in (False, True):
        assert_same(lambda m: MATCHERS[matcher](m).sample_location_and_conditional_flow(*arguments, return_noise))


# ---- hooks --------------------------------------------------------------------------------------------------------

HOOKS = {  # overrides that call what they override
    "compute_mu_t": lambda old: lambda self, x0, x1, t: 2 * old(self, x0, x1, t),
    "compute_sigma_t": lambda old: lambda self, t: 3 * old(self, t) + 0.1,
    "sample_xt": lambda old: lambda self, x0, x1, t, epsilon: old(self, x0, x1, t, epsilon) - x0,
    "compute_conditional_flow": lambda old: lambda self, x0, x1, t, xt: old(self, x0, x1, t, xt) + xt,
}


def overridden(how, cls, hook):
    """A matcher of which one hook is overridden."""
    new = HOOKS[hook](getattr(cls, hook))
    if how == "subclass":
        return type("Own", (cls,), {hook: new})(0.3)
    if how == "grandchild":
        return type("Child", (type("Own", (cls,), {hook: new}),), {})(0.3)
    if how == "mixin":
        return type("Own", (type("Mixin", (), {hook: new}), cls), {})(0.3)
    matcher = cls(0.3)
    if how == "instance":
        setattr(matcher, hook, types.MethodType(new, matcher))
    elif how == "function":
        setattr(matcher, hook, lambda *arguments: new(matcher, *arguments))
    else:  # another's, with another sigma
        setattr(matcher, hook, getattr(cls(0.8), hook))
    return matcher


@pytest.mark.parametrize("how", ["subclass", "grandchild", "mixin", "instance", "function", "another"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_hook_of_ones_own_is_used(cls, how, fused):
    x0, x1, t = sample((5, 3))
    for hook in HOOKS:
        assert_same(
            lambda m: overridden(how, getattr(m, cls), hook).sample_location_and_conditional_flow(x0, x1, t, True)
        )
    assert not fused


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_replaced_in_the_class_is_used(hook, monkeypatch, fused):
    x0, x1, t = sample((5, 3))
    for module in (ours, theirs):
        old = getattr(module.ConditionalFlowMatcher, hook)
        monkeypatch.setattr(module.ConditionalFlowMatcher, hook, HOOKS[hook](old))
    for cls in CLASSES:
        assert_same(lambda m: getattr(m, cls)(0.3).sample_location_and_conditional_flow(x0, x1, t))
    assert len(fused) == sum(hook in vars(getattr(theirs, cls)) for cls in OVERRIDING)


def test_hooks_of_ones_own_may_take_anything():
    x, t = np.ones((3, 2)), np.ones((3, 1))

    class Points:
        def sample_noise_like(self, x):
            return np.zeros_like(x)

        def sample_xt(self, x0, x1, t, epsilon):
            return t * x1 + (1 - t) * x0 + epsilon

    def own(m):
        return type("Own", (Points, m.ConditionalFlowMatcher), {})()

    assert_same(lambda m: own(m).sample_location_and_conditional_flow(x, 2 * x, t))


@pytest.mark.parametrize("name", OVERRIDING)
def test_a_sigma_that_no_hook_asks_for_may_be_missing(name, fused):
    x0, x1, t = sample((5, 3))

    def own(m):
        class Own(getattr(m, name)):
            def __init__(self):
                self.ot_sampler = m.OTPlanSampler("exact")

            def compute_sigma_t(self, t):
                return 0.25

            def compute_conditional_flow(self, x0, x1, t, xt):
                return x1 - x0 + xt

        return Own().sample_location_and_conditional_flow(x0, x1, t)

    assert_same(own)
    assert fused == []


@each_fused
def test_a_sigma_that_is_drawn(matcher, fused):
    x0, x1, t = sample((5, 3))

    def own(m):
        kind = type(MATCHERS[matcher](m))
        drawn = property(lambda self: float(torch.rand(())) / 2, lambda self, value: None)
        made = type("Own", (kind,), {"sigma": drawn})(0.3)
        return made.sample_location_and_conditional_flow(x0, x1, t)

    assert_same(own)
    assert fused == []


@pytest.mark.parametrize(
    "name", ["ExactOptimalTransportConditionalFlowMatcher", "SchrodingerBridgeConditionalFlowMatcher"]
)
def test_the_method_above_draws_no_plan(name):
    """Neither when called past the class, nor twice when two such classes are inherited from."""
    x0, x1, t = sample((8, 3))

    def past(m):
        kind = getattr(m, name)

        class Own(kind):
            def sample_location_and_conditional_flow(self, x0, x1, t=None, return_noise=False):
                x0, x1 = self.ot_sampler.sample_plan(x0, x1, replace=False)
                return super(kind, self).sample_location_and_conditional_flow(x0, x1, t, return_noise)

        return Own(0.3).sample_location_and_conditional_flow(x0, x1, t)

    assert_same(past)

    def twice(m):
        bases = m.SchrodingerBridgeConditionalFlowMatcher, m.ExactOptimalTransportConditionalFlowMatcher
        return type("Own", bases, {})(0.3).sample_location_and_conditional_flow(x0, x1, t)

    assert_same(twice)


def test_the_plan_of_a_bridge_has_the_sigma_that_is_set():
    def reg(m):
        class Doubled(m.ConditionalFlowMatcher):
            def __init__(self, sigma):
                super().__init__(2 * sigma)

        return type("Own", (m.SchrodingerBridgeConditionalFlowMatcher, Doubled), {})(0.5, "sinkhorn").ot_sampler.reg

    assert_same(reg)


def test_names_of_ones_own(fused):
    x0, x1, t = sample((5, 3))
    hooks = ("sample_location_and_conditional_flow", "sample_noise_like", "sample_xt", "compute_mu_t")
    hooks += ("compute_sigma_t", "compute_conditional_flow")

    def borrowed(m):
        made = type("Borrowed", (), {name: getattr(m.ConditionalFlowMatcher, name) for name in hooks})()
        made.sigma = 0.3
        return made.sample_location_and_conditional_flow(x0, x1, t)

    assert_same(borrowed)
    for name in set(vars(ours.SchrodingerBridgeConditionalFlowMatcher)) | set(vars(ours.ConditionalFlowMatcher)):
        assert name.startswith("__") or hasattr(theirs.SchrodingerBridgeConditionalFlowMatcher, name), name


@pytest.mark.parametrize("matcher", ["independent", "target", "preserving"])  # a plan is not traced
def test_jit_trace(matcher):
    x0, x1, t = (LAYOUTS["channels_last"](x) if x.dim() == 4 else x for x in sample((4, 3, 5, 6)))
    made = MATCHERS[matcher](ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing itself
        traced = torch.jit.trace(
            lambda *a: made.sample_location_and_conditional_flow(*a)[1:], (x0, x1, t), check_trace=False
        )
    torch.manual_seed(2)
    want = made.sample_location_and_conditional_flow(x0 + 1, x1, t)[1:]
    torch.manual_seed(2)
    assert same(list(traced(x0 + 1, x1, t)), list(want))


def test_a_hook_of_another_family_is_used(fused):
    x0, x1, t = sample((5, 3))

    def matcher(m):
        flow = m.ConditionalFlowMatcher.compute_conditional_flow
        return type("Own", (m.TargetConditionalFlowMatcher,), {"compute_conditional_flow": flow})(0.3)

    assert_same(lambda m: matcher(m).sample_location_and_conditional_flow(x0, x1, t))
    assert not fused


@each_fused
def test_what_is_no_hook_of_the_formulas_keeps_the_fused_pass(matcher, fused):
    """Noise of one's own, a subclass with attributes, sigma set afterwards."""
    x0, x1, t = sample((5, 3))

    def own(m):
        cls = type(MATCHERS[matcher](m))

        def sample_noise_like(self, x):
            return torch.rand_like(x) + self.shift

        own = type("Own", (cls,), {"sample_noise_like": sample_noise_like, "shift": 7.0, "extra": lambda self: 1})(0.5)
        own.sigma = 1
        return own

    assert_same(lambda m: own(m).sample_location_and_conditional_flow(x0, x1, t, True))
    assert fused == [FUSED[matcher]]
    assert_same(lambda m: own(m).sample_location_and_conditional_flow(x0, x1, t.double(), True))
    assert len(fused) == 1


def test_noise_of_another_dtype_or_shape(fused):
    x0, x1, t = sample((5, 3))
    for noise in (torch.randn(5, 3, dtype=F64), torch.randn(5, 1), torch.tensor(2.0), 0.5, torch.nn.Parameter(x0)):
        own = lambda m, noise=noise: type(  # noqa: E731
            "Own", (m.ConditionalFlowMatcher,), {"sample_noise_like": lambda self, x: noise}
        )(0.3)
        assert_same(lambda m: own(m).sample_location_and_conditional_flow(x0, x1, t, True))
    assert not fused


SIGMAS = {
    "zero": 0.0, "integer": 2, "bool": True, "float64": np.float64(0.3), "float32": np.float32(0.3), "tiny": 1e-30,
    "scalar": torch.tensor(0.3), "scalar64": torch.tensor(0.3, dtype=F64), "one": torch.tensor([0.3]),
    "nan": math.nan, "huge": 1e300,
}  # fmt: skip


@pytest.mark.parametrize("sigma", SIGMAS)
@each_fused
def test_sigmas(matcher, sigma, fused):
    x0, x1, t = sample((5, 3))
    assert_same(lambda m: MATCHERS[matcher](m, SIGMAS[sigma]).sample_location_and_conditional_flow(x0, x1, t))
    assert_same(lambda m: MATCHERS[matcher](m, SIGMAS[sigma]).compute_lambda(t))
    assert not fused or isinstance(SIGMAS[sigma], (float, int))


@each_fused
def test_the_hooks_called_alone(matcher):
    x0, x1, t = sample((5, 3, 2), F64)
    xt, made = x0 + 1, MATCHERS[matcher]
    for times in (t, 0.4):
        for call in (
            lambda m: made(m).compute_mu_t(x0, x1, times),
            lambda m: made(m).compute_sigma_t(times),
            lambda m: made(m).sample_xt(x0, x1, times, xt),
            lambda m: made(m).compute_conditional_flow(x0, x1, times, xt),
            lambda m: made(m).compute_lambda(times),
            lambda m: made(m).sample_noise_like(x0),
            lambda m: m.pad_t_like_x(times, x0),
        ):
            assert_same(call)


# ---- gradients, transforms, compilation ---------------------------------------------------------------------------


@each_fused
def test_gradients(matcher, fused):
    x0, x1, t = sample((5, 3))

    def gradients(m, leaf):
        inputs = [x.clone() for x in (x0, x1, t)]
        inputs[leaf].requires_grad_()
        matcher_of_m = MATCHERS[matcher](m)
        _, xt, ut = matcher_of_m.sample_location_and_conditional_flow(*inputs)
        total = (xt.square() + 3 * ut.square()).sum()
        return torch.autograd.grad(total, inputs[leaf])

    for leaf in range(3):
        assert_same(lambda m: gradients(m, leaf))
    assert not fused
    with torch.no_grad():
        assert_same(lambda m: MATCHERS[matcher](m).sample_location_and_conditional_flow(x0.requires_grad_(), x1, t))
    assert fused


def test_transforms():
    x0, x1, t = sample((5, 3))

    def call(m):
        def flow(x1):
            own = type("Own", (m.ConditionalFlowMatcher,), {"sample_noise_like": lambda self, x: 0 * x})(0.1)
            return own.sample_location_and_conditional_flow(x0, x1, t)[1]

        return torch.func.jvp(flow, (x1,), (x0,)), torch.vmap(flow)(torch.stack([x1, x0]))

    assert_same(call)


@pytest.mark.compiles
def test_compiles_in_one_graph():
    x0, x1, t = sample((5, 3))

    def flow(x0, x1, t):
        return ours.TargetConditionalFlowMatcher(0.1).sample_location_and_conditional_flow(x0, x1, t, True)

    torch.manual_seed(0)
    values = torch.compile(flow, fullgraph=True, backend="aot_eager")(x0, x1, t)
    torch.manual_seed(0)
    for value, want in zip(values, flow(x0, x1, t), strict=True):
        torch.testing.assert_close(value, want)


# ---- errors, names, objects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0, 0.0, -1.0, 1e-4, 1e-3])
def test_small_sigmas_of_the_bridge(sigma):
    assert_same(lambda m: m.SchrodingerBridgeConditionalFlowMatcher(sigma).sigma)
    assert_same(lambda m: m.SchrodingerBridgeConditionalFlowMatcher(sigma, ot_method="sinkhorn").ot_sampler.reg)


def test_errors_say_what_was_expected():
    x0, x1, t = sample((5, 3))
    matcher = ours.ConditionalFlowMatcher()
    with pytest.raises(AssertionError, match="t: expected 5 times, one a sample of x0, got 3"):
        matcher.sample_location_and_conditional_flow(x0, x1, t[:3])
    with pytest.raises(ValueError, match="sigma: expected a number above 0, got -1"):
        ours.SchrodingerBridgeConditionalFlowMatcher(-1)
    with pytest.raises(ValueError, match="method: expected one of 'exact', .*, got 'emd'"):
        ours.SchrodingerBridgeConditionalFlowMatcher(1.0, "emd")
    with pytest.raises(ValueError, match="method: expected 'exact', 'sinkhorn' or None, got 'partial'"):
        ours.wasserstein(x0, x1, "partial")
    with pytest.raises(AssertionError, match="power: expected 1 or 2, got 3"):
        ours.wasserstein(x0, x1, power=3)


def test_names_and_signatures():
    """Every class and function of torchcfm's two modules, with its parameters first and in its order."""
    for module in (theirs, their_plans):
        defined = {
            name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
        }
        assert set(defined) <= set(ours.__all__)
        for name, value in defined.items():
            functions = [(value, getattr(ours, name))]
            if isinstance(value, type):
                methods = [each for each in dir(value) if callable(getattr(value, each)) and not each.startswith("__")]
                functions = [
                    (getattr(value, each), getattr(getattr(ours, name), each)) for each in ["__init__", *methods]
                ]
                bases = {base.__name__ for base in value.__mro__[1:-1]}
                assert bases <= {base.__name__ for base in getattr(ours, name).__mro__}
            for original, own in functions:
                wanted, found = (list(inspect.signature(f).parameters.values()) for f in (original, own))
                more = found[len(wanted) :]
                assert [(p.name, p.default, p.kind) for p in wanted] == [
                    (p.name, p.default, p.kind) for p in found[: len(wanted)]
                ]
                assert all(p.kind == p.KEYWORD_ONLY for p in more), f"{name}: {more}"


@each_matcher
def test_copies_and_pickles(matcher):
    x0, x1, t = sample((5, 3))
    for copied in (copy.deepcopy, copy.copy, lambda it: pickle.loads(pickle.dumps(it))):
        assert_same(lambda m: copied(MATCHERS[matcher](m)).sample_location_and_conditional_flow(x0, x1, t))
    assert set(vars(MATCHERS[matcher](ours))) == set(vars(MATCHERS[matcher](theirs)))


class Coupling(torch.nn.Module):
    """A matcher as people keep it: in a module, used by the workers of a loader."""

    def __init__(self, m):
        super().__init__()
        self.matcher = m.ExactOptimalTransportConditionalFlowMatcher(0.1)

    def forward(self, samples):
        x1 = torch.stack(samples)
        return self.matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)


def test_in_the_workers_of_a_loader():
    data = list(torch.randn(9, 3))

    def epoch(m):
        torch.manual_seed(3)
        loader = torch.utils.data.DataLoader(
            data, batch_size=4, collate_fn=Coupling(m), num_workers=1, worker_init_fn=seed_numpy
        )
        return [tuple(batch) for batch in loader]

    assert_same(epoch)


def test_importing_imports_no_peer():
    program = "import sys, fmkernels.integrations.torchcfm; assert not {'torchcfm', 'ot', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
