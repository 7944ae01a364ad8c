"""Level 5, native: heedful's C++ engine, through `heedful.attention` and the fused operations beside it.

Over level 4: the kernels are C++ for the processor at hand, one object per instruction set, and run on the threads of
PyTorch. Attention keeps its scores in registers and caches, skips what a causal mask hides, and reads q, k and v where
the projections left them; the cache appends in place and is read once for each token.

Lesson: what remains after fusion is the algorithm. The largest step is attention that never stores a score, and it
grows with the length; operations that are one pass already gain little from another language, and the matrix products
of the projections are the same library's at every level, which bounds what a whole model can gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.api import attention as heedful_attention
from heedful.kv_cache import KVCache
from heedful.levels.pytorch_fused import gelu, layer_norm
from heedful.ops import layer_norm_gelu, rope, swiglu

__all__ = ["Cache", "attention", "gelu", "layer_norm", "layer_norm_gelu", "rope", "swiglu"]


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    # The output lies as (B, L, H, D) then, which the projection behind it reads without a copy.
    turned = (x.transpose(1, 2) for x in (q, k, v))
    return heedful_attention(*turned, causal=causal, scale=scale, layout="blhd", backend="native").transpose(1, 2)


class Cache:
    """A `heedful.KVCache`: appended in place, read once for each token."""

    def __init__(
        self, batch: int, heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.held = KVCache(capacity=capacity)

    def rows(self, table: Tensor, count: int) -> Tensor:
        held = len(self.held)
        return table[:, held : held + count]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        out = heedful_attention(*turned, causal=True, scale=scale, cache=self.held, layout="blhd", backend="native")
        return out.transpose(1, 2)
