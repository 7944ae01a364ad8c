"""What every kind of cache does with its memory; lengths are the cache's own business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Store(ABC):
    """The memory of one cache. Lengths come as an int where all batch items have the same, as a list otherwise."""

    kind: str
    key: Tensor
    value: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and values take, room for later ones included."""
        return self.key.nbytes + self.value.nbytes

    @property
    @abstractmethod
    def room(self) -> str:
        """How much there is room for, in words."""

    @abstractmethod
    def reserve(self, lengths: int | list[int], count: int) -> None:
        """Makes room for `count` more positions of every item.

        Raises:
            ValueError: there is none, and growth is not allowed; nothing has changed then.
        """

    @abstractmethod
    def write(self, key: Tensor, value: Tensor, lengths: int | list[int]) -> None:
        """Writes keys and values (B, Hkv, count, D or Dv) behind the lengths, where there is room."""

    @abstractmethod
    def dense(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` positions: (B, Hkv, length, D or Dv)."""

    @abstractmethod
    def crop(self, lengths: list[int]) -> None:
        """Forgets what lies behind these lengths.

        Raises:
            ValueError: something before them has been overwritten.
        """

    @abstractmethod
    def take(self, items: Sequence[int], lengths: list[int]) -> None:
        """Makes these items, which have these lengths, the batch; one may be named several times or not at all."""


def gather_pages(pool: Tensor, pages: Tensor) -> Tensor:
    """What a block table says, spelled out.

    Args:
        pool: (blocks, Hkv, P, D).
        pages: int (B, n), the block of each P positions; what no pair reaches may be any number.

    Returns:
        (B, Hkv, n * P, D), a copy.
    """
    _, heads, size, dim = pool.shape
    batch, count = pages.shape
    return pool[pages.clamp(0, len(pool) - 1).long()].transpose(1, 2).reshape(batch, heads, count * size, dim)


def memory(like: Tensor, *shape: int) -> Tensor:
    """Memory of a tensor's dtype and device that may be written in place later, under inference_mode or not."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=like.dtype, device=like.device)


def rounded_up(count: int, size: int) -> int:
    """How many blocks of `size` positions hold `count`."""
    return -(-count // size)


def as_list(lengths: int | list[int], batch: int) -> list[int]:
    return [lengths] * batch if isinstance(lengths, int) else lengths


def on_device(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of Python's as a tensor, without waiting for the device that it is on."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    if numbers and isinstance(numbers[0], int) and all(number == numbers[0] for number in numbers):
        # One launch, and no memory that both see.
        return torch.full((len(numbers),), numbers[0], dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def columns(lengths: int | list[int], count: int, device: torch.device) -> Tensor:
    """The next `count` positions of each item: int64 (B or 1, count)."""
    first = on_device([lengths] if isinstance(lengths, int) else lengths, torch.int64, device)
    return first[:, None] + torch.arange(count, device=device)
