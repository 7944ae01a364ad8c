"""Philox4x32-10, the counter-based random generator of Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (2011): the same words on every machine and in any order, for numpy arrays and for torch tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

Words = npt.NDArray[np.uint64]


def philox4x32(
    key0: npt.ArrayLike, key1: npt.ArrayLike, c0: npt.ArrayLike, c1: npt.ArrayLike, c2: npt.ArrayLike, c3: npt.ArrayLike
) -> tuple[Words, Words, Words, Words]:
    """The four words drawn for a 64-bit key and a 128-bit counter, each given as 32-bit words, lowest first.

    Args are unsigned integers below 2**32, scalars or arrays that broadcast together. The words come back as
    uint64 arrays of values below 2**32.
    """
    key0, key1, c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in (key0, key1, c0, c1, c2, c3))
    words: tuple[Words, Words, Words, Words] = _rounds(key0, key1, c0, c1, c2, c3)
    return words


def philox4x32_torch(
    key0: Tensor | int, key1: Tensor | int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `philox4x32`, for int64 tensors that broadcast together and hold values from 0 to 2**32 - 1."""
    words: tuple[Tensor, Tensor, Tensor, Tensor] = _rounds(key0, key1, c0, c1, c2, c3)
    return words


def _rounds(key0: Any, key1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple[Any, Any, Any, Any]:
    for _ in range(10):
        # In int64 the product may wrap to a negative number; its 64 bits are the right ones, and the mask drops
        # what the shift copies of the sign.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ key0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ key1,
            product0 & _WORD,
        )
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3
