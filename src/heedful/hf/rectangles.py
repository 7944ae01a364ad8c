"""Ranges of queries that see ranges of keys, each batch item its own."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor

from heedful.patterns import Pattern
from heedful.patterns.schedule import KEY, QUERY, Bound, Schedule, at_least, at_most

# Each is an atom of the schedule. With so many a call still costs what `Documents` costs, about.
MOST_RECTANGLES = 256


class Rectangles(Pattern):
    """Query i of batch item b may see key j where some n has q_start[b, n] <= i < q_stop[b, n] and
    k_start[b, n] <= j < k_stop[b, n].

    Args:
        q_start, q_stop, k_start, k_stop: int tensors (B, N); items with fewer ranges have empty ones.
    """

    def __init__(self, q_start: Tensor, q_stop: Tensor, k_start: Tensor, k_stop: Tensor) -> None:
        self.q_start, self.q_stop, self.k_start, self.k_stop = q_start, q_stop, k_start, k_stop

    @property
    def _ends(self) -> tuple[Tensor, ...]:
        return self.q_start, self.q_stop, self.k_start, self.k_stop

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        rectangles = zip(*(end.to(i.device)[:, None, None, None].unbind(-1) for end in self._ends), strict=True)
        return functools.reduce(
            operator.or_,
            [(q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) for q0, q1, k0, k1 in rectangles],
            torch.zeros_like(i * j, dtype=torch.bool),
        )

    def lower(self) -> Schedule:
        count = self.q_start.shape[1]
        atoms = []
        for n in range(count):
            q_start, q_stop, k_start, k_stop = (Bound(0, end * count + n) for end in range(4))
            atoms.append(
                [
                    at_least(QUERY, q_start),
                    at_most(QUERY, q_stop.plus(-1)),
                    at_least(KEY, k_start),
                    at_most(KEY, k_stop.plus(-1)),
                ]
            )
        return Schedule.of(atoms, 4 * count)

    def arrays(self, q_length: int, k_length: int) -> tuple[Tensor, ...]:
        return torch.cat(self._ends, 1).to(torch.int32).T.contiguous().unbind(0)

    def validate(self, batch: int, heads: int, q_length: int, k_length: int) -> None:
        if self.q_start.shape[0] != batch:
            raise ValueError(f"q_start takes one row per batch item, {batch} here, got {tuple(self.q_start.shape)}")


def runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where runs of equal ids (B, L) start and stop, negative ids left out: (B, N) each, of the most runs of an item.

    N is a power of 2, so that few numbers of runs make schedules of their own.
    """
    edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
    change = ids.diff(dim=1) != 0
    first, last = (torch.cat(parts, 1) & (ids >= 0) for parts in ((edge, change), (change, edge)))
    counts = first.sum(1)
    item, start = first.nonzero(as_tuple=True)
    stop = last.nonzero(as_tuple=True)[1] + 1
    n = torch.arange(start.numel(), device=ids.device) - (counts.cumsum(0) - counts)[item]
    width = 1 << max(int(counts.max()) - 1, 0).bit_length()
    bounds = torch.zeros(2, ids.shape[0], width, dtype=torch.int32, device=ids.device)
    bounds[0, item, n], bounds[1, item, n] = start.to(torch.int32), stop.to(torch.int32)
    return bounds[0], bounds[1]


def come_back(ids: Tensor, start: Tensor, stop: Tensor) -> bool:
    """Whether an id of `runs` has more than one of them in a batch item."""
    found = torch.where(stop > start, ids.gather(1, start.long()), -1).sort(1).values
    return bool(((found.diff(dim=1) == 0) & (found[:, 1:] >= 0)).any())
