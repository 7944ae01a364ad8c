"""Attention inside chunks of fixed size, as in Llama 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heedful.patterns.arguments import integer, offset_or_none
from heedful.patterns.arrays import is_array
from heedful.patterns.banded import position
from heedful.patterns.base import Pattern
from heedful.patterns.schedule import Bound, Schedule, same_chunk

if TYPE_CHECKING:
    from torch import Tensor

    from heedful.patterns.arrays import Array


class Chunked(Pattern):
    """A query may attend to the keys of its own chunk: (i + offset) // size == j // size, rounding down.

    Args:
        size: positions in a chunk, 1 or more.
        offset: see `Pattern`.

    Raises:
        TypeError, ValueError: `size` is not an int of at least 1, or `offset` is not as `Pattern` says.
    """

    def __init__(self, size: int, offset: int | Array | None = None) -> None:
        self.size = integer("size", size, 1)
        self.offset = offset_or_none(offset)

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        return position(i, self.offset, q_length, k_length) // self.size == j // self.size

    def lower(self) -> Schedule:
        return Schedule.of([[same_chunk(self.size, Bound.of(self.offset))]], int(is_array(self.offset)))
