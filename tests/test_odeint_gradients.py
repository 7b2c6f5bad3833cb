"""`odeint` differentiated through its steps, and `odeint_dense`."""

import math

import pytest
import torch
from driven import FORMS, Oscillator, assert_same, grid, parts

from fmkernels.integrations import torchdiffeq as ours

ADAPTIVE = ("dopri5", "bosh3")
T, Y = torch.tensor([0.0, 1.0]), torch.ones(2)


@pytest.fixture
def theirs():
    return pytest.importorskip("torchdiffeq")


class Field(torch.nn.Module):
    def __init__(self, seed=5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64) / 2)
        self.bias = torch.nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64) / 2)
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, t, y):
        return torch.tanh(y @ self.weight + self.bias * torch.cos(t))


CASES = [
    ("dopri5", {}),
    ("bosh3", {}),
    ("rk4", {}),
    ("heun3", {"step_size": 0.3}),
    ("midpoint", {"step_size": 0.3, "interp": "cubic"}),
    ("dopri5", {"step_t": torch.tensor([0.7])}),
    ("dopri5", {"jump_t": torch.tensor([0.8])}),
    ("dopri5", {"norm": lambda y: y.abs().max()}),
]


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize(("method", "options"), CASES)
def test_gradients(theirs, method, options, direction):
    """Equal to torchdiffeq's through a first step that does not depend on the state, else to within the tolerance."""
    if method in ADAPTIVE:
        options = {"first_step": 0.1, **options}
    results = []
    for library in (ours, theirs):
        field = Field()
        y0 = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
        t = torch.tensor([0.5, 0.9, 1.2, 2.0], dtype=torch.float64)
        t = (t if direction > 0 else t.flip(0)).requires_grad_()
        y = library.odeint(field, y0, t, rtol=1e-5, atol=1e-6, method=method, options=options)
        weights = torch.arange(1, 1 + y.numel(), dtype=torch.float64).reshape(y.shape).cos()
        results.append(torch.autograd.grad((y * weights).sum(), [y0, t, field.weight, field.bias]))
    assert_same(*results, 1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_every_form_of_state(theirs, form):
    results = []
    for library in (ours, theirs):
        f = Oscillator(form)
        y0 = tuple(y.requires_grad_() for y in parts(f.start()))
        y = library.odeint(f, y0 if "tuple" in form else y0[0], grid(1), options={"first_step": 0.1})
        loss = sum((part.abs() ** 3).sum() for part in parts(y))
        results.append(torch.autograd.grad(loss, y0))
    assert_same(*results, 1e-9)


@pytest.mark.parametrize(("method", "options"), [case for case in CASES[:6] if case[0] != "bosh3"])
def test_gradcheck(method, options):
    field = Field()

    def run(y0, t, weight, bias):
        f = lambda t, y: torch.tanh(y @ weight + bias * torch.cos(t))  # noqa: E731
        return ours.odeint(f, y0, t, rtol=1e-9, atol=1e-11, method=method, options=options)

    y0 = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    t = torch.tensor([0.5, 0.9, 1.45], dtype=torch.float64, requires_grad=True)
    inputs = (y0, t, field.weight, field.bias)
    # Where a step is rejected instead of accepted the solution jumps by the tolerance: quotients over more are smooth.
    eps = 3e-4 if method in ADAPTIVE else 1e-6
    assert torch.autograd.gradcheck(run, inputs, eps=eps, atol=1e-5 if method in ADAPTIVE else 1e-6, rtol=1e-4)
    if method in ("rk4", "heun3"):
        assert torch.autograd.gradgradcheck(run, (y0.detach(), t.detach(), *inputs[2:]), atol=1e-5)


@pytest.mark.parametrize("direction", [1, -1])
def test_the_start_does_not_move_a_jump(direction):
    """y' = a before the jump and b after it: y(t₁) moves with t₀ by −a, though f was never asked to be smooth there."""
    t = torch.tensor([0.0, 2.0], dtype=torch.float64) * direction
    t.requires_grad_()

    def switch(t, y):
        return torch.where(direction * t < 0.9, 3.0, -1.0) * torch.ones_like(y)

    options = {"jump_t": torch.tensor([0.9 * direction], dtype=torch.float64)}
    end = ours.odeint(switch, torch.zeros(2, dtype=torch.float64), t, options=options)[1]
    assert end.tolist() == pytest.approx([direction * (0.9 * 3 - 1.1)] * 2)
    (by_t,) = torch.autograd.grad(end[0], t)
    assert by_t.tolist() == pytest.approx([-3, -1])


def test_second_derivatives_of_an_adaptive_solve():
    y0 = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    end = ours.odeint(lambda t, y: y * (1 - y), y0, t, rtol=1e-10, atol=1e-12)[1]
    (first,) = torch.autograd.grad(end.sum(), y0, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y0)
    e = math.e
    exact = y0 * e / (1 + y0 * (e - 1))  # its derivatives: e/(1 + y0(e − 1))², −2e(e − 1)/(1 + y0(e − 1))³
    assert_same(end.detach(), exact.detach(), 1e-9)
    assert_same(first.detach(), (e / (1 + y0 * (e - 1)) ** 2).detach(), 1e-7)
    assert_same(second, (-2 * e * (e - 1) / (1 + y0 * (e - 1)) ** 3).detach(), 1e-6)


def test_a_parameter_that_enters_late_gets_its_gradient():
    """At the start nothing requires a gradient; from t = 1 on func does."""
    rate = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    y0, t = torch.ones(3, dtype=torch.float64), torch.linspace(0, 2, 5, dtype=torch.float64)
    options = {"first_step": 0.05, "max_step": 0.05}
    field = lambda t, y: y * rate if t > 1 else -y  # noqa: E731
    y = ours.odeint(field, y0, t, rtol=1e-9, atol=1e-11, options=options)
    assert y[-1].tolist() == pytest.approx([math.exp(-2)] * 3, rel=1e-6)
    plain = ours.odeint(lambda t, y: field(t, y).detach(), y0, t, rtol=1e-9, atol=1e-11, options=options)
    assert_same(y.detach(), plain, 1e-12)
    y[-1].sum().backward()
    assert float(rate.grad) == pytest.approx(3 * math.exp(-2), rel=0.03)  # one step is half and half


def test_no_graph_where_none_is_wanted():
    field = Field()
    y0 = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        y = ours.odeint(field, y0, grid(1))
    assert not y.requires_grad
    y = ours.odeint(field, y0, grid(1))
    assert y.requires_grad
    assert_same(y.detach(), ours.odeint(lambda t, y: field(t, y).detach(), y0.detach(), grid(1)), 1e-12)


@pytest.mark.parametrize(
    ("method", "options"), [("dopri5", {}), ("rk4", {}), ("dopri5", {"jump_t": torch.tensor([0.8])})]
)
def test_functional_transforms(method, options):
    field, t = Field(), torch.tensor([0.5, 0.9, 1.4], dtype=torch.float64)
    y0 = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    direction = torch.linspace(1, 2, 6, dtype=torch.float64).reshape(2, 3)

    def end(y0, t=t):
        return ours.odeint(field, y0, t, method=method, options=options)[-1]

    jacobian = torch.autograd.functional.jacobian(end, y0)
    assert_same(torch.func.jacrev(end)(y0), jacobian, 1e-10)
    assert_same(torch.func.grad(lambda y: end(y).sum())(y0), jacobian.sum((0, 1)), 1e-10)
    value, tangent = torch.func.jvp(end, (y0,), (direction,))
    assert_same(value, end(y0).detach(), 1e-10)
    assert_same(tangent, (jacobian * direction).sum((-1, -2)), 1e-10)
    tangent = torch.func.jvp(lambda t: end(y0, t), (t,), (torch.ones_like(t),))[1]
    assert_same(tangent, torch.autograd.functional.jacobian(lambda t: end(y0, t), t).sum(-1), 1e-10)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_states_without_elements(method):
    empty, y0 = torch.empty(0, 3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert ours.odeint(lambda t, y: y, empty, grid(1), method=method).shape == (6, 0, 3)
    nothing, y = ours.odeint(lambda t, y: (y[0], -y[1]), (empty, y0), grid(1), method=method)
    assert nothing.shape == (6, 0, 3)
    assert_same(y, ours.odeint(lambda t, y: -y, y0, grid(1), method=method), 1e-12)


# Dense output


@pytest.mark.parametrize("direction", [1, -1])
def test_dense(theirs, direction):
    f = Oscillator()
    t = grid(direction)
    dense = ours.odeint_dense(f, f.start(), t[0], t[-1], rtol=1e-7, atol=1e-8)
    at = ours.odeint(f, f.start(), t, rtol=1e-7, atol=1e-8)
    assert_same(dense(t), at, 1e-12)
    assert dense(t.reshape(2, 3)).shape == (2, 3, 3, 5, 2)
    assert_same(dense(float(t[2])), at[2], 1e-12)
    if direction > 0:
        other = theirs.odeint_dense(f, f.start(), t[0], t[-1], rtol=1e-7, atol=1e-8)
        for time in torch.linspace(0.51, 3.49, 40, dtype=torch.float64):
            assert_same(dense(time), other(time))
    for outside in (0.4, 4.5):
        with pytest.raises(AssertionError, match="t: expected a time"):
            dense(outside)


def test_dense_includes_an_end_that_a_step_ends_at():
    f, t = Oscillator(), grid(1)
    options = {"step_t": t[-1:]}
    dense = ours.odeint_dense(f, f.start(), t[0], t[-1], options=options)
    assert_same(dense(t[-1]), ours.odeint(f, f.start(), t, options=options)[-1], 1e-12)


def test_dense_is_differentiable():
    field = Field()
    t0, t1 = torch.tensor([0.5, 1.5], dtype=torch.float64)
    at = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    y = ours.odeint_dense(field, torch.ones(3, dtype=torch.float64), t0, t1, rtol=1e-9, atol=1e-10)(at)
    (slope,) = torch.autograd.grad(y.sum(), at, retain_graph=True)
    assert float(slope) == pytest.approx(float(field(at, y).sum().detach()), rel=1e-5)
    (by_weight,) = torch.autograd.grad(y.sum(), field.weight)
    t = torch.tensor([0.5, 0.9], dtype=torch.float64)
    y = ours.odeint(field, torch.ones(3, dtype=torch.float64), t, rtol=1e-9, atol=1e-10)[1]
    assert_same(by_weight, torch.autograd.grad(y.sum(), field.weight)[0], 1e-6)


def test_dense_bad_input(theirs):
    calls = [
        ((Y,), {}),
        (Y, {"method": "rk4"}),
    ]
    for y0, keywords in calls:
        for library in (ours, theirs):
            with pytest.raises(AssertionError):
                library.odeint_dense(lambda t, y: y, y0, T[0], T[1], **keywords)
