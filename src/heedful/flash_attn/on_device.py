"""Decoding where lengths lie on a device: nothing is read from there, so that a step may be part of a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.cached import deciding
from heedful.choose import choose
from heedful.errors import wrong_type, wrong_value
from heedful.flash_attn.calls import cache_call, check_table, run
from heedful.flash_attn.rotation import rotated
from heedful.patterns import Pattern
from heedful.patterns.aligned import Aligned
from heedful.patterns.arguments import describe

Where = tuple[int | Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class HeldOnDevice:
    """As `heedful.flash_attn.held.Held`, in tensors of the device. Contents are not checked: lengths behind the cache's
    room, and blocks that there are not, are taken for the last ones."""

    def __init__(self, batch: int, cache: Tensor, count: int, where: Where) -> None:
        cache_seqlens, cache_batch_idx, cache_leftpad, block_table = where
        device = cache.device
        self.batch, self.count, self.room, self.blocks, self.size = batch, count, cache.shape[1], *cache.shape[:2]
        self.table: Tensor | None = None
        if block_table is not None:
            if cache_batch_idx is not None:
                raise wrong_value("cache_batch_idx", describe(cache_batch_idx), "None with a block_table")
            check_table(block_table, batch)
            self.table = block_table.to(device, torch.int32)
            self.room *= block_table.shape[1]
        elif cache_batch_idx is None and self.blocks < batch:
            raise wrong_value("k_cache", f"{self.blocks} sequences", f"at least q's batch, {batch}")
        if count > self.room:
            raise wrong_value("k", f"{count} new keys", f"at most {self.room}, as there is room for")
        if cache_seqlens is None:
            cache_seqlens = self.room
        if isinstance(cache_seqlens, int):
            if not 0 <= cache_seqlens <= self.room - count:
                raise wrong_value("cache_seqlens", cache_seqlens, f"lengths from 0 to {self.room - count}")
            self.lengths = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=device)
        else:
            self.lengths = _vector("cache_seqlens", cache_seqlens, batch, device)
        self.starts = None if cache_leftpad is None else _vector("cache_leftpad", cache_leftpad, batch, device)
        self.places = None if cache_batch_idx is None else _vector("cache_batch_idx", cache_batch_idx, batch, device)

    def positions(self, count: int, end: int) -> Tensor:
        """The next `count` positions of each item, before `end`: int64 (B, count)."""
        steps = torch.arange(count, device=self.lengths.device)
        return (self.lengths[:, None] + steps).clamp(0, end - 1)

    def write(self, caches: tuple[Tensor, Tensor], news: tuple[Tensor, Tensor]) -> None:
        positions = self.positions(self.count, self.room)
        if self.table is not None:
            blocks = self.table.gather(1, positions // self.size).long().clamp(0, self.blocks - 1)
            positions = positions % self.size
        elif self.places is not None:
            blocks = self.places.long().clamp(0, self.blocks - 1)[:, None]
        else:
            blocks = torch.arange(self.batch, device=positions.device)[:, None]
        for cache, new in zip(caches, news, strict=True):
            cache.index_put_((blocks, positions), new)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    turns_each: bool,
    where: Where,
    alibi_slopes: Tensor | None,
    pattern: Pattern,
    scale: float | None,
    softcap: float | None,
    return_lse: bool,
) -> Any:
    """`flash_attn_with_kvcache` on arguments whose shapes and dtypes were checked, those of `where` aside."""
    batch, q_length = q.shape[:2]
    held = HeldOnDevice(batch, k_cache, 0 if k is None else k.shape[1], where)
    if k is not None and v is not None:
        if cos is not None and sin is not None:
            at = held.positions(q_length if turns_each else 1, len(cos))
            q = rotated(q, cos[at], sin[at], interleaved)
            at = held.positions(k.shape[1], len(cos))
            k = rotated(k, cos[at], sin[at], interleaved)
        held.write((k_cache, v_cache), (k, v))
    stop = held.lengths + held.count
    offset = stop - q_length
    if held.table is not None:
        pages: Tensor | None = held.table
    elif held.places is not None:
        # A cache is a pool of blocks as long as its sequences, of which each item has one.
        pages = held.places[:, None]
    else:
        pages = None
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    aligned = Aligned(pattern, offset, stop, held.starts, held.room)
    call = cache_call(
        q, k_cache.transpose(1, 2), v_cache.transpose(1, 2), aligned, held.room, scale, softcap, alibi_slopes,
        return_lse, pages, offset,
    )  # fmt: skip
    found = run(call, choose(deciding(call.problem)))
    return (found.out, found.lse) if return_lse else found.out


def _vector(name: str, given: Tensor, batch: int, device: torch.device) -> Tensor:
    if not isinstance(given, Tensor) or given.dtype not in (torch.int32, torch.int64):
        raise wrong_type(name, describe(given), "an int32 tensor (batch,)")
    if given.shape != (batch,):
        raise wrong_value(name, f"shape {tuple(given.shape)}", f"({batch},), a number for each sequence")
    return given.to(device, torch.int32)
