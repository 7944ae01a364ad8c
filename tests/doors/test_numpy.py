"""heedful.numpy.attention against the fp64 reference: layouts, dtypes, strides, features, patterns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inputs import pattern_examples
from numpy_arrays import MEMORY, array, check, in_torch, wanted

import heedful
from heedful.numpy import Attention, Context, attention, last_call
from heedful.patterns.base import And, Or, Pattern

DTYPES = ("float32", "float16", "float64")


@pytest.fixture(autouse=True)
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def twice(q, k, v, **options: object) -> Attention:
    """The call when it is new and when it is known, which must be the same."""
    first = attention(q, k, v, return_lse=True, **options)
    again = attention(q, k, v, return_lse=True, **options)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    bare = [attention(q, k, v, **options) for _ in range(2)]
    for out in bare:
        np.testing.assert_array_equal(out, first.out)
        assert out.shape == (*q.shape[:-1], v.shape[-1])
    return first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("q_shape", "kv_shape", "value_dim"),
    [
        ((1, 1), (1, 1), 1),
        ((3, 8), (7, 8), 8),
        ((113, 64), (239, 64), 33),
        ((1, 8, 8), (1, 8, 8), 8),
        ((5, 6, 16), (239, 2, 16), 16),
        ((113, 4, 40), (113, 1, 40), 24),
        ((2, 3, 4, 16), (2, 113, 2, 16), 16),
        ((3, 113, 2, 64), (3, 113, 2, 64), 64),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_layouts_and_lengths(rng, dtype, q_shape, kv_shape, value_dim, causal):
    q, k, v = (array(rng, shape, dtype) for shape in (q_shape, kv_shape, (*kv_shape[:-1], value_dim)))
    found = twice(q, k, v, causal=causal)
    assert last_call().zero_copy
    assert found.out.dtype == dtype
    assert found.out.flags.c_contiguous
    assert found.lse.dtype == ("float64" if dtype == "float64" else "float32")
    heads = q.shape[-2:-1] if q.ndim > 2 else ()
    assert found.lse.shape == (*q.shape[:-3], *heads, q.shape[0] if q.ndim < 4 else q.shape[1])
    check(found, wanted(q, k, v, causal=causal))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("shape", [(17, 24), (17, 4, 24), (2, 17, 4, 24)], ids=str)
def test_strides(rng, memory, shape):
    for dtype in DTYPES:
        q, k, v = (array(rng, shape, dtype, memory) for _ in range(3))
        found = twice(q, k, v, causal=True)
        assert last_call().zero_copy
        check(found, wanted(q, k, v, causal=True))


@pytest.mark.parametrize("memory", MEMORY[1:])
def test_strides_of_one_of_three(rng, memory):
    plain = [array(rng, (17, 4, 24)) for _ in range(3)]
    for place in range(3):
        inputs = list(plain)
        inputs[place] = array(rng, (17, 4, 24), memory=memory)
        same = list(plain)
        same[place] = inputs[place].copy()
        for _ in range(2):
            np.testing.assert_array_equal(attention(*inputs), attention(*same))


@pytest.mark.parametrize("memory", ["contiguous", "bhsd", "sliced", "last-strided", "reversed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out(rng, memory, dtype):
    q, k, v = (array(rng, (2, 17, 4, 24), dtype) for _ in range(3))
    plain = attention(q, k, v)
    for _ in range(2):
        out = array(rng, q.shape, dtype, memory)
        out[...] = np.nan
        around = None if out.base is None else out.base.copy()
        assert attention(q, k, v, out=out) is out
        assert last_call().zero_copy
        np.testing.assert_array_equal(out, plain)
        out[...] = np.nan
        if around is not None:
            np.testing.assert_array_equal(out.base, around)


def test_features_together(rng):
    q, k, v = (array(rng, (2, 19, 4, 16)) for _ in range(3))
    k, v = k[:, :, :2], v[:, :, :2]
    bias = array(rng, (2, 1, 19, 19))
    bias[0, :, 3] = -np.inf
    bias[:, :, :, 5] = -np.inf
    options = {"softcap": 3.0, "alibi_slopes": rng.random(4, np.float32), "sinks": array(rng, (4,))}
    for _ in range(2):
        found = attention(
            q, k, v, attn_mask=bias, softmax_scale=0.3, causal=True, return_lse=True, return_weights=True, **options
        )
        assert last_call().zero_copy
        check(found, wanted(q, k, v, bias=bias, scale=0.3, causal=True, **options))
        assert found.weights.shape == (2, 4, 19, 19)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (13,), (11, 1), (11, 13), (4, 11, 13), (4, 1, 13), (3, 1, 11, 13)], ids=str)
def test_masks_broadcast(rng, dtype, shape):
    q, k, v = array(rng, (3, 11, 4, 8), dtype), array(rng, (3, 13, 4, 8), dtype), array(rng, (3, 13, 4, 8), dtype)
    mask = np.asarray(rng.random(shape) < 0.6)
    found = twice(q, k, v, attn_mask=mask)
    assert last_call().zero_copy
    check(found, wanted(q, k, v, pattern=mask))
    added = rng.standard_normal(shape).astype(dtype)
    check(twice(q, k, v, attn_mask=added), wanted(q, k, v, bias=added))
    assert last_call().zero_copy


def test_masks_of_two_dimensional_calls(rng):
    q, k, v = (array(rng, (9, 8)) for _ in range(3))
    mask = rng.random((9, 9)) < 0.5
    found = attention(q, k, v, attn_mask=mask, return_lse=True, return_weights=True)
    check(found, wanted(q, k, v, pattern=mask))
    assert found.lse.shape == (9,)
    assert found.weights.shape == (9, 9)


def test_masks_are_read_at_each_call(rng):
    q, k, v = (array(rng, (9, 2, 8)) for _ in range(3))
    for _ in range(3):
        mask = rng.random((9, 9)) < 0.5
        check(attention(q, k, v, attn_mask=mask, return_lse=True), wanted(q, k, v, pattern=mask))
        mask[:, ::2] = False
        check(attention(q, k, v, attn_mask=mask, return_lse=True), wanted(q, k, v, pattern=mask))
        stop = np.array([rng.integers(1, 9)])
        check(
            attention(q, k, v, pattern=heedful.Padding(0, stop), return_lse=True),
            wanted(q, k, v, pattern=heedful.Padding(0, torch.from_numpy(stop))),
        )


def test_numpys_own_floats_as_masks(rng):
    q, k, v = (array(rng, (7, 2, 8)) for _ in range(3))
    causal = np.tril(np.ones((7, 7), bool))
    found = attention(q, k, v, attn_mask=np.where(causal, 0, -np.inf), return_lse=True)
    check(found, wanted(q, k, v, pattern=causal))
    assert dict(last_call().copied) == {"attn_mask": "cast from float64 to float32"}
    slopes = np.linspace(0, 1, 2)
    check(attention(q, k, v, alibi_slopes=slopes, return_lse=True), wanted(q, k, v, alibi_slopes=slopes))
    assert list(last_call().copied) == ["alibi_slopes"]


@pytest.mark.parametrize(
    ("window", "pattern"),
    [
        (3, heedful.SlidingWindow(3)),
        (np.int64(0), heedful.SlidingWindow(0)),
        ((4, 0), heedful.SlidingWindow(4, 0)),
        ((None, 2), heedful.SlidingWindow(None, 2)),
        ([1, None], heedful.SlidingWindow(1, None)),
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
def test_windows(rng, window, pattern, causal):
    q, k, v = array(rng, (15, 2, 8)), array(rng, (23, 2, 8)), array(rng, (23, 2, 8))
    check(twice(q, k, v, window=window, causal=causal), wanted(q, k, v, pattern=pattern, causal=causal))


def in_numpy(pattern: Pattern) -> Pattern:
    """The pattern made of numpy arrays where it has tensors."""
    if isinstance(pattern, And | Or):
        return type(pattern)(*map(in_numpy, pattern.parts))
    arguments = [
        value.numpy() if isinstance(value, torch.Tensor) else in_numpy(value) if isinstance(value, Pattern) else value
        for value in pattern.arguments
    ]
    return type(pattern)(*arguments)


@pytest.mark.parametrize("index", range(len(pattern_examples(2, 4, 40, 57))))
def test_every_pattern(rng, index):
    pattern = pattern_examples(2, 4, 40, 57)[index]
    q, k, v = array(rng, (2, 40, 4, 16)), array(rng, (2, 57, 2, 16)), array(rng, (2, 57, 2, 16))
    reference = wanted(q, k, v, pattern=pattern)
    for one in (pattern, in_numpy(pattern)):
        check(twice(q, k, v, pattern=one), reference)
        assert last_call().zero_copy
    mask = rng.random((40, 57)) < 0.7
    found = twice(q, k, v, pattern=in_numpy(pattern), attn_mask=mask, causal=True, window=30)
    both = pattern & heedful.Mask(torch.from_numpy(mask)) & heedful.SlidingWindow(30)
    check(found, wanted(q, k, v, pattern=both, causal=True))


def test_documents_that_end_elsewhere(rng):
    q, k, v = (array(rng, (8, 2, 8)) for _ in range(3))
    for end in (8, 8, 9, 7):
        pattern = heedful.Documents(np.array([0, 3, end]))
        if end == 8:
            check(attention(q, k, v, pattern=pattern, return_lse=True), wanted(q, k, v, pattern=pattern))
        else:
            with pytest.raises(ValueError, match=f"cu_q takes a last element equal to q_length, 8 here, got {end}"):
                attention(q, k, v, pattern=pattern, return_lse=True)


def test_documents_around_a_mask(rng):
    q, k, v = (array(rng, (8, 2, 8)) for _ in range(3))
    mask = np.array([[True, False], [True, True]])
    pattern = heedful.Documents(np.array([0, 2, 4, 6, 8]), within=heedful.Mask(mask))
    check(twice(q, k, v, pattern=pattern), wanted(q, k, v, pattern=np.kron(np.eye(4, dtype=bool), mask)))


def test_a_bool_array_is_a_pattern(rng):
    q, k, v = (array(rng, (8, 2, 8)) for _ in range(3))
    mask = rng.random((8, 8)) < 0.5
    check(twice(q, k, v, pattern=mask), wanted(q, k, v, pattern=mask))
    check(twice(q, k, v, pattern=torch.from_numpy(mask)), wanted(q, k, v, pattern=mask))


def test_patterns_of_arrays_serve_torch_too(rng):
    q, k, v = (torch.from_numpy(rng.standard_normal((2, 4, 40, 16), np.float32)) for _ in range(3))
    for pattern in pattern_examples(2, 4, 40, 40):
        own = in_numpy(pattern)
        assert own == pattern
        assert own.key is pattern.key
        assert torch.equal(own.dense(40, 40), pattern.dense(40, 40))
        assert own.density(40, 40) == pattern.density(40, 40)
        for _ in range(2):
            assert torch.equal(heedful.attention(q, k, v, pattern=own), heedful.attention(q, k, v, pattern=pattern))


def test_rows_without_keys(rng):
    q, k, v = array(rng, (5, 2, 8)), array(rng, (3, 2, 8)), array(rng, (3, 2, 8))
    found = twice(q, k, v, causal=True)
    assert (found.out[:2] == 0).all()
    assert (found.lse[:, :2] == -np.inf).all()
    assert np.isfinite(found.lse[:, 2:]).all()
    sinks = np.array([0.5, -1], np.float32)
    found = twice(q, k, v, causal=True, sinks=sinks)
    np.testing.assert_array_equal(found.lse[:, :2], np.repeat(sinks[:, None], 2, 1))


@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [((0, 8), (3, 8)), ((3, 8), (0, 8)), ((0, 3, 2, 8), (0, 4, 2, 8)), ((0, 8), (0, 8))],
    ids=str,
)
def test_nothing_to_compute(q_shape, k_shape):
    q, k = np.ones(q_shape, np.float32), np.ones(k_shape, np.float32)
    found = twice(q, k, k)
    assert (found.out == 0).all()
    assert (found.lse == -np.inf).all()


def test_what_is_masked_may_be_nan(rng):
    q, k, v = (array(rng, (2, 9, 2, 8)) for _ in range(3))
    found = attention(q, k, v, pattern=heedful.Padding(0, np.array([9, 6])), return_lse=True)
    check(found, wanted(q, k, v, pattern=heedful.Padding(0, torch.tensor([9, 6]))))
    plain = found.out
    k[1, 6:] = v[1, 6:] = np.nan
    np.testing.assert_array_equal(attention(q, k, v, pattern=heedful.Padding(0, np.array([9, 6]))), plain)


def test_any_number_of_threads_gives_the_same_bits(rng):
    q, k, v = (array(rng, (2, 113, 4, 16)) for _ in range(3))
    results = []
    for threads in (1, 2, 3, 7):
        with Context(threads) as context:
            results.append(context.attention(q, k, v, causal=True))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    same = heedful.attention(in_torch(q), in_torch(k), in_torch(v), causal=True, backend="native")
    np.testing.assert_array_equal(same.transpose(1, 2).numpy(), results[0])
