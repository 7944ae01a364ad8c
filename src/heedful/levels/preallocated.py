"""A cache that is filled in place, of which a view is read; for levels whose kernels take any length."""

from __future__ import annotations

import torch
from torch import Tensor


class Preallocated:
    """Keys and values of (B, H, capacity, D), of which the first `length` positions are filled."""

    def __init__(
        self, batch: int, heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.key = torch.empty(batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self.value = torch.empty_like(self.key)
        self.length = 0

    def rows(self, table: Tensor, count: int) -> Tensor:
        return table[:, self.length : self.length + count]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Everything held, k and v included, as views."""
        end = self.length + k.shape[2]
        self.key[:, :, self.length : end] = k
        self.value[:, :, self.length : end] = v
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]
