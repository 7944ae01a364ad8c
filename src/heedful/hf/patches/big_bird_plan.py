"""Which blocks of keys each block of BigBird's queries sees, and how many times: as a pattern over a few more keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from heedful.hf.recognise import key_ranges
from heedful.patterns import BlockSparse, Mask, Padding, Pattern

# Lengths with plans of their own, from BigBird's paper.
PAPER_LENGTHS = (1024, 3072, 4096)

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """BigBird's blocks for one length.

    A random block may be one that the query block sees already, and while a model does not train all random blocks are
    block 0, so that a block of keys may count several times. Counting n times is a bias of log n. Blocks that count a
    number of times other than one somewhere stand behind the keys again, once for each such number.

    Attributes:
        blocks: which blocks of keys, the appended ones too, each block of queries sees.
        block_size: positions in a block.
        appended: the blocks of keys that are appended.
        times: how many times each of these counts.
        bias: the logarithms of that, for each key, (1, 1, 1, Lk) in float64; None where nothing is appended.
    """

    blocks: BlockSparse
    block_size: int
    appended: tuple[int, ...]
    times: tuple[int, ...]
    bias: Tensor | None

    @classmethod
    def of(cls, counts: Numbers, block_size: int) -> Plan:
        """Of how many times each block of queries sees each of keys, (H or 1, n, n)."""
        n = counts.shape[-1]
        again = [(block, times) for block in range(n) for times in np.unique(counts[:, :, block]) if times > 1]
        seen = [counts == 1, *((counts[:, :, block] == times)[:, :, None] for block, times in again)]
        bias = None
        if again:
            logarithms = [0.0] * n + [math.log(times) for _, times in again]
            bias = torch.tensor(logarithms, dtype=torch.float64).repeat_interleave(block_size).view(1, 1, 1, -1)
        blocks = BlockSparse(torch.from_numpy(np.concatenate(seen, axis=2)), block_size)
        return cls(blocks, block_size, tuple(b for b, _ in again), tuple(int(t) for _, t in again), bias)

    def extend(self, states: Tensor) -> Tensor:
        """Keys, values or what is said of them, (B, L, ...), with the appended blocks."""
        size = self.block_size
        return torch.cat([states, *(states[:, block * size : (block + 1) * size] for block in self.appended)], dim=1)

    def real(self, kept: Tensor) -> Pattern:
        """The keys, appended ones too, that are no padding: `kept` (B, L)."""
        found = key_ranges(kept)
        if not isinstance(found, Padding):
            return Mask(self.extend(kept)[:, None, None, :])
        pattern: Pattern = found
        for place, block in enumerate(self.appended):
            begin = kept.shape[1] + place * self.block_size
            ends = (torch.as_tensor(end) - block * self.block_size for end in (found.start, found.stop))
            pattern = pattern | Padding(*(end.clamp(0, self.block_size) + begin for end in ends))
        return pattern

    def weights(self, weights: Tensor) -> Tensor:
        """Weights over all keys (B, H, L, Lk) as BigBird returns them: a block that counts n times, once."""
        length = weights.shape[2]
        found = weights[..., :length].clone()
        size = self.block_size
        for place, (block, times) in enumerate(zip(self.appended, self.times, strict=True)):
            appended = weights[..., length + place * size : length + (place + 1) * size]
            found[..., block * size : (block + 1) * size] += appended / times
        return found


def plan(module: Any, length: int) -> Plan:
    """The plan of a BigBird self-attention for sequences of `length`; leaves numpy's generator as the original does."""
    heads, blocks = module.num_attention_heads, (module.block_size, module.num_random_blocks)
    if not module.training:
        return _at_rest(length, *blocks)
    found, state = _training(type(module).replaces, module.seed, length, module.max_seqlen, heads, *blocks)
    np.random.set_state(state)
    return found


@lru_cache(maxsize=64)
def _at_rest(length: int, block_size: int, random_blocks: int) -> Plan:
    n = length // block_size
    return Plan.of(_counts(np.zeros((1, n - 2, random_blocks), dtype=np.int64), n), block_size)


@lru_cache(maxsize=256)
def _training(
    cls: type[nn.Module], seed: int, length: int, longest: int, heads: int, block_size: int, random_blocks: int
) -> tuple[Plan, Any]:
    """The plan that BigBird draws at each training step, always from the same seed, and numpy's state after it."""
    drawing: Any = cls
    module = SimpleNamespace(training=True, _get_single_block_row_attention=drawing._get_single_block_row_attention)
    n = length // block_size
    np.random.seed(seed)
    if length in PAPER_LENGTHS:
        sizes = (longest, longest, block_size, block_size, random_blocks)
        rows = [drawing._bigbird_block_rand_mask(module, *sizes, last_idx=1024)[: n - 2] for _ in range(heads)]
    else:
        lengths, numbers = drawing._get_rand_attn_plan(length, block_size, random_blocks)
        rows = drawing._bigbird_block_rand_mask_with_head(
            module, length, length, block_size, block_size, heads, lengths, numbers
        )
    return Plan.of(_counts(np.stack(rows).astype(np.int64), n), block_size), np.random.get_state()


def _counts(drawn: Numbers, n: int) -> Numbers:
    """How many times each block of queries sees each of keys, (H, n, n); `drawn` (H, n - 2, r) is for 1 to n - 2.

    The first and the last block see and are seen by all; the others see the three around them and their random ones.
    """
    block = np.arange(n)
    seen = np.abs(block[:, None] - block) <= 1
    seen[[0, -1]] = True
    seen[:, [0, -1]] = True
    counts = np.repeat(seen[None].astype(np.int64), drawn.shape[0], axis=0)
    head, row, _ = np.indices(drawn.shape)
    np.add.at(counts, (head, row + 1, drawn), 1)
    return counts
