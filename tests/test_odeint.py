"""`odeint`: torchdiffeq's contract, call by call against it, and what must hold without it."""

import math
import sys
import warnings

import pytest
import torch
from driven import FORMS, Oscillator, assert_same, both, grid, parts
from problems import PROBLEMS

from fmkernels.integrations import torchdiffeq as ours
from fmkernels.ops.runge_kutta_step import ACCEPTED
from fmkernels.solvers._odeint_inputs import problem
from fmkernels.solvers._shared_step import SharedStep

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
TOLERANCE = {"dopri5": 1e-6, "dopri8": 1e-6, "bosh3": 1e-5, "fehlberg2": 1e-3, "adaptive_heun": 1e-4}


@pytest.fixture
def theirs():
    return pytest.importorskip("torchdiffeq")


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods(theirs, method, form, direction):
    tolerance = TOLERANCE[method]
    # The error estimate of a short first step of dopri8 is rounding.
    options = {"first_step": 0.4} if method == "dopri8" else {}
    (mine, f), (other, g) = both(
        theirs,
        lambda: Oscillator(form),
        grid(direction),
        method=method,
        rtol=tolerance,
        atol=tolerance,
        options=options,
    )
    assert f.calls == g.calls
    assert_same(mine, other)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize(
    "options",
    [{}, {"step_size": 0.13}, {"step_size": 0.4, "interp": "cubic"}, {"step_size": 0.25, "perturb": True}],
    ids=["grid", "step_size", "cubic", "perturb"],
)
def test_fixed_methods(theirs, method, form, direction, options):
    (mine, f), (other, g) = both(theirs, lambda: Oscillator(form), grid(direction), method=method, options=options)
    assert f.calls <= g.calls if "interp" in options else f.calls == g.calls
    assert_same(mine, other)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("method", FIXED)
def test_what_fixed_methods_show(theirs, method, perturb, direction):
    """The times given to func, just inside a step's ends with ``perturb``, and what callback_step sees."""

    class Watched(Oscillator):
        def forward(self, t, y):
            self.seen.append(("func", t, y, y))
            return super().forward(t, y)

    options = {"perturb": perturb, "step_size": 0.25}
    (_, f), (_, g) = both(
        theirs, lambda: Watched(callbacks=("callback_step",)), grid(direction), method=method, options=options
    )
    assert [x[0] for x in f.seen] == [x[0] for x in g.seen]
    for (name, t, y, dt), (_, t_, y_, dt_) in zip(f.seen, g.seen, strict=True):
        assert_same((t, y, dt), (t_, y_, dt_))
        if perturb and name == "func":  # inside or not is a matter of the last bit
            edge = abs(float(t) * 64 - round(float(t) * 64)) < 1e-9
            assert not edge or float(t - t_) == 0


def constructor(func, y0, t):
    assert t[0] == 0.5 or t[0] == 3.5
    func(t[0], y0)
    return torch.linspace(float(t[0]), float(t[-1]), 23, dtype=t.dtype)


@pytest.mark.parametrize("direction", [1, -1])
def test_a_grid_of_the_users(theirs, direction):
    options = {"grid_constructor": constructor}
    (mine, f), (other, g) = both(theirs, Oscillator, grid(direction), method="midpoint", options=options)
    assert f.calls == g.calls
    assert_same(mine, other)


OPTIONS = {
    "first_step": {"first_step": 0.05},
    "first_step_tensor": {"first_step": torch.tensor(0.02)},
    "max_step": {"max_step": 0.07},
    "min_step": {"min_step": 0.11},
    "min_step_reached": {"min_step": 0.1, "first_step": 0.1},
    "factors": {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.5},
    "max_num_steps": {"max_num_steps": 400},
    "step_t": {"step_t": torch.tensor([0.1, 0.77, 1.9, 5.0])},
    "jump_t": {"jump_t": torch.tensor([1.234, 2.5], dtype=torch.float64)},
    "both": {"step_t": torch.tensor([2.25, 0.9]), "jump_t": torch.tensor([1.7, 2.251])},
    "norm": {"norm": lambda y: max(x.abs().max() for x in parts(y))},
}


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("form", ["tensor", "tuple", "complex"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(theirs, name, form, direction):
    callbacks = ("callback_step", "callback_accept_step", "callback_reject_step")
    for seen in ((), callbacks):
        (mine, f), (other, g) = both(
            theirs,
            lambda seen=seen: Oscillator(form, seen),
            grid(direction),
            rtol=1e-7,
            atol=1e-8,
            options=OPTIONS[name],
        )
        assert f.calls == g.calls
        assert_same(mine, other)
    assert [x[0] for x in f.seen] == [x[0] for x in g.seen]
    for (_, t, y, dt), (_, t_, y_, dt_) in zip(f.seen, g.seen, strict=True):
        assert_same((t, *parts(y), dt), (t_, *parts(y_), dt_), 1e-7)  # a tiny error is rounding
    assert {x[0] for x in f.seen} >= {"callback_step", "callback_accept_step"}


def test_a_jump_is_evaluated_on_both_sides(theirs):
    class Switch(Oscillator):
        def forward(self, t, y):
            self.seen.append(float(t))
            self.calls += 1
            return torch.where(t < 1.7, y.new_tensor(1.0), y.new_tensor(-2.0)).expand_as(y)

    t = torch.tensor([0.5, 3.0], dtype=torch.float64)
    options = {"jump_t": torch.tensor([1.7], dtype=torch.float64)}
    (mine, f), (other, g) = both(theirs, Switch, t, options=options)
    assert f.seen == pytest.approx(g.seen, abs=1e-12)
    before, after = math.nextafter(1.7, 0), math.nextafter(1.7, 2)
    assert f.seen.count(before) == 2 and f.seen.count(after) == 1
    assert_same(mine, other)
    assert_same(mine[1], mine[0] + 1.2 - 2 * 1.3)


def test_a_step_that_ends_on_a_jump_by_itself_sees_its_far_side():
    times = []

    def switch(t, y):
        times.append(float(t))
        return torch.where(t < 1.0, 1.0, -1.0).to(y) * torch.ones_like(y)

    options = {"jump_t": torch.tensor([1.0], dtype=torch.float64), "first_step": 0.5}
    t = torch.tensor([0.5, 2.0], dtype=torch.float64)
    y = ours.odeint(switch, torch.zeros(2, dtype=torch.float64), t, options=options)
    assert math.nextafter(1.0, 2) in times
    assert y[1].tolist() == pytest.approx([-0.5, -0.5])


TOLERANCES = {
    "tensor": (torch.tensor(1e-5), torch.rand(3, 5, 2, dtype=torch.float64) * 1e-5),
    "column": (torch.full((2,), 1e-6), 1e-7),
    "tuple": ((1e-4, 1e-6), (torch.tensor(1e-6), torch.rand(5).repeat(2) * 1e-5)),
    "tensor of a tuple": (torch.tensor([1e-4, 1e-6]), 1e-7),
}


@pytest.mark.parametrize("name", TOLERANCES)
def test_tolerances(theirs, name):
    rtol, atol = TOLERANCES[name]
    form = "tuple" if "tuple" in name else "tensor"
    (mine, f), (other, g) = both(theirs, lambda: Oscillator(form), grid(1), rtol=rtol, atol=atol)
    assert f.calls == g.calls
    assert_same(mine, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_single_precision(theirs, method, form):
    class Single(Oscillator):
        def start(self):
            return super().start(torch.float32)

    t = grid(1, torch.float32)
    (mine, f), (other, g) = both(theirs, lambda: Single(form), t, method=method, rtol=1e-4, atol=1e-4)
    assert abs(f.calls - g.calls) <= 0.1 * g.calls  # rounding may turn a decision
    assert_same(mine, other, 1e-3)


def test_components_of_two_dtypes_become_one(theirs):
    class Mixed(Oscillator):
        def start(self):
            x, v = super().start()
            return x.float(), v

    (mine, f), (other, g) = both(theirs, lambda: Mixed("tuple"), grid(1))
    assert f.calls == g.calls
    assert_same(mine, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_keep_their_times(dtype):
    def f(t, y):
        assert t.dtype == torch.float32 and y.dtype == dtype
        return -y * t

    y = ours.odeint(f, torch.ones(4, dtype=dtype), torch.tensor([0.0, 1.0, 1.5]), rtol=1e-3, atol=1e-3)
    assert y.dtype == dtype
    assert y[:, 0].tolist() == pytest.approx([1, math.exp(-0.5), math.exp(-1.125)], abs=0.02)


def test_what_func_may_return(theirs):
    class Loose(Oscillator):
        def forward(self, t, y):
            self.calls += 1
            return [t.to(torch.float32), torch.cat([v.reshape(-1) for v in y])[1:]]

    class Constant(Oscillator):
        def forward(self, t, y):
            self.calls += 1
            return torch.tensor([1.0, 2.0])  # broadcast, and converted to float64

    for func, method in ((lambda: Loose("tuple"), "dopri5"), (Constant, "rk4")):
        (mine, f), (other, g) = both(theirs, func, grid(1), method=method)
        assert f.calls == g.calls
        assert_same(mine, other, 1e-6)  # float32 values


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4"])
@pytest.mark.parametrize("options", [{}, {"first_step": 0.1}], ids=["", "first_step"])
def test_a_func_that_returns_the_same_memory_every_time(method, options):
    """torchdiffeq copies what func returns; here it is used where it lies, and this case must be noticed."""
    buffer = torch.empty(3, dtype=torch.float64)

    def reused(t, y):
        torch.mul(y, -t, out=buffer)
        return buffer

    t = torch.linspace(0, 1, 11 if method == "rk4" else 3, dtype=torch.float64)
    y0 = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    if method == "rk4":
        options = {}
    arguments = {"method": method, "options": options, "rtol": 1e-5, "atol": 1e-5}
    assert_same(ours.odeint(reused, y0, t, **arguments), ours.odeint(lambda t, y: -y * t, y0, t, **arguments), 0)


def test_one_time(theirs):
    for method in ("dopri5", "rk4"):
        (mine, _), (other, _) = both(theirs, Oscillator, grid(1)[:1], method=method)
        assert_same(mine, other, 0)


def test_nothing_is_written_to_the_users_tensors():
    f = Oscillator()
    y0, t = f.start(), grid(1)
    copies = y0.clone(), t.clone()
    options = {"step_t": torch.tensor([1.0])}
    for kind in (None, options):
        result = ours.odeint(f, y0, t, options=kind)
        result.zero_()
        assert torch.equal(y0, copies[0]) and torch.equal(t, copies[1])
    assert list(options) == ["step_t"]


def test_a_state_that_callbacks_keep_does_not_change():
    f = Oscillator(callbacks=("callback_step", "callback_accept_step"))
    y = ours.odeint(f, f.start(), grid(1))
    accepted = [seen[2] for seen in f.seen if seen[0] == "callback_accept_step"]
    assert torch.equal(accepted[0], y[0]) and len({float(x.sum()) for x in accepted}) == len(accepted)


def test_warnings(theirs):
    calls = [
        {"method": "dopri5", "options": {"step_size": 0.1, "nonsense": 3}},
        {"method": "rk4", "options": {"max_num_steps": 3, "step_size": 0.1}},
        {"method": "adaptive_heun", "options": {"interp": "cubic"}, "rtol": 1e-3, "atol": 1e-3},
        {"method": "fehlberg2", "options": {"perturb": True}, "rtol": 1e-3, "atol": 1e-3},
    ]
    for arguments in calls:
        texts = []
        for library in (ours, theirs):
            f = Oscillator()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                library.odeint(f, f.start(), grid(1), **arguments)
            texts.append([(w.category, str(w.message)) for w in caught])
        assert texts[0] == texts[1] and len(texts[0]) == 1
    for library in (ours, theirs):
        f = Oscillator(callbacks=("callback_accept_step",))
        with pytest.warns(UserWarning, match="Solver 'rk4' does not support callbacks {'callback_accept_step'}"):
            library.odeint(f, f.start(), grid(1), method="rk4")


T, Y = torch.tensor([0.0, 1.0]), torch.ones(2)
BAD = {
    "func returns a wrong shape": ((lambda t, y: torch.ones(3), Y, T), {}, "func"),
    "func returns too little": ((lambda t, y: (y[0],), (Y, Y), T), {}, "func"),
    "func returns None": ((lambda t, y: None, Y, T), {}, "func"),
    "y0 is a list": ((lambda t, y: y, [Y], T), {}, "y0"),
    "t is a list": ((lambda t, y: y, Y, [0.0, 1.0]), {}, "t"),
    "t is integer": ((lambda t, y: y, Y, torch.tensor([0, 1])), {}, "t"),
    "t is a number": ((lambda t, y: y, Y, torch.tensor(1.0)), {}, "t"),
    "t is a matrix": ((lambda t, y: y, Y, T[None]), {}, "t"),
    "t is empty": ((lambda t, y: y, Y, T[:0]), {}, "t"),
    "t repeats": ((lambda t, y: y, Y, torch.tensor([0.0, 1.0, 1.0])), {}, "t"),
    "t turns back": ((lambda t, y: y, Y, torch.tensor([0.0, 1.0, 0.5])), {}, "t"),
    "t is NaN": ((lambda t, y: y, Y, torch.tensor([0.0, math.nan])), {}, "t"),
    "method is unknown": ((lambda t, y: y, Y, T), {"method": "rk5"}, "method"),
    "rtol requires a gradient": ((lambda t, y: y, Y, T), {"rtol": torch.tensor(1e-3, requires_grad=True)}, "rtol"),
    "too many tolerances": ((lambda t, y: y, (Y, Y), T), {"atol": (1e-3, 1e-3, 1e-3)}, "atol"),
    "atol has a wrong shape": ((lambda t, y: y, Y, T), {"atol": torch.full((3,), 1e-3)}, "atol"),
    "steps and a grid": (
        (lambda t, y: y, Y, T),
        {"method": "euler", "options": {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}},
        "step_size",
    ),
    "the grid ends early": (
        (lambda t, y: y, Y, T),
        {"method": "euler", "options": {"grid_constructor": lambda f, y, t: t[:1]}},
        "grid_constructor",
    ),
    "interp is unknown": ((lambda t, y: y, Y, T), {"method": "rk4", "options": {"interp": "quintic"}}, "interp"),
    "step_t repeats jump_t": (
        (lambda t, y: y, Y, T),
        {"options": {"step_t": torch.tensor([0.5]), "jump_t": torch.tensor([0.5])}},
        "jump_t",
    ),
    "an event with three times": (
        (lambda t, y: y, Y, torch.tensor([0.0, 1.0, 2.0])),
        {"event_fn": lambda t, y: y[0]},
        "t",
    ),
    "max_num_steps": (
        (lambda t, y: -50 * y, Y, T),
        {"options": {"max_num_steps": 5}},
        "max_num_steps exceeded \\(5>=5\\)",
    ),
    "func is NaN": ((lambda t, y: y * math.nan, Y, T), {}, "non-finite values in state `y`"),
    "y0 is NaN": ((lambda t, y: y, Y * math.nan, T), {}, "non-finite values in state `y`"),
    "y0 is infinite": ((lambda t, y: y, Y * math.inf, T), {"options": {"first_step": 0.1}}, "non-finite"),
    "a pole": ((lambda t, y: y * y, Y, torch.tensor([0.0, 2.0])), {}, "underflow in dt|non-finite"),
    "first_step underflows": ((lambda t, y: y, Y, T + 1), {"options": {"first_step": 1e-30}}, "underflow in dt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_what_torchdiffeq_raises(theirs, name):
    positional, keywords, text = BAD[name]
    with pytest.raises(Exception) as other:
        theirs.odeint(*positional, **keywords)
    with pytest.raises(other.type, match=text):
        ours.odeint(*positional, **keywords)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3, Y, T), TypeError, "func: expected a callable"),
        ((torch.sin, torch.ones(2, dtype=torch.int64), T), TypeError, "y0: expected a floating"),
        ((torch.sin, (Y, 3.0), T), TypeError, r"y0\[1\]: expected a torch.Tensor"),
        ((torch.sin, (), T), ValueError, "y0: expected a tuple of at least one"),
    ],
)
def test_bad_input(arguments, error, text):
    with pytest.raises(error, match=text):
        ours.odeint(*arguments)


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"first_step": "short"}, {"min_step": None}])
def test_bad_options(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        ours.odeint(lambda t, y: y, Y, T, options=options)


def test_a_field_that_is_nan_beyond_a_wall_is_passed_with_shorter_steps():
    """y' = −√y reaches 0 at t = 2: steps that go beyond are not finite, and are taken again."""
    t = torch.tensor([0.0, 1.9], dtype=torch.float64)
    options = {"first_step": 5.0}
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for y in (y0.detach(), y0):
        end = ours.odeint(lambda t, y: -torch.sqrt(y), y, t, rtol=1e-8, atol=1e-10, options=options)[1]
        assert end.tolist() == pytest.approx([0.05**2] * 2, rel=1e-4)
    end.sum().backward()
    assert y0.grad.tolist() == pytest.approx([0.05] * 2, rel=1e-4)  # y = (√y0 − t/2)²


def test_torchdiffeqs_own_methods(theirs, monkeypatch):
    for method, options in (("explicit_adams", {"step_size": 0.1}), ("implicit_adams", {"step_size": 0.1})):
        (mine, f), (other, g) = both(theirs, Oscillator, grid(1), method=method, options=options)
        assert f.calls == g.calls
        assert torch.equal(mine, other)
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    f = Oscillator()
    with pytest.raises(ImportError, match="method: 'scipy_solver'.*pip install torchdiffeq"):
        ours.odeint(f, f.start(), grid(1), method="scipy_solver")
    ours.odeint(f, f.start(), grid(1))


@pytest.mark.parametrize("name", ["linear", "spiral", "van der Pol", "Lotka-Volterra", "Lorenz"])
def test_known_solutions(name):
    case = PROBLEMS[name]
    t = torch.linspace(*case.t_span, 7, dtype=torch.float64)
    for method, tolerance in (("dopri5", 1e-9), ("dopri8", 1e-11), ("bosh3", 1e-7)):
        y = ours.odeint(case.f, case.y0, t, rtol=tolerance, atol=tolerance, method=method)
        assert (y - case.solution(t)).abs().max() < 3e5 * tolerance


def test_the_loop_leaves_no_op_to_python(monkeypatch):
    """Without options a step is func and the ops alone: the host loop is not entered, and counts stay on the device."""
    f = Oscillator()
    monkeypatch.setattr(SharedStep, "attempt", None)
    with torch.no_grad():
        solver = SharedStep(problem(f, f.start(), grid(1), 1e-7, 1e-9, None, None))
        solver.run()
    attempts = int(solver.integrator.counters[ACCEPTED : ACCEPTED + 2].sum())
    assert f.calls == 2 + 6 * attempts
