"""The end of each sequence, in blocks that are used in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heedful.cache_kinds.pool import Pool, blocks_like
from heedful.cache_kinds.store import as_list, rounded_up


class Ring(Pool):
    """The last positions of each item, in blocks of its own that are used in turn: position j overwrites what is as
    many positions before it as the ring holds. The table repeats the blocks, so that positions stay what they are.

    window: positions before a query's own that later queries still see.
    """

    kind = "ring"

    def __init__(self, key: Tensor, value: Tensor, window: int, size: int) -> None:
        self.window = window
        self.least = rounded_up(window + size, size)
        self.turn = self.least
        super().__init__(key, value, size, key.shape[0] * self.turn)
        self.floors = [0] * self.batch

    @property
    def room(self) -> str:
        return f"the last {self.turn * self.size} positions, window {self.window}"

    def block(self, item: int, column: int) -> int:
        return item * self.turn + column % self.turn

    def fill(self, first: int) -> None:
        device = self.table.device
        turns = torch.arange(first, self.table.shape[1], device=device) % self.turn
        self.table[:, first:] = torch.arange(self.batch, device=device)[:, None] * self.turn + turns

    def reserve(self, lengths: int | list[int], count: int) -> None:
        # All that the queries of a call see is there at once: their window and themselves.
        turn = max(self.least, rounded_up(self.window + count, self.size))
        lengths = as_list(lengths, self.batch)
        if turn > self.turn or (self.turn > turn == self.least):
            self._resize(turn, lengths, count)
        self.widen(rounded_up(max(lengths, default=0) + count, self.size))

    def write(self, key: Tensor, value: Tensor, lengths: int | list[int]) -> None:
        count, turn = key.shape[2], self.turn * self.size
        if isinstance(lengths, int) and lengths % self.size + count <= self.size:
            block, row = lengths // self.size % self.turn, lengths % self.size
            for pool, new in ((self.key, key), (self.value, value)):
                pool.unflatten(0, (-1, self.turn)).select(1, block).narrow(2, row, count).copy_(new)
        else:
            super().write(key, value, lengths)
        stops = [length + count for length in as_list(lengths, self.batch)]
        self.floors = [max(floor, stop - turn) for floor, stop in zip(self.floors, stops, strict=True)]

    def crop(self, lengths: list[int]) -> None:
        for length, floor in zip(lengths, self.floors, strict=True):
            if length and max(0, length - self.window) < floor:
                raise ValueError(
                    f"lengths takes 0 or at least {floor + self.window} here, as the ring has overwritten what a query "
                    f"behind {length} positions would see, got {length}"
                )
        self.floors = [floor if length else 0 for length, floor in zip(lengths, self.floors, strict=True)]

    def take(self, items: Sequence[int], lengths: list[int]) -> None:
        index = torch.tensor(items, dtype=torch.int64, device=self.key.device)
        taken = []
        for old in (self.key, self.value):
            new = blocks_like(old, len(items) * self.turn, self.size)
            new.unflatten(0, (-1, self.turn))[:] = old.unflatten(0, (-1, self.turn)).index_select(0, index)
            taken.append(new)
        self.key, self.value = taken
        self.floors = [self.floors[item] for item in items]
        self.batch = len(items)
        self.table = self.empty_table(self.table.shape[1])
        self.fill(0)

    def _resize(self, turn: int, lengths: list[int], count: int) -> None:
        """A ring of another size, with what is left in it once `count` more positions are."""
        room = turn * self.size - count
        self.floors = [max(floor, length - room) for floor, length in zip(self.floors, lengths, strict=True)]
        seen = [range(floor, length) for floor, length in zip(self.floors, lengths, strict=True)]
        device = self.key.device
        positions = torch.tensor([position for held in seen for position in held], dtype=torch.int64, device=device)
        items = torch.arange(self.batch, device=device).repeat_interleave(
            torch.tensor([len(held) for held in seen], dtype=torch.int64, device=device)
        )
        columns, rows = positions // self.size, positions % self.size
        resized = []
        for old in (self.key, self.value):
            new = blocks_like(old, self.batch * turn, self.size)
            new[items * turn + columns % turn, :, rows] = old[items * self.turn + columns % self.turn, :, rows]
            resized.append(new)
        self.key, self.value = resized
        self.turn = turn
        self.fill(0)
