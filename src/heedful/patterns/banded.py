"""Patterns of diagonals: every pair, the past, a window, a window with gaps."""

from __future__ import annotations

from types import EllipsisType
from typing import TYPE_CHECKING

from heedful.patterns.arguments import integer, offset_or_none
from heedful.patterns.arrays import is_array, per_item
from heedful.patterns.base import Pattern
from heedful.patterns.schedule import DIAGONAL, Bound, Schedule, at_least, at_most, every

if TYPE_CHECKING:
    from torch import Tensor

    from heedful.patterns.arrays import Array


def diagonal(i: Tensor, j: Tensor, offset: int | Array | None, q_length: int, k_length: int) -> Tensor:
    """d = j - i - offset, for every batch item that the offset tells apart."""
    return j - position(i, offset, q_length, k_length)


def position(i: Tensor, offset: int | Array | None, q_length: int, k_length: int) -> Tensor:
    """i + offset, the key position of each query."""
    return i + (k_length - q_length if offset is None else per_item(offset, i.device))


class Full(Pattern):
    """Every query may attend to every key."""

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        return (i == i) & (j == j)

    def lower(self) -> Schedule:
        return Schedule.of([[]])


class Causal(Pattern):
    """A query may attend to its own position and to those before it: d <= 0.

    Without an offset the last query meets the last key (bottom-right alignment); `Causal(0)` is top-left, as in
    PyTorch's `is_causal`.

    Raises:
        TypeError, ValueError: `offset` is not an int, or an int tensor of one element or one per batch item.
    """

    def __init__(self, offset: int | Array | None = None) -> None:
        self.offset = offset_or_none(offset)

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        return diagonal(i, j, self.offset, q_length, k_length) <= 0

    def lower(self) -> Schedule:
        offset = Bound.of(self.offset)
        return Schedule.of([[at_most(DIAGONAL, offset)]], int(is_array(self.offset)))


class SlidingWindow(Pattern):
    """A query may attend to the keys from `left` positions before its own to `right` after it: -left <= d <= right.

    Both sides are inclusive, so `SlidingWindow(w)` is a radius and sees 2 w + 1 keys; a causal window of n keys
    (Hugging Face's `sliding_window=n`) is `SlidingWindow(n - 1, 0)`.

    Args:
        left: positions before the query's own, 0 or more; None is unlimited.
        right: positions after it, 0 or more; None is unlimited; as many as `left` if not given.
        offset: see `Pattern`.

    Raises:
        TypeError, ValueError: a side is not an int of at least 0 or None, or `offset` is not as `Pattern` says.
    """

    def __init__(
        self, left: int | None, right: int | EllipsisType | None = ..., offset: int | Array | None = None
    ) -> None:
        self.left = None if left is None else integer("left", left, 0)
        self.right = self.left if right is ... else None if right is None else integer("right", right, 0)
        self.offset = offset_or_none(offset)

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        d = diagonal(i, j, self.offset, q_length, k_length)
        pairs = d == d
        if self.left is not None:
            pairs = pairs & (-self.left <= d)
        if self.right is not None:
            pairs = pairs & (d <= self.right)
        return pairs

    def lower(self) -> Schedule:
        offset = Bound.of(self.offset)
        terms = []
        if self.left is not None:
            terms.append(at_least(DIAGONAL, offset.plus(-self.left)))
        if self.right is not None:
            terms.append(at_most(DIAGONAL, offset.plus(self.right)))
        return Schedule.of([terms], int(is_array(self.offset)))


class Dilated(Pattern):
    """A query may attend to every `step`-th key on both sides of its own, up to `radius` of them on each:
    |d| <= radius * step, and step divides d.

    Args:
        radius: keys on each side, 0 or more; 2 radius + 1 in all.
        step: distance between them in positions, 1 or more.
        offset: see `Pattern`.

    Raises:
        TypeError, ValueError: an argument is not an int in its range, or `offset` is not as `Pattern` says.
    """

    def __init__(self, radius: int, step: int, offset: int | Array | None = None) -> None:
        self.radius = integer("radius", radius, 0)
        self.step = integer("step", step, 1)
        self.offset = offset_or_none(offset)

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        d = diagonal(i, j, self.offset, q_length, k_length)
        return (d.abs() <= self.radius * self.step) & (d % self.step == 0)

    def lower(self) -> Schedule:
        offset = Bound.of(self.offset)
        span = self.radius * self.step
        band = [at_least(DIAGONAL, offset.plus(-span)), at_most(DIAGONAL, offset.plus(span))]
        return Schedule.of([[*band, every(self.step, offset)]], int(is_array(self.offset)))
