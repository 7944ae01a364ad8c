"""Every backend against the reference, within the bound that rounding allows."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import MEMORY, attention_inputs
from tolerance import expected, rms

from heedful import (
    BigBird,
    BlockSparse,
    Causal,
    Chunked,
    Dilated,
    Documents,
    Full,
    Global,
    Longformer,
    Mask,
    Padding,
    Prefix,
    SlidingWindow,
    attention,
    explain,
)
from heedful.backend.sdpa import lower

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["native", "sdpa"]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """torch.empty gives NaN, so that what a backend leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(backend: str, q, k, v, **options):
    """The call on this backend; a test of what the backend says it cannot do is skipped."""
    explanation = explain(q, k, v, backend=backend, **options)
    if explanation.backend is None:
        pytest.skip(f"{backend} {'; '.join(explanation.reasons[backend])}")
    return attention(q, k, v, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "heads": 1, "q_length": 1, "k_length": 1, "head_dim": 1},
        {"q_length": 3, "k_length": 3, "head_dim": 8},
        {"q_length": 1, "k_length": 239, "kv_heads": 2, "head_dim": 64},
        {"batch": 1, "q_length": 113, "k_length": 239, "kv_heads": 1, "head_dim": 80},
        {"batch": 1, "q_length": 239, "k_length": 113, "head_dim": 32, "value_dim": 40},
        {"batch": 1, "heads": 2, "q_length": 300, "k_length": 300, "head_dim": 128, "value_dim": 64},
        {"batch": 1, "heads": 1, "q_length": 1023, "k_length": 1023, "head_dim": 33},
    ],
    ids=lambda sizes: "x".join(str(n) for n in sizes.values()),
)
def test_shapes_and_dtypes(backend, dtype, causal, sizes) -> None:
    q, k, v = attention_inputs(**sizes, dtype=dtype)
    want = expected(q, k, v, causal=causal)
    out = run(backend, q, k, v, causal=causal)
    assert out.dtype == dtype
    want.out.check(out)


def patterns(q_length: int, k_length: int):
    yield Full()
    yield Causal()
    yield Causal(0)
    yield Causal(5)
    yield Causal(torch.tensor([-3, k_length // 2]))
    yield SlidingWindow(9)
    yield SlidingWindow(4, 0)
    yield SlidingWindow(0, 7, offset=0)
    yield SlidingWindow(None, 3)
    yield Dilated(5, 3)
    yield Chunked(16)
    yield Prefix(11) & Causal()
    yield Global(3)
    yield Global([0, q_length // 2])
    yield Longformer(4, 2)
    yield BigBird(8, 3, 1, 1, seed=3)
    yield BlockSparse(torch.rand(2, 4, -(-q_length // 8), -(-k_length // 8)) > 0.5, 8)
    yield Documents(torch.tensor([0, 1, 20, q_length]), torch.tensor([0, 9, 9, k_length]), Causal())
    yield Padding(torch.tensor([3, 0]), torch.tensor([k_length, 5]))
    yield Padding(torch.tensor([3, 0]), torch.tensor([k_length, 5])) & Causal()
    yield Mask(torch.rand(2, 1, q_length, k_length) > 0.7)
    yield Mask(torch.rand(4, 1, k_length) > 0.5) & SlidingWindow(20)
    yield Chunked(10) & Causal() | Global(1)


LENGTHS = [(37, 37), (33, 70), (70, 33)]
PATTERNS = [(lengths, index) for lengths in LENGTHS for index in range(len(list(patterns(*LENGTHS[0]))))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lengths", "index"), PATTERNS)
def test_patterns(backend, lengths, index) -> None:
    pattern = list(patterns(*lengths))[index]
    q, k, v = attention_inputs(kv_heads=2, q_length=lengths[0], k_length=lengths[1])
    want = expected(q, k, v, pattern=pattern)
    want.out.check(run(backend, q, k, v, pattern=pattern), repr(pattern))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("pattern", [Full(), SlidingWindow(3, 1)], ids=str)
def test_memory(backend, layout, memory, pattern) -> None:
    q, k, v = attention_inputs(kv_heads=2, q_length=19, k_length=23, value_dim=24, memory=memory)
    copies = [t.clone() for t in (q, k, v)]
    want = expected(q, k, v, pattern=pattern).out
    if layout == "blhd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = run(backend, q, k, v, pattern=pattern, layout=layout)
    want.check(out.transpose(1, 2) if layout == "blhd" else out)
    for tensor, copy in zip((q, k, v), copies, strict=True):
        assert torch.equal(tensor.transpose(1, 2) if layout == "blhd" else tensor, copy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse(backend, dtype) -> None:
    q, k, v = attention_inputs(q_length=45, k_length=67, dtype=dtype)
    pattern = SlidingWindow(5, 0, offset=30)
    want = expected(q, k, v, pattern=pattern)
    got = run(backend, q, k, v, pattern=pattern, return_lse=True)
    want.out.check(got.out, "out")
    want.lse.check(got.lse, "lse")
    assert got.weights is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0, 30.0])
def test_scale(backend, scale) -> None:
    q, k, v = attention_inputs(q_length=17, k_length=29)
    expected(q, k, v, scale=scale).out.check(run(backend, q, k, v, scale=scale))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 4, 33, 45), (4, 1, 45), (33, 45), (2, 1, 1, 45), (45,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", [None, SlidingWindow(12)], ids=str)
def test_bias(backend, shape, dtype, pattern) -> None:
    q, k, v = attention_inputs(kv_heads=2, q_length=33, k_length=45, dtype=dtype)
    for bias in (torch.randn(shape), torch.randn(shape).to(dtype)):
        want = expected(q, k, v, bias=bias, pattern=pattern)
        want.out.check(run(backend, q, k, v, bias=bias, pattern=pattern))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_minus_infinity(backend) -> None:
    q, k, v = attention_inputs(q_length=33, k_length=45)
    bias = torch.randn(33, 45)
    bias[torch.rand(33, 45) > 0.5] = -math.inf
    bias[7] = -math.inf
    bias[:, 44] = -math.inf
    k[:, :, 44] = v[:, :, 44] = math.nan
    out = run(backend, q, k, v, bias=bias)
    expected(q, k, v, bias=bias).out.check(out)
    assert (out[:, :, 7] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_alibi(backend, per_item, causal) -> None:
    q, k, v = attention_inputs(q_length=33, k_length=45)
    slopes = torch.rand(2, 4) if per_item else torch.rand(4)
    bias = torch.randn(33, 45)
    for extra in ({}, {"bias": bias}):
        want = expected(q, k, v, alibi_slopes=slopes, causal=causal, **extra)
        want.out.check(run(backend, q, k, v, alibi_slopes=slopes, causal=causal, **extra))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_key(backend, dtype) -> None:
    q, k, v = attention_inputs(q_length=70, k_length=66, dtype=dtype)
    for pattern in (Causal(-40), Padding(torch.tensor([5, 5]), torch.tensor([5, 60])), Mask(torch.zeros(66) > 0)):
        empty = ~pattern.dense(70, 66).any(-1).expand(2, 4, 70)
        assert empty.any()
        out = run(backend, q, k, v, pattern=pattern)
        expected(q, k, v, pattern=pattern).out.check(out, repr(pattern))
        assert (out[empty] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "pattern",
    [
        Padding(torch.tensor([20, 0]), torch.tensor([150, 1])),
        Padding(torch.tensor([20, 0]), torch.tensor([150, 131])) & Causal(),
        Causal(0),
        SlidingWindow(3, 0, offset=17),
        Mask(torch.arange(150) % 7 != 3),
    ],
    ids=str,
)
def test_keys_that_no_row_attends_to_never_matter(backend, pattern, poison) -> None:
    q, k, v = attention_inputs(q_length=101, k_length=150)
    unused = ~pattern.dense(101, 150).expand(2, -1, 101, 150).any(2).any(1)
    assert unused.any()
    clean = expected(q, k, v, pattern=pattern).out
    k.mT[unused[:, None, None].expand_as(k.mT)] = poison
    v.mT[unused[:, None, None].expand_as(v.mT)] = poison
    clean.check(run(backend, q, k, v, pattern=pattern))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_nan_shows_where_it_is_attended(backend, causal) -> None:
    q, k, v = attention_inputs(q_length=40, k_length=40)
    k[0, 1, 3, 2] = math.nan
    v[1, 2, 0, 5] = math.nan
    out = run(backend, q, k, v, causal=causal)
    assert out[0, 1, 3:].isnan().all()
    assert out[1, 2, :, 5].isnan().all()
    assert out[0, [0, 2, 3]].isfinite().all()
    assert out[1, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("pattern", "with_bias"),
    [(Full(), False), (Causal(), False), (Causal(0), False), (SlidingWindow(6), True), (Full(), True)],
    ids=str,
)
def test_gradients(backend, dtype, pattern, with_bias) -> None:
    q, k, v = attention_inputs(kv_heads=2, q_length=37, k_length=53, dtype=dtype)
    leaves = {"q": q, "k": k, "v": v}
    if with_bias:
        leaves["bias"] = torch.randn(4, 1, 53)
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = run(backend, pattern=pattern, **leaves)
    grad_out = torch.randn(out.shape).to(dtype)
    want = expected(pattern=pattern, grad_out=grad_out, **leaves)
    want.out.check(out)
    found = torch.autograd.grad(out, list(leaves.values()), grad_out)
    for name, gradient in zip(leaves, found, strict=True):
        want.gradients[name].check(gradient, f"gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_empty_rows_and_unused_keys(backend) -> None:
    q, k, v = attention_inputs(q_length=37, k_length=41)
    pattern = Padding(torch.tensor([4, 0]), torch.tensor([41, 11])) & Causal(-8)
    unused = ~pattern.dense(37, 41).any(2).any(1)
    grad_out = torch.randn(2, 4, 37, 16)
    want = expected(q, k, v, pattern=pattern, grad_out=grad_out)
    with torch.no_grad():
        k.mT[unused[:, None, None].expand_as(k.mT)] = math.nan
        q[:, :, 0] = math.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = run(backend, *leaves, pattern=pattern)
    want.out.check(out)
    for name, gradient in zip("qkv", torch.autograd.grad(out, leaves, grad_out), strict=True):
        want.gradients[name].check(gradient, f"gradient of {name}")
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_engine_is_as_near_as_sdpa_in_16_bit(dtype, causal) -> None:
    q, k, v = attention_inputs(q_length=239, k_length=239, head_dim=64, dtype=dtype)
    want = expected(q, k, v, causal=causal).out.value
    mine, theirs = (rms(run(name, q, k, v, causal=causal).double() - want) for name in ("native", "sdpa"))
    assert mine <= 1.3 * theirs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("amount", [1e2, 1e4])
def test_large_scores(backend, amount) -> None:
    q, k, v = attention_inputs(q_length=33, k_length=45)
    expected(q * amount, k, v).out.check(run(backend, q * amount, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(backend) -> None:
    q, k, v = (t.unsqueeze(1) for t in attention_inputs(batch=3, q_length=33, k_length=45))
    pattern = SlidingWindow(5)
    got = torch.vmap(lambda q, k, v: run(backend, q, k, v, pattern=pattern))(q, k, v)
    for item in range(3):
        expected(q[item], k[item], v[item], pattern=pattern).out.check(got[item])


SMALL = {
    "one pair": (SlidingWindow(1, 0), 1, 1, "plain"),
    "all pairs": (Longformer(3, 1), 4, 4, "plain"),
    "window": (SlidingWindow(2, 0), 9, 9, "mask"),
    "chunks": (Chunked(4) & Causal(), 9, 9, "mask"),
    "rows without a key": (SlidingWindow(0, 0, offset=-1) | Causal(-3), 6, 5, "mask"),
    "no pair at all": (SlidingWindow(0, 0, offset=9), 3, 3, "dense"),
    "constant blocks": (BigBird(2, 1, 1, 1, seed=3), 9, 9, "mask"),
    "constant blocks that let all see all": (BigBird(32, 3, 0, 0, seed=3), 1, 1, "plain"),
    "constant blocks beside an operand": (BigBird(2, 1, 1, 1, seed=3) & Padding(0, torch.tensor([5])), 9, 9, "dense"),
    "keys that no row sees": (SlidingWindow(2, 0), 2, 9, "dense"),
    "an operand": (Padding(0, torch.tensor([5])), 9, 9, "dense"),
    "many pairs": (SlidingWindow(2, 0), 65, 65, "dense"),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_pairs_that_never_change_reach_sdpa_as_a_kept_mask(name, dtype) -> None:
    pattern, q_length, k_length, how = SMALL[name]
    q, k, v = attention_inputs(q_length=q_length, k_length=k_length, kv_heads=2, dtype=dtype)
    lowering = lower(explain(q, k, v, pattern=pattern).problem)
    assert lowering.dense == (how == "dense")
    assert (lowering.mask is not None) == (how == "mask")
    for _ in range(2):
        got = attention(q, k, v, pattern=pattern, backend="sdpa")
        expected(q, k, v, pattern=pattern).out.check(got)
    differentiable = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *qkv: attention(*qkv, pattern=pattern, backend="sdpa"), differentiable, fast_mode=q_length > 16
    )
