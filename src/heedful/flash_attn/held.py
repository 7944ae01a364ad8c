"""What each sequence of a call holds in a cache of the caller's, and where."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.cache_kinds.store import as_list, columns
from heedful.errors import wrong_type, wrong_value
from heedful.flash_attn.calls import check_blocks, check_table
from heedful.patterns.arguments import describe


class Held:
    """Numbers of a batch are an int where they are the same for all items, otherwise a list.

    lengths: positions that are filled. starts: the first of them that counts. places: which of the cache's sequences an
    item is; an int is the first of as many as there are items, one after the other. table: the block of each P
    positions, which takes the place of places.
    """

    __slots__ = ("batch", "lengths", "places", "starts", "table")

    def __init__(
        self,
        batch: int,
        cache: Tensor,
        count: int,
        cache_seqlens: int | Tensor | None,
        cache_batch_idx: Tensor | None,
        cache_leftpad: Tensor | None,
        block_table: Tensor | None,
    ) -> None:
        """The arguments of `flash_attn_with_kvcache`, checked against a cache (caches, L, …) or (blocks, P, …), which
        has to have room for `count` more positions of each item.

        Raises:
            TypeError, ValueError: one of them is wrong.
        """
        self.batch, self.table = batch, block_table
        room = cache.shape[1]
        if block_table is not None:
            if cache_batch_idx is not None:
                raise wrong_value("cache_batch_idx", describe(cache_batch_idx), "None with a block_table")
            check_table(block_table, batch)
            room *= block_table.shape[1]
        elif cache_batch_idx is None and cache.shape[0] < batch:
            raise wrong_value("k_cache", f"{cache.shape[0]} sequences", f"at least q's batch, {batch}")
        if cache_seqlens is None:
            cache_seqlens = room
        if isinstance(cache_seqlens, int):
            lengths: int | list[int] = cache_seqlens
        else:
            lengths = _numbers("cache_seqlens", cache_seqlens, batch)
        ends = (lengths,) if isinstance(lengths, int) else lengths or (0,)
        if min(ends) < 0 or max(ends) + count > room:
            takes = f"lengths from 0 to {room - count}, as there is room for {room}"
            wrong = min(ends) if min(ends) < 0 else max(ends)
            raise wrong_value("cache_seqlens", wrong, f"{takes} with {count} more" if count else takes)
        self.lengths = lengths
        self.starts = 0 if cache_leftpad is None else self._starts(cache_leftpad)
        self.places = 0 if cache_batch_idx is None else _places(cache_batch_idx, batch, cache.shape[0])
        if block_table is not None:
            stops = [length + count for length in as_list(lengths, batch)]
            check_blocks(block_table, stops, cache.shape[1], cache.shape[0])
            if block_table.dtype != torch.int32:
                self.table = block_table.to(torch.int32)

    @property
    def longest(self) -> int:
        return self.lengths if isinstance(self.lengths, int) else max(self.lengths, default=0)

    @property
    def plain(self) -> bool:
        """Whether what the items hold is one slice of the cache."""
        return (
            self.table is None
            and isinstance(self.lengths, int)
            and isinstance(self.places, int)
            and isinstance(self.starts, int)
        )

    def sequences(self, cache: Tensor) -> Tensor:
        """The items' part (B, L, …) of a cache, where they lie one after the other in it."""
        assert isinstance(self.places, int)
        return cache if self.batch == cache.shape[0] else cache.narrow(0, self.places, self.batch)

    def write(self, caches: tuple[Tensor, Tensor], news: tuple[Tensor, Tensor]) -> None:
        """Writes (B, count, …) behind what the items hold; each cache with its news."""
        count = news[0].shape[1]
        if self.table is None and isinstance(self.lengths, int) and isinstance(self.places, int):
            for cache, new in zip(caches, news, strict=True):
                self.sequences(cache).narrow(1, self.lengths, count).copy_(new)
            return
        blocks, rows = self._next(count, caches[0].shape[1])
        for cache, new in zip(caches, news, strict=True):
            cache.index_put_((blocks, rows), new)

    def _next(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """Block and row of the next positions of each item, which broadcast to (B, count)."""
        lengths = as_list(self.lengths, self.batch)
        if self.table is None:
            first = self.places
            places = range(first, first + self.batch) if isinstance(first, int) else first
            blocks = torch.tensor([[place] for place in places])
            if count == 1:
                return blocks, torch.tensor([[length] for length in lengths])
            return blocks, columns(lengths, count, blocks.device)
        if count == 1:
            # A tensor of Python's numbers is made in the time that one operation on tensors takes.
            blocks = self.table.gather(1, torch.tensor([[length // size] for length in lengths]))
            return blocks, torch.tensor([[length % size] for length in lengths], dtype=blocks.dtype)
        positions = columns(lengths, count, self.table.device)
        return self.table.gather(1, positions // size).long(), positions % size

    def _starts(self, cache_leftpad: Tensor) -> int | list[int]:
        starts = _numbers("cache_leftpad", cache_leftpad, self.batch)
        both = zip(as_list(starts, self.batch), as_list(self.lengths, self.batch), strict=True)
        for start, length in both:
            if not 0 <= start <= length:
                raise wrong_value("cache_leftpad", start, f"0 to the sequence's cache_seqlens, {length}")
        return starts


def _numbers(name: str, given: Tensor, batch: int) -> int | list[int]:
    if not isinstance(given, Tensor) or given.dtype not in (torch.int32, torch.int64):
        raise wrong_type(name, describe(given), "an int32 tensor (batch,)")
    if given.ndim != 1 or given.numel() != batch:
        raise wrong_value(name, f"shape {tuple(given.shape)}", f"({batch},), a number for each sequence")
    numbers: list[int] = given.tolist()
    return numbers[0] if numbers and numbers.count(numbers[0]) == batch else numbers


def _places(cache_batch_idx: Tensor, batch: int, caches: int) -> int | list[int]:
    found = _numbers("cache_batch_idx", cache_batch_idx, batch)
    places = as_list(found, batch)
    for place in places:
        if not 0 <= place < caches:
            raise wrong_value("cache_batch_idx", place, f"0 to {caches - 1}, the cache's sequences")
    return places[0] if batch and places == list(range(places[0], places[0] + batch)) else places
