"""How a user's state, a tensor or a tuple, real or complex, is laid out in the one real tensor that the ops work on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)  # fmt: skip


class State:
    """The layout of a state ``[*lead, …]``, where ``lead`` is ``[B]``, or nothing where one step size serves all.

    A real tensor is itself, a complex one its ``view_as_real``; a tuple is flattened after ``lead`` and concatenated.
    """

    def __init__(self, name: str, y0, lead: int):
        self.name, self.lead = name, lead
        self.is_tuple = isinstance(y0, tuple)
        parts = y0 if self.is_tuple else (y0,)
        if not parts:
            raise ValueError(f"{name}: expected a tensor or a tuple of at least one tensor, got an empty tuple")
        for i, part in enumerate(parts):
            where = f"{name}[{i}]" if self.is_tuple else name
            if not isinstance(part, torch.Tensor):
                raise TypeError(f"{where}: expected a torch.Tensor, got {type(part).__name__}")
            if part.dtype not in DTYPES:
                raise TypeError(f"{where}: expected a floating or complex dtype, got {part.dtype}")
            if part.dim() < lead:
                raise ValueError(f"{where}: expected shape [B, …], got a scalar")
            for what, got, want in (
                ("dtype", part.dtype, parts[0].dtype),
                ("device", part.device, parts[0].device),
                ("leading size", list(part.shape[:lead]), list(parts[0].shape[:lead])),
            ):
                if got != want:
                    raise ValueError(f"{where}: expected {what} {want}, that of {name}[0], got {got}")
        self.dtype, self.device = parts[0].dtype, parts[0].device
        self.complex = self.dtype.is_complex
        self.components = 2 if self.complex else 1
        self.shapes = [part.shape[lead:] for part in parts]
        self.rows = parts[0].shape[0] if lead else 1
        self.shape = y0.shape if not self.is_tuple else None

    @property
    def columns(self) -> int:
        """Real columns of a row."""
        return self.components * sum(math.prod(shape) for shape in self.shapes)

    def pack(self, y) -> torch.Tensor:
        if not self.is_tuple:
            return torch.view_as_real(y.resolve_conj()) if self.complex else y
        flat = [part.reshape(*part.shape[: self.lead], math.prod(part.shape[self.lead :])) for part in y]
        whole = torch.cat(flat, dim=-1)
        return torch.view_as_real(whole.resolve_conj()).flatten(-2) if self.complex else whole

    def unpack(self, x: torch.Tensor):
        """The user's form of a packed state, whose leading dimensions may have become more."""
        if not self.is_tuple:
            return torch.view_as_complex(x) if self.complex else x
        if self.complex:
            x = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        sizes = [math.prod(shape) for shape in self.shapes]
        return tuple(part.reshape(*x.shape[:-1], *shape) for part, shape in zip(x.split(sizes, -1), self.shapes))

    def field(self, f: Callable) -> Callable:
        """f(t, packed state) → packed value, checked; a copy where f gives the same tensor again, a buffer perhaps."""
        previous = None  # the first value is copied too, since only the second tells
        if not self.is_tuple and not self.complex:
            shape, dtype = self.shape, self.dtype

            def plain(t, y):
                nonlocal previous
                k = f(t, y)
                if previous is None or not isinstance(k, torch.Tensor) or k.shape != shape or k.dtype != dtype:
                    self.check(k)
                    previous = k
                    return k.clone()
                if k is previous:
                    return k.clone()
                previous = k
                return k

            return plain

        def packed(t, y):
            nonlocal previous
            k = f(t, self.unpack(y))
            self.check(k)
            again, previous = previous is None or previous is k, k
            return self.pack(k.clone() if again and not self.is_tuple else k)  # a tuple's parts are concatenated anyway

        return packed

    def check(self, k) -> None:
        """Whether what f returned has the structure, shapes and dtype of the state."""
        if self.is_tuple and (not isinstance(k, tuple) or len(k) != len(self.shapes)):
            got = f"a tuple of {len(k)}" if isinstance(k, tuple) else type(k).__name__
            raise ValueError(
                f"f: expected it to return a tuple of {len(self.shapes)} tensors like {self.name}, got {got}"
            )
        for i, (part, shape) in enumerate(zip(k if self.is_tuple else (k,), self.shapes)):
            where = f" for {self.name}[{i}]" if self.is_tuple else ""
            if not isinstance(part, torch.Tensor):
                raise ValueError(f"f: expected it to return a torch.Tensor{where}, got {type(part).__name__}")
            want = [self.rows, *shape] if self.lead else list(shape)
            if list(part.shape) != want:
                raise ValueError(
                    f"f: expected it to return shape {want}, that of {self.name}{where}, got {list(part.shape)}"
                )
            if part.dtype != self.dtype:
                raise ValueError(
                    f"f: expected it to return {self.dtype}, the dtype of {self.name}{where}, got {part.dtype}"
                )
            if part.device != self.device:
                raise ValueError(f"f: expected it to return a tensor on {self.device}{where}, got {part.device}")
