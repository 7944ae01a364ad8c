"""The engine's forward against the fp64 reference, on the tier that HEEDFUL_ISA allows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from inputs import DTYPES, MEMORY, attention_inputs, pattern_examples
from tolerance import expected, rms

import heedful
from heedful import Causal, Full, Longformer, Mask, Padding, SlidingWindow

# Odd lengths around tiles of 12 and 24 rows, units of 4 to 32 keys and blocks of 256.
LENGTHS = ((1, 1), (1, 3), (3, 1), (13, 113), (113, 239), (239, 113), (25, 1023), (600, 600))


def native(q, k, v, **options):
    return heedful.attention(q, k, v, return_lse=True, backend="native", **options)


def check(q, k, v, **options):
    found, wanted = native(q, k, v, **options), expected(q, k, v, **options)
    wanted.out.check(found.out, "out")
    wanted.lse.check(found.lse, "lse")
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q_length", "k_length"), LENGTHS)
@pytest.mark.parametrize("pattern", (Full(), Causal(), SlidingWindow(20, 7)), ids=repr)
def test_dense_causal_and_window(dtype, q_length, k_length, pattern):
    for head_dim, value_dim in ((64, 64), (33, 17)):
        q, k, v = attention_inputs(
            heads=2, q_length=q_length, k_length=k_length, head_dim=head_dim, value_dim=value_dim, dtype=dtype
        )
        check(q, k, v, pattern=pattern)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(pattern_examples(2, 4, 50, 50))))
def test_every_pattern(dtype, index):
    for q_length, k_length in ((113, 300), (270, 130)):
        q, k, v = attention_inputs(kv_heads=2, q_length=q_length, k_length=k_length, head_dim=24, dtype=dtype)
        check(q, k, v, pattern=pattern_examples(2, 4, q_length, k_length)[index])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (1, 2, 3, 7, 8, 15, 16, 31, 32, 63, 65, 80, 96, 127, 128, 200, 256))
def test_head_dims(dtype, head_dim):
    for value_dim in {head_dim, 257 - head_dim}:
        q, k, v = attention_inputs(
            batch=1, heads=2, q_length=37, k_length=70, head_dim=head_dim, value_dim=value_dim, dtype=dtype
        )
        check(q, k, v, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", MEMORY)
def test_strides(dtype, memory):
    sizes = {"kv_heads": 2, "q_length": 29, "k_length": 45, "head_dim": 20, "value_dim": 36}
    q, k, v = attention_inputs(**sizes, dtype=dtype, memory=memory)
    check(q, k, v, pattern=SlidingWindow(11))


@pytest.mark.parametrize("heads, kv_heads", ((1, 1), (8, 1), (6, 2), (5, 5), (32, 8)))
@pytest.mark.parametrize("q_length", (1, 2, 5, 16, 31))
def test_grouped_heads_share_rows_of_a_tile(heads, kv_heads, q_length):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = attention_inputs(
            heads=heads, kv_heads=kv_heads, q_length=q_length, k_length=77, head_dim=32, dtype=dtype
        )
        check(q, k, v, causal=True)
        check(q, k, v, pattern=Mask(torch.rand(2, heads, q_length, 77) < 0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_blhd_gives_the_same_bits(dtype):
    q, k, v = attention_inputs(q_length=40, k_length=50, head_dim=16, dtype=dtype)
    out, lse, _ = native(q, k, v)
    turned, turned_lse, _ = native(*(t.transpose(1, 2) for t in (q, k, v)), layout="blhd")
    assert turned.is_contiguous()
    assert torch.equal(turned.transpose(1, 2), out)
    assert torch.equal(turned_lse, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", (0.0, -0.7, 3.0))
def test_scale(dtype, scale):
    q, k, v = attention_inputs(q_length=19, k_length=33, dtype=dtype)
    check(q, k, v, scale=scale, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_are_zero(dtype):
    q, k, v = attention_inputs(q_length=50, k_length=20, dtype=dtype)
    out, lse, _ = check(q, k, v, causal=True)
    assert torch.equal(out[:, :, :30], torch.zeros_like(out[:, :, :30]))
    assert bool((lse[:, :, :30] == -math.inf).all())
    out, lse, _ = check(q, k, v, pattern=Mask(torch.zeros(1, 1, 50, 20, dtype=torch.bool)))
    assert not out.any()
    assert bool((lse == -math.inf).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf), ids=str)
def test_keys_that_nobody_attends_to_may_hold_anything(dtype, poison):
    q, k, v = attention_inputs(q_length=61, k_length=330, dtype=dtype)
    starts, stops = torch.tensor([0, 37], dtype=torch.int32), torch.tensor([301, 290], dtype=torch.int32)
    odd = torch.zeros(1, 1, 1, 330, dtype=torch.bool)
    odd[..., ::3] = True
    for pattern in (Padding(starts, stops), Padding(starts, stops) & Causal(), Mask(odd) & Padding(starts, stops)):
        dead = ~pattern.dense(61, 330).any(2).expand(2, 1, 330)[:, 0]
        poisoned_k, poisoned_v = (t.masked_fill(dead[:, None, :, None], poison) for t in (k, v))
        clean = check(q, k, v, pattern=pattern)
        found = native(q, poisoned_k, poisoned_v, pattern=pattern)
        assert torch.equal(found.out, clean.out)
        assert torch.equal(found.lse, clean.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_thread_count(dtype):
    q, k, v = attention_inputs(heads=6, kv_heads=2, q_length=301, k_length=517, head_dim=40, dtype=dtype)
    before = torch.get_num_threads()
    try:
        for pattern in (Full(), Causal(), Longformer(20, 2)):
            results = []
            for threads in (1, 2, 3, 5, 1):
                torch.set_num_threads(threads)
                results.append(native(q, k, v, pattern=pattern))
            assert all(torch.equal(r.out, results[0].out) and torch.equal(r.lse, results[0].lse) for r in results)
    finally:
        torch.set_num_threads(before)


def test_a_batch_item_does_not_depend_on_its_neighbours():
    q, k, v = attention_inputs(batch=3, heads=4, q_length=130, k_length=300, head_dim=48)
    whole = native(q, k, v, causal=True)
    for item, head in itertools.product(range(3), range(4)):
        part = native(*(t[item : item + 1, head : head + 1] for t in (q, k, v)), causal=True)
        assert torch.equal(part.out[0, 0], whole.out[item, head])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_error_is_no_larger_than_sdpa_s(dtype):
    q, k, v = attention_inputs(batch=1, q_length=400, k_length=400, head_dim=64, dtype=dtype)
    wanted = expected(q, k, v).out.value
    ours = rms(native(q, k, v).out.double() - wanted)
    theirs = rms(torch.nn.functional.scaled_dot_product_attention(q, k, v).double() - wanted)
    assert ours <= 1.3 * theirs


def test_zero_lengths():
    for shape in ((0, 2, 3, 4), (2, 2, 0, 4)):
        q, k, v = torch.randn(shape), torch.randn(shape[0], 2, 5, 4), torch.randn(shape[0], 2, 5, 4)
        assert heedful.attention(q, k, v, backend="native").shape == shape
    q = torch.randn(2, 2, 3, 4)
    out, lse, _ = native(q, torch.randn(2, 2, 0, 4), torch.randn(2, 2, 0, 6))
    assert torch.equal(out, torch.zeros(2, 2, 3, 6))
    assert bool((lse == -math.inf).all())
