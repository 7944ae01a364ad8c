"""Few queries against many keys, as when a model writes: the engine splits these calls over the keys."""

from __future__ import annotations

import math

import pytest
import torch
from comparison import check, run
from inputs import DTYPES, attention_inputs
from torch import Tensor

from heedful import Causal, Documents, Full, Longformer, Mask, Padding, Pattern, SlidingWindow

# Around the tiles of keys, the chunks of 512 that a call is split into, and what several of them make.
K_LENGTHS = (1, 2, 3, 15, 31, 65, 113, 239, 255, 257, 511, 512, 513, 1023, 1025, 2049, 3001, 5000)
PATTERNS = ("full", "causal", "window", "padding", "both", "mask", "documents", "global", "nothing")


def pattern_of(name: str, batch: int, q_length: int, k_length: int) -> Pattern:
    starts = torch.arange(batch, dtype=torch.int32) * 5
    stops = k_length - torch.arange(batch, dtype=torch.int32) * (k_length // 3)
    cut = torch.tensor([0, k_length // 2, k_length], dtype=torch.int32)
    return {
        "full": Full(),
        "causal": Causal(),
        "window": SlidingWindow(100, 0),
        "padding": Padding(starts, stops),
        "both": Padding(starts, stops) & Causal(),
        "mask": Mask(torch.rand(batch, 1, q_length, k_length) < 0.5),
        "documents": Documents(torch.tensor([0, q_length // 2, q_length], dtype=torch.int32), cut, within=Causal()),
        "global": Longformer(50, 3),
        "nothing": Padding(0, torch.tensor([0] * (batch - 1) + [k_length], dtype=torch.int32)),
    }[name]


def cache(length: int, capacity: int, dtype: torch.dtype, *, kv_heads: int, dim: int, blhd: bool) -> Tensor:
    """The first keys of a larger buffer, the rest of which is NaN."""
    shape = (2, capacity, kv_heads, dim) if blhd else (2, kv_heads, capacity, dim)
    buffer = torch.full(shape, math.nan, dtype=dtype)
    buffer = buffer.transpose(1, 2) if blhd else buffer
    buffer[:, :, :length] = torch.randn(2, kv_heads, length, dim).to(dtype)
    return buffer[:, :, :length]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k_length", K_LENGTHS)
def test_lengths(dtype, k_length):
    for q_length in (1, 2, 7, 16):
        for heads, kv_heads in ((2, 2), (8, 2)):
            q, k, v = attention_inputs(
                batch=1, heads=heads, kv_heads=kv_heads, q_length=q_length, k_length=k_length, head_dim=32, dtype=dtype
            )
            check(q, k, v, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", range(1, 9))
def test_every_group_size_and_row_count(dtype, group):
    for q_length in range(1, 17):
        q, k, v = attention_inputs(
            heads=2 * group, kv_heads=2, q_length=q_length, k_length=67 + 13 * q_length, head_dim=16, dtype=dtype
        )
        check(q, k, v, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads", ((1, 1), (16, 1), (71, 1), (32, 8), (12, 12)))
@pytest.mark.parametrize("q_length", (1, 4))
def test_heads(dtype, heads, kv_heads, q_length):
    q, k, v = attention_inputs(
        heads=heads, kv_heads=kv_heads, q_length=q_length, k_length=613, head_dim=24, dtype=dtype
    )
    check(q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", ((1, 1), (7, 33), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (512, 512)))
def test_head_dims(dtype, dims):
    for q_length in (1, 5):
        q, k, v = attention_inputs(
            heads=4, kv_heads=1, q_length=q_length, k_length=700, head_dim=dims[0], value_dim=dims[1], dtype=dtype
        )
        check(q, k, v, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(dtype, name):
    for q_length, k_length in ((1, 1301), (3, 520), (16, 999)):
        q, k, v = attention_inputs(
            heads=4, kv_heads=2, q_length=q_length, k_length=k_length, head_dim=24, value_dim=40, dtype=dtype
        )
        check(q, k, v, pattern=pattern_of(name, 2, q_length, k_length))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_features(dtype, name):
    for q_length, k_length in ((1, 1301), (6, 700)):
        q, k, v = attention_inputs(
            heads=4, kv_heads=2, q_length=q_length, k_length=k_length, head_dim=24, value_dim=40, dtype=dtype
        )
        bias = torch.randn(2, 4, 1, k_length).masked_fill(torch.rand(k_length) < 0.1, -math.inf).to(dtype)
        pattern = pattern_of(name, 2, q_length, k_length)
        slopes, sinks = torch.rand(2, 4) / 50, torch.randn(4)
        check(q, k, v, pattern=pattern, softcap=4.0)
        check(q, k, v, pattern=pattern, bias=bias)
        check(q, k, v, pattern=pattern, alibi_slopes=slopes)
        check(q, k, v, pattern=pattern, sinks=sinks)
        check(
            q, k, v, pattern=pattern, bias=bias, alibi_slopes=slopes, sinks=sinks, softcap=9.0, dropout_p=0.2,
            weights=True,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blhd", (False, True), ids=("bhld", "blhd"))
def test_caches_that_are_views_of_a_larger_buffer(dtype, blhd):
    for length in (1, 130, 600, 1027):
        k = cache(length, 1100, dtype, kv_heads=2, dim=32, blhd=blhd)
        v = cache(length, 1100, dtype, kv_heads=2, dim=48, blhd=blhd)
        for q_length in (1, 4):
            q = attention_inputs(heads=8, q_length=q_length, head_dim=32, dtype=dtype)[0]
            found = check(q, k, v, causal=True, layout="blhd" if blhd else "bhld")
            again = run(q, k.contiguous(), v.contiguous(), causal=True)
            assert torch.equal(found.out, again.out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_are_strided_in_the_head_dim(dtype):
    q, k, v = attention_inputs(q_length=2, k_length=777, head_dim=20, dtype=dtype, memory="last-strided")
    check(q, k, v, causal=True)
    check(q, k.mT.contiguous().mT, v.mT.contiguous().mT, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf), ids=str)
def test_dead_keys_may_hold_anything(dtype, poison):
    starts, stops = torch.tensor([0, 61], dtype=torch.int32), torch.tensor([1201, 800], dtype=torch.int32)
    for q_length in (1, 5):
        q, k, v = attention_inputs(heads=4, kv_heads=2, q_length=q_length, k_length=1300, head_dim=24, dtype=dtype)
        bias = torch.randn(1, 4, 1, 1300).to(dtype)
        bias[..., 40:45] = -math.inf
        for pattern in (Padding(starts, stops), Padding(starts, stops) & SlidingWindow(900, 0)):
            counted = pattern.dense(q_length, 1300) & (bias != -math.inf)
            dead = ~counted.any(2).any(1)[:, None, :, None]
            clean = check(q, k, v, pattern=pattern, bias=bias)
            found = run(q, k.masked_fill(dead, poison), v.masked_fill(dead, poison), pattern=pattern, bias=bias)
            assert torch.equal(found.out, clean.out)
            assert torch.equal(found.lse, clean.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads", ((1, 1), (8, 2)))
def test_the_same_bits_for_any_thread_count_and_neighbours(dtype, heads, kv_heads):
    before = torch.get_num_threads()
    for q_length, k_length in ((1, 5000), (3, 1537), (16, 2000)):
        q, k, v = attention_inputs(heads=heads, kv_heads=kv_heads, q_length=q_length, k_length=k_length, dtype=dtype)
        for options in ({}, {"causal": True}, {"pattern": SlidingWindow(700, 0), "sinks": torch.randn(heads)}):
            results = []
            try:
                for threads in (1, 2, 3, 7, 1):
                    torch.set_num_threads(threads)
                    results.append(run(q, k, v, **options))
            finally:
                torch.set_num_threads(before)
            assert all(torch.equal(r.out, results[0].out) and torch.equal(r.lse, results[0].lse) for r in results)
            alone = run(*(t[1:] for t in (q, k, v)), **options)
            assert torch.equal(alone.out[0], results[0].out[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    q, k, v = attention_inputs(heads=8, kv_heads=2, q_length=2, k_length=1100, head_dim=24, dtype=dtype)
    check(q, k, v, causal=True, through=("out", "lse"))
