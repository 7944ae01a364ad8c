"""Level 1, PyTorch-native: the formulas, written down with PyTorch's operators as a person does first.

Over a loop in Python: every line works on whole tensors, so that the time goes to compiled kernels and not to the
interpreter.

Lesson: each operator reads its inputs from memory and writes its result back before the next one starts. Normalising
a tensor takes nine of them, and attention makes four tensors of (L, L) for every head. Matrix products aside, the
time is that traffic, and in decoding the copies: `torch.cat` moves the whole cache for every token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) * scale
    if causal:
        ahead = torch.ones(scores.shape[-2], scores.shape[-1], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(ahead.triu(k.shape[-2] - q.shape[-2] + 1), -math.inf)
    return torch.matmul(torch.softmax(scores, -1), v)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight + bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2.0)))


def layer_norm_gelu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return gelu(layer_norm(x, weight, bias, eps))


def swiglu(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    gate, up = x[..., :half], x[..., half:]
    return gate * torch.sigmoid(gate) * up


class Cache:
    """Keys and values joined with `torch.cat`, which copies everything held for each new token."""

    def __init__(
        self, batch: int, heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.key = torch.empty(batch, heads, 0, head_dim, dtype=dtype, device=device)
        self.value = self.key

    def rows(self, table: Tensor, count: int) -> Tensor:
        held = self.key.shape[2]
        return table[:, held : held + count]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.key = torch.cat((self.key, k), 2)
        self.value = torch.cat((self.value, v), 2)
        return attention(q, self.key, self.value, True, scale)
