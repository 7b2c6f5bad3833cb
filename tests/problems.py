"""Initial value problems whose solutions are known: in closed form, or by SciPy's DOP853 at its tightest tolerance.

``f(t, y)`` takes y of shape [..., D] and t of shape [] or [...], so that a batch may be at one time or at many.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.special import ellipj

Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """y' = f(t, y) from y0 [D] over t_span; ``exact(t)`` maps t [...] to y [..., D], or is None."""

    name: str
    f: Field
    initial: tuple[float, ...]
    t_span: tuple[float, float]
    exact: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def y0(self) -> torch.Tensor:
        return torch.tensor(self.initial, dtype=torch.float64)

    def batch(self, rows: int) -> torch.Tensor:
        """The initial state in every one of the rows, [rows, D]."""
        return self.y0.repeat(rows, 1)

    def solution(self, t) -> torch.Tensor:
        """y at the times t [...], [..., D] in float64."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if self.exact is not None:
            return self.exact(t)
        states = [_reference(self, time) for time in t.flatten().tolist()]
        return torch.stack(states).reshape(*t.shape, len(self.initial))


@functools.cache
def _reference(problem: Problem, time: float) -> torch.Tensor:
    """The state at one time; DOP853 ends there, since its dense output is less exact than its steps."""
    start = problem.t_span[0]
    if time == start:
        return problem.y0

    def f(t, y):
        return problem.f(torch.tensor(t, dtype=torch.float64), torch.from_numpy(y)).numpy()

    run = solve_ivp(f, (start, time), np.array(problem.initial), "DOP853", t_eval=[time], rtol=1e-13, atol=1e-15)
    if not run.success:
        raise RuntimeError(f"{problem.name}: {run.message}")
    return torch.from_numpy(run.y[:, -1].copy())


def _stack(*components) -> torch.Tensor:
    return torch.stack(torch.broadcast_tensors(*components), dim=-1)


def linear_system(name: str, matrix: torch.Tensor, initial, t_end: float) -> Problem:
    """y' = A y; y(t) = exp(tA) y0."""
    y0 = torch.as_tensor(initial, dtype=torch.float64)

    def f(t, y):
        return y @ matrix.to(y.dtype).T

    def exact(t):
        return torch.linalg.matrix_exp(t[..., None, None] * matrix) @ y0

    return Problem(name, f, tuple(y0.tolist()), (0.0, t_end), exact)


def linear(dimension: int = 10) -> Problem:
    """A rotation with some damping: every eigenvalue of the matrix has a negative real part."""
    generator = torch.Generator().manual_seed(dimension)
    g = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    matrix = (g - g.T) / 2 - 0.1 * torch.diag(torch.linspace(0.5, 1.5, dimension, dtype=torch.float64))
    return linear_system("linear", matrix, torch.linspace(1, 2, dimension), 5.0)


def sine() -> Problem:
    """y' = cos t: a field that depends on time alone."""

    def f(t, y):
        return t.cos()[..., None].expand_as(y)

    return Problem("sine", f, (0.0,), (0.0, 10.0), lambda t: _stack(t.sin()))


def logistic() -> Problem:
    """y' = y(1 − y)."""

    def exact(t):
        return _stack(1 / (1 + 9 * (-t).exp()))

    return Problem("logistic", lambda t, y: y * (1 - y), (0.1,), (0.0, 8.0), exact)


def spiral() -> Problem:
    """y1' = −ωy2 + y1(1 − r²), y2' = ωy1 + y2(1 − r²) with ω = 1 + cos t: it winds onto the unit circle.

    In polar coordinates r² = 1/(1 + (1/r0² − 1)e^{−2t}) and the angle is t + sin t.
    """

    def f(t, y):
        a, b = y.unbind(-1)
        growth, rate = 1 - a * a - b * b, 1 + t.cos()
        return _stack(a * growth - b * rate, b * growth + a * rate)

    def exact(t):
        radius, angle = (1 + 3 * (-2 * t).exp()).rsqrt(), t + t.sin()
        return _stack(radius * angle.cos(), radius * angle.sin())

    return Problem("spiral", f, (0.5, 0.0), (0.0, 3.0), exact)


def van_der_pol(mu: float | torch.Tensor = 2.0, t_end: float = 10.0) -> Problem:
    """y1' = y2, y2' = μ(1 − y1²)y2 − y1; μ may be a tensor [B], one for every row (then without a reference)."""

    def f(t, y):
        a, b = y.unbind(-1)
        return _stack(b, mu * (1 - a * a) * b - a)

    return Problem("van der Pol", f, (2.0, 0.0), (0.0, t_end))


def lotka_volterra() -> Problem:
    """Prey y1' = y1(1.5 − y2) and predators y2' = y2(y1 − 3)."""

    def f(t, y):
        prey, predators = y.unbind(-1)
        return _stack(prey * (1.5 - predators), predators * (prey - 3))

    return Problem("Lotka-Volterra", f, (1.0, 1.0), (0.0, 10.0))


def lorenz() -> Problem:
    """σ = 10, ρ = 28, β = 8/3, over a time short enough for the chaos not to hide the error."""

    def f(t, y):
        a, b, c = y.unbind(-1)
        return _stack(10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c)

    return Problem("Lorenz", f, (1.0, 1.0, 1.0), (0.0, 3.0))


ARENSTORF_PERIOD = 17.0652165601579625588917206249


def arenstorf() -> Problem:
    """The restricted three-body problem on a closed orbit around Earth and Moon (Hairer, Nørsett & Wanner, II.0)."""
    moon = 0.012277471
    earth = 1 - moon

    def f(t, y):
        a, b, u, v = y.unbind(-1)
        near = ((a + moon) ** 2 + b**2) ** 1.5
        far = ((a - earth) ** 2 + b**2) ** 1.5
        du = a + 2 * v - earth * (a + moon) / near - moon * (a - earth) / far
        dv = b - 2 * u - earth * b / near - moon * b / far
        return _stack(u, v, du, dv)

    return Problem("Arenstorf", f, (0.994, 0.0, 0.0, -2.00158510637908252240537862224), (0.0, ARENSTORF_PERIOD))


# DETEST: T. E. Hull, W. H. Enright, B. M. Fellen & A. E. Sedgwick, Comparing numerical methods for ODEs,
# SIAM J. Numer. Anal. 9(4), 1972. Every problem runs from 0 to 20.


def _class_a() -> list[Problem]:
    """Single equations."""

    def one(f):
        return lambda t, y: f(t[..., None], y)

    def curve(t):  # e^φ sin φ = t/4 and y = 4e^φ cos φ
        phi = torch.full_like(t, 1.6)
        for _ in range(30):
            phi = phi - (phi.sin() - t / 4 * (-phi).exp()) / (phi.sin() + phi.cos())
        return _stack(4 * phi.exp() * phi.cos())

    span = (0.0, 20.0)
    return [
        Problem("A1", lambda t, y: -y, (1.0,), span, lambda t: _stack((-t).exp())),
        Problem("A2", lambda t, y: -(y**3) / 2, (1.0,), span, lambda t: _stack((t + 1).rsqrt())),
        Problem("A3", one(lambda t, y: y * t.cos()), (1.0,), span, lambda t: _stack(t.sin().exp())),
        Problem(
            "A4", lambda t, y: y / 4 * (1 - y / 20), (1.0,), span, lambda t: _stack(20 / (1 + 19 * (-t / 4).exp()))
        ),
        Problem("A5", one(lambda t, y: (y - t) / (y + t)), (4.0,), span, curve),
    ]


def _class_b() -> list[Problem]:
    """Small systems."""

    def b1(t, y):
        a, b = y.unbind(-1)
        return _stack(2 * (a - a * b), a * b - b)

    def b3(t, y):
        a, b, _ = y.unbind(-1)
        return _stack(-a, a - b * b, b * b)

    def b4(t, y):
        a, b, c = y.unbind(-1)
        radius = (a * a + b * b).sqrt()
        return _stack(-b - a * c / radius, a - b * c / radius, a / radius)

    def b5(t, y):
        a, b, c = y.unbind(-1)
        return _stack(b * c, -a * c, -0.51 * a * b)

    def jacobi(t):
        sn, cn, dn, _ = ellipj(t.numpy(), 0.51)
        return _stack(*(torch.as_tensor(x, dtype=torch.float64) for x in (sn, cn, dn)))

    chain = torch.tensor([[-1, 1, 0], [1, -2, 1], [0, 1, -1]], dtype=torch.float64)
    span = (0.0, 20.0)
    return [
        Problem("B1", b1, (1.0, 3.0), span),
        linear_system("B2", chain, (2.0, 0.0, 1.0), 20.0),
        Problem("B3", b3, (1.0, 0.0, 0.0), span),
        Problem("B4", b4, (3.0, 0.0, 0.0), span),
        Problem("B5", b5, (0.0, 1.0, 1.0), span, jacobi),
    ]


_MASSES = (
    1.00000597682,
    0.000954786104043,
    0.000285583733151,
    0.0000437273164546,
    0.0000517759138449,
    0.00000277777777778,
)
_POSITIONS = (
    *(3.42947415189, 3.35386959711, 1.35494901715, 6.64145542550, 5.97156957878, 2.18231499728),
    *(11.2630437207, 14.6952576794, 6.27960525067, -30.1552268759, 1.65699966404, 1.43785752721),
    *(-21.1238353380, 28.4465098142, 15.3882659679),
)
_VELOCITIES = (
    *(-0.557160570446, 0.505696783289, 0.230578543901, -0.415570776342, 0.365682722812, 0.169143213293),
    *(-0.325325669158, 0.189706021964, 0.0877265322780, -0.0240476254170, -0.287659532608, -0.117219543175),
    *(-0.176860753121, -0.216393453025, -0.0148647893090),
)


def _planets(t, y):
    """The five outer planets around the sun: positions and velocities, each [5, 3] flattened."""
    sun, masses = _MASSES[0], torch.tensor(_MASSES[1:], dtype=y.dtype)
    x, v = y.unflatten(-1, (2, 5, 3)).unbind(-3)
    towards = x[..., None, :, :] - x[..., :, None, :]  # [..., j, k, 3]: from planet j to planet k
    distance = towards.square().sum(-1).sqrt() + torch.eye(5, dtype=y.dtype)
    pull = x / x.square().sum(-1, keepdim=True) ** 1.5
    others = masses[:, None] * (towards / distance[..., None] ** 3 - pull[..., None, :, :])
    others = (others * (1 - torch.eye(5, dtype=y.dtype))[..., None]).sum(-2)
    acceleration = 2.95912208286 * (others - (sun + masses)[:, None] * pull)
    return torch.stack((v, acceleration), dim=-3).flatten(-3)


def _class_c() -> list[Problem]:
    """Moderate systems: two decay chains, two heat equations, five planets."""

    def chain(rates):
        rates = torch.as_tensor(rates, dtype=torch.float64)
        return torch.diag(rates, -1) - torch.diag(torch.cat((rates, rates.new_zeros(1))))

    def heat(size):
        ones = torch.ones(size - 1, dtype=torch.float64)
        return torch.diag(ones, 1) + torch.diag(ones, -1) - 2 * torch.eye(size, dtype=torch.float64)

    def impulse(size):
        return (1.0,) + (0.0,) * (size - 1)

    return [
        linear_system("C1", chain([1.0] * 9), impulse(10), 20.0),
        linear_system("C2", chain(range(1, 10)), impulse(10), 20.0),
        linear_system("C3", heat(10), impulse(10), 20.0),
        linear_system("C4", heat(51), impulse(51), 20.0),
        Problem("C5", _planets, _POSITIONS + _VELOCITIES, (0.0, 20.0)),
    ]


def _class_d() -> list[Problem]:
    """Kepler's orbits of eccentricity 0.1 to 0.9."""

    def f(t, y):
        a, b, u, v = y.unbind(-1)
        cube = (a * a + b * b) ** 1.5
        return _stack(u, v, -a / cube, -b / cube)

    def orbit(e):
        def exact(t):
            anomaly = t + e * t.sin()
            for _ in range(60):  # Newton's method on Kepler's equation, damped near the pericentre
                step = (anomaly - e * anomaly.sin() - t) / (1 - e * anomaly.cos())
                anomaly = anomaly - step.clamp(-0.5, 0.5)
            cos, sin = anomaly.cos(), anomaly.sin()
            minor, rate = math.sqrt(1 - e * e), 1 / (1 - e * cos)
            return _stack(cos - e, minor * sin, -sin * rate, minor * cos * rate)

        return exact

    return [
        Problem(f"D{i}", f, (1 - e, 0.0, 0.0, math.sqrt((1 + e) / (1 - e))), (0.0, 20.0), orbit(e))
        for i, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9), start=1)
    ]


def _class_e() -> list[Problem]:
    """Equations of second order."""

    def second_order(acceleration):
        def f(t, y):
            position, velocity = y.unbind(-1)
            return _stack(velocity, acceleration(t, position, velocity))

        return f

    def bessel(t):  # J_{1/2} and its derivative
        x = t + 1
        scale = (2 / (math.pi * x)).sqrt()
        return _stack(scale * x.sin(), scale * (x.cos() - x.sin() / (2 * x)))

    def fall(t):
        rate = math.sqrt(0.0128)
        return _stack(30 + 2.5 * (rate * t).cosh().log(), math.sqrt(0.08) * (rate * t).tanh())

    def pursuit(t):
        rest = 1 - t / 25
        return _stack(-12.5 * rest.log() - 6.25 * (1 - rest**2), (1 / rest - rest) / 2)

    start = torch.zeros((), dtype=torch.float64)
    span = (0.0, 20.0)
    return [
        Problem(
            "E1",
            second_order(lambda t, x, v: -(v / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * x)),
            tuple(bessel(start).tolist()),
            span,
            bessel,
        ),
        Problem("E2", second_order(lambda t, x, v: (1 - x * x) * v - x), (2.0, 0.0), span),
        Problem("E3", second_order(lambda t, x, v: x**3 / 6 - x + 2 * (2.78535 * t).sin()), (0.0, 0.0), span),
        Problem("E4", second_order(lambda t, x, v: 0.032 - 0.4 * v * v), (30.0, 0.0), span, fall),
        Problem("E5", second_order(lambda t, x, v: (1 + v * v).sqrt() / (25 - t)), (0.0, 0.0), span, pursuit),
    ]


DETEST: dict[str, Problem] = {
    problem.name: problem for group in (_class_a, _class_b, _class_c, _class_d, _class_e) for problem in group()
}
PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (linear(), sine(), logistic(), spiral(), van_der_pol(), lotka_volterra(), lorenz(), arenstorf())
} | DETEST
