"""Argument checks shared by the public functions: every message names the argument, what was expected, what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensor(name: str, value: Any, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def floating(name: str, value: torch.Tensor) -> None:
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected dtype float32, float64, bfloat16 or float16, got {_dtype(value.dtype)}")


def full_precision(name: str, value: torch.Tensor) -> None:
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: expected dtype float32 or float64 (half precision rounds times near 1 to 1), "
            f"got {_dtype(value.dtype)}"
        )


def same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device}, that of {other_name}, got {value.device}")


def same_shape(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(f"{name}: expected shape {list(other.shape)}, that of {other_name}, got {list(value.shape)}")


def same_dtype(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name}: expected dtype {_dtype(other.dtype)}, that of {other_name}, got {_dtype(value.dtype)}"
        )


def key(name: str, value: Any) -> None:
    tensor(name, value)
    if value.dtype != torch.int64 or value.shape != (1,):
        raise ValueError(
            f"{name}: expected an int64 tensor of shape [1] (made by fmkernels.key), "
            f"got {_dtype(value.dtype)} of shape {list(value.shape)}"
        )


def number(
    name: str, value: Any, low: float | None = None, high: float | None = None, *, open_low: bool = False
) -> float:
    """A finite real number in [low, high], or in (low, high] with open_low."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")
    value = float(value)
    expected = "a finite number"
    if low is not None:
        expected += f" {'above' if open_low else 'of at least'} {low:g}"
    if high is not None:
        expected += f"{' and' if low is not None else ''} at most {high:g}"
    too_low = low is not None and (value < low or (open_low and value == low))
    if not math.isfinite(value) or too_low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return value


def count(name: str, value: Any, low: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if isinstance(value, int) and value < low:
        raise ValueError(f"{name}: expected an int of at least {low}, got {value}")


def choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {_names(choices)}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {_names(choices)}, got {value!r}")


def _names(choices: Iterable[str]) -> str:
    return ", ".join(repr(c) for c in choices)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
