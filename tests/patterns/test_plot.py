"""Pictures of patterns."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from heedful.patterns import Causal, Documents, Full, Mask, Padding, Pattern, Prefix, SlidingWindow
from heedful.patterns.plot import classify


@pytest.mark.parametrize("pattern", [Causal(), Full(), Prefix(0), SlidingWindow(9) & Padding(3, torch.tensor([40]))])
@pytest.mark.parametrize(("q_length", "k_length", "tile"), [(64, 64, 16), (37, 50, 8), (1, 5, 3)])
def test_tiles_are_what_dense_holds(pattern: Pattern, q_length: int, k_length: int, tile: int) -> None:
    tiles = classify(pattern, q_length, k_length, tile)
    dense = pattern.dense(q_length, k_length)[0, 0]
    for row in range(tiles.shape[0]):
        for column in range(tiles.shape[1]):
            part = dense[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
            assert tiles[row, column] == (2 if part.all() else 1 if part.any() else 0)


def test_a_batch_item_and_a_head_are_chosen() -> None:
    flags = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    flags[1, 1] = True
    assert (classify(Mask(flags), 4, 4, 2, 1, 1) == 2).all()
    assert (classify(Mask(flags), 4, 4, 2, 1, 0) == 0).all()


@pytest.mark.parametrize(
    "pattern", [Causal() & SlidingWindow(30), Documents(torch.tensor([0, 100, 128]), within=Causal())]
)
def test_plot_writes_a_png(pattern: Pattern, tmp_path: Path) -> None:
    path = tmp_path / "pattern.png"
    pattern.plot(path, q_length=128)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 400
    assert height > 400
