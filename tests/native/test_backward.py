"""The engine's gradients against those of the fp64 reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from comparison import check, run
from inputs import DTYPES, MEMORY, all_features, attention_inputs, pattern_examples
from tolerance import expected

from heedful import Causal, Chunked, Full, Longformer, Mask, Padding, SlidingWindow, attention

OUT = ("out",)
EVERYTHING = ("out", "lse", "weights")
LENGTHS = ((1, 1), (1, 3), (3, 1), (13, 113), (113, 239), (239, 113), (25, 1023), (300, 300))
POISON = (math.nan, math.inf, -math.inf)


@pytest.fixture
def threads():
    """Sets the number of torch's threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_length, k_length", LENGTHS)
@pytest.mark.parametrize("pattern", (Full(), Causal(), SlidingWindow(20, 7)), ids=repr)
def test_dense_causal_and_window(dtype, q_length, k_length, pattern):
    for head_dim, value_dim in ((64, 64), (33, 17)):
        q, k, v = attention_inputs(
            heads=2, q_length=q_length, k_length=k_length, head_dim=head_dim, value_dim=value_dim, dtype=dtype
        )
        check(q, k, v, pattern=pattern, through=OUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(pattern_examples(2, 4, 50, 50))))
def test_every_pattern(dtype, index):
    for q_length, k_length in ((113, 300), (270, 130)):
        q, k, v = attention_inputs(kv_heads=2, q_length=q_length, k_length=k_length, head_dim=24, dtype=dtype)
        pattern = pattern_examples(2, 4, q_length, k_length)[index]
        check(q, k, v, pattern=pattern, through=OUT)
        check(q, k, v, pattern=pattern, through=OUT, **all_features(2, 4, q_length, k_length, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("through", (("lse",), ("weights",), ("out", "lse"), EVERYTHING), ids=str)
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_through_every_output(dtype, through, dropout_p):
    q, k, v = attention_inputs(kv_heads=2, q_length=61, k_length=90, head_dim=24, value_dim=40, dtype=dtype)
    for features in ({}, all_features(2, 4, 61, 90, dtype)):
        for pattern in (Full(), Causal(), Causal(offset=-9)):
            check(q, k, v, pattern=pattern, through=through, dropout_p=dropout_p, **features)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", (0.05, 1.0, 20.0, 1e4))
@pytest.mark.parametrize("size", (0.01, 1.0, 30.0))
def test_softcap(dtype, softcap, size):
    q, k, v = attention_inputs(kv_heads=2, q_length=33, k_length=77, head_dim=24, dtype=dtype)
    q, k = (q.double() * math.sqrt(size)).to(dtype), (k.double() * math.sqrt(size)).to(dtype)
    check(q, k, v, softcap=softcap, causal=True, through=OUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("full", tuple(itertools.product((False, True), repeat=4)), ids=str)
def test_bias_of_every_broadcast_shape(dtype, full):
    q, k, v = attention_inputs(kv_heads=2, q_length=29, k_length=37, head_dim=8, dtype=dtype)
    shape = tuple(size if axis else 1 for size, axis in zip((2, 4, 29, 37), full, strict=True))
    for kind, pattern in itertools.product((dtype, torch.float32), (Full(), Causal())):
        bias = torch.randn(shape).masked_fill(torch.rand(shape) < 0.1, -math.inf).to(kind)
        found = check(q, k, v, bias=bias, pattern=pattern, through=OUT)
        assert not found.gradients["bias"][bias == -math.inf].any()
    lying = torch.randn(*shape[:2], shape[3], shape[2]).to(dtype).mT
    check(q, k, v, bias=lying, through=OUT)
    check(q, k, v, bias=lying.expand(2, 4, 29, 37), through=OUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alibi_slopes(dtype):
    for q_length, k_length in ((1, 90), (61, 140), (140, 61)):
        q, k, v = attention_inputs(kv_heads=2, q_length=q_length, k_length=k_length, head_dim=8, dtype=dtype)
        for shape, kind in itertools.product(((4,), (2, 4)), {dtype, torch.float32}):
            slopes = (torch.randn(shape) / 10).to(kind)
            check(q, k, v, alibi_slopes=slopes, causal=True, through=OUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ((0.0, 1.0, -1.0, 3.0), (20.0, 60.0, 0.0, -1e4), (-math.inf, 0.5, -math.inf, 9.0)))
def test_sinks(dtype, values):
    for q_length, k_length in ((1, 1), (13, 300), (90, 40)):
        q, k, v = attention_inputs(kv_heads=2, q_length=q_length, k_length=k_length, dtype=dtype)
        for kind, through in itertools.product({dtype, torch.float32}, (OUT, EVERYTHING)):
            check(q, k, v, sinks=torch.tensor(values).to(kind), causal=True, through=through)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_through_sparse_weights(dtype):
    q, k, v = attention_inputs(kv_heads=2, q_length=30, k_length=50, head_dim=8, dtype=dtype)
    for features in ({}, all_features(2, 4, 30, 50, dtype)):
        check(q, k, v, causal=True, through=EVERYTHING, weights="sparse", **features)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", ((1, 1), (7, 9), (80, 96), (128, 128), (192, 128), (257, 1), (512, 512), (64, 384)))
def test_head_dims(dtype, dims):
    q, k, v = attention_inputs(
        heads=2, kv_heads=1, q_length=37, k_length=70, head_dim=dims[0], value_dim=dims[1], dtype=dtype
    )
    check(q, k, v, causal=True, through=OUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads", ((1, 1), (8, 1), (6, 2), (5, 5), (16, 4)))
@pytest.mark.parametrize("q_length", (1, 5, 16, 31))
def test_grouped_heads(dtype, heads, kv_heads, q_length):
    q, k, v = attention_inputs(heads=heads, kv_heads=kv_heads, q_length=q_length, k_length=77, head_dim=32, dtype=dtype)
    check(q, k, v, causal=True, through=OUT)
    check(q, k, v, pattern=Mask(torch.rand(2, heads, q_length, 77) < 0.3), through=OUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("layout", ("bhld", "blhd"))
def test_strides_of_inputs(dtype, memory, layout):
    sizes = {"kv_heads": 2, "q_length": 29, "k_length": 45, "head_dim": 20, "value_dim": 36}
    q, k, v = attention_inputs(**sizes, dtype=dtype, memory=memory)
    check(q, k, v, pattern=SlidingWindow(11), layout=layout, through=OUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_blhd_tensors_lie_as_they_do(dtype):
    q, k, v = attention_inputs(kv_heads=2, q_length=29, k_length=45, dtype=dtype, memory="blhd")
    found = check(q, k, v, causal=True, through=OUT)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        assert found.gradients[name].stride() == tensor.stride(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_what_arrives(dtype):
    q, k, v = attention_inputs(kv_heads=2, q_length=29, k_length=45, value_dim=24, dtype=dtype)
    shapes = {"out": (2, 4, 29, 24), "lse": (2, 4, 29), "weights": (2, 4, 29, 45)}
    kinds = {"out": dtype, "weights": dtype, "lse": torch.float64 if dtype == torch.float64 else torch.float32}
    for how in ("number", "row", "transposed", "sliced"):
        upstream = {}
        for name, shape in shapes.items():
            if how == "number":
                made = torch.randn(()).expand(shape)
            elif how == "row":
                made = torch.randn(shape[-1]).expand(shape)
            elif how == "transposed":
                made = torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
            else:
                made = torch.randn(*shape[:-1], 3 * shape[-1])[..., 1::3]
            upstream[name] = made.to(kinds[name])
        check(q, k, v, causal=True, through=EVERYTHING, upstream=upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_sum(dtype):
    q, k, v = (t.requires_grad_() for t in attention_inputs(q_length=40, k_length=50, dtype=dtype))
    out = attention(q, k, v, causal=True, backend="native")
    out.sum().backward()
    wanted = expected(q, k, v, causal=True, grad_out=torch.ones_like(out)).gradients
    for name, leaf in (("q", q), ("k", k), ("v", v)):
        wanted[name].check(leaf.grad, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_is_asked_for(dtype):
    q, k, v = attention_inputs(kv_heads=2, q_length=40, k_length=50, dtype=dtype)
    features = all_features(2, 4, 40, 50, dtype)
    whole = check(q, k, v, through=OUT, **features)
    named = {"q": q, "k": k, "v": v} | {n: features[n] for n in ("bias", "alibi_slopes", "sinks")}
    for name in named:
        leaves = {n: t.detach().requires_grad_(n == name) for n, t in named.items()}
        out = attention(
            *(leaves[n] for n in "qkv"),
            **{n: t for n, t in leaves.items() if n not in "qkv"},
            softcap=features["softcap"],
            backend="native",
        )
        (gradient,) = torch.autograd.grad(out, leaves[name], whole.upstream["out"])
        assert torch.equal(gradient, whole.gradients[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_sinks", (False, True))
def test_rows_without_keys(dtype, with_sinks):
    q, k, v = attention_inputs(q_length=50, k_length=20, dtype=dtype)
    sinks = torch.randn(4) if with_sinks else None
    found = check(q, k, v, causal=True, sinks=sinks, through=EVERYTHING)
    assert not found.gradients["q"][:, :, :30].any()
    nothing = Mask(torch.zeros(1, 1, 50, 20, dtype=torch.bool))
    found = check(q, k, v, pattern=nothing, sinks=sinks, through=EVERYTHING)
    assert not any(found.gradients[name].any() for name in "qkv")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("featured", (False, True), ids=("plain", "features"))
def test_what_no_pair_needs_may_hold_anything(dtype, poison, featured):
    """Rows without a key in q and grad_out, and keys that nobody attends to in k and v."""
    q, k, v = attention_inputs(kv_heads=2, q_length=61, k_length=330, dtype=dtype)
    starts, stops = torch.tensor([0, 37], dtype=torch.int32), torch.tensor([301, 290], dtype=torch.int32)
    odd = torch.zeros(1, 1, 61, 330, dtype=torch.bool)
    odd[..., ::3] = True
    odd[:, :, 11] = odd[:, :, 40:45] = False
    features = {"softcap": 4.0, "bias": torch.randn(1, 4, 1, 330), "sinks": torch.randn(4)} if featured else {}
    patterns = (Padding(starts, stops), Padding(starts, stops) & Causal(offset=-5), Mask(odd) & Padding(starts, stops))
    for pattern in patterns:
        seen = pattern.dense(61, 330).expand(2, 1, 61, 330)
        dead_key, dead_row = ~seen.any(2)[:, 0, :, None].unsqueeze(1), ~seen.any(3)[..., None]
        upstream = {"out": torch.randn(2, 4, 61, 16).to(dtype), "lse": torch.randn(2, 4, 61)}
        upstream["lse"] = upstream["lse"].to(torch.float64 if dtype == torch.float64 else torch.float32)
        clean = check(q, k, v, pattern=pattern, through=("out", "lse"), upstream=upstream, **features)
        poisoned = {"out": upstream["out"].masked_fill(dead_row, poison), "lse": upstream["lse"]}
        tensors = q.masked_fill(dead_row, poison), k.masked_fill(dead_key, poison), v.masked_fill(dead_key, poison)
        found = run(*tensors, pattern=pattern, through=("out", "lse"), upstream=poisoned, **features)
        for name, gradient in found.gradients.items():
            assert torch.equal(gradient, clean.gradients[name]), name
        assert not found.gradients["q"].masked_select(dead_row).any()
        assert not any(found.gradients[name].masked_select(dead_key).any() for name in "kv")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", POISON, ids=str)
def test_keys_whose_bias_is_minus_infinity_may_hold_anything(dtype, poison):
    q, k, v = attention_inputs(kv_heads=2, q_length=30, k_length=133, dtype=dtype)
    bias = torch.randn(2, 1, 30, 133).to(dtype)
    bias[0, :, :, 3::7] = bias[1, :, :, 100:] = bias[1, :, 9] = -math.inf
    dead = (bias == -math.inf).all(2).all(1)[:, None, :, None]
    dead_row = (bias == -math.inf).all(3, keepdim=True)
    upstream = {"out": torch.randn(2, 4, 30, 16).to(dtype)}
    clean = check(q, k, v, bias=bias, through=OUT, upstream=upstream)
    tensors = q.masked_fill(dead_row, poison), k.masked_fill(dead, poison), v.masked_fill(dead, poison)
    upstream = {"out": upstream["out"].masked_fill(dead_row, poison)}
    found = run(*tensors, bias=bias, through=OUT, upstream=upstream)
    for name, gradient in found.gradients.items():
        assert torch.equal(gradient, clean.gradients[name]), name
    assert not any(found.gradients[name].masked_select(dead).any() for name in "kv")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_thread_count(dtype, threads):
    for heads, kv_heads in ((6, 2), (1, 1)):
        q, k, v = attention_inputs(
            batch=1, heads=heads, kv_heads=kv_heads, q_length=301, k_length=517, head_dim=40, dtype=dtype
        )
        features = all_features(1, heads, 301, 517, dtype)
        for pattern, options in (
            (Full(), {}),
            (Causal(), {}),
            (Longformer(20, 2), {}),
            (Causal(), features),
            (Full(), {"dropout_p": 0.2}),
        ):
            upstream = {"out": torch.randn(1, heads, 301, 40).to(dtype)}
            results = []
            for count in (1, 2, 3, 5, 1):
                threads(count)
                torch.manual_seed(5)
                results.append(run(q, k, v, pattern=pattern, through=OUT, upstream=upstream, **options).gradients)
            for found, name in itertools.product(results[1:], results[0]):
                assert torch.equal(found[name], results[0][name]), (pattern, name)


def test_sums_over_all_rows_have_the_same_bits_for_any_thread_count(threads):
    # Long enough that torch's own sums over them would be split by thread.
    q, k, v = attention_inputs(batch=1, heads=1, q_length=80_001, k_length=3, head_dim=2)
    tensors = {"sinks": torch.randn(1), "alibi_slopes": torch.rand(1) / 1e5, "bias": torch.randn(1, 1, 1, 1)}
    upstream = {"out": torch.randn(1, 1, 80_001, 2)}
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(check(q, k, v, through=OUT, upstream=upstream, **tensors).gradients)
    for found, name in itertools.product(results[1:], results[0]):
        assert torch.equal(found[name], results[0][name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_item_does_not_depend_on_its_neighbours(dtype):
    q, k, v = attention_inputs(batch=3, heads=4, kv_heads=2, q_length=130, k_length=200, head_dim=48, dtype=dtype)
    bias = torch.randn(3, 4, 130, 200).to(dtype)
    upstream = torch.randn(3, 4, 130, 48).to(dtype)
    whole = run(q, k, v, causal=True, bias=bias, through=OUT, upstream={"out": upstream}).gradients
    for item, group in itertools.product(range(3), range(2)):
        heads, kv = slice(2 * group, 2 * group + 2), slice(group, group + 1)
        one = slice(item, item + 1)
        part = run(
            q[one, heads], k[one, kv], v[one, kv], causal=True, bias=bias[one, heads], through=OUT,
            upstream={"out": upstream[one, heads]},
        ).gradients  # fmt: skip
        for name, where in (("q", heads), ("k", kv), ("v", kv), ("bias", heads)):
            assert torch.equal(part[name], whole[name][one, where]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_run_after_run_gives_the_same_bits(dtype):
    q, k, v = attention_inputs(batch=1, heads=2, q_length=200, k_length=200, head_dim=32, dtype=dtype)
    upstream = {"out": torch.randn(1, 2, 200, 32).to(dtype)}
    first = run(q, k, v, pattern=Chunked(70), through=OUT, upstream=upstream).gradients
    for _ in range(5):
        again = run(q, k, v, pattern=Chunked(70), through=OUT, upstream=upstream).gradients
        assert all(torch.equal(again[name], first[name]) for name in first)
