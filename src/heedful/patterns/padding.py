"""The part of each sequence that is not padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heedful.patterns.arguments import integers
from heedful.patterns.arrays import is_array, per_item
from heedful.patterns.base import Pattern
from heedful.patterns.schedule import KEY, Bound, Schedule, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

    from heedful.patterns.arrays import Array


class Padding(Pattern):
    """A query may attend to the keys from start to stop of its batch item: start[b] <= j < stop[b].

    Args:
        start: the first key that is no padding: an int, or an int tensor of one element or one per batch item.
        stop: the first padding key after it, in the same form.

    Raises:
        TypeError, ValueError: an argument is not of that form; at the call, it has neither one element nor one
            per batch item.
    """

    def __init__(self, start: int | Array, stop: int | Array) -> None:
        self.start = integers("start", start)
        self.stop = integers("stop", stop)

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        return (per_item(self.start, j.device) <= j) & (j < per_item(self.stop, j.device))

    def lower(self) -> Schedule:
        start, stop = is_array(self.start), is_array(self.stop)
        first, last = Bound.of(self.start), Bound.of(self.stop, int(start)).plus(-1)
        return Schedule.of([[at_least(KEY, first), at_most(KEY, last)]], start + stop)
