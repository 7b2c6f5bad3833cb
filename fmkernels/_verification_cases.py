"""What `python -m fmkernels verify` calls: a few public calls of every op, and whole pieces with known answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from . import _registration, ops
from .distributions import Normal
from .estimators import Exact
from .likelihood import log_prob
from .matching import FlowMatching
from .objectives import REDUCTIONS, MinSNR, PseudoHuber
from .schedules import VE, VP, Cosine, Custom, Polynomial, SchrodingerBridge, SubVP
from .solvers import odeint, solve
from .timesteps import Beta, CosMap, LogitNormal, Mode

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {"fp32": F32, "fp64": F64, "bf16": BF16, "fp16": F16}
FULL = ("fp32", "fp64")
LAST_ROW = 2**32 - 2  # rows numbered from here need more than 32 bits
# Rows and columns: odd, single, no multiple of a vector, longer than a block or than a thread's share.
SIZES = ((3, 7), (1, 1), (2, 130), (37, 129), (3, 4099), (301, 3), (2, 40_001))
SMALL = 3
Form = TypeVar("Form")


@dataclass(frozen=True)
class Data:
    """Inputs of a case: they depend on the seed alone, whatever the device. ``sizes`` counts those of SIZES in use."""

    dtype: torch.dtype
    device: torch.device
    sizes: int
    generator: torch.Generator
    matrices: Iterator[int]

    @classmethod
    def of(cls, dtype: str, device: str, sizes: int) -> Data:
        generator = torch.Generator().manual_seed(20)
        return cls(DTYPES[dtype], torch.device(device), sizes, generator, itertools.count())

    @property
    def small(self) -> bool:
        """Whether kernels are interpreted, where every program of a launch takes its time."""
        return self.sizes <= SMALL

    @property
    def full(self) -> torch.dtype:
        """The dtype of coefficients and weights: never half precision."""
        return F64 if self.dtype == F64 else F32

    def normal(self, *shape: int, plain: bool = False) -> torch.Tensor:
        """Every third matrix lies in memory by columns, unless ``plain``."""
        by_columns = len(shape) == 2 and not plain and next(self.matrices) % 3 == 2
        values = torch.randn(shape[::-1] if by_columns else shape, generator=self.generator, dtype=F64)
        return (values.T if by_columns else values).to(self.device, self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = F64) -> torch.Tensor:
        values = torch.rand(shape, generator=self.generator, dtype=F64)
        return (low + (high - low) * values).to(self.device, dtype)

    def mask(self, *shape: int) -> torch.Tensor:
        return self.uniform(*shape) < 0.7

    def key(self) -> torch.Tensor:
        return torch.randint(2**62, (1,), generator=self.generator).to(self.device)

    def each(self, forms: Iterable[Form], rounds: int = 2) -> Iterator[tuple[int, Form, int, int]]:
        """Every form at so many sizes, at one where not all are in use: (count, form, rows, columns)."""
        sizes, forms = SIZES[: self.sizes], list(forms)
        for i in range(len(forms) * (rounds if self.sizes == len(SIZES) else 1)):
            yield i, forms[i % len(forms)], *sizes[(i + i // len(forms)) % len(sizes)]


# ---- ops: each generator makes public calls and says after each what was special about it -----------------------


def noise(data: Data) -> Iterator[str]:
    forms: list[dict[str, Any]] = [
        {}, {"distribution": "uniform"}, {"first_row": LAST_ROW}, {"stream": "bridge", "index": 7},
        {"distribution": "uniform", "stream": "time"},
    ]  # fmt: skip
    for _, options, rows, columns in data.each(forms):
        ops.noise(data.key(), rows, columns, dtype=data.dtype, **options)
        yield ", ".join(f"{name} {value}" for name, value in options.items()) or "normal"


HEADS: dict[str, dict[str, Any]] = {
    "CondOT": {},
    "VP, noise": {"schedule": VP(), "prediction": "noise", "weight": MinSNR(5.0), "timesteps": LogitNormal()},
    "cosine, data as velocity": {
        "schedule": Cosine(),
        "prediction": "data",
        "compare": "velocity",
        "timesteps": Mode(),
    },
    "bridge": {"schedule": SchrodingerBridge(0.7), "timesteps": CosMap(stratified=True), "noise": "store"},
    "VE, score": {"schedule": VE(), "prediction": "score", "rho": PseudoHuber(0.03), "noise": "recompute"},
    "sub-VP, EDM": {"schedule": SubVP(), "prediction": "edm", "timesteps": Beta(1.5, 0.999, shift=2.0)},
    "polynomial": {"schedule": Polynomial(2.0), "rho": "absolute", "noise": "store"},
    "custom": {"schedule": Custom(lambda t: (t * t, 1 - t), t_range=(0.05, 0.95))},
}


def sample_path(data: Data) -> Iterator[str]:
    for _, (name, options), rows, columns in data.each(HEADS.items()):
        FlowMatching(**options).sample(data.normal(rows, columns), key=data.key(), first_row=5, total_rows=rows + 9)
        yield name
    ops.sample_path(data.normal(4, 3, 5), data.normal(4, 3, 5), data.uniform(4, 3, dtype=F32), data.key())
    yield "x0 and t given"


def matching_loss(data: Data, gradient: bool) -> Iterator[str]:
    """Every reduction, ρ and kind of mask, noise drawn and given; what a mask leaves out is NaN and must not count."""
    reductions, masks = ("mean", "sum", "none"), ("", "elements", "", "rows")
    for i, (name, options), rows, columns in data.each(HEADS.items()):
        matching, reduction, kind = FlowMatching(**options), reductions[i % 3], masks[i % 4]
        mask = data.mask(rows, columns if kind == "elements" else 1) if kind else None
        prediction = data.normal(rows, columns)
        prediction = prediction if mask is None else prediction.masked_fill(~mask, math.nan)
        weight = data.uniform(rows, low=0.2, high=2.0, dtype=F32) if i % 2 else None
        batch = matching.sample(data.normal(rows, columns), key=data.key())
        matching.loss(prediction.requires_grad_(gradient), batch, weight=weight, mask=mask, reduction=reduction)
        yield f"{name}, {reduction}" + (f", {kind} masked" if kind else "")


def scale_gradient(data: Data, op: Callable[..., object]) -> Iterator[str]:
    for _, (per_row, divided), rows, columns in data.each(itertools.product((False, True), repeat=2)):
        scale = data.uniform(*(rows,) * per_row, low=0.5, high=3.0, dtype=data.full)
        counts = (9 * data.uniform(*scale.shape, dtype=data.full)).ceil() + 1 if divided else scale.new_empty(0)
        op(data.normal(rows, columns, plain=True), scale, counts, 1 / 12345)
        yield ("a number a row" if per_row else "one number") + (", divided" if divided else "")


def conditional_flow(data: Data) -> Iterator[str]:
    for _, form, rows, columns in data.each(("linear", "target", "bridge", "trigonometric", "affine")):
        x0, x1, eps = (data.normal(rows, columns) for _ in range(3))
        coefficients = data.uniform(rows, 4, low=0.2, dtype=data.full)
        ops.conditional_flow(x0, x1, None if form == "affine" else eps, coefficients, form)
        yield form


def runge_kutta_stage(data: Data) -> Iterator[str]:
    for i, terms, rows, columns in data.each((1, 2, 5, 12, 3)):
        y, *k = (data.normal(rows, columns) for _ in range(1 + terms))
        times = data.uniform(3, *(rows,) * (i % 2))
        coefficients = data.uniform(2, 1 + terms, low=-1.0)
        coefficients[:, 0] = 0.25
        ops.runge_kutta_stage(y, k, times, coefficients, step=1, row=1)
        yield f"{terms} values of f" + (", a step a row" if i % 2 else "")


def runge_kutta_step(data: Data) -> Iterator[str]:
    """The op as ``solve`` reaches it. f is noise: no error cancels, and steps of every size are taken and rejected."""
    forms: list[tuple[str, dict[str, Any]]] = [
        ("dopri5", {"controller": "PID"}), ("tsit5", {"t_eval": [0.0, 0.1, 0.37, 1.0]}), ("bosh3", {}), ("dopri8", {}),
        ("fehlberg2", {"t_eval": [0.5, 1.0]}), ("adaptive_heun", {"controller": "PI"}), ("dopri5", {}),
    ]  # fmt: skip
    for _, (method, options), rows, columns in data.each(forms, rounds=1):
        y = data.normal(rows, columns)
        if "t_eval" in options:
            options = {**options, "t_eval": torch.tensor(options["t_eval"], dtype=F64, device=data.device)}
        solve(lambda t, y: data.normal(*y.shape), y, method=method, rtol=0.3, atol=0.3, max_steps=4, **options)
        yield method + (", outputs between" if "t_eval" in options else "")


def guided_euler(data: Data) -> Iterator[str]:
    for i, rescale, rows, columns in data.each((0.0, 0.0, 0.7, 1.0, 0.0)):
        rescale = 0.0 if columns == 1 else rescale
        x, conditional, unconditional = (data.normal(rows, columns) for _ in range(3))
        h, scale = (data.uniform(rows, high=high, dtype=data.full) for high in (0.2, 7.0))
        ops.guided_euler(x, conditional, unconditional, h if i % 2 else -0.07, scale if i % 2 else 7.5, rescale)
        yield ("numbers a row" if i % 2 else "numbers") + (f", rescaled {rescale}" if rescale else "")


PROBES = ("rademacher", "normal", "hadamard")


def probe(data: Data) -> Iterator[str]:
    for _, distribution, rows, columns in data.each(PROBES, rounds=3):
        many = 1 if columns == 1 else 3
        ops.probe(data.key(), rows, columns, distribution=distribution, probes=many, first_row=5, dtype=data.dtype)
        yield distribution


def probe_dot(data: Data) -> Iterator[str]:
    for _, distribution, rows, columns in data.each(PROBES, rounds=3):
        values = data.normal(1 if columns == 1 else 3, rows, columns)
        ops.probe_dot(data.key(), values, distribution=distribution, first_row=LAST_ROW)
        yield distribution


def marginal_field(data: Data) -> Iterator[str]:
    sizes = ((3, 7, 5), (1, 1, 1), (2, 130, 40), (37, 12, 530))
    for i, (rows, columns, points) in enumerate(sizes[: data.sizes]):
        x, known = data.normal(rows, columns), data.normal(points, columns)
        weights = data.uniform(points, low=0.1).log() if i % 2 else None
        ops.marginal_field(x, data.uniform(rows, low=0.2, high=0.7), data.uniform(rows, low=0.5), known, weights)
        yield f"{points} points" + (", weighted" if i % 2 else "")


# ---- whole pieces: (what, error, bound) against a formula of their own ------------------------------------------


class Measured(NamedTuple):
    what: str
    error: float
    bound: float


def furthest(value: Any, truth: torch.Tensor) -> float:
    """The largest difference of a tensor; NaN where there is one."""
    return float((value.double() - truth.double()).abs().max())


def training_head(data: Data) -> Iterator[Measured]:
    """x_t, loss and gradient of flow matching, spelled out in float64."""
    rows, columns = (3, 7) if data.small else (64, 1031)
    x1, key, prediction = data.normal(rows, columns), data.key(), data.normal(rows, columns).requires_grad_()
    matching = FlowMatching()
    batch = matching.sample(x1, key=key)
    loss = matching.loss(prediction, batch)
    loss.backward()
    x0, t = ops.noise(key, rows, columns, dtype=data.dtype).double(), batch.t.double()[:, None]
    r = prediction.detach().double() - (x1.double() - x0)
    small, few = torch.finfo(data.full).eps, torch.finfo(data.dtype).eps
    for what, value, truth in (
        ("x_t", batch.x_t, (1 - t) * x0 + t * x1.double()),
        ("gradient", prediction.grad, 2 * r / r.numel()),
    ):
        yield Measured(what, furthest(value, truth), (few + 8 * small) * float(truth.abs().max()))
    yield Measured("loss", furthest(loss.detach(), r.square().mean()), 16 * small * float(r.square().mean()))


def linear_ode(data: Data) -> Iterator[Measured]:
    """dy/dt = yA against the matrix exponential."""
    rows = 2 if data.small else 33
    a, y = data.uniform(4, 4, low=-1.0, dtype=data.dtype), data.normal(rows, 4)
    tolerance = 1e-5 if data.dtype == F32 else 1e-9
    truth = y.double() @ torch.linalg.matrix_exp(a.double())
    bound = 20 * tolerance * float(truth.abs().max())
    solution = solve(lambda t, y: y @ a, y, rtol=tolerance, atol=tolerance)
    yield Measured("solve", furthest(solution.y, truth), bound)
    t = torch.tensor([0.0, 1.0], dtype=data.dtype, device=data.device)
    states = odeint(lambda t, y: y @ a, y, t, rtol=tolerance, atol=tolerance)
    yield Measured("odeint", furthest(states[-1], truth), bound)


MEAN, SPREAD = 0.7, 0.5


def gaussian_velocity(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The marginal velocity of N(MEAN, SPREAD²) data on the optimal-transport path."""
    t = t[:, None]
    variance = (SPREAD * t).square() + (1 - t).square()
    return MEAN + (SPREAD**2 * t - (1 - t)) / variance * (x - MEAN * t)


def gaussian_density(data: Data) -> Iterator[Measured]:
    """log p of Gaussian data in closed form."""
    x1 = MEAN + SPREAD * data.normal(2 if data.small else 33, 5)
    tolerance = 1e-5 if data.dtype == F32 else 1e-9
    scored = log_prob(gaussian_velocity, x1, divergence=Exact(), rtol=tolerance, atol=tolerance)
    truth = Normal(SPREAD).log_prob(x1.double() - MEAN)
    bound = 20 * tolerance * float(truth.abs().max())
    yield Measured("log_prob", furthest(scored.log_prob, truth), bound)


def repeated(data: Data) -> Iterator[Measured]:
    """Training head and solver again, on other numbers of threads: equal to the bit."""
    rows, columns = (3, 7) if data.small else (33, 2051)
    x1, key, prediction = data.normal(rows, columns), data.key(), data.normal(rows, columns)
    matching, threads = FlowMatching(), torch.get_num_threads()

    def once() -> list[Any]:
        wanted = prediction.clone().requires_grad_()
        batch = matching.sample(x1, key=key)
        loss = matching.loss(wanted, batch)
        loss.backward()
        solution = solve(lambda t, y: -y * (1 + y.square()), prediction, steps=2, method="midpoint")
        return [batch.x_t, loss.detach(), wanted.grad, solution.y]

    first = once()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            differences = [furthest(again, value) for again, value in zip(once(), first)]
            yield Measured(f"{number} threads", sum(differences), 0.0)  # a maximum may pass over NaN
    finally:
        torch.set_num_threads(threads)


def compiled(data: Data) -> Iterator[Measured]:
    """The loss and its gradient through torch.compile: what eager code gives."""
    rows, columns = 5, 130
    prediction, x1, x0 = (data.normal(rows, columns) for _ in range(3))
    table = data.uniform(rows, 6, low=0.3, high=1.5, dtype=data.full)

    def loss_and_gradient(call: Callable[..., torch.Tensor]) -> tuple[Any, Any]:
        wanted = prediction.clone().requires_grad_()
        loss = call(wanted, x1, table, x0)
        loss.backward()
        return loss.detach(), wanted.grad

    eager = loss_and_gradient(ops.matching_loss)
    traced = loss_and_gradient(torch.compile(ops.matching_loss, backend="aot_eager", fullgraph=True))
    for what, one, other in zip(("loss", "gradient"), traced, eager):
        yield Measured(what, furthest(one, other), 4 * torch.finfo(data.dtype).eps * float(other.abs().max()))


# ---- the lists --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """How an op is checked.

    Attributes:
        calls: makes the calls.
        reached: the op whose arguments are recorded, where it is not this one itself; the last is then left out.
        dtypes: in which it exists.
        exact: whether these arguments must give the reference's own bits.
        draws: position of the argument whose dtype drawn noise has; None where nothing is drawn inside.
        gradient: positions of the arguments whose gradient is checked.
        scale: (arguments, oracle) → oracle, where the op leaves a factor out in some dtype.
    """

    calls: Callable[[Data], Iterator[str]]
    reached: str = ""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    exact: Callable[[tuple[Any, ...]], bool] = lambda arguments: False
    draws: int | None = None
    gradient: tuple[int, ...] = ()
    scale: Callable[[tuple[Any, ...], list[torch.Tensor]], list[torch.Tensor]] | None = None


def as_rounded_by_torch(arguments: tuple[Any, ...]) -> bool:
    x1: torch.Tensor = arguments[1]
    return x1.device.type == "cpu" and x1.dtype in (F32, F64)


def before_division(arguments: tuple[Any, ...], oracle: list[torch.Tensor]) -> list[torch.Tensor]:
    """float16 gradients of a mean are stored before the division by the number of elements."""
    prediction, mask, reduction = arguments[0], arguments[6], arguments[12]
    divided_later = prediction.dtype == F16 and mask is None and reduction == REDUCTIONS["mean"]
    loss, gradient, denominator = oracle
    return [loss, gradient * prediction.numel() if divided_later else gradient, denominator]


OPS: dict[str, Op] = {
    "noise": Op(noise, exact=lambda arguments: arguments[6] == 1),  # uniform numbers
    "sample_path": Op(sample_path, draws=0),
    "matching_loss": Op(
        lambda data: matching_loss(data, False), reached="_matching_loss_forward", draws=1, gradient=(0,)
    ),
    "_matching_loss_forward": Op(lambda data: matching_loss(data, True), draws=1, scale=before_division),
    "_scale_gradient": Op(lambda data: scale_gradient(data, _registration.overload("_scale_gradient"))),
    "_scale_gradient_": Op(lambda data: scale_gradient(data, _registration.overload("_scale_gradient_"))),
    "conditional_flow": Op(conditional_flow, exact=as_rounded_by_torch),
    "runge_kutta_stage": Op(runge_kutta_stage, gradient=(0, 1)),
    "_runge_kutta_step_": Op(runge_kutta_step),
    "guided_euler": Op(guided_euler),
    "probe": Op(probe, exact=lambda arguments: arguments[3] != 1),  # signs, not normals
    "probe_dot": Op(probe_dot, draws=1, gradient=(1,)),
    "marginal_field": Op(marginal_field, dtypes=FULL, gradient=(0,)),
}


@dataclass(frozen=True)
class Piece:
    """Something whole, with the dtypes it has and whether interpreted kernels can do it."""

    measure: Callable[[Data], Iterator[Measured]]
    dtypes: tuple[str, ...] = FULL
    interpreted: bool = True


PIECES: dict[str, Piece] = {
    "training_head": Piece(training_head, tuple(DTYPES)),
    "linear_ode": Piece(linear_ode),
    "log_prob": Piece(gaussian_density),
    "repeat": Piece(repeated, ("fp32",)),
    "compile": Piece(compiled, ("fp32",), interpreted=False),
}
