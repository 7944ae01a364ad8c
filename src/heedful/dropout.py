"""Which attention weights dropout keeps: a function of a seed and the weight's place, the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.patterns.philox import philox4x32_torch


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of that device: int64, one element."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_mask(seed: Tensor, dropout_p: float, shape: tuple[int, int, int, int]) -> Tensor:
    """Which of the weights (B, H, Lq, Lk) are kept, bool, each with probability 1 - dropout_p.

    Weight (b, h, i, j) takes word ⌊j/16⌋ mod 4 of Philox4x32-10 with the seed as key and (16·⌊j/64⌋ + j mod 16, i,
    h, b) as counter, and is kept where that word is at least dropout_p·2^32, rounded down. So one evaluation of
    Philox serves four weights.
    """
    axes = [torch.arange(size, device=seed.device) for size in shape]
    b, h, i, j = (axis.view([-1 if d == n else 1 for d in range(4)]) for n, axis in enumerate(axes))
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    drawn = philox4x32_torch(low, high, 16 * (j // 64) + j % 16, i, h, b)
    words = torch.stack([word.expand(shape) for word in drawn])
    chosen = words.gather(0, (j // 16 % 4).expand(1, *shape))[0]
    return chosen.ge(int(dropout_p * 2**32))
