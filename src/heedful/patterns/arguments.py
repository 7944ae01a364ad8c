"""Checks of what patterns are made of: an error names the argument, what it got and what it takes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

# Bounds are sums of a few arguments, positions and int32 operands; below this they stay within 64 bits.
LARGEST = 2**31 - 1

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def readable(tensor: Tensor) -> bool:
    """Whether looking at a tensor's contents costs no synchronisation and no graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def integer(name: str, value: Any, minimum: int = -LARGEST, maximum: int = LARGEST) -> int:
    """An int argument from `minimum` to `maximum`."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} takes an int, got {describe(value)}")
    number = operator.index(value)
    if not minimum <= number <= maximum:
        raise ValueError(f"{name} takes an int from {minimum} to {maximum}, got {number}")
    return number


def integers(name: str, value: Any) -> int | Tensor:
    """An int, or an int tensor that has one element or one per batch item."""
    if not isinstance(value, Tensor):
        if not hasattr(value, "__index__"):
            raise TypeError(f"{name} takes an int or an int tensor, got {describe(value)}")
        return integer(name, value)
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name} takes an int or an int tensor, got {describe(value)}")
    if value.ndim > 1:
        raise ValueError(f"{name} takes one element or one per batch item, got {describe(value)}")
    if value.dtype == torch.int64 and value.numel() and readable(value):
        least, largest = int(value.min()), int(value.max())
        if least < -LARGEST or largest > LARGEST:
            raise ValueError(f"{name} takes values from {-LARGEST} to {LARGEST}, got {least} to {largest}")
    return value


def offset_or_none(value: Any) -> int | Tensor | None:
    return None if value is None else integers("offset", value)


def booleans(name: str, value: Any) -> Tensor:
    """A bool tensor of at most four dimensions."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} takes a bool tensor, True where a query attends, got {describe(value)}")
    if value.ndim > 4:
        raise ValueError(f"{name} takes at most 4 dimensions, got {describe(value)}")
    return value


def check_per_batch(name: str, value: object, batch: int) -> None:
    if isinstance(value, Tensor) and value.numel() not in (1, batch):
        raise ValueError(f"{name} takes one element or one per batch item, {batch} here, got {describe(value)}")


def check_broadcast(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    sizes = (1,) * (4 - tensor.ndim) + tuple(tensor.shape)
    if any(size not in (1, wanted) for size, wanted in zip(sizes, shape, strict=True)):
        raise ValueError(f"{name} takes a shape that broadcasts to {tuple(shape)}, got {tuple(tensor.shape)}")


def four_dimensional(tensor: Tensor) -> Tensor:
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))
