"""A pattern over a cache whose batch items have lengths of their own."""

from __future__ import annotations

import functools
import operator
from collections.abc import Hashable
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heedful.patterns.base import And, Or, Pattern
from heedful.patterns.schedule import BLOCKS, KEY, MASK, Bound, Schedule, at_least, at_most

if TYPE_CHECKING:
    from heedful.patterns.arrays import Array


class Aligned(Pattern):
    """`within` among the keys start[b] <= j < stop[b], the last query of batch item b at position stop[b] - 1.

    Where `within` says k_length - q_length, here it is stop[b] - q_length. What does not speak of positions (masks,
    blocks, documents) is made for keys up to `width`, the longest stop, and holds nothing behind it.

    Args:
        within: the pattern.
        offset: int32 (B or 1,), stop - q_length.
        stop: int32 (B or 1,).
        start: int32 (B or 1,), or None for 0.
        width: int, the largest of `stop`.
    """

    def __init__(self, within: Pattern, offset: Tensor, stop: Tensor, start: Tensor | None, width: int) -> None:
        self.within = within
        self.offset = offset
        self.stop = stop
        self.start = start
        self.width = width

    @functools.cached_property
    def static(self) -> tuple[Hashable, ...]:
        # The width is no part of the schedule.
        shapes = tuple(self.offset.shape), None if self.start is None else tuple(self.start.shape)
        return (type(self), self.within.static, *shapes)

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        start = 0 if self.start is None else self.start.to(j.device).view(-1, 1, 1, 1)
        inside = (start <= j) & (j < self.stop.to(j.device).view(-1, 1, 1, 1))
        return self._pairs(self.within, i, j, q_length, k_length) & inside

    def _pairs(self, pattern: Pattern, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        if pattern.by_position:
            lengths = self.stop.to(j.device, torch.int64).view(-1, 1, 1, 1)
            return pattern.pairs(i, j, q_length, lengths)  # type: ignore[arg-type]
        if isinstance(pattern, And | Or):
            join = operator.and_ if isinstance(pattern, And) else operator.or_
            return functools.reduce(join, [self._pairs(part, i, j, q_length, k_length) for part in pattern.parts])
        pairs = pattern.pairs(i, j[..., : self.width], q_length, self.width)
        return _widened(pairs, k_length if pairs.shape[-1] > 1 else 1)

    def lower(self) -> Schedule:
        aligned = self.within.schedule.aligned(self.within.schedule.slots)
        inside = [at_most(KEY, Bound(-1, 0))]
        if self.start is not None:
            inside.append(at_least(KEY, Bound(0, 1)))
        return aligned & Schedule.of([inside], len(inside))

    def arrays(self, q_length: int, k_length: int) -> tuple[Array, ...]:
        operands = self.within.operands(q_length, self.width, self.stop.device)
        if operands and k_length != self.width and not self.within.by_position:
            operands = self._widened_operands(operands, k_length)
        ends = (self.offset, self.stop) if self.start is None else (self.offset, self.stop, self.start)
        return (*operands, *ends)

    def _widened_operands(self, operands: tuple[Tensor, ...], k_length: int) -> tuple[Tensor, ...]:
        widths = {}
        for term in chain(*self.within.schedule.atoms):
            if term.kind == MASK and operands[term.slot].shape[-1] > 1:
                widths[term.slot] = k_length
            elif term.kind == BLOCKS:
                widths[term.slot] = -(-k_length // term.numbers[0])
        return tuple([_widened(tensor, widths.get(slot, 0)) for slot, tensor in enumerate(operands)])

    def validate(self, batch: int, heads: int, q_length: int, k_length: int) -> None:
        self.within.validate(batch, heads, q_length, self.width)


def _widened(pairs: Tensor, width: int) -> Tensor:
    """A mask of at least this width, False behind its keys."""
    missing = width - pairs.shape[-1]
    return pairs if missing <= 0 else torch.nn.functional.pad(pairs, (0, missing))
