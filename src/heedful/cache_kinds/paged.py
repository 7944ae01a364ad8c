"""Keys and values in blocks that come out of a pool and go back to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heedful.cache_kinds.pool import Pool, blocks_like
from heedful.cache_kinds.store import as_list, on_device, rounded_up


class Paged(Pool):
    """Blocks that items take out of a pool as they grow and give back when they are done; reordered items share
    theirs until one of them writes.

    blocks: how many the pool has; None begins with none and doubles.
    """

    kind = "paged"

    def __init__(self, key: Tensor, value: Tensor, size: int, blocks: int | None) -> None:
        super().__init__(key, value, size, blocks or 0)
        self.fixed = blocks is not None
        self.tables: list[list[int]] = [[] for _ in range(self.batch)]
        self.users = [0] * self.blocks
        self.free = list(range(self.blocks - 1, -1, -1))

    @property
    def room(self) -> str:
        return f"{self.blocks} blocks of {self.size}, {len(self.free)} free"

    def block(self, item: int, column: int) -> int:
        return self.tables[item][column]

    def fill(self, first: int) -> None:
        pass

    def reserve(self, lengths: int | list[int], count: int) -> None:
        if self._ready(as_list(lengths, self.batch), count):
            return
        starts = [length // self.size for length in as_list(lengths, self.batch)]
        stops = [rounded_up(length + count, self.size) for length in as_list(lengths, self.batch)]
        users = list(self.users)
        shared: list[tuple[int, int]] = []
        for item, (table, start, stop) in enumerate(zip(self.tables, starts, stops, strict=True)):
            for column in range(start, min(stop, len(table))):
                # The last of the items that share a block keeps it.
                if users[table[column]] > 1:
                    users[table[column]] -= 1
                    shared.append((item, column))
        missing = sum(max(0, stop - len(table)) for table, stop in zip(self.tables, stops, strict=True))
        self._find(missing + len(shared))
        self.widen(max(stops))
        for item, column in shared:
            self._own(item, column)
        for item, (table, stop) in enumerate(zip(self.tables, stops, strict=True)):
            have = len(table)
            if stop > have:
                table.extend(self._taken() for _ in range(stop - have))
                self.table[item, have:stop] = on_device(table[have:], torch.int32, self.table.device)

    def _ready(self, lengths: list[int], count: int) -> bool:
        """Whether every item has blocks of its own for `count` more positions."""
        for table, length in zip(self.tables, lengths, strict=True):
            columns = range(length // self.size, rounded_up(length + count, self.size) if count else 0)
            if columns.stop > len(table) or any(self.users[table[column]] > 1 for column in columns):
                return False
        return True

    def crop(self, lengths: list[int]) -> None:
        for table, length in zip(self.tables, lengths, strict=True):
            keep = rounded_up(length, self.size)
            self._release(table[keep:])
            del table[keep:]

    def take(self, items: Sequence[int], lengths: list[int]) -> None:
        tables = [
            self.tables[item][: rounded_up(length, self.size)] for item, length in zip(items, lengths, strict=True)
        ]
        for table in tables:
            for block in table:
                self.users[block] += 1
        for table in self.tables:
            self._release(table)
        self.tables, self.batch = tables, len(tables)
        taken = self.table[torch.tensor(items, dtype=torch.int64, device=self.table.device)]
        self.table = self.empty_table(taken.shape[1])
        self.table[:] = taken

    def _find(self, wanted: int) -> None:
        missing = wanted - len(self.free)
        if missing <= 0:
            return
        if self.fixed:
            raise ValueError(
                f"cache takes {self.blocks} blocks of {self.size} positions, got a call that needs {wanted} more with "
                f"{len(self.free)} free; free or crop sequences, or make it with more blocks"
            )
        have = self.blocks
        blocks = max(have + missing, 2 * have)
        grown = []
        for old in (self.key, self.value):
            new = blocks_like(old, blocks, self.size)
            new[:have] = old
            grown.append(new)
        self.key, self.value = grown
        self.users += [0] * (blocks - have)
        self.free[:0] = range(blocks - 1, have - 1, -1)

    def _taken(self) -> int:
        block = self.free.pop()
        self.users[block] = 1
        return block

    def _release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)

    def _own(self, item: int, column: int) -> None:
        """Gives an item a copy of a block that it shares."""
        shared, own = self.tables[item][column], self._taken()
        self.users[shared] -= 1
        self.key[own], self.value[own] = self.key[shared], self.value[shared]
        self.tables[item][column] = own
        self.table[item, column] = own
