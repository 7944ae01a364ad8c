"""Rotary position embeddings, of which `layers.rotary` and the cache make use."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.errors import wrong_type, wrong_value


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., H, D) with each pair of its first 2 R columns turned by the angle of cos and sin (..., R), which has no
    axis for heads: columns 2 r and 2 r + 1 are a pair if interleaved, otherwise r and R + r. In float32 for 16-bit
    inputs, rounded once."""
    half, dtype = cos.shape[-1], x.dtype
    turned = x[..., : 2 * half]
    if dtype.itemsize == 2:
        turned, cos, sin = turned.float(), cos.float(), sin.float()
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
    else:
        first, second = turned[..., :half], turned[..., half:]
        turned = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
    turned = turned.to(dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), -1)


def check_tables(names: tuple[str, str], cos: Tensor, sin: Tensor, head_dim: int) -> None:
    """Raises ValueError or TypeError unless cos and sin, which go by these names, are (positions, R) with 2 R up to
    head_dim."""
    for name, table in zip(names, (cos, sin), strict=True):
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise wrong_type(name, type(table).__name__ if not isinstance(table, Tensor) else table.dtype, "floats")
        if table.ndim != 2 or table.shape != cos.shape or not 0 < 2 * table.shape[1] <= head_dim:
            takes = f"(positions, rotary_dim / 2), rotary_dim 2 to {head_dim}, {names[0]} and {names[1]} alike"
            raise wrong_value(name, f"shape {tuple(table.shape)}", takes)
