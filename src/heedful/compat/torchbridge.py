"""The names of the five-level guide of TorchBridge: attention at the levels, and their comparison.

`from heedful.compat.torchbridge import BasicOptimizedAttention, compare_optimization_levels`. The modules are
`heedful.levels.MultiHeadAttention`; beyond that package's functions are only the names and the seed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from heedful.levels import MultiHeadAttention, compare_optimization_levels
from heedful.levels.ladder import Level, require, set_level

__all__ = [
    "BasicOptimizedAttention",
    "CompileOptimizedAttention",
    "JITOptimizedAttention",
    "compare_optimization_levels",
]


class _AtALevel(MultiHeadAttention):
    """Multi-head attention with RoPE at one level of the ladder.

    Initial weights are drawn from `seed`, whatever torch's generator holds and without moving it, so that instances
    that are made on their own compute the same. Takes and returns (B, L, dim).

    Args:
        dim, heads: as `heedful.levels.MultiHeadAttention`.
        seed: what the weights are drawn from.
        options: the other arguments of `heedful.levels.MultiHeadAttention`.

    Raises:
        UnsupportedError: the level does not run here; the message says why.
    """

    at: ClassVar[Level]

    def __init__(self, dim: int = 512, heads: int = 8, *, seed: int = 0, **options: Any) -> None:
        require(self.at, self.component, torch.get_default_device())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(dim, heads, **options)
        set_level(self, self.at)


class BasicOptimizedAttention(_AtALevel):
    __doc__ = f"Level 1, plain PyTorch. {_AtALevel.__doc__}"
    at = 1


class JITOptimizedAttention(_AtALevel):
    __doc__ = f"Level 2, TorchScript. {_AtALevel.__doc__}"
    at = 2


class CompileOptimizedAttention(_AtALevel):
    __doc__ = f"Level 3, torch.compile. {_AtALevel.__doc__}"
    at = 3
