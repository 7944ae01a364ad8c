"""BigBird's map of blocks as an operator that torch.compile does not look into.

Traced, the map is one opaque operator, so that neither lengths nor tracing's fake tensors get into its cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.patterns.blocks import bigbird_map


@torch.library.custom_op("heedful::bigbird_blocks", mutates_args=())
def bigbird_operator(
    q_blocks: int, k_blocks: int, radius: int, global_blocks: int, random_blocks: int, seed_low: int, seed_high: int
) -> Tensor:
    """Of which blocks of keys each block of queries may attend to: bool (1, 1, q_blocks, k_blocks)."""
    # A compiled graph may write into the memory that it gets.
    return torch.from_numpy(
        bigbird_map(q_blocks, k_blocks, radius, global_blocks, random_blocks, seed_low, seed_high)
    ).clone()


@bigbird_operator.register_fake
def _(q_blocks: int, k_blocks: int, *rest: int) -> Tensor:
    return torch.empty((1, 1, q_blocks, k_blocks), dtype=torch.bool)
