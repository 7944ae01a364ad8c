"""Positions that see everything and that everything sees, and Longformer's pattern built on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from heedful.patterns.arguments import INTEGERS, describe, integer, offset_or_none
from heedful.patterns.arrays import dtype_name, is_array
from heedful.patterns.banded import SlidingWindow, position
from heedful.patterns.base import Pattern
from heedful.patterns.schedule import KEY, QUERY, Bound, Schedule, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

    from heedful.patterns.arrays import Array


class Global(Pattern):
    """Some positions attend to every key and are attended to by every query: j in positions, or i + offset in
    positions.

    Args:
        positions: an int n for the first n positions, or the positions themselves as a sequence of ints or a 1-D
            int tensor. They become part of the pattern: a tensor's contents are read here, once.
        offset: see `Pattern`.

    Raises:
        TypeError, ValueError: a position is not an int of at least 0, or `offset` is not as `Pattern` says.
    """

    def __init__(self, positions: int | Sequence[int] | Array, offset: int | Array | None = None) -> None:
        self.positions = _normal(positions)
        self.offset = offset_or_none(offset)

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        import torch

        chosen = range(self.positions) if isinstance(self.positions, int) else self.positions
        positions = torch.tensor(list(chosen), dtype=torch.int64, device=i.device)
        return torch.isin(j, positions) | torch.isin(position(i, self.offset, q_length, k_length), positions)

    def lower(self) -> Schedule:
        shift = Bound.of(self.offset).negative()
        atoms = []
        for first, last in self._runs():
            atoms.append([at_least(KEY, Bound(first)), at_most(KEY, Bound(last))])
            atoms.append([at_least(QUERY, shift.plus(first)), at_most(QUERY, shift.plus(last))])
        return Schedule.of(atoms, int(is_array(self.offset)))

    def _runs(self) -> list[tuple[int, int]]:
        """First and last of each run of consecutive positions."""
        if isinstance(self.positions, int):
            return [(0, self.positions - 1)]
        runs: list[tuple[int, int]] = []
        for place in self.positions:
            if runs and runs[-1][1] == place - 1:
                runs[-1] = (runs[-1][0], place)
            else:
                runs.append((place, place))
        return runs


class Longformer(Pattern):
    """A window and some global positions: `SlidingWindow(radius) | Global(global_tokens)`, both at `offset`.

    Args:
        radius: positions on each side of the query's own, inclusive, 0 or more (half of Longformer's
            `attention_window`).
        global_tokens: as `Global`'s positions: an int n for the first n, or the positions.
        offset: see `Pattern`.

    Raises:
        TypeError, ValueError: as `SlidingWindow` and `Global`.
    """

    def __init__(
        self, radius: int, global_tokens: int | Sequence[int] | Array, offset: int | Array | None = None
    ) -> None:
        self.radius = integer("radius", radius, 0)
        self.global_tokens = _normal(global_tokens, "global_tokens")
        self.offset = offset_or_none(offset)

    def _union(self) -> Pattern:
        return SlidingWindow(self.radius, self.radius, self.offset) | Global(self.global_tokens, self.offset)

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        return self._union().pairs(i, j, q_length, k_length)

    def lower(self) -> Schedule:
        return self._union().schedule

    def arrays(self, q_length: int, k_length: int) -> tuple[Array, ...]:
        return self._union().arrays(q_length, k_length)


def _normal(positions: int | Iterable[int] | Array, name: str = "positions") -> int | tuple[int, ...]:
    """Sorted and without duplicates; the first n as the int n."""
    if is_array(positions):
        if positions.ndim != 1 or dtype_name(positions) not in INTEGERS:
            raise TypeError(f"{name} takes an int, ints or a 1-D int tensor, got {describe(positions)}")
        positions = positions.tolist()
    elif not isinstance(positions, Iterable):
        return integer(name, positions, 0)
    chosen = tuple(sorted({integer(name, place, 0) for place in positions}))
    return len(chosen) if chosen == tuple(range(len(chosen))) else chosen
