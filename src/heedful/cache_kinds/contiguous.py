"""Keys and values in one buffer, position after position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heedful.cache_kinds.store import Store, columns, memory

SMALLEST = 64


class Contiguous(Store):
    """Buffers (B, Hkv, capacity, D or Dv) that double where they are full.

    capacity: positions to make room for at once. max_length: more will never be asked for.
    """

    kind = "contiguous"

    def __init__(self, key: Tensor, value: Tensor, capacity: int | None, max_length: int | None) -> None:
        self.max_length = max_length
        self.capacity = 0 if capacity is None else capacity
        self.key, self.value = (_buffer(t, t.shape[0], self.capacity) for t in (key, value))

    @property
    def room(self) -> str:
        return f"{self.capacity} positions"

    def reserve(self, lengths: int | list[int], count: int) -> None:
        longest = lengths if isinstance(lengths, int) else max(lengths, default=0)
        needed = longest + count
        if needed <= self.capacity:
            return
        capacity = max(needed, 2 * self.capacity, SMALLEST)
        if self.max_length is not None:
            capacity = min(capacity, self.max_length)
        grown = []
        for old in (self.key, self.value):
            new = _buffer(old, old.shape[0], capacity)
            new[:, :, :longest] = old[:, :, :longest]
            grown.append(new)
        self.key, self.value = grown
        self.capacity = capacity

    def write(self, key: Tensor, value: Tensor, lengths: int | list[int]) -> None:
        count = key.shape[2]
        if isinstance(lengths, int):
            self.key.narrow(2, lengths, count).copy_(key)
            self.value.narrow(2, lengths, count).copy_(value)
            return
        items = torch.arange(key.shape[0], device=key.device)[:, None]
        positions = columns(lengths, count, key.device)
        for buffer, new in ((self.key, key), (self.value, value)):
            buffer[items, :, positions] = new.transpose(1, 2)

    def dense(self, length: int) -> tuple[Tensor, Tensor]:
        return self.key.narrow(2, 0, length), self.value.narrow(2, 0, length)

    def crop(self, lengths: list[int]) -> None:
        pass

    def take(self, items: Sequence[int], lengths: list[int]) -> None:
        longest = max(lengths, default=0)
        index = torch.tensor(items, dtype=torch.int64, device=self.key.device)
        taken = []
        for old in (self.key, self.value):
            new = _buffer(old, len(items), self.capacity)
            new[:, :, :longest] = old[:, :, :longest].index_select(0, index)
            taken.append(new)
        self.key, self.value = taken


def _buffer(like: Tensor, batch: int, capacity: int) -> Tensor:
    return memory(like, batch, like.shape[1], capacity, like.shape[3])
