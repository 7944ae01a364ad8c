"""Philox4x32-10 against the known answers that its authors published (Random123, kat_vectors)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pattern_cases import philox_first_word

from heedful.patterns.philox import philox4x32, philox4x32_torch

KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_known_answers(key: tuple[int, int], counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert tuple(map(int, philox4x32(*key, *counter))) == words
    assert tuple(map(int, philox4x32_torch(*key, *map(torch.tensor, counter)))) == words
    assert philox_first_word(key, counter) == words[0]


def test_arrays_broadcast_and_numpy_agrees_with_torch() -> None:
    rows, columns = np.arange(5, dtype=np.uint32)[:, None], np.arange(2**32 - 7, 2**32, dtype=np.uint64)
    from_numpy = philox4x32(123, 2**32 - 1, columns, rows, 0, np.uint32(9))
    from_torch = philox4x32_torch(
        123,
        2**32 - 1,
        torch.from_numpy(columns.astype(np.int64)),
        torch.from_numpy(rows.astype(np.int64)),
        torch.tensor(0),
        torch.tensor(9),
    )
    for words, tensor in zip(from_numpy, from_torch, strict=True):
        assert words.dtype == np.uint64
        assert words.shape == (5, 7)
        assert (words == tensor.numpy().astype(np.uint64)).all()
    assert int(from_numpy[0][3, 2]) == philox_first_word((123, 2**32 - 1), (int(columns[2]), 3, 0, 9))
