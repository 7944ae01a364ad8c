"""Dense masks read as patterns, so that a call does work only for the pairs that its mask allows."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from heedful.patterns import BlockSparse, Causal, Mask, Padding, Pattern, SlidingWindow

# Queries and keys of a tile that is classified, as in bridge/selection.cpp.
TILE = 32
# Below so many elements making the patterns of tiles costs more than the tiles save.
FEWEST_TILED = 1 << 16


def read_mask(mask: Tensor, q_length: int, k_length: int) -> tuple[Pattern | None, Tensor | None]:
    """What a mask (B, H, Lq, Lk), each size possibly 1, says: a pattern, None for every pair, and a bias, if it is one.

    It is read at every call, since nothing tells of every change of a tensor's memory. A bool mask counts where it is
    True; a float mask that excludes pairs (heedful.h says how) and adds nothing elsewhere is a pattern too.
    """
    if mask.shape[3] == k_length and mask.stride(3) != 1 and k_length > 1:
        mask = mask.contiguous()
    if mask.shape[3] == k_length:
        operators: Any = torch.ops.heedful
        found = operators.mask_band.default._op(mask, q_length, k_length)
        kind, low, high, *_ = found.tolist()
        if kind == 1:
            return band(low, high, q_length, k_length), None
        if kind == 2:
            items = mask.shape[0]
            padding = Padding(found[3 : 3 + items], found[3 + items :])
            within = band(low, high, q_length, k_length)
            return padding if within is None else within & padding, None
        if mask.shape[2] * mask.shape[3] >= FEWEST_TILED and mask.shape[2] > 1 and mask.stride(2) != 0:
            counts, full, partial, pairs = operators.mask_tiles.default._op(mask, q_length, k_length, TILE)
            sorted_tiles, full_count, _ = counts.tolist()
            if sorted_tiles:
                some = BlockSparse(partial, TILE) & Mask(mask if mask.dtype == torch.bool else pairs)
                return (BlockSparse(full, TILE) | some if full_count else some), None
    return (Mask(mask), None) if mask.dtype == torch.bool else (None, mask)


@functools.lru_cache(maxsize=1024)
def band(low: int, high: int, q_length: int, k_length: int) -> Pattern | None:
    """The pairs with low <= j - i <= high; None where that is all of them."""
    below, above = low > 1 - q_length, high < k_length - 1
    if not below:
        return Causal(high) if above else None
    if not above:
        return SlidingWindow(0, None, offset=low)
    offset = min(max(0, low), high)
    return SlidingWindow(offset - low, high - offset, offset=offset)
