"""Solves that end at an event, and the gradients of its time and state."""

import math

import pytest
import torch

from fmkernels.integrations import torchdiffeq as ours


@pytest.fixture
def theirs():
    return pytest.importorskip("torchdiffeq")


class Ball(torch.nn.Module):
    """A ball under gravity, with drag: (height, velocity) as a tensor or a tuple."""

    def __init__(self, as_tuple=False, dtype=torch.float64):
        super().__init__()
        self.gravity = torch.nn.Parameter(torch.tensor(9.8, dtype=dtype))
        self.drag = torch.nn.Parameter(torch.tensor(0.1, dtype=dtype))
        self.as_tuple, self.calls = as_tuple, 0

    def forward(self, t, y):
        self.calls += 1
        height, velocity = y if self.as_tuple else y.unbind()
        k = velocity, -self.gravity - self.drag * velocity
        return k if self.as_tuple else torch.stack(k)

    def start(self):
        y = torch.tensor([10.0, 2.0], dtype=self.gravity.dtype).requires_grad_()
        return y.detach().unbind() if self.as_tuple else y


def ground(t, y):
    return y[0]


def several(t, y):
    return torch.stack([y[0] - 3.0, y[1] + 20.0, 5.0 - t.to(y[0])])


def span(direction=1, dtype=torch.float64):
    return torch.tensor([0.25, 0.25 + direction], dtype=dtype)


def parts(y):
    return y if isinstance(y, tuple) else (y,)


def assert_close(a, b, tolerance=1e-8):
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        x, y = x.detach(), y.detach()
        assert (x - y).abs().max() <= tolerance * max(1.0, float(y.abs().max()))


METHODS = [
    ("dopri5", {}),
    ("bosh3", {}),
    ("dopri5", {"step_t": torch.tensor([0.4, 1.0])}),
    ("dopri5", {"norm": lambda y: max(x.abs().max() for x in parts(y))}),
    ("rk4", {"step_size": 0.05}),
    ("rk4", {"step_size": 0.05, "interp": "cubic"}),
    ("euler", {"step_size": 0.02}),
]


@pytest.mark.parametrize("event", [ground, several])
@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_events(theirs, method, options, as_tuple, event):
    results, calls = [], []
    for library in (ours, theirs):
        ball = Ball(as_tuple)
        arguments = {"rtol": 1e-7, "atol": 1e-8, "method": method, "options": options}
        t, y = library.odeint(ball, ball.start(), span(), event_fn=event, **arguments)
        results.append((t, *parts(y)))
        calls.append(ball.calls)
    assert calls[0] == calls[1]
    assert_close(*results)


@pytest.mark.parametrize(("method", "options"), METHODS[:1] + METHODS[4:6])
def test_backward_in_time(theirs, method, options):
    """Thrown back to where it left the ground, which lies before the start."""
    results = []
    for library in (ours, theirs):
        ball = Ball()
        arguments = {"rtol": 1e-8, "atol": 1e-8, "method": method, "options": options}
        results.append(library.odeint(ball, ball.start(), span(-1), event_fn=ground, **arguments))
    assert_close(*results)
    assert results[0][0] < 0.25 and abs(results[0][1][1, 0]) < 1e-6


def test_an_event_at_the_start(theirs):
    for library in (ours, theirs):
        ball = Ball()
        t, y = library.odeint(ball, ball.start(), span(), event_fn=lambda t, y: y[0] - 10.0)
        assert float(t) == 0.25 and torch.equal(y[0], y[1])


def test_to_within_the_tolerance():
    falling = Ball()
    torch.nn.init.zeros_(falling.drag)
    exact = 0.25 + (2 + math.sqrt(4 + 2 * 9.8 * 10)) / 9.8
    for tolerance in (1e-3, 1e-6, 1e-9, 0.0):
        t, _ = ours.odeint(falling, falling.start(), span(), rtol=1e-9, atol=tolerance, event_fn=ground)
        assert abs(float(t) - exact) <= max(tolerance, 1e-9)


def test_dtypes_of_the_event():
    ball = Ball(dtype=torch.float32)
    seen = set()

    def event(t, y):
        seen.add((t.dtype, y.dtype))
        return y[0]

    t, y = ours.odeint(ball, ball.start(), span(dtype=torch.float32), rtol=1e-5, atol=1e-5, event_fn=event)
    assert t.dtype == y.dtype == torch.float32 and t.shape == ()
    assert (torch.float64, torch.float32) in seen


@pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients(theirs, reverse, as_tuple, interface):
    results = []
    for library in (ours, theirs):
        ball = Ball(as_tuple)
        start = torch.tensor([10.0, 2.0], dtype=torch.float64, requires_grad=True)
        t0 = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
        y0 = tuple(start.unbind()) if as_tuple else start
        t, y = library.odeint_event(
            ball, y0, t0, event_fn=several if not reverse else ground, reverse_time=reverse, rtol=1e-9, atol=1e-10,
            odeint_interface=getattr(library, interface), options={"first_step": 0.01},
        )  # fmt: skip
        y = torch.stack(y, -1) if as_tuple else y
        inputs = [start, t0, *ball.parameters()]
        grads = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (t, y[1, 0] + 2 * y[1, 1], y.sum())]
        results.append((t, y, *(g for group in grads for g in group)))
    assert_close(*results, 1e-6)


@pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
def test_an_event_that_depends_on_time(theirs, interface):
    results = []
    for library in (ours, theirs):
        ball = Ball()
        t0 = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
        t, y = library.odeint_event(
            ball, ball.start(), t0, event_fn=lambda t, y: y[0] - 2 * t, rtol=1e-9, atol=1e-10,
            odeint_interface=getattr(library, interface), options={"first_step": 0.01},
        )  # fmt: skip
        results.append((t, y, *torch.autograd.grad(t + y[1].sum(), [t0, *ball.parameters()])))
    assert_close(*results, 1e-6)


def test_only_the_first_time_of_an_adjoint_solve_to_an_event_has_a_gradient(theirs):
    grads = []
    for library in (ours, theirs):
        ball, t = Ball(), span().requires_grad_()
        _, y = library.odeint_adjoint(ball, ball.start(), t, event_fn=ground, rtol=1e-9, atol=1e-10)
        grads.append(torch.autograd.grad(y[1].sum(), t))
    assert grads[0][0][1] == 0 and grads[0][0][0] != 0
    assert_close(*grads, 1e-7)


def test_the_time_of_a_fall_and_its_derivatives():
    """Without drag t* = t₀ + (v + √(v² + 2gh))/g."""

    def fall(start, t0, gravity):
        f = lambda t, y: torch.stack([y[1], -gravity])  # noqa: E731
        return ours.odeint_event(f, start, t0, event_fn=ground, rtol=1e-10, atol=1e-12)

    def exact(start, t0, gravity):
        height, velocity = start
        speed = torch.sqrt(velocity**2 + 2 * gravity * height)
        return t0 + (velocity + speed) / gravity, -speed

    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([10.0, 2.0], 0.5, 9.8)]
    t, y = fall(*inputs)
    time, speed = exact(*inputs)
    assert_close((t.detach(), y[1, 1].detach()), (time.detach(), speed.detach()))
    assert abs(float(y[1, 0].detach())) < 1e-9
    for mine, other in ((t, time), (y[1, 1], speed)):
        want = torch.autograd.grad(other, inputs, allow_unused=True, retain_graph=True)
        want = [torch.zeros_like(x) if g is None else g for g, x in zip(want, inputs)]
        assert_close(torch.autograd.grad(mine, inputs, retain_graph=True), want, 1e-7)
    # The height at the event is zero whatever the start is.
    for gradient in torch.autograd.grad(y[1, 0], inputs):
        assert gradient.abs().max() < 1e-7


def test_gradcheck_of_a_complex_state():
    """|z| = e^{−0.3 (t − t₀)}|z₀| crosses 1/2 while it turns."""
    z0 = torch.tensor([1.0 + 0.5j, 0.2 - 0.1j], dtype=torch.complex128, requires_grad=True)
    t0 = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(-0.3 + 2.0j, dtype=torch.complex128, requires_grad=True)

    def run(z0, t0, rate):
        def event(t, z):
            return z[0].abs() - 0.5

        return ours.odeint_event(lambda t, z: rate * z, z0, t0, event_fn=event, rtol=1e-10, atol=1e-12)

    t, _ = run(z0, t0, rate)
    assert float(t.detach()) == pytest.approx(0.2 + math.log(abs(1 + 0.5j) / 0.5) / 0.3, abs=1e-8)
    assert torch.autograd.gradcheck(run, (z0, t0, rate), eps=1e-4, atol=1e-5)


def bad(name, library):
    ball = Ball()
    match name:
        case "one time":
            library.odeint(ball, ball.start(), span()[:1], event_fn=ground)
        case "fixed steps without a size":
            library.odeint(ball, ball.start(), span(), event_fn=ground, method="rk4")
        case "max_num_steps":
            library.odeint(ball, ball.start(), span(), event_fn=ground, options={"max_num_steps": 2})
        case "never, in fixed steps":
            ball.forward = lambda t, y: torch.zeros_like(y)
            library.odeint(ball, ball.start(), span(), event_fn=ground, method="euler", options={"step_size": 0.1})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one time", "t: expected two times"),
        ("fixed steps without a size", "step_size"),
        ("max_num_steps", "max_num_steps exceeded"),
        ("never, in fixed steps", "event_fn"),
    ],
)
def test_bad_input_raises_what_torchdiffeq_raises(theirs, name, text):
    with pytest.raises(Exception) as other:
        bad(name, theirs)
    with pytest.raises(other.type, match=text):
        bad(name, ours)


def test_bad_input():
    ball = Ball()
    with pytest.raises(TypeError, match="event_fn: expected a callable"):
        ours.odeint(ball, ball.start(), span(), event_fn=3)
    with pytest.raises(TypeError, match="t0: expected a torch.Tensor"):
        ours.odeint_event(ball, ball.start(), 0.25, event_fn=ground)
    with pytest.raises(RuntimeError, match="event_fn: expected it to change its sign"):
        ours.odeint(lambda t, y: 0 * y, ball.start(), span(), event_fn=ground)
