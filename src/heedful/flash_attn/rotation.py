"""Rotary position embeddings, of which `layers.rotary` and the cache make use."""

from __future__ import annotations

from torch import Tensor

from heedful.errors import wrong_type, wrong_value
from heedful.ops import rope


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., H, D) with each pair of its first 2 R columns turned by the angle of cos and sin (..., R), which has no
    axis for heads: columns 2 r and 2 r + 1 are a pair if interleaved, otherwise r and R + r. In float32 for 16-bit
    inputs, rounded once."""
    if cos.ndim == 2 and cos.shape[0] == 1 != x.shape[-3]:
        cos, sin = cos[None], sin[None]  # one row for all tokens
    return rope(x, cos, sin, interleaved=interleaved, layout="blhd")


def check_tables(names: tuple[str, str], cos: Tensor, sin: Tensor, head_dim: int) -> None:
    """Raises ValueError or TypeError unless cos and sin, which go by these names, are (positions, R) with 2 R up to
    head_dim."""
    for name, table in zip(names, (cos, sin), strict=True):
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise wrong_type(name, type(table).__name__ if not isinstance(table, Tensor) else table.dtype, "floats")
        if table.ndim != 2 or table.shape != cos.shape or not 0 < 2 * table.shape[1] <= head_dim:
            takes = f"(positions, rotary_dim / 2), rotary_dim 2 to {head_dim}, {names[0]} and {names[1]} alike"
            raise wrong_value(name, f"shape {tuple(table.shape)}", takes)
