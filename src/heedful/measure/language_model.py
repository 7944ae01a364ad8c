"""A small byte-level language model with a sliding window, in plain PyTorch, whose attention is a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
BYTES = 256


@dataclass(frozen=True)
class Size:
    """How large the model is and what it sees."""

    layers: int = 3
    heads: int = 3
    head_dim: int = 64
    length: int = 2048
    window: int = 256
    batch: int = 1

    @property
    def width(self) -> int:
        """Channels between the layers."""
        return self.heads * self.head_dim


class Block(nn.Module):
    """Attention with rotary positions, then a feed-forward layer, each around a residual."""

    def __init__(self, size: Size, attend: Attend) -> None:
        super().__init__()
        self.size, self.attend = size, attend
        self.before_attention, self.before_feed_forward = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.project = nn.Linear(size.width, 3 * size.width, bias=False)
        self.output = nn.Linear(size.width, size.width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """(B, L, width) to the same."""
        batch, length, width = x.shape
        split = self.project(self.before_attention(x)).view(batch, length, 3, self.size.heads, self.size.head_dim)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        out = self.attend(_rotate(q, cosines, sines), _rotate(k, cosines, sines), v)
        x = x + self.output(out.transpose(1, 2).reshape(batch, length, width))
        changed: Tensor = x + self.feed_forward(self.before_feed_forward(x))
        return changed


class LanguageModel(nn.Module):
    """Bytes to the logits of the next byte."""

    def __init__(self, size: Size, attend: Attend) -> None:
        """attend takes q, k, v (B, H, L, D) and knows the pattern."""
        super().__init__()
        self.embed = nn.Embedding(BYTES, size.width)
        self.blocks = nn.ModuleList(Block(size, attend) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, BYTES, bias=False)
        frequencies = 10_000.0 ** (-torch.arange(0, size.head_dim, 2) / size.head_dim)
        angles = torch.arange(size.length)[:, None] * frequencies
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """(B, L) bytes as int64 to (B, L, 256)."""
        x = self.embed(text)
        for block in self.blocks:
            x = block(x, self.cosines, self.sines)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Trainer:
    """A model and its optimiser. The same seed gives the same weights, whatever attention the model has."""

    def __init__(self, size: Size, attend: Attend, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.model = LanguageModel(size, attend)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
        warm = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda step: min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * min(step / steps, 1.0))),
        )

    def step(self, text: Tensor) -> float:
        """One step on (B, L + 1) bytes; the loss in nats per byte before it."""
        logits = self.model(text[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        return loss.item()


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1)
