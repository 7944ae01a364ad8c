"""What each level provides, so that one module serves all of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class LayerCache(Protocol):
    """Keys and values of one layer for the positions that were generated so far; made for one batch."""

    def rows(self, table: Tensor, count: int) -> Tensor:
        """The next `count` positions of a table (2, positions, features)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append k and v (B, H, L, D), then let q attend causally to everything held: (B, H, L, D)."""


class CacheMaker(Protocol):
    """Makes an empty cache with room for `capacity` positions."""

    def __call__(
        self, batch: int, heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> LayerCache: ...


class Operations(Protocol):
    """One level: the file of each has these as functions, and its `Cache`."""

    @property
    def Cache(self) -> CacheMaker: ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        """softmax(scale · q kᵀ) v for q (B, H, Lq, D) and k, v (B, H, Lk, D); the last query meets the last key."""

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, L, D) with its pairs (x[i], x[i + D / 2]) turned by angles of cos and sin (L, D / 2)."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension."""

    def layer_norm_gelu(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """gelu(layer_norm(x))."""

    def gelu(self, x: Tensor) -> Tensor:
        """x · Φ(x) with the normal distribution's Φ, by erf."""

    def swiglu(self, x: Tensor) -> Tensor:
        """gate · sigmoid(gate) · up of x (..., 2 n), whose first half is the gate: (..., n)."""
