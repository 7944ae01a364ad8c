"""Inputs of attention as callers have them: random tensors in their memory layouts, features and patterns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heedful import (
    BigBird,
    BlockSparse,
    Causal,
    Chunked,
    Dilated,
    Documents,
    Full,
    Global,
    Longformer,
    Mask,
    Padding,
    Pattern,
    Prefix,
    SlidingWindow,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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


def all_features(batch: int, heads: int, q_length: int, k_length: int, dtype: torch.dtype) -> dict[str, object]:
    """Every feature but dropout, with a bias that excludes pairs, one row of the first item, and one key."""
    bias = torch.randn(batch, 1, q_length, k_length).masked_fill(torch.rand(q_length, k_length) < 0.1, -math.inf)
    bias[0, :, q_length // 2] = -math.inf
    bias[:, :, :, k_length // 3] = -math.inf
    return {
        "softcap": 5.0,
        "bias": bias.to(dtype),
        "alibi_slopes": torch.rand(batch, heads).to(dtype) / 4,
        "sinks": torch.randn(heads),
    }


def pattern_examples(batch: int, heads: int, q_length: int, k_length: int) -> list[Pattern]:
    """Every family and the compositions that models use; the same list of kinds for any sizes."""
    generator = torch.Generator().manual_seed(q_length * 1000 + k_length)
    blocks = torch.rand(1, heads, -(-q_length // 16), -(-k_length // 16), generator=generator) < 0.3
    mask = torch.rand(batch, 1, q_length, k_length, generator=generator) < 0.2
    cut_q, cut_k = q_length // 3, k_length // 2
    lengths = ((cut_q, q_length), (cut_k, k_length))
    documents = [torch.tensor([0, cut, cut, length], dtype=torch.int32) for cut, length in lengths]
    starts = torch.arange(batch, dtype=torch.int32) * 3
    return [
        Full(),
        Causal(),
        Causal(offset=0),
        Causal(offset=torch.arange(batch, dtype=torch.int32)),
        SlidingWindow(17),
        SlidingWindow(40, 0, offset=2),
        SlidingWindow(None, 5),
        Dilated(6, 5),
        Chunked(33),
        Prefix(7) | Causal(),
        Global((0, 5, 6, 70)) & Causal(),
        Longformer(9, 3),
        BigBird(block_size=16, window_blocks=3, global_blocks=1, random_blocks=1, seed=3),
        BlockSparse(blocks, 16),
        Documents(*documents),
        Documents(*documents, within=Causal()) & SlidingWindow(50),
        Padding(starts, starts + k_length // 2),
        Padding(starts, torch.full((batch,), k_length, dtype=torch.int32)) & Causal(),
        Mask(mask),
        (Mask(mask) | SlidingWindow(3)) & Chunked(64),
        SlidingWindow(5) & Chunked(7) & Chunked(9),
        Dilated(9, 3) & Padding(starts, starts + k_length // 2) | Global(2),
    ]
