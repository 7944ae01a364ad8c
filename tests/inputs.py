"""Random inputs of attention in the memory layouts that callers have."""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY = ("contiguous", "blhd", "sliced", "expanded", "last-strided")


def tensor(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, memory: str = "contiguous") -> Tensor:
    """Standard normal values of this shape, with strides as `memory` says."""
    batch, heads, length, dim = shape
    if memory == "blhd":
        return torch.randn(batch, length, heads, dim).to(dtype).transpose(1, 2)
    if memory == "sliced":
        return torch.randn(batch + 1, heads + 1, length + 2, dim + 3).to(dtype)[1:, :-1, 1:-1, 2:-1]
    if memory == "expanded":
        return torch.randn(1, heads, length, dim).to(dtype).expand(batch, -1, -1, -1)
    if memory == "last-strided":
        return torch.randn(batch, heads, length, 2 * dim).to(dtype)[..., ::2]
    return torch.randn(shape).to(dtype)


def attention_inputs(
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    q_length: int = 7,
    k_length: int = 9,
    head_dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    memory: str = "contiguous",
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, Lq, D), k (B, Hkv, Lk, D) and v (B, Hkv, Lk, Dv)."""
    kv_heads = heads if kv_heads is None else kv_heads
    value_dim = head_dim if value_dim is None else value_dim
    return (
        tensor((batch, heads, q_length, head_dim), dtype, memory),
        tensor((batch, kv_heads, k_length, head_dim), dtype, memory),
        tensor((batch, kv_heads, k_length, value_dim), dtype, memory),
    )
