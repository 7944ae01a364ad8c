"""Beside the ladder: PyTorch's own fused functions, what somebody who knows the library writes.

No rung of its own, since none of it is a step that the reader takes, but the line that the rungs have to be measured
against: `F.scaled_dot_product_attention`, `F.layer_norm`, `F.gelu` and `F.silu`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.levels.level_1_pytorch import rope
from heedful.levels.preallocated import Preallocated

__all__ = ["Cache", "attention", "gelu", "layer_norm", "layer_norm_gelu", "rope", "swiglu"]

gelu = F.gelu


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    if not causal or q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    if q.shape[2] == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def layer_norm_gelu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.gelu(F.layer_norm(x, weight.shape, weight, bias, eps))


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class Cache(Preallocated):
    """A buffer that is filled in place; attention reads the part that is filled."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return attention(q, *self.append(k, v), True, scale)
