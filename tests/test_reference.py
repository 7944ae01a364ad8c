"""The reference against a loop over single pairs, against what PyTorch defines, and against its own derivatives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from inputs import attention_inputs
from torch import Tensor

import heedful
from heedful import BlockSparse, Causal, Dilated, Full, Global, Mask, Padding, SlidingWindow, attention
from heedful.arguments import prepare
from heedful.choose import BACKENDS, UNAVAILABLE
from heedful.dropout import keep_mask
from heedful.problem import Call


def by_loops(q, k, v, sees, *, scale, softcap=None, bias=None, slopes=None, sinks=None, kept=None):
    """Attention in Python floats, one pair at a time; sees(b, h, i, j) tells whether the pair counts."""
    batch, heads, q_length, dim = q.shape
    kv_heads, k_length, value_dim = k.shape[1], k.shape[2], v.shape[3]
    out = torch.zeros(batch, heads, q_length, value_dim, dtype=torch.float64)
    lse = torch.full((batch, heads, q_length), -math.inf, dtype=torch.float64)
    weights = torch.zeros(batch, heads, q_length, k_length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // kv_heads)
            for i in range(q_length):
                scores = {}
                for j in range(k_length):
                    if not sees(b, h, i, j):
                        continue
                    score = scale * sum(float(q[b, h, i, d]) * float(k[b, kv, j, d]) for d in range(dim))
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    if bias is not None:
                        score += float(bias[b, h, i, j])
                    if slopes is not None:
                        score -= float(slopes[b, h]) * abs(i + k_length - q_length - j)
                    scores[j] = score
                total = sum(math.exp(score) for score in scores.values())
                if sinks is not None:
                    total += math.exp(float(sinks[h]))
                if not total:
                    continue
                lse[b, h, i] = math.log(total)
                for j, score in scores.items():
                    weights[b, h, i, j] = math.exp(score) / total
                    if kept is not None:
                        weights[b, h, i, j] *= float(kept[b, h, i, j])
                    for d in range(value_dim):
                        out[b, h, i, d] += weights[b, h, i, j] * float(v[b, kv, j, d])
    return out, lse, weights


SIZES = [
    {"batch": 1, "heads": 1, "q_length": 1, "k_length": 1, "head_dim": 1},
    {"batch": 2, "heads": 4, "kv_heads": 2, "q_length": 3, "k_length": 5, "head_dim": 3, "value_dim": 2},
    {"batch": 2, "heads": 3, "kv_heads": 1, "q_length": 6, "k_length": 4, "head_dim": 2, "value_dim": 5},
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    "features",
    [
        set(),
        {"softcap"},
        {"bias"},
        {"alibi"},
        {"sinks"},
        {"softcap", "bias", "alibi", "sinks"},
    ],
    ids=lambda names: "+".join(sorted(names)),
)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_loop_over_pairs(sizes, features, masked) -> None:
    q, k, v = attention_inputs(**sizes, dtype=torch.float64)
    batch, heads, q_length, k_length = *q.shape[:3], k.shape[2]
    shape = (batch, heads, q_length, k_length)
    mask = torch.rand(shape) > 0.4 if masked else torch.ones(shape, dtype=torch.bool)
    bias = torch.randn(shape, dtype=torch.float64) if "bias" in features else None
    slopes = torch.rand(batch, heads, dtype=torch.float64) if "alibi" in features else None
    sinks = torch.randn(heads, dtype=torch.float64) if "sinks" in features else None
    softcap = 1.5 if "softcap" in features else None
    got = attention(
        q, k, v, pattern=mask, bias=bias, alibi_slopes=slopes, sinks=sinks, softcap=softcap, scale=0.7,
        return_lse=True, return_weights=True, backend="reference",
    )  # fmt: skip
    want = by_loops(
        q, k, v, lambda *pair: bool(mask[pair]), scale=0.7, softcap=softcap, bias=bias, slopes=slopes, sinks=sinks
    )
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_pattern_is_the_one_of_the_pattern() -> None:
    q, k, v = attention_inputs(q_length=5, k_length=8, dtype=torch.float64)
    got = attention(q, k, v, pattern=SlidingWindow(2, 1), causal=True, backend="reference")
    want, _, _ = by_loops(q, k, v, lambda b, h, i, j: -2 <= j - i - 3 <= 0, scale=0.25)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_philox_known_answers() -> None:
    assert philox_in_integers([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_in_integers(
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    ) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]  # fmt: skip


def test_dropout_mask_is_philox_of_seed_and_place() -> None:
    seed, probability, shape = 0x0123456789ABCDEF, 0.3, (2, 2, 3, 150)
    mask = keep_mask(torch.tensor([seed]), probability, shape)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    for b, h, i, j in [(0, 0, 0, 0), (1, 0, 2, 15), (0, 1, 1, 16), (1, 1, 2, 63), (0, 1, 0, 64), (1, 1, 1, 149)]:
        words = philox_in_integers([16 * (j // 64) + j % 16, i, h, b], [seed & 0xFFFFFFFF, seed >> 32])
        assert bool(mask[b, h, i, j]) == (words[j // 16 % 4] >= int(probability * 2**32))


def test_dropout_keeps_as_many_as_it_says() -> None:
    mask = keep_mask(torch.tensor([7]), 0.25, (2, 4, 64, 256))
    share = mask.double().mean().item()
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / mask.numel())
    for axis in range(4):
        others = [a for a in range(4) if a != axis]
        spread = mask.double().mean(others)
        assert (spread - 0.75).abs().max() < 6 * math.sqrt(0.75 * 0.25 * spread.numel() / mask.numel())


def test_dropout_scales_what_it_keeps_and_returns_the_weights_that_it_used() -> None:
    q, k, v = attention_inputs(dtype=torch.float64)
    plain = attention(q, k, v, return_weights=True, backend="reference")
    dropped = attention(q, k, v, dropout_p=0.4, return_weights=True, return_lse=True, backend="reference")
    zero = dropped.weights == 0
    assert 0.2 < zero.double().mean() < 0.6
    torch.testing.assert_close(dropped.weights, (plain.weights / 0.6).where(~zero, 0.0))
    torch.testing.assert_close(dropped.out, dropped.weights @ v)


def test_dropout_follows_the_generator() -> None:
    q, k, v = attention_inputs()
    outs = []
    for _ in range(2):
        torch.manual_seed(11)
        outs.append([attention(q, k, v, dropout_p=0.5) for _ in range(2)])
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])
    assert not torch.equal(outs[0][0], outs[0][1])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_full_is_torch_sdpa(kv_heads) -> None:
    q, k, v = attention_inputs(kv_heads=kv_heads, dtype=torch.float64, value_dim=5)
    got = attention(q, k, v, backend="reference")
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_mask_and_bias_are_sdpa_attn_mask() -> None:
    q, k, v = attention_inputs(dtype=torch.float64)
    mask = torch.rand(7, 9) > 0.3
    mask[:, 0] = True
    bias = torch.randn(4, 7, 9, dtype=torch.float64)
    got = attention(q, k, v, pattern=mask, bias=bias, backend="reference")
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~mask, -math.inf))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_causal_is_bottom_right_and_offset_zero_is_sdpa() -> None:
    q, k, v = attention_inputs(q_length=3, k_length=6, dtype=torch.float64)
    last = attention(q, k, v, causal=True, backend="reference")[:, :, -1:]
    torch.testing.assert_close(last, F.scaled_dot_product_attention(q[:, :, -1:], k, v))
    top_left = attention(q, k, v, pattern=Causal(0), backend="reference")
    torch.testing.assert_close(top_left, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_alibi_is_what_flash_attn_documents() -> None:
    # flash-attn: bias(i, j) = -slope * |i + seqlen_k - seqlen_q - j|, added to the scaled scores.
    q, k, v = attention_inputs(heads=2, q_length=2, k_length=4, dtype=torch.float64)
    slopes = torch.tensor([0.5, 0.25])
    distance = torch.tensor([[2.0, 1, 0, 1], [3, 2, 1, 0]], dtype=torch.float64)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=-slopes.double().view(2, 1, 1) * distance)
    torch.testing.assert_close(attention(q, k, v, alibi_slopes=slopes, backend="reference"), want)


def test_sink_is_a_key_without_a_value() -> None:
    q, k, v = attention_inputs(heads=2, dtype=torch.float64)
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64)
    got = attention(q, k, v, sinks=sinks, return_lse=True, return_weights=True, backend="reference")
    scores = torch.cat([q @ k.mT / 4, sinks.view(1, 2, 1, 1).expand(2, 2, 7, 1)], -1)
    torch.testing.assert_close(got.weights, scores.softmax(-1)[..., :-1])
    torch.testing.assert_close(got.out, scores.softmax(-1)[..., :-1] @ v)
    torch.testing.assert_close(got.lse, scores.logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_results(dtype) -> None:
    q, k, v = attention_inputs(dtype=dtype)
    got = attention(q, k, v, return_lse=True, return_weights=True)
    assert got.out.dtype == got.weights.dtype == dtype
    assert got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.lse.shape == (2, 4, 7)


def gradients(out: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.sum() + (out * out).sum(), leaves)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("how", ["pattern", "bias"])
def test_rows_without_a_key(how, with_sinks) -> None:
    q, k, v = (t.requires_grad_() for t in attention_inputs(dtype=torch.float64))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[2] = mask[5] = False
    excluded = {"pattern": mask} if how == "pattern" else {"bias": torch.zeros(7, 9).masked_fill(~mask, -math.inf)}
    with torch.no_grad():
        q[:, :, 2] = math.nan
    got = attention(q, k, v, sinks=sinks, return_lse=True, return_weights=True, backend="reference", **excluded)
    assert (got.out[:, :, [2, 5]] == 0).all()
    assert (got.weights[:, :, [2, 5]] == 0).all()
    want = torch.full((2, 4, 2), -math.inf) if sinks is None else sinks.view(1, 4, 1).expand(2, 4, 2)
    assert torch.equal(got.lse[:, :, [2, 5]], want.to(torch.float64))
    finite_lse = got.lse.where(got.lse.isfinite(), 0.0)
    grads = gradients(got.out, q, k, v) if sinks is None else gradients(got.out, q, k, v, sinks)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, [2, 5]] == 0).all()
    through_lse = torch.autograd.grad(
        attention(q, k, v, return_lse=True, backend="reference", **excluded).lse[:, :, 0].sum(), (q, k)
    )
    assert all(g.isfinite().all() for g in through_lse)
    assert finite_lse.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "pattern",
    [
        Padding(torch.tensor([2, 0]), torch.tensor([9, 6])),
        Padding(torch.tensor([2, 0]), torch.tensor([9, 6])) & Causal(),
        Causal(0),
        SlidingWindow(1, 0, offset=3),
    ],
    ids=str,
)
def test_keys_that_no_row_attends_to_never_matter(pattern, poison) -> None:
    q, k, v = attention_inputs(dtype=torch.float64)
    unused = ~pattern.dense(7, 9).expand(2, 1, 7, 9).any(2).any(1)
    assert unused.any()
    results = []
    for fill in (0.0, poison):
        kk, vv = k.clone(), v.clone()
        kk.mT[unused[:, None, None].expand_as(kk.mT)] = fill
        vv.mT[unused[:, None, None].expand_as(vv.mT)] = fill
        leaves = [t.requires_grad_() for t in (q.clone(), kk, vv)]
        out = attention(*leaves, pattern=pattern, softcap=2.0, backend="reference")
        results.append((out, *gradients(out, *leaves)))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
        assert clean.isfinite().all()


def test_non_finite_input_shows_where_it_is_attended() -> None:
    q, k, v = attention_inputs(dtype=torch.float64)
    k[0, 1, 3, 2] = math.nan
    out = attention(q, k, v, causal=True, backend="reference")
    assert out[0, 1, 1:].isnan().all()
    assert out[0, 0].isfinite().all()
    assert out[1].isfinite().all()


def test_row_whose_scores_are_all_minus_infinity_has_no_key() -> None:
    q, k, v = attention_inputs(batch=1, heads=1, q_length=2, k_length=3, head_dim=1, dtype=torch.float64)
    q[...] = 1.0
    k[...] = -math.inf
    got = attention(q, k, v, return_lse=True, backend="reference")
    assert (got.out == 0).all()
    assert (got.lse == -math.inf).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"pattern": SlidingWindow(1)},
        {"pattern": Dilated(1, 2) | Global(1)},
        {"softcap": 0.8, "causal": True},
        {"pattern": Mask(torch.tensor([[True, False, True, True], [False] * 4, [True] * 4]))},
        {"pattern": BlockSparse(torch.tensor([[True, False], [True, True]]), 2)},
    ],
    ids=str,
)
def test_gradcheck(options) -> None:
    q, k, v = (
        t.requires_grad_()
        for t in attention_inputs(
            batch=1, heads=2, kv_heads=1, q_length=3, k_length=4, head_dim=2, value_dim=3, dtype=torch.float64
        )
    )
    bias = torch.randn(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, bias, sinks, slopes, return_weights=True):
        return attention(
            q, k, v, bias=bias, sinks=sinks, alibi_slopes=slopes, return_lse=True, return_weights=return_weights,
            backend="reference", **options,
        )  # fmt: skip

    def sparse_values(*tensors):
        return call(*tensors, return_weights="sparse").weights.values()

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks, slopes))
    assert torch.autograd.gradcheck(sparse_values, (q, k, v, bias, sinks, slopes))
    assert torch.autograd.gradgradcheck(lambda *a: call(*a).out, (q, k, v, bias, sinks, slopes))
    assert torch.autograd.gradcheck(
        lambda *a: call(*a).out, (q, k, v, bias, sinks, slopes), check_forward_ad=True, check_backward_ad=False
    )


@pytest.mark.parametrize("size", ["batch", "q_length", "k_length", "value_dim"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"pattern": SlidingWindow(2)}], ids=str)
def test_zero_sizes(size, options) -> None:
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "q_length": 3, "k_length": 5, "value_dim": 6} | {size: 0}
    q, k, v = (t.requires_grad_() for t in attention_inputs(**sizes))
    sinks = torch.randn(4)
    got = attention(q, k, v, sinks=sinks, return_lse=True, return_weights=True, **options)
    assert got.out.shape == (sizes["batch"], 4, sizes["q_length"], sizes["value_dim"])
    assert got.lse.shape == got.out.shape[:3]
    assert got.weights.shape == (*got.out.shape[:3], sizes["k_length"])
    if size == "k_length":
        assert (got.out == 0).all()
        assert torch.equal(got.lse, sinks.view(1, 4, 1).expand(2, 4, 3))
        assert (attention(q, k, v, return_lse=True).lse == -math.inf).all()
    for gradient, tensor in zip(torch.autograd.grad(got.out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert gradient.shape == tensor.shape
        assert (gradient == 0).all()


def test_full_is_the_default() -> None:
    q, k, v = attention_inputs()
    assert torch.equal(attention(q, k, v, backend="reference"), attention(q, k, v, pattern=Full(), backend="reference"))


def test_blhd_is_a_transposition() -> None:
    q, k, v = attention_inputs(kv_heads=2, value_dim=5)
    bias = torch.randn(4, 7, 9)
    want = attention(q, k, v, bias=bias, causal=True, return_lse=True, return_weights=True, backend="reference")
    blhd = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    got = attention(
        *blhd, bias=bias, causal=True, layout="blhd", return_lse=True, return_weights=True, backend="reference"
    )
    assert torch.equal(got.out, want.out.transpose(1, 2))
    assert torch.equal(got.lse, want.lse)
    assert torch.equal(got.weights, want.weights)


def test_vmap() -> None:
    q, k, v = attention_inputs(batch=3)
    got = torch.vmap(lambda q, k, v: heedful.attention(q, k, v, causal=True, backend="reference"))(
        q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    )
    torch.testing.assert_close(got.squeeze(1), attention(q, k, v, causal=True, backend="reference"))


def test_sparse_weights_are_the_attended_pairs() -> None:
    q, k, v = attention_inputs(dtype=torch.bfloat16)
    bias = torch.randn(7, 9)
    bias[1, 2] = bias[3] = -math.inf
    options = {"causal": True, "bias": bias, "dropout_p": 0.5, "backend": "reference"}
    found = []
    for kind in (True, "sparse"):
        torch.manual_seed(3)
        found.append(attention(q, k, v, return_weights=kind, **options).weights)
    dense, sparse = found
    attended = (Causal().dense(7, 9) & (bias != -math.inf)).expand(2, 4, 7, 9)
    assert sparse.dtype == torch.bfloat16
    assert sparse.is_coalesced()
    # What dropout zeroes stays.
    assert torch.equal(sparse.indices(), attended.nonzero().T)
    assert torch.equal(sparse.values(), dense[attended])


def paged(pool_k: Tensor, pool_v: Tensor, q: Tensor, pages: Tensor, **options) -> tuple[Call, Call]:
    """The same call over pages and over the keys and values that they stand for."""
    k, v = (pool[pages.clamp(0).long()].transpose(1, 2).flatten(2, 3) for pool in (pool_k, pool_v))
    pattern = Padding(torch.tensor([0, 0], dtype=torch.int32), torch.tensor([5, 9], dtype=torch.int32))
    call = prepare(q, k, v, **DEFAULTS | {"pattern": pattern, "alibi_slopes": torch.rand(4)} | options)
    call = replace(call, query_offset=torch.tensor([-2, 2], dtype=torch.int32))
    return replace(call, key=pool_k, value=pool_v, pages=pages), call


DEFAULTS = {
    "pattern": None, "causal": False, "bias": None, "alibi_slopes": None, "scale": None, "softcap": None, "sinks": None,
    "dropout_p": 0.0, "cache": None, "layout": "bhld", "return_lse": True, "return_weights": True,
}  # fmt: skip


def test_pages() -> None:
    pool_k, pool_v = torch.randn(7, 2, 3, 16), torch.randn(7, 2, 3, 8)
    # Item 0 ends in its second page: its third entry is nobody's.
    pages = torch.tensor([[6, 0, -1], [3, 3, 5]], dtype=torch.int32)
    over_pages, plain = paged(pool_k, pool_v, torch.randn(2, 4, 7, 16), pages)
    for mine, theirs in zip(*(BACKENDS["reference"].run(call) for call in (over_pages, plain)), strict=True):
        assert torch.equal(mine, theirs)


def test_alibi_counts_from_each_items_own_position() -> None:
    q, k, v = attention_inputs(dtype=torch.float64)
    slopes, offset = torch.rand(4, dtype=torch.float64), torch.tensor([-2, 2], dtype=torch.int32)
    call = prepare(q, k, v, **DEFAULTS | {"alibi_slopes": slopes})
    distance = (torch.arange(7)[:, None] + offset.view(2, 1, 1, 1) - torch.arange(9)).abs()
    bias = -slopes.view(1, 4, 1, 1) * distance
    want = attention(q, k, v, bias=bias, backend="reference")
    for name in ("reference", "sdpa", "native"):
        if name not in UNAVAILABLE:
            out = BACKENDS[name].run(replace(call, query_offset=offset)).out
            torch.testing.assert_close(out, want, msg=lambda text, name=name: f"{name}: {text}")
