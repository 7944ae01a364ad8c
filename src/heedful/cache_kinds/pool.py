"""Keys and values in blocks of one size, found through a block table."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from heedful.cache_kinds.store import Store, as_list, columns, gather_pages, memory, on_device, rounded_up

# Items up to which one new position of each is written item by item.
_ONE_BY_ONE = 2


class Pool(Store):
    """Blocks (blocks, Hkv, size, D or Dv); position j of item b is row j % size of block table[b, j // size].

    The table is int32, wider than it has to be, and 0 where no block is.
    """

    def __init__(self, key: Tensor, value: Tensor, size: int, blocks: int) -> None:
        self.batch, self.size = key.shape[0], size
        self.key, self.value = (blocks_like(t, blocks, size) for t in (key, value))
        self.table = self.empty_table(0)

    @property
    def blocks(self) -> int:
        return self.key.shape[0]

    def pages(self, length: int) -> Tensor:
        """The block table of the first `length` positions: int32 (B, n), a view."""
        return self.table[:, : rounded_up(length, self.size)]

    def write(self, key: Tensor, value: Tensor, lengths: int | list[int]) -> None:
        if key.shape[2] == 1:
            self._write_one(key, value, as_list(lengths, self.batch))
            return
        positions = columns(lengths, key.shape[2], key.device).expand(key.shape[0], -1)
        blocks = self.table.gather(1, positions // self.size).long()
        rows = positions % self.size
        for pool, new in ((self.key, key), (self.value, value)):
            pool[blocks, :, rows] = new.transpose(1, 2)

    def _write_one(self, key: Tensor, value: Tensor, lengths: list[int]) -> None:
        blocks = [self.block(item, length // self.size) for item, length in enumerate(lengths)]
        rows = [length % self.size for length in lengths]
        if self.batch <= _ONE_BY_ONE:
            for item, (block, row) in enumerate(zip(blocks, rows, strict=True)):
                self.key.select(0, block).select(1, row).copy_(key.select(0, item).squeeze(1))
                self.value.select(0, block).select(1, row).copy_(value.select(0, item).squeeze(1))
            return
        places = on_device([blocks, rows], torch.int64, key.device)
        for pool, new in ((self.key, key), (self.value, value)):
            pool[places[0], :, places[1]] = new.squeeze(2)

    def dense(self, length: int) -> tuple[Tensor, Tensor]:
        pages = self.pages(length)
        return gather_pages(self.key, pages)[:, :, :length], gather_pages(self.value, pages)[:, :, :length]

    def widen(self, columns: int) -> None:
        """Makes the table wide enough, for some time to come."""
        have = self.table.shape[1]
        if columns > have:
            table = self.empty_table(max(columns, 2 * have, 8))
            table[:, :have] = self.table
            self.table = table
            self.fill(have)

    def empty_table(self, columns: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.zeros((self.batch, columns), dtype=torch.int32, device=self.key.device)

    @abstractmethod
    def block(self, item: int, column: int) -> int:
        """The table's entry, known without looking at memory of a device."""

    @abstractmethod
    def fill(self, first: int) -> None:
        """Writes what is known of the table's columns from the first on."""


def blocks_like(tensor: Tensor, blocks: int, size: int) -> Tensor:
    """Blocks (blocks, Hkv, size, D) for a tensor (B, Hkv, length, D)."""
    return memory(tensor, blocks, tensor.shape[1], size, tensor.shape[3])
