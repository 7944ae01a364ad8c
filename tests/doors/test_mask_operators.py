"""The operators that read a dense mask once: what they find, and what they tell tracing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from heedful.sdpa.masks import band

DTYPES = (torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64)
operators = torch.ops.heedful


@pytest.fixture(autouse=True, scope="module")
def _loaded():
    from heedful.backend.native import library

    library.load_operators()


def as_mask(pairs, dtype):
    return pairs if dtype == torch.bool else torch.zeros(pairs.shape).masked_fill(~pairs, -math.inf).to(dtype)


def band_pairs(q_length, k_length, low, high):
    distance = torch.arange(k_length) - torch.arange(q_length)[:, None]
    return (low <= distance) & (distance <= high)


def found_pairs(found, q_length, k_length):
    kind, low, high, *ends = found.tolist()
    assert kind in (1, 2)
    pattern = band(low, high, q_length, k_length)
    pairs = band_pairs(q_length, k_length, low, high)
    if pattern is not None:
        assert torch.equal(pattern.dense(q_length, k_length)[0, 0], pairs)
    start, stop = torch.tensor(ends).view(2, -1, 1, 1, 1)
    keys = torch.arange(k_length)
    return pairs & (start <= keys) & (keys < stop) if kind == 2 else pairs[None, None]


@example(4, 1, -4, -3, [(0, 9)], 0, 1)
@example(7, 9, -2, 0, [(0, 9), (3, 9), (0, 2), (5, 5)], 1, 2)
@given(
    st.integers(1, 70),
    st.integers(1, 90),
    st.integers(-75, 95),
    st.integers(-75, 95),
    st.lists(st.tuples(st.integers(0, 95), st.integers(0, 95)), min_size=1, max_size=3),
    st.integers(0, 4),
    st.integers(1, 2),
)
def test_every_band_is_found(q_length, k_length, low, high, paddings, dtype, heads):
    pairs = band_pairs(q_length, k_length, low, high)[None, None]
    keys = torch.arange(k_length)
    pairs = torch.cat([pairs & (start <= keys) & (keys < stop) for start, stop in paddings]).expand(-1, heads, -1, -1)
    found = operators.mask_band(as_mask(pairs, DTYPES[dtype]), q_length, k_length)
    assert torch.equal(found_pairs(found, q_length, k_length).expand(pairs.shape), pairs)


@given(st.integers(1, 70), st.integers(1, 90), st.integers(0, 2**31), st.integers(0, 4))
def test_nothing_else_is_taken_for_a_band(q_length, k_length, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.randint(-20, 20, (2,), generator=generator).tolist()
    pairs = band_pairs(q_length, k_length, low, high)[None, None].clone()
    changed = torch.randint(q_length * k_length, (), generator=generator)
    pairs.view(-1)[changed] ^= True
    found = operators.mask_band(as_mask(pairs, DTYPES[dtype]), q_length, k_length)
    if found[0] != 0:
        # Small ones may be another band.
        assert torch.equal(found_pairs(found, q_length, k_length), pairs)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("value", [1.0, -1.0, -1e4, math.inf, math.nan])
def test_a_bias_is_neither(dtype, value):
    mask = torch.zeros(2, 1, 33, 45, dtype=dtype)
    mask[1, 0, 30, 44] = value
    assert operators.mask_band(mask, 33, 45)[0] == 0
    assert operators.mask_tiles(mask, 33, 45, 16)[0][0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_of_very_negative_numbers_is_none_without_a_key(dtype):
    for least, kind in ((-math.inf, 2), (torch.finfo(dtype).min, 0)):
        mask = torch.zeros(2, 1, 1, 45, dtype=dtype)
        mask[1] = least
        mask[0, ..., 40:] = torch.finfo(dtype).min
        assert operators.mask_band(mask, 33, 45)[0] == kind
        rows = torch.zeros(1, 1, 64, 64, dtype=dtype)
        rows[:, :, :32, 32:] = torch.finfo(dtype).min
        rows[:, :, 40] = least
        assert operators.mask_tiles(rows, 64, 64, 4)[0][0] == (kind == 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(113, 239), (64, 64), (1, 300), (300, 31)])
@pytest.mark.parametrize("threads", [1, 2])
def test_tiles(dtype, size, threads):
    q_length, k_length = size
    tile = 16
    rows, columns = torch.arange(q_length)[:, None] // 40, torch.arange(k_length)[None] // 40
    pairs = torch.stack([rows == columns, (rows + columns) % 3 == 0])[:, None]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        counts, full, partial, counted = operators.mask_tiles(as_mask(pairs, dtype), q_length, k_length, tile)
    finally:
        torch.set_num_threads(before)
    if counts[0] == 0:
        return
    padded = torch.nn.functional.pad(pairs.float(), (0, -k_length % tile, 0, -q_length % tile), value=math.nan)
    tiles = padded.unflatten(2, (-1, tile)).unflatten(4, (-1, tile)).transpose(3, 4).flatten(4)
    there = ~tiles.isnan()
    every, some = (there <= (tiles == 1)).all(-1), (tiles == 1).any(-1)
    assert torch.equal(full, every)
    assert torch.equal(partial, some & ~every)
    assert counts.tolist() == [1, int(every.sum()), int((some & ~every).sum())]
    assert torch.equal(counted, pairs) if dtype != torch.bool else counted.shape == (0,)


def test_what_repeats_is_read_once():
    pairs = torch.ones(60, 60, dtype=torch.bool).tril().fill_diagonal_(False)
    pairs[:, 0] = True
    repeated = pairs.expand(3, 4, -1, -1)
    counts, full, partial, _ = operators.mask_tiles(repeated, 60, 60, 10)
    assert full.shape == partial.shape == (1, 1, 6, 6)
    assert counts.tolist() == [1, 15, 6]
    assert operators.mask_band(pairs.tril(-1).expand(3, 4, -1, -1), 60, 60).tolist()[:3] == [1, -60, -1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("expanded", [False, True])
def test_tracing_is_told_the_truth(dtype, expanded):
    mask = as_mask(torch.ones(2, 1, 33, 45, dtype=torch.bool).tril(), dtype)
    mask = mask[:, :, :1].expand(-1, 3, 33, -1) if expanded else mask
    for operator, arguments in ((operators.mask_band, (33, 45)), (operators.mask_tiles, (33, 45, 16))):
        torch.library.opcheck(operator.default, (mask, *arguments), raise_exception=True)


@pytest.mark.parametrize(
    ("mask", "lengths", "words"),
    [
        (torch.ones(3, 3, dtype=torch.bool), (3, 3), "4"),
        (torch.ones(1, 1, 3, 3, dtype=torch.bool), (3, 4), "takes 1 or 4"),
        (torch.ones(1, 1, 3, 3, dtype=torch.int32), (3, 3), "dtype"),
        (torch.ones(1, 1, 3, 3, dtype=torch.bool).mT, (3, 3), "side by side"),
        (torch.ones(1, 1, 3, 0, dtype=torch.bool), (3, 0), "take 1 or more"),
    ],
)
def test_refusals(mask, lengths, words):
    for operator, more in ((operators.mask_band, ()), (operators.mask_tiles, (16,))):
        with pytest.raises(RuntimeError, match=words):
            operator(mask, *lengths, *more)
    with pytest.raises(RuntimeError, match="tile takes 1 or more"):
        operators.mask_tiles(torch.ones(1, 1, 3, 3), 3, 3, 0)
