"""Shapes, dtypes and strides of what the operators return, for tracing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _statistics(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    schedule: Sequence[int],
    scale: float,
    blhd: bool,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    pages: Tensor | None = None,
    query_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads, q_length, _ = query.shape
    value_dim = value.shape[3]
    if blhd:
        out = query.new_empty(batch, q_length, heads, value_dim).transpose(1, 2)
    else:
        out = query.new_empty(batch, heads, q_length, value_dim)
    return out, query.new_empty(batch, heads, q_length, dtype=_statistics(query))


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    schedule: Sequence[int],
    scale: float,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    bias_gradient: bool,
    slopes_gradient: bool,
    query_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _statistics(query)
    rows = query.shape[:3]
    grad_bias_shape = (*bias.shape[:3], key.shape[2]) if bias_gradient and bias is not None else (0,)
    return (
        _gradient(query),
        _gradient(key),
        _gradient(value),
        query.new_empty(rows, dtype=dtype),
        query.new_empty(grad_bias_shape, dtype=dtype),
        query.new_empty(rows if slopes_gradient else (0,), dtype=dtype),
    )


def _gradient(of: Tensor) -> Tensor:
    """Dense, in (B, L, H, D) memory order where the tensor is."""
    batch, heads, length, dim = of.shape
    if of.stride(1) < of.stride(2):
        return of.new_empty(batch, length, heads, dim).transpose(1, 2)
    return of.new_empty(batch, heads, length, dim)


def _weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    schedule: Sequence[int],
    scale: float,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    query_offset: Tensor | None = None,
) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[2])


def _weights_sparse(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    schedule: Sequence[int],
    scale: float,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    query_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()
    return query.new_empty(4, pairs, dtype=torch.int64), query.new_empty(pairs)


def _mask_band(mask: Tensor, q_length: int, k_length: int) -> Tensor:
    return mask.new_empty(3 + 2 * mask.shape[0], dtype=torch.int32)


def _mask_tiles(mask: Tensor, q_length: int, k_length: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, rows, keys = (
        1 if axis < 3 and stride == 0 else size
        for axis, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True))
    )
    tiles = batch, heads, -(-rows // tile), -(-keys // tile)
    full, partial = (mask.new_empty(tiles, dtype=torch.bool) for _ in range(2))
    pairs = mask.new_empty(0 if mask.dtype == torch.bool else (batch, heads, rows, keys), dtype=torch.bool)
    return mask.new_empty(3, dtype=torch.int64), full, partial, pairs


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[:-1], dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)


FAKES: dict[str, Callable[..., object]] = {
    "attention_forward": _forward,
    "attention_backward": _backward,
    "attention_weights": _weights,
    "attention_weights_sparse": _weights_sparse,
    "mask_band": _mask_band,
    "mask_tiles": _mask_tiles,
    "row_products": _row_products,
}


def register() -> None:
    """Tell torch about every operator, which must be loaded."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"heedful::{name}", fake)
