"""What the engine does to scores before the softmax, and to weights after it: one feature at a time, then together."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from comparison import check, run
from inputs import DTYPES, MEMORY, all_features, attention_inputs, pattern_examples
from torch import Tensor

from heedful import Causal, Chunked, Documents, Full, Mask, Padding, SlidingWindow, UnsupportedError

POISON = (math.nan, math.inf, -math.inf)
# Of an lse that should be a sink, which the engine keeps as a power of 2.
ROUNDED = {dtype: 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", (0.01, 1.0, 20.0, 50.0, 1e4))
@pytest.mark.parametrize("size", (1.0, 30.0, 1e4))
def test_softcap(dtype, softcap, size):
    q, k, v = attention_inputs(kv_heads=2, q_length=33, k_length=77, head_dim=24, dtype=dtype)
    q, k = (q.double() * math.sqrt(size)).to(dtype), (k.double() * math.sqrt(size)).to(dtype)
    check(q, k, v, softcap=softcap, causal=True, weights=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (1e-30, 1e-5, 1e-2))
def test_softcap_of_tiny_scores_is_relatively_precise(dtype, size):
    # An error of tanh that is absolute, times a softcap of 1e4, would move every score by more than its size.
    q, k, v = attention_inputs(q_length=9, k_length=50, head_dim=8, dtype=dtype)
    check(q, k, v, softcap=1e4, scale=size, weights=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_of_infinite_scores_is_the_cap(dtype):
    q = torch.ones(1, 1, 2, 1, dtype=dtype)
    k = torch.tensor([math.inf, 0.0, -math.inf], dtype=dtype).view(1, 1, 3, 1)
    v = torch.eye(3, dtype=dtype).view(1, 1, 3, 3)
    wanted = torch.tensor([2.0, 0.0, -2.0], dtype=torch.float64).softmax(0)
    found = run(q, k, v, softcap=2.0)
    torch.testing.assert_close(found.out[0, 0, 0].double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


def stored(shape: tuple[int, ...], whole: tuple[int, ...], dtype: torch.dtype, memory: str) -> Tensor:
    """Normal values with one in ten -inf, which broadcast to `whole` and lie in memory as said."""
    if memory == "transposed":
        values = torch.randn(*shape[:2], shape[3], shape[2]).mT
    elif memory == "strided":
        values = torch.randn(*shape[:3], 3 * shape[3])[..., ::3]
    else:
        values = torch.randn(shape)
    values = values.to(dtype)
    values.masked_fill_(torch.rand(shape) < 0.1, -math.inf)
    return values.expand(whole) if memory == "expanded" else values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("full", tuple(itertools.product((False, True), repeat=4)), ids=str)
def test_bias_of_every_broadcast_shape(dtype, full):
    q, k, v = attention_inputs(kv_heads=2, q_length=13, k_length=37, head_dim=8, dtype=dtype)
    whole = (2, 4, 13, 37)
    shape = tuple(size if axis else 1 for size, axis in zip(whole, full, strict=True))
    for kind, memory in itertools.product({dtype, torch.float32}, ("contiguous", "transposed", "strided", "expanded")):
        bias = stored(shape, whole, kind, memory)
        for pattern in (Full(), Causal()):
            check(q, k, v, bias=bias, pattern=pattern)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", (Full(), Causal(), SlidingWindow(90), Chunked(100)), ids=repr)
def test_bias_over_many_tiles(dtype, pattern):
    q, k, v = attention_inputs(heads=2, kv_heads=1, q_length=150, k_length=601, head_dim=16, dtype=dtype)
    for shape in ((1, 2, 150, 601), (2, 1, 1, 601), (1, 2, 150, 1)):
        check(q, k, v, bias=stored(shape, (2, 2, 150, 601), dtype, "contiguous"), pattern=pattern)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_of_fewer_dimensions(dtype):
    q, k, v = attention_inputs(q_length=9, k_length=11, dtype=dtype)
    for shape in ((), (11,), (9, 1), (4, 1, 11)):
        check(q, k, v, bias=torch.randn(shape).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_sinks", (False, True))
def test_rows_whose_bias_is_minus_infinity_have_no_key(dtype, with_sinks):
    q, k, v = attention_inputs(q_length=40, k_length=300, dtype=dtype)
    sinks = torch.randn(4) if with_sinks else None
    bias = torch.randn(2, 1, 40, 300).to(dtype)
    bias[0, 0, 5] = bias[1, 0, 30:] = -math.inf
    # Until the last block of keys every score of this row is -inf.
    bias[0, 0, 6, :290] = -math.inf
    q[0, :, 5] = math.nan
    q[1, :, 30:] = math.inf
    found = check(q, k, v, bias=bias, sinks=sinks, weights=True)
    for rows in (found.out[0, :, 5], found.out[1, :, 30:], found.weights[0, :, 5], found.weights[1, :, 30:]):
        assert not rows.any()
    wanted = torch.full((4, 10), -math.inf) if sinks is None else sinks[:, None].expand(4, 10)
    torch.testing.assert_close(found.lse[1, :, 30:], wanted.to(found.lse.dtype), rtol=ROUNDED[dtype], atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", POISON, ids=str)
def test_keys_whose_bias_is_minus_infinity_may_hold_anything(dtype, poison):
    q, k, v = attention_inputs(kv_heads=2, q_length=30, k_length=333, dtype=dtype)
    for shape in ((1, 1, 1, 333), (2, 1, 1, 333), (2, 4, 30, 333), (1, 1, 30, 333)):
        bias = torch.randn(shape).to(dtype)
        bias[0, :, :, 3::7] = -math.inf
        bias[-1, :, :, 270:] = -math.inf
        dead = (bias == -math.inf).all(2).all(1).expand(2, 333)[:, None, :, None]
        for options in ({}, {"pattern": Causal(), "softcap": 3.0, "sinks": torch.randn(4)}):
            clean = check(q, k, v, bias=bias, weights=True, **options)
            found = run(q, k.masked_fill(dead, poison), v.masked_fill(dead, poison), bias=bias, weights=True, **options)
            assert all(torch.equal(getattr(found, name), getattr(clean, name)) for name in ("out", "lse", "weights"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", ((1, 1), (1, 300), (3, 1), (113, 300), (270, 130)), ids=str)
def test_alibi(dtype, lengths):
    q, k, v = attention_inputs(kv_heads=2, q_length=lengths[0], k_length=lengths[1], head_dim=8, dtype=dtype)
    for shape, kind in itertools.product(((4,), (2, 4)), {dtype, torch.float32}):
        slopes = torch.rand(shape).to(kind)
        for pattern in (Full(), Causal(), SlidingWindow(40, 9, offset=1)):
            check(q, k, v, alibi_slopes=slopes, pattern=pattern)


def test_alibi_slopes_of_any_sign_and_stride():
    q, k, v = attention_inputs(q_length=20, k_length=31)
    check(q, k, v, alibi_slopes=torch.randn(4, 2).T)
    check(q, k, v, alibi_slopes=torch.randn(2, 1).expand(2, 4))
    check(q, k, v, alibi_slopes=torch.zeros(4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "values", ((0.0, 1.0, -1.0, 3.0), (30.0, 1e4, 80.0, -1e4), (-math.inf, 0.5, -math.inf, -200.0)), ids=str
)
def test_sinks(dtype, values):
    for q_length, k_length in ((1, 1), (13, 300), (90, 40)):
        q, k, v = attention_inputs(kv_heads=2, q_length=q_length, k_length=k_length, dtype=dtype)
        for kind in {dtype, torch.float32}:
            for pattern in (Full(), Causal(), SlidingWindow(3, 0)):
                check(q, k, v, sinks=torch.tensor(values).to(kind), pattern=pattern, weights=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_have_the_sink_as_lse(dtype):
    q, k, v = attention_inputs(q_length=50, k_length=20, dtype=dtype)
    sinks = torch.tensor([0.3, -math.inf, 1e4, -7.0])
    for pattern in (Causal(), Mask(torch.zeros(1, 1, 50, 20, dtype=torch.bool))):
        found = check(q, k, v, pattern=pattern, sinks=sinks)
        assert not found.out[:, :, :30].any()
        wanted = sinks.view(1, 4, 1).expand(2, 4, 30).to(found.lse.dtype)
        torch.testing.assert_close(found.lse[:, :, :30], wanted, rtol=ROUNDED[dtype], atol=0)


def test_sinks_of_any_stride():
    q, k, v = attention_inputs()
    check(q, k, v, sinks=torch.randn(8)[::2])
    check(q, k, v, sinks=torch.randn(1).expand(4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", (0.1, 0.9))
@pytest.mark.parametrize("pattern", (Full(), Causal(), SlidingWindow(30, 3)), ids=repr)
def test_dropout_draws_the_mask_of_the_reference(dtype, dropout_p, pattern):
    q, k, v = attention_inputs(kv_heads=2, q_length=37, k_length=330, head_dim=8, dtype=dtype)
    found = check(q, k, v, dropout_p=dropout_p, pattern=pattern, weights=True)
    seen = pattern.dense(37, 330).expand(2, 4, -1, -1)
    assert torch.equal(found.weights != 0, seen & (found.kept != 0))
    # The identity as values shows the weights that the output was made with.
    eye = torch.eye(330, dtype=dtype).expand(2, 2, -1, -1)
    found = check(q, k, eye, dropout_p=dropout_p, pattern=pattern)
    assert torch.equal(found.out != 0, seen & (found.kept != 0))
    assert abs(float((found.kept != 0).double().mean()) - 1 + dropout_p) < 0.01


def test_dropout_is_the_same_for_any_thread_count_and_another_for_another_seed():
    q, k, v = attention_inputs(q_length=70, k_length=300, head_dim=8)
    before = torch.get_num_threads()
    try:
        results = []
        for threads, seed in ((1, 0), (2, 0), (3, 0), (1, 1)):
            torch.set_num_threads(threads)
            torch.manual_seed(seed)
            results.append(run(q, k, v, dropout_p=0.4, weights=True))
    finally:
        torch.set_num_threads(before)
    first, *same, other = results
    assert all(torch.equal(r.out, first.out) and torch.equal(r.weights, first.weights) for r in same)
    assert not torch.equal(other.weights != 0, first.weights != 0)


def test_dropout_leaves_the_lse_alone():
    q, k, v = attention_inputs(q_length=40, k_length=90)
    assert torch.equal(run(q, k, v, dropout_p=0.5, causal=True).lse, run(q, k, v, causal=True).lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(pattern_examples(2, 4, 50, 50))))
def test_weights_dense_and_sparse(dtype, index):
    for q_length, k_length in ((61, 100), (90, 45)):
        q, k, v = attention_inputs(kv_heads=2, q_length=q_length, k_length=k_length, head_dim=8, dtype=dtype)
        pattern = pattern_examples(2, 4, q_length, k_length)[index]
        seen = pattern.dense(q_length, k_length).expand(2, 4, -1, -1)
        dense = check(q, k, v, pattern=pattern, weights=True).weights
        assert not dense[~seen].any()
        sparse = run(q, k, v, pattern=pattern, weights="sparse").weights
        assert sparse.is_coalesced()
        assert sparse.shape == dense.shape
        assert torch.equal(sparse.indices(), seen.nonzero().T)
        assert torch.equal(sparse.values(), dense[seen])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_weights_with_every_feature(dtype):
    q, k, v = attention_inputs(kv_heads=2, q_length=45, k_length=70, head_dim=8, dtype=dtype)
    features = all_features(2, 4, 45, 70, dtype)
    seen = Causal().dense(45, 70) & (features["bias"] != -math.inf)
    seen = seen.expand(2, 4, -1, -1)
    for dropout_p in (0.0, 0.5):
        torch.manual_seed(3)
        dense = check(q, k, v, causal=True, weights=True, dropout_p=dropout_p, **features).weights
        torch.manual_seed(3)
        sparse = check(q, k, v, causal=True, weights="sparse", dropout_p=dropout_p, **features).weights
        assert torch.equal(sparse.indices(), seen.nonzero().T)
        assert torch.equal(sparse.values(), dense[seen])


@pytest.mark.parametrize("memory", MEMORY)
def test_weights_of_strided_inputs(memory):
    sizes = {"kv_heads": 2, "q_length": 29, "k_length": 45, "head_dim": 20, "value_dim": 36}
    q, k, v = attention_inputs(**sizes, memory=memory)
    check(q, k, v, weights=True, causal=True, layout="blhd")


def test_weights_where_no_pair_counts():
    q, k, v = attention_inputs(q_length=5, k_length=6)
    nothing = Mask(torch.zeros(1, 1, 5, 6, dtype=torch.bool))
    assert not run(q, k, v, pattern=nothing, weights=True).weights.any()
    sparse = run(q, k, v, pattern=nothing, weights="sparse").weights
    assert sparse.shape == (2, 4, 5, 6)
    assert sparse.values().numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "dims", ((192, 128), (320, 96), (512, 512), (1, 512), (511, 1), (257, 300), (128, 384)), ids=str
)
def test_head_dims_up_to_512(dtype, dims):
    q, k, v = attention_inputs(
        kv_heads=2, q_length=19, k_length=70, head_dim=dims[0], value_dim=dims[1], dtype=dtype
    )  # fmt: skip
    check(q, k, v, causal=True)
    check(q, k, v, **all_features(2, 4, 19, 70, dtype), pattern=SlidingWindow(30), weights=True)


def test_head_dims_above_512_are_refused():
    for dims in ((513, 8), (8, 513)):
        q, k, v = attention_inputs(head_dim=dims[0], value_dim=dims[1])
        with pytest.raises(UnsupportedError, match="512"):
            run(q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(pattern_examples(2, 4, 50, 50))))
def test_all_features_on_every_pattern(dtype, index):
    for q_length, k_length in ((67, 290), (130, 75)):
        q, k, v = attention_inputs(
            kv_heads=2, q_length=q_length, k_length=k_length, head_dim=24, value_dim=40, dtype=dtype
        )
        features = all_features(2, 4, q_length, k_length, dtype)
        pattern = pattern_examples(2, 4, q_length, k_length)[index]
        check(q, k, v, pattern=pattern, **features)
        check(q, k, v, pattern=pattern, **features, dropout_p=0.2, layout="blhd")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads", ((1, 1), (8, 1), (6, 2), (5, 5)))
@pytest.mark.parametrize("q_length", (1, 3, 16, 31))
def test_all_features_with_grouped_heads(dtype, heads, kv_heads, q_length):
    q, k, v = attention_inputs(
        heads=heads, kv_heads=kv_heads, q_length=q_length, k_length=77, head_dim=32, dtype=dtype
    )  # fmt: skip
    check(q, k, v, causal=True, dropout_p=0.3, weights=True, **all_features(2, heads, q_length, 77, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", MEMORY)
def test_all_features_on_strided_inputs(dtype, memory):
    sizes = {"kv_heads": 2, "q_length": 29, "k_length": 45, "head_dim": 20, "value_dim": 36}
    q, k, v = attention_inputs(**sizes, dtype=dtype, memory=memory)
    features = all_features(2, 4, 29, 45, dtype)
    found = [check(q, k, v, pattern=SlidingWindow(11), layout=layout, **features) for layout in ("bhld", "blhd")]
    assert torch.equal(found[0].out, found[1].out)


def test_all_features_in_documents_and_padding():
    q, k, v = attention_inputs(q_length=60, k_length=60)
    cu = torch.tensor([0, 7, 7, 40, 60], dtype=torch.int32)
    ends = torch.tensor([31, 55], dtype=torch.int32)
    for pattern in (Documents(cu, within=Causal()), Documents(cu) & Padding(0, ends), Padding(3, ends) | Causal()):
        check(q, k, v, pattern=pattern, **all_features(2, 4, 60, 60, torch.float32), dropout_p=0.1, weights=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_features_give_the_same_bits_for_any_thread_count_and_neighbours(dtype):
    q, k, v = attention_inputs(heads=6, kv_heads=2, q_length=131, k_length=517, head_dim=40, dtype=dtype)
    features = all_features(2, 6, 131, 517, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(q, k, v, causal=True, **features))
    finally:
        torch.set_num_threads(before)
    first = results[0]
    assert all(torch.equal(r.out, first.out) and torch.equal(r.lse, first.lse) for r in results)
    for item in range(2):
        part = {name: t[item : item + 1] if name in ("bias", "alibi_slopes") else t for name, t in features.items()}
        alone = run(*(t[item : item + 1] for t in (q, k, v)), causal=True, **part)
        assert torch.equal(alone.out[0], first.out[item])
