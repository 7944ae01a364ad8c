"""Patterns of square blocks: a map given by the caller, and BigBird's."""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from heedful.patterns.arguments import booleans, check_broadcast, four_dimensional, integer
from heedful.patterns.arrays import as_tensor, broadcast, is_tracing
from heedful.patterns.base import Pattern
from heedful.patterns.philox import philox4x32
from heedful.patterns.schedule import Schedule, in_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from heedful.patterns.arrays import Array


class _Blocks(Pattern):
    block_size: int

    @abstractmethod
    def block_map(self, q_length: int, k_length: int) -> Array:
        """Which blocks of keys each block of queries may attend to: bool (B or 1, H or 1, nq, nk)."""

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        blocks = as_tensor(self.block_map(q_length, k_length), i.device)
        return blocks[:, :, i.flatten() // self.block_size][..., j.flatten() // self.block_size]

    def lower(self) -> Schedule:
        return Schedule.of([[in_blocks(self.block_size, 0)]], 1)

    def arrays(self, q_length: int, k_length: int) -> tuple[Array, ...]:
        return (self.block_map(q_length, k_length),)

    def density(self, q_length: int, k_length: int) -> float:
        import torch

        blocks = as_tensor(self.block_map(q_length, k_length), "cpu")
        queries, keys = (
            (length - torch.arange(0, length, self.block_size)).clamp(max=self.block_size)
            for length in (q_length, k_length)
        )
        pairs = blocks.shape[0] * blocks.shape[1] * q_length * k_length
        return int((blocks * queries.view(-1, 1) * keys).sum()) / pairs if pairs else 0.0


class BlockSparse(_Blocks):
    """A query may attend to a key where blocks[..., i // block_size, j // block_size].

    Args:
        blocks: bool tensor that broadcasts to (B, H, nq, nk), True = attend, where nq and nk are the lengths
            divided by `block_size`, rounded up.
        block_size: positions along a block's side, 1 or more.

    Raises:
        TypeError, ValueError: `blocks` is not a bool tensor of at most 4 dimensions, or `block_size` is not an
            int of at least 1; at the call, `blocks` does not broadcast.
    """

    def __init__(self, blocks: Array, block_size: int) -> None:
        self.blocks = booleans("blocks", blocks)
        self.block_size = integer("block_size", block_size, 1)

    def block_map(self, q_length: int, k_length: int) -> Array:
        blocks = four_dimensional(self.blocks)
        nq, nk = -(-q_length // self.block_size), -(-k_length // self.block_size)
        check_broadcast("blocks", blocks, (*blocks.shape[:2], nq, nk))
        return broadcast(blocks, (*blocks.shape[:2], nq, nk))

    def validate(self, batch: int, heads: int, q_length: int, k_length: int) -> None:
        shape = (batch, heads, -(-q_length // self.block_size), -(-k_length // self.block_size))
        check_broadcast("blocks", self.blocks, shape)


class BigBird(_Blocks):
    """A window of blocks, some global blocks and some random ones. With bi = i // block_size and
    bj = j // block_size, a query may attend to a key where |bi - bj| <= window_blocks // 2, or bi or bj is below
    global_blocks, or bj is one of the random blocks of bi.

    The random blocks of bi are drawn without replacement from the key blocks that the other rules leave to it:
    those with the smallest draws, where the draw of (bi, bj) is the first word of Philox4x32-10 with the seed as
    key and the counter (bj, bi, 0, 0), the smaller bj first among equal draws. All heads share them.

    Args:
        block_size: positions along a block's side, 1 or more.
        window_blocks: blocks in the window in all, odd: the query's own and as many on each side.
        global_blocks: the first so many blocks see and are seen by everything, 0 or more.
        random_blocks: drawn for each block of queries, 0 or more; all that are left where there are fewer.
        seed: 0 to 2**64 - 1.

    Raises:
        TypeError, ValueError: an argument is not an int in its range, or `window_blocks` is even.
    """

    def __init__(
        self, block_size: int, window_blocks: int, global_blocks: int, random_blocks: int, seed: int = 0
    ) -> None:
        self.block_size = integer("block_size", block_size, 1)
        self.window_blocks = integer("window_blocks", window_blocks, 1)
        self.global_blocks = integer("global_blocks", global_blocks, 0)
        self.random_blocks = integer("random_blocks", random_blocks, 0)
        self.seed = integer("seed", seed, 0, 2**64 - 1)
        if self.window_blocks % 2 == 0:
            raise ValueError(
                f"window_blocks takes an odd int, the query's own block in the middle, got {window_blocks}"
            )

    def block_map(self, q_length: int, k_length: int) -> Array:
        arguments = (
            -(-q_length // self.block_size),
            -(-k_length // self.block_size),
            self.window_blocks // 2,
            self.global_blocks,
            self.random_blocks,
            self.seed & 0xFFFFFFFF,
            self.seed >> 32,
        )
        if is_tracing():
            from heedful.patterns.traced_blocks import bigbird_operator

            traced: Tensor = bigbird_operator(*arguments)
            return traced
        return bigbird_map(*arguments)


@functools.lru_cache(maxsize=32)
def bigbird_map(
    q_blocks: int, k_blocks: int, radius: int, global_blocks: int, random_blocks: int, seed_low: int, seed_high: int
) -> npt.NDArray[np.bool_]:
    bi, bj = np.ogrid[:q_blocks, :k_blocks]
    blocks: npt.NDArray[np.bool_] = (np.abs(bi - bj) <= radius) | (bi < global_blocks) | (bj < global_blocks)
    if random_blocks:
        for row, chosen in enumerate(blocks):
            rest = np.flatnonzero(~chosen)
            draws = philox4x32(seed_low, seed_high, rest, row, 0, 0)[0]
            chosen[rest[np.argsort(draws, kind="stable")[:random_blocks]]] = True
    return blocks[np.newaxis, np.newaxis]
