"""Decoding with a `KVCache` on Triton: every kind, step by step, against the whole in fp64."""

from __future__ import annotations

import pytest
import torch
from tolerance import expected

from heedful import Causal, KVCache, Padding, SlidingWindow, attention

HEADS, KV_HEADS, DIM = 4, 2, 32
KINDS = {
    "contiguous": {"capacity": 8},
    "left padded": {"starts": [0, 5]},
    "ring": {"window": 20, "block_size": 16},
    "paged": {"block_size": 16},
    "paged and left padded": {"block_size": 8, "starts": [3, 0]},
}


def compare(out: torch.Tensor, q: torch.Tensor, held: list, starts: list[int], window: int | None) -> None:
    for item, (key, value) in enumerate(held):
        pattern = Causal() & Padding(starts[item], 10**6)
        if window is not None:
            pattern = pattern & SlidingWindow(window, None)
        wanted = expected(q[item : item + 1].cpu(), key.cpu(), value.cpu(), pattern=pattern)
        wanted.out.check(out[item : item + 1].cpu(), f"item {item}")


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_steps(device, kind, ragged) -> None:
    options = KINDS[kind]
    cache = KVCache(**options)
    starts, window = list(options.get("starts", [0, 0])), options.get("window")
    nothing = torch.empty(1, KV_HEADS, 0, DIM, device=device, dtype=torch.float16)
    held = [(nothing, nothing)] * 2
    for turn, length in enumerate((37, 1, 1, 3, 1)):
        q, k, v = (
            torch.randn(2, heads, length, DIM, device=device).to(torch.float16) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        held = [
            tuple(torch.cat([old, more[item : item + 1]], 2) for old, more in zip(pair, (k, v), strict=True))
            for item, pair in enumerate(held)
        ]
        compare(attention(q, k, v, cache=cache, causal=True, backend="triton"), q, held, starts, window)
        if ragged and turn == 1:
            lengths = [held[0][0].shape[2], held[1][0].shape[2] - 4]
            cache.crop(lengths)
            held = [tuple(t[:, :, :stop] for t in pair) for pair, stop in zip(held, lengths, strict=True)]
        if ragged and turn == 3:
            cache.reorder([1, 0])
            held, starts = held[::-1], starts[::-1]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_many_keys_in_runs(device, kind) -> None:
    """Enough for the keys of one step to be split."""
    cache = KVCache(**KINDS[kind])
    q, k, v = (
        torch.randn(1, heads, 700, DIM, device=device).to(torch.float16) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    cache.append(k[:, :, :699], v[:, :, :699])
    out = attention(q[:, :, 699:], k[:, :, 699:], v[:, :, 699:], cache=cache, causal=True, backend="triton")
    compare(out, q[:, :, 699:], [(k, v)], [0], None)
