"""Which tokens of a batch are padding and which are global, as patterns; the same for all layers of a pass."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.hf.recognise import key_ranges
from heedful.hf.rectangles import MOST_RECTANGLES, Rectangles, runs
from heedful.patterns import Mask, Padding, Pattern, SlidingWindow


class Layout:
    """Read from bool tensors (B, L): which tokens are padding, and which are global.

    Attributes:
        has_padding: whether there is padding.
        real: the pattern of all keys that are no padding, None for all.
        global_count: G, the most global tokens of a batch item.
        free_slots: (B, G), True where an item has fewer.
        places: batch item and position of each global token, two index tensors.
        slots: for each of them its batch item and which global token of it it is.
    """

    def __init__(self, is_padding: Tensor, is_global: Tensor) -> None:
        self.is_padding = is_padding
        self.has_padding = bool(is_padding.any())
        self.real = _keys(~is_padding) if self.has_padding else None
        counts = is_global.sum(1)
        self.global_count = int(counts.max())
        self.global_keys = _global_keys(is_global) if self.global_count else None
        self.free_slots = torch.arange(self.global_count, device=counts.device) >= counts[:, None]
        self.ranks = is_global.cumsum(1) - 1
        self.places = is_global.nonzero(as_tuple=True)
        self.slots = self.places[0], self.ranks[self.places]
        self._windows: dict[int, Pattern] = {}

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def of(is_padding: Tensor, is_global: Tensor) -> Layout:
        """The layout of two masks, made at the first layer that asks."""
        found = getattr(is_global, "_heedful_layout", None)
        if not isinstance(found, Layout) or found.is_padding is not is_padding:
            # On the tensor, so that it lives as long as the pass.
            found = Layout(is_padding, is_global)
            is_global._heedful_layout = found  # type: ignore[attr-defined]
        return found

    def window(self, radius: int) -> Pattern:
        """What local queries see: `radius` keys on each side and the global ones."""
        if radius not in self._windows:
            seen: Pattern = SlidingWindow(radius)
            if self.global_keys is not None:
                seen = seen | self.global_keys
            self._windows[radius] = seen if self.real is None else seen & self.real
        return self._windows[radius]

    def banded(self, weights: Tensor, radius: int, is_global: Tensor) -> Tensor:
        """Sparse weights (B, H, L, L) as Longformer returns them, (B, L, H, G + 2 · radius + 1).

        First a column for each global key, then one for each place in the window, where global keys have 0. Rows of
        global tokens, which are not computed with these, and of padding are 0.
        """
        batch, heads, length, _ = weights.shape
        item, head, i, j = weights.indices()
        places = self.global_count + radius + j - i
        column = torch.where(is_global[item, j], self.ranks[item, j], places)
        shape = (batch, length, heads, self.global_count + 2 * radius + 1)
        banded = weights.values().new_zeros(shape).index_put((item, i, head, column), weights.values())
        return banded.masked_fill((self.is_padding | is_global)[:, :, None, None], 0.0)


def _keys(kept: Tensor) -> Pattern:
    return key_ranges(kept) or Mask(kept[:, None, None, :])


def _global_keys(is_global: Tensor) -> Pattern:
    start, stop = runs(is_global.to(torch.int8) - 1)
    if start.shape[1] == 1:
        return Padding(start[:, 0], stop[:, 0])
    if start.shape[1] > MOST_RECTANGLES:
        return Mask(is_global[:, None, None, :])
    return Rectangles(torch.zeros_like(start), torch.full_like(stop, is_global.shape[1]), start, stop)
