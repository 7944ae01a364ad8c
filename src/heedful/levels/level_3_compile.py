"""Level 3, torch.compile: the formulas of level 1, with the whole module compiled as one graph.

Over level 2: the compiler sees across functions, projections and residuals included, and generates kernels: a run of
elementwise operators and reductions becomes one loop that reads and writes once. The backward is compiled too.

Lesson: fusion does for everything beside the matrix products what hand-written kernels do, for one line of code. It
does not change an algorithm: attention still makes its scores, only in fewer passes. A graph holds for its shapes, so
the cache is one that keeps its shape, filled in place and masked; and the first call takes seconds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heedful.levels.level_1_pytorch import attention, gelu, layer_norm, layer_norm_gelu, rope, swiglu

__all__ = ["OPTIONS", "Cache", "attention", "gelu", "layer_norm", "layer_norm_gelu", "rope", "swiglu"]

# The names of the fused loops in a profile; without a profiler that costs nothing that shows.
OPTIONS = {"cpp.enable_kernel_profile": True}
LEAST_CAPACITY = 64


class Cache:
    """A buffer of fixed shape; how far it is filled is a tensor, so that no graph depends on it."""

    def __init__(
        self, batch: int, heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Few different shapes, since each is a compilation.
        capacity = max(LEAST_CAPACITY, 1 << (capacity - 1).bit_length())
        self.key = torch.zeros(batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)
        self.held = torch.zeros((), dtype=torch.int64, device=device)

    def rows(self, table: Tensor, count: int) -> Tensor:
        return table.index_select(1, self.held + torch.arange(count, device=table.device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        positions = self.held + torch.arange(q.shape[2], device=q.device)
        self.key.index_copy_(2, positions, k)
        self.value.index_copy_(2, positions, v)
        self.held.add_(q.shape[2])
        ahead = torch.arange(self.key.shape[2], device=q.device) > positions[:, None]
        scores = torch.matmul(q, self.key.transpose(-2, -1)) * scale
        return torch.matmul(torch.softmax(scores.masked_fill(ahead, -math.inf), -1), self.value)
