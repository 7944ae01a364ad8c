"""The engine's reading of a schedule against `Schedule.mask`."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import Case, cases

from heedful.backend.native import library

property_test = settings(max_examples=200, deadline=None)


def check_mask(case: Case) -> None:
    s = case.sizes
    code, operands = case.pattern.schedule.encode(), case.operands()
    expected = case.pattern.schedule.mask(s.q_length, s.k_length, operands, s.batch, s.heads)
    for b in range(s.batch):
        for h in range(s.heads):
            mask = library.schedule_mask(code, operands, s.batch, b, h, s.q_length, s.k_length)
            assert torch.equal(mask.bool(), expected[b, h])


def check_tiles(case: Case, tile_q: int, tile_k: int) -> None:
    """No tile is called empty or full that is not."""
    s = case.sizes
    code, operands = case.pattern.schedule.encode(), case.operands()
    expected = case.pattern.schedule.mask(s.q_length, s.k_length, operands, s.batch, s.heads)
    for b in range(s.batch):
        for h in range(s.heads):
            tiles = library.schedule_tiles(code, operands, s.batch, b, h, s.q_length, s.k_length, tile_q, tile_k)
            assert tuple(tiles.shape) == (-(-s.q_length // tile_q), -(-s.k_length // tile_k))
            assert bool((tiles <= 2).all())
            for row, kinds in enumerate(tiles.tolist()):
                for column, kind in enumerate(kinds):
                    rows, columns = (
                        slice(row * tile_q, (row + 1) * tile_q),
                        slice(column * tile_k, (column + 1) * tile_k),
                    )
                    tile = expected[b, h, rows, columns]
                    assert kind != 0 or not tile.any(), f"tile {row}, {column} is not empty"
                    assert kind != 2 or tile.all(), f"tile {row}, {column} is not full"


@property_test
@given(cases(longest=157))
def test_engine_expands_what_the_schedule_says(case: Case) -> None:
    check_mask(case)


@property_test
@given(cases(longest=157), st.integers(1, 16), st.sampled_from([4, 8, 16, 32, 64]))
def test_engine_calls_no_tile_empty_or_full_that_is_not(case: Case, tile_q: int, tile_k: int) -> None:
    check_tiles(case, tile_q, tile_k)
