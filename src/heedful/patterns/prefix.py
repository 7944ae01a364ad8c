"""The keys at the beginning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heedful.patterns.arguments import integer
from heedful.patterns.base import Pattern
from heedful.patterns.schedule import KEY, Bound, Schedule, at_most

if TYPE_CHECKING:
    from torch import Tensor


class Prefix(Pattern):
    """Every query may attend to the first `n` keys: j < n. `Causal() | Prefix(n)` is a prefix language model.

    Raises:
        TypeError, ValueError: `n` is not an int of at least 0.
    """

    def __init__(self, n: int) -> None:
        self.n = integer("n", n, 0)

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        return j < self.n

    def lower(self) -> Schedule:
        return Schedule.of([[at_most(KEY, Bound(self.n - 1))]])
