"""What `return_attn_probs=True` returns third: the weights, with a sign that says what dropout kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# flash-attn rounds both lengths up to its tiles.
_TILE = 128


def attend(
    attention: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, dropout_p: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output and log-sum-exp of `heedful.attention`, or of what stands in for it, in layout "blhd", and where there
    is dropout the weights before it, negative where it dropped them: a sparse COO tensor (B, H, Lq, Lk) of the attended
    pairs."""
    options |= {"layout": "blhd", "return_lse": True}
    if not dropout_p:
        out, lse, _ = attention(q, k, v, **options)
        return out, lse, None
    options["return_weights"] = "sparse"
    out, lse, dropped = attention(q, k, v, dropout_p=dropout_p, **options)
    with torch.no_grad():
        plain = attention(q, k, v, **options).weights
        # Kept weights have grown, so that one which was not 0 before cannot be 0 now.
        signed = plain.values().where(dropped.values() != 0, -plain.values())
        weights = torch.sparse_coo_tensor(
            plain.indices(), signed, plain.shape, is_coalesced=True, check_invariants=False
        )
    return out, lse, weights


def padded(weights: Tensor | None, like: Tensor, q_length: int, k_length: int) -> Tensor:
    """S_dmask (B, H, q_length, k_length), both lengths rounded up to 128, of weights as `attend` returns them; without
    weights an empty tensor, as flash-attn returns it where there is no dropout."""
    if weights is None:
        return like.new_empty(0)
    batch, heads = weights.shape[:2]
    return scattered(weights.indices(), weights.values(), batch, heads, q_length, k_length)


def scattered(indices: Tensor, values: Tensor, batch: int, heads: int, q_length: int, k_length: int) -> Tensor:
    """The same from a pair's places (4, n) and weights (n,)."""
    dense = values.new_zeros(batch, heads, -(-q_length // _TILE) * _TILE, -(-k_length // _TILE) * _TILE)
    dense[tuple(indices)] = values
    return dense
