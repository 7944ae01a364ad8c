"""Checks of what patterns are made of: an error names the argument, what it got and what it takes."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from heedful.patterns.arrays import count, dtype_name, is_array, is_bool, is_tracing

if TYPE_CHECKING:
    from heedful.patterns.arrays import Array

# Bounds are sums of a few arguments, positions and int32 operands; below this they stay within 64 bits.
LARGEST = 2**31 - 1

INTEGERS = ("int8", "uint8", "int16", "int32", "int64")


def describe(value: object) -> str:
    if is_array(value):
        what = "array" if isinstance(value, np.ndarray) else "tensor"
        return f"a {dtype_name(value)} {what} of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def readable(array: Array) -> bool:
    """Whether looking at an array's contents costs no synchronisation and no graph break."""
    return isinstance(array, np.ndarray) or (array.is_cpu and not is_tracing())


def integer(name: str, value: Any, minimum: int = -LARGEST, maximum: int = LARGEST) -> int:
    """An int argument from `minimum` to `maximum`."""
    if isinstance(value, bool) or is_array(value) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} takes an int, got {describe(value)}")
    number = operator.index(value)
    if not minimum <= number <= maximum:
        raise ValueError(f"{name} takes an int from {minimum} to {maximum}, got {number}")
    return number


def integers(name: str, value: Any) -> int | Array:
    """An int, or an int tensor that has one element or one per batch item."""
    if not is_array(value):
        if not hasattr(value, "__index__"):
            raise TypeError(f"{name} takes an int or an int tensor, got {describe(value)}")
        return integer(name, value)
    if dtype_name(value) not in INTEGERS:
        raise TypeError(f"{name} takes an int or an int tensor, got {describe(value)}")
    if value.ndim > 1:
        raise ValueError(f"{name} takes one element or one per batch item, got {describe(value)}")
    if dtype_name(value) == "int64" and count(value) and readable(value):
        least, largest = int(value.min()), int(value.max())
        if least < -LARGEST or largest > LARGEST:
            raise ValueError(f"{name} takes values from {-LARGEST} to {LARGEST}, got {least} to {largest}")
    return value


def offset_or_none(value: Any) -> int | Array | None:
    return None if value is None else integers("offset", value)


def booleans(name: str, value: Any) -> Array:
    """A bool tensor or array of at most four dimensions."""
    if not is_array(value) or not is_bool(value):
        raise TypeError(f"{name} takes a bool tensor, True where a query attends, got {describe(value)}")
    if value.ndim > 4:
        raise ValueError(f"{name} takes at most 4 dimensions, got {describe(value)}")
    return value


def check_per_batch(name: str, value: object, batch: int) -> None:
    if is_array(value) and count(value) not in (1, batch):
        raise ValueError(f"{name} takes one element or one per batch item, {batch} here, got {describe(value)}")


def check_broadcast(name: str, tensor: Array, shape: tuple[int, ...]) -> None:
    sizes = (1,) * (4 - tensor.ndim) + tuple(tensor.shape)
    if any(size not in (1, wanted) for size, wanted in zip(sizes, shape, strict=True)):
        raise ValueError(f"{name} takes a shape that broadcasts to {tuple(shape)}, got {tuple(tensor.shape)}")


def four_dimensional(tensor: Array) -> Array:
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))
