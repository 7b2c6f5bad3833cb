"""`odeint_adjoint`: against torchdiffeq's, and against differentiating through the steps."""

import warnings

import pytest
import torch

from fmkernels.integrations import torchdiffeq as ours


@pytest.fixture
def theirs():
    return pytest.importorskip("torchdiffeq")


class Field(torch.nn.Module):
    """A small network on a tensor, a tuple or a complex state, with its calls and what callbacks saw."""

    def __init__(self, form="tensor", dtype=torch.float64, callbacks=()):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.form, self.calls, self.seen = form, 0, []
        self.weight = torch.nn.Parameter((torch.randn(3, 3, generator=generator) / 2).to(dtype))
        self.bias = torch.nn.Parameter((torch.randn(3, generator=generator) / 2).to(dtype))
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=dtype))
        for name in callbacks:
            setattr(self, name, lambda t, y, dt, name=name: self.seen.append((name, t, y, dt)))

    def network(self, t, y):
        return torch.tanh(y @ self.weight + self.bias * torch.cos(t))

    def forward(self, t, y):
        self.calls += 1
        if self.form == "tensor":
            return self.network(t, y)
        if self.form == "complex":
            return 1j * self.network(t, y.real) - 0.3 * y
        x, v = y
        return v[:, :3], torch.cat([self.network(t, x), -v[:, 3:]], -1)

    def start(self):
        y = torch.linspace(-1, 1, 16, dtype=self.weight.dtype)
        if self.form == "tensor":
            return (y[:12].reshape(4, 3).clone().requires_grad_(),)
        if self.form == "complex":
            return (torch.complex(y[:6], y[6:12]).reshape(2, 3).requires_grad_(),)
        return y[:6].reshape(2, 3).clone().requires_grad_(), y[6:].reshape(2, 5).clone().requires_grad_()


def times(direction=1, dtype=torch.float64):
    t = torch.tensor([0.5, 0.9, 1.2, 2.0], dtype=dtype)
    return (t if direction > 0 else t.flip(0)).requires_grad_()


def loss_of(solution):
    parts = solution if isinstance(solution, tuple) else (solution,)
    weights = [torch.arange(1, 1 + p.numel(), dtype=p.real.dtype).reshape(p.shape).cos() for p in parts]
    return sum((w * (p.real + (p.imag**2 if p.is_complex() else 0))).sum() for w, p in zip(weights, parts))


def gradients(library, field, t=None, function="odeint_adjoint", **arguments):
    """Solution, gradients with respect to y0, t and the parameters, calls of the solve and of the backward."""
    y0, t = field.start(), times() if t is None else t
    solution = getattr(library, function)(field, y0 if len(y0) > 1 else y0[0], t, **arguments)
    forward, field.calls = field.calls, 0
    inputs = [*y0, *((t,) if t.requires_grad else ()), *field.parameters()]
    grads = torch.autograd.grad(loss_of(solution), inputs, allow_unused=True)
    return solution, [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs)], (forward, field.calls)


def assert_close(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        x, y = x.detach(), y.detach()
        assert (x - y).abs().max() <= tolerance * max(1.0, float(y.abs().max()))


def sup(parts):
    return max(part.abs().max() for part in parts if part.numel())


CASES = {
    "plain": {},
    "bosh3": {"method": "bosh3"},
    "rk4": {"method": "rk4", "options": {"step_size": 0.1}},
    "midpoint": {"method": "midpoint"},
    "tolerances": {"adjoint_rtol": 1e-4, "adjoint_atol": 1e-5},
    "tolerances per part": {"adjoint_rtol": (1e-4,) * 6, "adjoint_atol": (1e-3, *(1e-5,) * 5)},
    "method": {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.05}, "method": "dopri5"},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "norm": {"adjoint_options": {"norm": sup}},
    "forward norm": {"options": {"norm": lambda y: y.abs().max() if torch.is_tensor(y) else sup(y)}},
    "forward norm and seminorm": {
        "options": {"norm": lambda y: y.abs().max() if torch.is_tensor(y) else sup(y)},
        "adjoint_options": {"norm": "seminorm"},
    },
    "options": {"options": {"max_step": 0.2, "first_step": 0.1}},
    "step_t": {"adjoint_options": {"step_t": torch.tensor([0.7, 1.5])}},
}


@pytest.mark.parametrize("form", ["tensor", "tuple"])  # torchdiffeq's refuses real parameters of a complex state
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_calls(theirs, name, form):
    arguments = {"rtol": 1e-6, "atol": 1e-7, **CASES[name]}
    for t in (times(), times().detach()):
        mine = gradients(ours, Field(form), t, **arguments)
        other = gradients(theirs, Field(form), t, **arguments)
        assert mine[2] == other[2]
        assert_close(mine[1], other[1], 1e-9)


@pytest.mark.parametrize("name", ["plain", "rk4", "seminorm", "options"])
def test_backward_in_time(theirs, name):
    arguments = {"rtol": 1e-6, "atol": 1e-7, **CASES[name]}
    mine, other = (gradients(library, Field(), times(-1), **arguments) for library in (ours, theirs))
    assert mine[2] == other[2]
    assert_close(mine[1], other[1], 1e-9)


def test_single_precision(theirs):
    t = times(dtype=torch.float32)
    mine, other = (gradients(x, Field(dtype=torch.float32), t, rtol=1e-4, atol=1e-5) for x in (ours, theirs))
    assert_close(mine[1], other[1], 1e-3)


def test_parameters_of_another_dtype(theirs):
    class Mixed(Field):
        def network(self, t, y):
            return torch.tanh(y @ self.weight.double() + self.bias.double() * torch.cos(t))

        def start(self):
            return tuple(y.detach().double().requires_grad_() for y in super().start())

    mine, other = (gradients(library, Mixed(dtype=torch.float32), rtol=1e-6, atol=1e-7) for library in (ours, theirs))
    assert mine[2] == other[2]
    assert_close(mine[1], other[1], 1e-6)


@pytest.mark.parametrize("form", ["tensor", "tuple", "complex"])
@pytest.mark.parametrize("direction", [1, -1])
def test_gradients_are_those_through_the_steps(form, direction):
    arguments = {"rtol": 1e-9, "atol": 1e-10}
    adjoint = gradients(ours, Field(form), times(direction), **arguments)
    steps = gradients(ours, Field(form), times(direction), function="odeint", **arguments)
    assert_close(adjoint[1], steps[1], 1e-6)


def test_gradcheck():
    field = Field()

    def run(y0, t, weight, bias):
        f = lambda t, y: torch.tanh(y @ weight + bias * torch.cos(t))  # noqa: E731
        return ours.odeint_adjoint(f, y0, t, rtol=1e-10, atol=1e-12, adjoint_params=(weight, bias))

    (y0,) = field.start()
    assert torch.autograd.gradcheck(run, (y0, times(), field.weight, field.bias), eps=3e-4, atol=1e-5, rtol=1e-4)


def test_callbacks_of_both_passes(theirs):
    names = [f"callback{kind}_step{end}" for kind in ("", "_accept", "_reject") for end in ("", "_adjoint")]
    for form in ("tensor", "tuple"):
        fields = []
        for library in (ours, theirs):
            field = Field(form, callbacks=names)
            gradients(library, field, rtol=1e-6, atol=1e-7)
            fields.append(field)
        mine, other = fields
        assert [x[0] for x in mine.seen] == [x[0] for x in other.seen]
        assert {x[0] for x in mine.seen} >= {"callback_step", "callback_step_adjoint", "callback_accept_step_adjoint"}
        for (_, t, y, dt), (_, t_, y_, dt_) in zip(mine.seen, other.seen):
            y, y_ = (x if isinstance(x, tuple) else (x,) for x in (y, y_))
            assert_close((t, *y, dt), (t_, *y_, dt_), 1e-6)


def test_frozen_parameters(theirs):
    fields = []
    for library in (ours, theirs):
        field = Field()
        field.bias.requires_grad_(False)
        (y0,) = field.start()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = library.odeint_adjoint(field, y0, times(), adjoint_options={"norm": sup})
        y.sum().backward()
        assert field.bias.grad is None
        fields.append(([str(w.message) for w in caught], field.weight.grad, field.calls))
    assert fields[0][0] == fields[1][0] != []
    assert fields[0][2] == fields[1][2]
    assert_close([fields[0][1]], [fields[1][1]], 1e-9)


def test_a_field_without_gradients():
    y0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
    t = times()
    y = ours.odeint_adjoint(lambda t, y: torch.full_like(y, 2.0), y0, t, adjoint_params=())
    by_y0, by_t = torch.autograd.grad(y[-1].sum(), (y0, t))
    assert by_y0.tolist() == [1.0] * 3
    assert by_t.tolist() == pytest.approx([-6.0, 0.0, 0.0, 6.0])


def test_memory_does_not_grow_with_the_steps():
    """Nothing is kept but the states at t: the solve records no graph."""
    field = Field()
    (y0,) = field.start()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
        ours.odeint_adjoint(field, y0, times(), options={"max_step": 0.01})
    assert field.calls > 500
    assert sum(x.numel() for x in held) <= 4 * y0.numel() + 5 + sum(p.numel() for p in field.parameters())


def test_differentiating_twice_is_refused():
    field = Field()
    (y0,) = field.start()
    y = ours.odeint_adjoint(field, y0, times())
    (first,) = torch.autograd.grad((y**2).sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_under_no_grad():
    field = Field()
    (y0,) = field.start()
    with torch.no_grad():
        y = ours.odeint_adjoint(field, y0, times())
        assert torch.equal(y, ours.odeint(field, y0, times()))
    assert not y.requires_grad


def test_torchdiffeqs_own_methods(theirs):
    arguments = {"method": "explicit_adams", "options": {"step_size": 0.1}}
    mine, other = (gradients(library, Field(), times().detach(), **arguments) for library in (ours, theirs))
    assert mine[2] == other[2]
    assert all(torch.equal(a, b) for a, b in zip(mine[1], other[1]))
    arguments = {"adjoint_method": "explicit_adams", "adjoint_options": {"step_size": 0.1}}
    gradients(ours, Field(), times().detach(), **arguments)


def bad(name, library):
    field = Field()
    (y0,) = field.start()
    match name:
        case "not a module":
            library.odeint_adjoint(lambda t, y: y, y0, times())
        case "options of another method":
            options = {"step_size": 0.1}
            library.odeint_adjoint(field, y0, times(), method="rk4", options=options, adjoint_method="dopri5")
        case "too many tolerances":
            library.odeint_adjoint(field, y0, times(), adjoint_rtol=(1e-3, 1e-3)).sum().backward()
        case "unknown method":
            library.odeint_adjoint(field, y0, times(), method="rk5")
        case "three times for an event":
            library.odeint_adjoint(field, y0, times(), event_fn=lambda t, y: y.sum())
        case "a solve that fails":
            library.odeint_adjoint(field, y0, times(), options={"max_num_steps": 1})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("not a module", "adjoint_params"),
        ("options of another method", "adjoint_options"),
        ("too many tolerances", "adjoint_rtol"),
        ("unknown method", "method"),
        ("three times for an event", "t: "),
        ("a solve that fails", "max_num_steps"),
    ],
)
def test_bad_input_raises_what_torchdiffeq_raises(theirs, name, text):
    with pytest.raises(Exception) as other:
        bad(name, theirs)
    with pytest.raises(other.type, match=text):
        bad(name, ours)


def test_an_unknown_norm():
    field = Field()
    (y0,) = field.start()
    with pytest.raises(ValueError, match="adjoint_options.*'supernorm'"):
        ours.odeint_adjoint(field, y0, times(), adjoint_options={"norm": "supernorm"}).sum().backward()
