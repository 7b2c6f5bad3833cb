"""What an op of the contract suite is, and what its samples and oracles are made of; :mod:`contract` lists the ops."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fmkernels import _registration

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = {"f32": F32, "f64": F64, "bf16": BF16, "f16": F16}
NORMAL_ERROR = {F32: 4e-6, F64: 2e-14}  # absolute, of a normal computed in that precision
ULPS = 8  # "a few": roundings that a kernel may order otherwise than the reference
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()


class Expected(NamedTuple):
    """What an output must be in fp64, and the error allowed besides twice the reference's and the output's rounding.

    With ``exact`` no error is allowed.
    """

    value: torch.Tensor
    slack: torch.Tensor | float = 0.0
    exact: bool = False


class Function(NamedTuple):
    """A smooth fp64 function of an op's differentiable inputs, for gradient checks and transforms."""

    name: str
    call: Callable[..., Any]
    inputs: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Op:
    """One op of the contract.

    Attributes:
        name: in ``torch.ops.fmkernels``.
        factors: name -> {label: level}; "shape" holds (shape, leading dimensions that number the rows).
        make: (levels by factor name, device) -> arguments of the op; random data depends on the level "seed".
        oracle: (arguments, outputs) -> one :class:`Expected` per output in fp64, or None for an output without numbers.
            It takes drawn times from the outputs and drawn normals from the noise op, itself tested.
        valid: whether a combination of levels exists.
        functions: device -> what can be differentiated; nothing by default.
        reference: (arguments, outputs) -> the reference's outputs, where it is more than a call of it.
        part: (arguments, row) -> arguments of that row of dimension 0 alone, whose outputs must be the whole's row.
        row_dim: the dimension of the outputs that numbers the rows.
        sum_ulps: how far that may be off where a sum's order follows the launch; draws must be equal to the bit.
        mutates: positions of the arguments that the op overwrites and which stand for its outputs, None left out.
        paired: positions of arguments whose rows make sense only with those of what is overwritten.
    """

    name: str
    factors: Mapping[str, Mapping[str, Any]]
    make: Callable[[dict, torch.device], tuple]
    oracle: Callable[[tuple, tuple], list[Expected | None]]
    valid: Callable[[dict], bool] = lambda levels: True
    functions: Callable[[torch.device], list[Function]] = lambda device: []
    reference: Callable[[tuple, tuple], tuple] | None = None
    part: Callable[[tuple, int], tuple] | None = None
    row_dim: int = 0
    sum_ulps: int = 0
    mutates: tuple[int, ...] = ()
    paired: tuple[int, ...] = ()

    @property
    def overload(self):
        return _registration.overload(self.name)

    def run(self, arguments: tuple, function: Callable | None = None) -> tuple[torch.Tensor, ...]:
        """The outputs of the op, or of another function of its arguments, such as the reference."""
        arguments = list(arguments)
        overwritten = [i for i in self.mutates if arguments[i] is not None]
        for i in overwritten:
            arguments[i] = arguments[i].clone()
        outputs = (function or self.overload)(*arguments)
        if self.mutates:
            outputs = tuple(arguments[i] for i in overwritten)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def expected(self, arguments: tuple, outputs: tuple) -> tuple[tuple, list[Expected | None]]:
        """What the reference gives in the same precision, and the oracle in fp64."""
        if self.reference is None:
            return self.run(arguments, _registration.references[self.name]), self.oracle(arguments, outputs)
        return self.reference(arguments, outputs), self.oracle(arguments, outputs)

    def levels(self, labels: Mapping[str, str], **override) -> dict:
        return {"seed": 0, **{name: self.factors[name][label] for name, label in labels.items()}, **override}

    def cover(self) -> list[dict[str, str]]:
        """Labels of combinations in which every valid pair of levels occurs."""
        return pairwise(self.factors, lambda labels: self.valid(self.levels(labels)))


def pairwise(factors: Mapping[str, Mapping], valid: Callable[[dict], bool]) -> list[dict[str, str]]:
    """A deterministic greedy pairwise cover; pairs without a valid completion among 200 are left out."""
    chance = random.Random(0)
    names = list(factors)
    pairs = itertools.combinations(names, 2)
    missing = dict.fromkeys(((a, i), (b, j)) for a, b in pairs for i in factors[a] for j in factors[b])  # in this order
    rows = []
    while missing:
        pair = next(iter(missing))
        best, gain = None, 0
        for attempt in range(200):
            labels = {name: chance.choice(list(factors[name])) for name in names} | dict(pair)
            covered = sum(p in missing for p in itertools.combinations(labels.items(), 2))
            if covered > gain and valid(labels):
                best, gain = labels, covered
            if best and attempt >= 30:
                break
        if best is None:
            del missing[pair]
            continue
        rows.append(best)
        for p in itertools.combinations(best.items(), 2):
            missing.pop(p, None)
    return rows


class Data:
    """Random tensors that depend on the seed alone: made on the CPU, then moved."""

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def normal(self, shape, dtype=F32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64).to(self.device, dtype)

    def uniform(self, shape, low=0.0, high=1.0, dtype=F32) -> torch.Tensor:
        return (low + (high - low) * torch.rand(shape, generator=self.generator, dtype=F64)).to(self.device, dtype)

    def boolean(self, shape, probability=0.7) -> torch.Tensor:
        return self.uniform(shape) < probability

    def key(self) -> torch.Tensor:
        return torch.randint(-(2**62), 2**62, (1,), generator=self.generator).to(self.device)


class Capture(TorchDispatchMode):
    """Records the arguments with which an op is reached."""

    def __init__(self, name: str):
        super().__init__()
        self.overload, self.arguments = _registration.overload(name), None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.overload:
            self.arguments = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        return func(*args, **(kwargs or {}))


def captured(name: str, call: Callable) -> tuple:
    """The arguments with which a public call reaches an op."""
    with Capture(name) as capture:
        call()
    return capture.arguments


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def rows_of(values: torch.Tensor, dims: int) -> torch.Tensor:
    return values.reshape(values.shape + (1,) * (dims - values.dim()))


def row_sums(values: torch.Tensor, dims: int) -> torch.Tensor:
    return values.sum(dim=tuple(range(dims, values.dim()))) if values.dim() > dims else values


SHAPES = {  # (shape, row dimensions): scalars, empty, single, odd, a t of every prefix shape, rows longer than a block
    "5": ((5,), 1),
    "3x7": ((3, 7), 1),
    "1x1": ((1, 1), 1),
    "4x3x5": ((4, 3, 5), 2),
    "37x2": ((37, 2), 1),
    "2x1031": ((2, 1031), 1),
    "2x3x4_all": ((2, 3, 4), 3),
    "2x130_one": ((2, 130), 0),
    "scalar": ((), 0),
    "3x0": ((3, 0), 1),
    "0x4": ((0, 4), 1),
    "3x16x16": ((3, 16, 16), 1),
}
FIRST_ROWS = {"first0": 0, "first5": 5, "first2^32": 2**32 - 2}
