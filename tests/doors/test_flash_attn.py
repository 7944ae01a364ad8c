"""heedful.flash_attn's functions over whole and packed sequences, against what flash-attn documents."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from flash_oracle import allowed, sequence
from torch import Tensor

import heedful
from heedful import flash_attn
from heedful.dropout import draw_seed, keep_mask
from heedful.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LENGTHS = ((1, 1), (1, 113), (3, 239), (113, 113), (239, 113), (113, 3))
HEADS = ((4, 4), (6, 3), (4, 1))
WINDOWS = ((-1, -1), (17, -1), (-1, 5), (9, 0), (0, 0), (0, 30), (40, 3), (1000, 1000))


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def inputs(
    lengths: tuple[int, int], heads: tuple[int, int] = (4, 2), dtype: torch.dtype = torch.float32, dim: int = 16
):
    (q_length, k_length), (h, h_kv) = lengths, heads
    return (
        new(2, q_length, h, dim, dtype=dtype),
        new(2, k_length, h_kv, dim, dtype=dtype),
        new(2, k_length, h_kv, dim, dtype=dtype),
    )


def check(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window: tuple[int, int] = (-1, -1), **options: Any):
    """flash_attn_func's output, log-sum-exp and gradients."""
    named = {"softmax_scale": options.get("scale"), "softcap": options.get("softcap", 0.0)}
    arguments = {**named, "causal": causal, "window_size": window, "alibi_slopes": options.get("slopes")}
    out = flash_attn_func(q, k, v, **arguments)
    grad_out = torch.randn(out.shape).to(out.dtype)
    gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    wanted = sequence(q.detach(), k.detach(), v.detach(), causal=causal, window=window, grad_out=grad_out, **options)
    wanted.out.check(out.transpose(1, 2), "out")
    for name, gradient in zip("qkv", gradients, strict=True):
        wanted.gradients[name].check(gradient.transpose(1, 2), f"gradient of {name}")
    with torch.no_grad():
        again, lse, probabilities = flash_attn_func(q, k, v, **arguments, return_attn_probs=True)
    wanted.out.check(again.transpose(1, 2), "out")
    wanted.lse.check(lse, "lse")
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert out.dtype == q.dtype
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert probabilities.shape == (0,)
    assert probabilities.dtype == q.dtype


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_and_heads(lengths, heads, causal):
    check(*inputs(lengths, heads), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dtypes(dtype, causal):
    check(*inputs((37, 61), dtype=dtype), causal=causal, window=(20, 3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", [(37, 61), (61, 37), (1, 29)], ids=str)
def test_windows(lengths, window, causal):
    check(*inputs(lengths), causal=causal, window=window)


def test_a_window_of_tensors_and_lists():
    q, k, v = (t.detach() for t in inputs((20, 30)))
    wanted = flash_attn_func(q, k, v, window_size=(4, 2))
    for window in ([4, 2], torch.tensor([4, 2])):
        assert torch.equal(flash_attn_func(q, k, v, window_size=window), wanted)
    assert torch.equal(flash_attn_func(q, k, v, window_size=(-7, 2)), flash_attn_func(q, k, v, window_size=(-1, 2)))


@pytest.mark.parametrize("lengths", [(37, 61), (61, 37)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("per_item", [False, True])
def test_alibi(lengths, causal, per_item):
    slopes = torch.rand(2, 4) if per_item else torch.rand(4)
    check(*inputs(lengths), causal=causal, slopes=slopes, window=(25, 6))


@pytest.mark.parametrize("causal", [False, True])
def test_softcap_and_scale(causal):
    check(*inputs((37, 61)), causal=causal, softcap=0.7, scale=0.4)
    q, k, v = (t.detach() for t in inputs((5, 7)))
    assert torch.equal(flash_attn_func(q, k, v, softcap=-1.0), flash_attn_func(q, k, v))


def test_a_value_dim_of_its_own_and_an_odd_head_dim():
    q, k, v = new(2, 13, 4, 19), new(2, 17, 2, 19), new(2, 17, 2, 40)
    check(q, k, v, causal=True)


def test_deterministic_is_taken_and_changes_nothing():
    q, k, v = inputs((37, 61))
    found = []
    for deterministic in (False, True):
        out = flash_attn_func(q, k, v, causal=True, deterministic=deterministic)
        found.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_flow_through_the_log_sum_exp():
    q, k, v = inputs((13, 29))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse))
    wanted = sequence(q.detach(), k.detach(), v.detach(), causal=True, grad_out=grad_out, grad_lse=grad_lse)
    for name, gradient in zip("qkv", gradients, strict=True):
        wanted.gradients[name].check(gradient.transpose(1, 2), f"gradient of {name}")


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_and_its_mask(dtype, softcap):
    q, k, v = (t.detach() for t in inputs((37, 61), dtype=dtype))
    options = {"causal": True, "softcap": softcap}
    state = torch.get_rng_state()
    out, lse, signed = flash_attn_func(q, k, v, dropout_p=0.3, **options, return_attn_probs=True)
    torch.set_rng_state(state)
    assert torch.equal(flash_attn_func(q, k, v, dropout_p=0.3, **options), out)
    torch.set_rng_state(state)
    kept = keep_mask(draw_seed(q.device), 0.3, (2, 4, 37, 61))
    wanted = sequence(q, k, v, **options, kept=kept.double() / 0.7)
    wanted.out.check(out.transpose(1, 2), "out")
    wanted.lse.check(lse, "lse")
    assert signed.shape == (2, 4, 128, 128)
    assert signed.dtype == dtype
    inside = signed[:, :, :37, :61]
    sequence(q, k, v, **options).weights.check(inside.abs(), "S_dmask")
    pairs = allowed(37, 61, True).expand_as(kept)
    assert torch.equal((inside < 0)[pairs], ~kept[pairs])
    assert signed.count_nonzero() == inside.count_nonzero()


def test_packed_inputs():
    qkv = new(2, 21, 3, 4, 16)
    q, k, v = (t.detach().clone().requires_grad_() for t in qkv.unbind(2))
    options = {"causal": True, "window_size": (9, -1), "softmax_scale": 0.3, "softcap": 2.0}
    out, wanted = flash_attn_qkvpacked_func(qkv, **options), flash_attn_func(q, k, v, **options)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, qkv, grad)[0]
    assert torch.equal(out, wanted)
    assert torch.equal(found, torch.stack(torch.autograd.grad(wanted, (q, k, v), grad), 2))

    kv = torch.stack([k, v], 2).detach().requires_grad_()
    out = flash_attn_kvpacked_func(q, kv, **options)
    found = torch.autograd.grad(out, (q, kv), grad)
    grad_q, grad_k, grad_v = torch.autograd.grad(flash_attn_func(q, k, v, **options), (q, k, v), grad)
    assert torch.equal(out, wanted)
    assert torch.equal(found[0], grad_q)
    assert torch.equal(found[1], torch.stack([grad_k, grad_v], 2))
    assert flash_attn_qkvpacked_func(qkv, return_attn_probs=True)[1].shape == (2, 4, 21)


class TestPackedSequences:
    """flash_attn_varlen_func."""

    LENGTHS_Q = (5, 0, 37, 1, 12)
    LENGTHS_K = (9, 4, 37, 0, 3)

    @staticmethod
    def ends(lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def check(
        self,
        lengths_q: tuple[int, ...],
        lengths_k: tuple[int, ...],
        *,
        heads: tuple[int, int] = (4, 2),
        dtype: torch.dtype = torch.float32,
        behind: tuple[int, int] = (0, 0),
        slopes: Tensor | None = None,
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        scale: float | None = None,
    ) -> None:
        cu_q, cu_k = self.ends(lengths_q), self.ends(lengths_k)
        total_q, total_k = sum(lengths_q) + behind[0], sum(lengths_k) + behind[1]
        (h, h_kv), dim = heads, 16
        q = new(total_q, h, dim, dtype=dtype)
        k, v = new(total_k, h_kv, dim, dtype=dtype), new(total_k, h_kv, dim, dtype=dtype)
        arguments = q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k)
        options = {"softmax_scale": scale, "causal": causal, "window_size": window, "softcap": softcap}
        out = flash_attn_varlen_func(*arguments, **options, alibi_slopes=slopes)
        _, lse, probabilities = flash_attn_varlen_func(
            *arguments, **options, alibi_slopes=slopes, return_attn_probs=True
        )
        grad_out = torch.randn(out.shape).to(dtype)
        gradients = torch.autograd.grad(out, (q, k, v), grad_out)
        assert out.shape == q.shape
        assert lse.shape == (h, total_q)
        assert probabilities.shape == (0,)
        for t in range(len(lengths_q)):
            queries, keys = slice(cu_q[t], cu_q[t + 1]), slice(cu_k[t], cu_k[t + 1])
            wanted = sequence(
                q.detach()[None, queries],
                k.detach()[None, keys],
                v.detach()[None, keys],
                causal=causal,
                window=window,
                slopes=slopes[t] if slopes is not None and slopes.ndim == 2 else slopes,
                scale=scale,
                softcap=softcap,
                grad_out=grad_out[None, queries],
            )
            wanted.out.check(out[None, queries].transpose(1, 2), f"out of sequence {t}")
            wanted.lse.check(lse[None, :, queries], f"lse of sequence {t}")
            for name, gradient, part in zip("qkv", gradients, (queries, keys, keys), strict=True):
                wanted.gradients[name].check(gradient[None, part].transpose(1, 2), f"gradient of {name}, sequence {t}")
        assert out[sum(lengths_q) :].count_nonzero() == 0
        assert (lse[:, sum(lengths_q) :] == -torch.inf).all()
        for gradient, used in zip(gradients, (sum(lengths_q), *[sum(lengths_k)] * 2), strict=True):
            assert gradient[used:].count_nonzero() == 0

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("heads", HEADS, ids=str)
    def test_lengths_of_their_own(self, causal, heads):
        self.check(self.LENGTHS_Q, self.LENGTHS_K, heads=heads, causal=causal)

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("window", [(-1, -1), (4, -1), (3, 0), (-1, 2), (5, 7)], ids=str)
    def test_windows(self, window, causal):
        self.check(self.LENGTHS_Q, self.LENGTHS_K, causal=causal, window=window)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype):
        self.check(self.LENGTHS_Q, self.LENGTHS_Q, dtype=dtype, causal=True, softcap=3.0, scale=0.5)

    @pytest.mark.parametrize("lengths_k", [LENGTHS_Q, LENGTHS_K], ids=["alike", "apart"])
    @pytest.mark.parametrize("per_sequence", [False, True])
    @pytest.mark.parametrize("causal", [False, True])
    def test_alibi_counts_inside_a_sequence(self, lengths_k, per_sequence, causal):
        slopes = torch.rand(5, 4) if per_sequence else torch.rand(4)
        self.check(self.LENGTHS_Q, lengths_k, slopes=slopes, causal=causal, window=(20, 4))
        self.check(self.LENGTHS_Q, lengths_k, slopes=slopes, dtype=torch.bfloat16, behind=(2, 3))

    @pytest.mark.parametrize("behind", [(3, 5), (0, 2), (4, 0)], ids=str)
    def test_what_lies_behind_the_last_sequence_takes_no_part(self, behind):
        self.check(self.LENGTHS_Q, self.LENGTHS_K, behind=behind, causal=True)

    def test_gradient_of_slopes(self):
        cu_q, cu_k = self.ends((5, 7)), self.ends((9, 4))
        q, k, v = (torch.randn(n, 4, 8, dtype=torch.float64) for n in (12, 13, 13))
        slopes = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)

        def loss(slopes: Tensor) -> Tensor:
            return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 9, causal=True, alibi_slopes=slopes)

        assert torch.autograd.gradcheck(loss, slopes)

    def test_packed_inputs(self):
        cu = self.ends(self.LENGTHS_Q)
        qkv = new(int(cu[-1]), 3, 4, 16)
        q, k, v = (t.detach().clone().requires_grad_() for t in qkv.unbind(1))
        options = {"causal": True, "window_size": (9, -1), "softmax_scale": 0.3}
        wanted = flash_attn_varlen_func(q, k, v, cu, cu, 37, 37, **options)
        grad = torch.randn_like(wanted)
        gradients = torch.autograd.grad(wanted, (q, k, v), grad)
        out = flash_attn_varlen_qkvpacked_func(qkv, cu, 37, **options)
        assert torch.equal(out, wanted)
        assert torch.equal(torch.autograd.grad(out, qkv, grad)[0], torch.stack(gradients, 1))
        kv = torch.stack([k, v], 1).detach().requires_grad_()
        out = flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 37, 37, **options)
        assert torch.equal(out, wanted)
        assert torch.equal(torch.autograd.grad(out, kv, grad)[0], torch.stack(gradients[1:], 1))

    def test_dropout_and_its_mask(self):
        cu_q, cu_k = self.ends((5, 0, 37)), self.ends((9, 4, 33))
        q, k, v = torch.randn(42, 4, 16), torch.randn(46, 2, 16), torch.randn(46, 2, 16)
        out, _, signed = flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, 37, 40, dropout_p=0.4, causal=True, return_attn_probs=True
        )
        assert signed.shape == (3, 4, 128, 128)
        for t in range(3):
            queries, keys = slice(cu_q[t], cu_q[t + 1]), slice(cu_k[t], cu_k[t + 1])
            inside = signed[t : t + 1, :, : cu_q[t + 1] - cu_q[t], : cu_k[t + 1] - cu_k[t]]
            kept = (inside > 0).double() / 0.6
            parts = q[None, queries], k[None, keys], v[None, keys]
            sequence(*parts, causal=True).weights.check(inside.abs(), "S_dmask")
            sequence(*parts, causal=True, kept=kept).out.check(out[None, queries].transpose(1, 2), "out")
            assert signed[t].count_nonzero() == inside.count_nonzero()

    def test_lengths_that_are_written_over(self):
        q, k, v = (torch.randn(7, 2, 8) for _ in range(3))
        slopes = torch.rand(2, 2)

        def attend(cu: Tensor) -> Tensor:
            return flash_attn_varlen_func(q, k, v, cu, cu, 7, 7, alibi_slopes=slopes)

        wanted = {first: attend(self.ends((first, 7 - first))) for first in (3, 5)}
        cu = self.ends((4, 3))
        for first in (3, 5, 3):
            cu[1] = first
            assert torch.equal(attend(cu), wanted[first])

    def test_inference_tensors_and_int64_lengths(self):
        q, k, v = (torch.randn(7, 2, 8) for _ in range(3))
        cu = self.ends((3, 4))
        wanted = flash_attn_varlen_func(q, k, v, cu, cu, 4, 4)
        with torch.inference_mode():
            assert torch.equal(flash_attn_varlen_func(q, k, v, cu.clone(), cu.clone(), 4, 4), wanted)
        assert torch.equal(flash_attn_varlen_func(q, k, v, cu.long(), cu.long(), 4, 4), wanted)
        grad_q = q.clone().requires_grad_()
        flash_attn_varlen_func(grad_q, k, v, cu, cu, 4, 4).sum().backward()
        assert grad_q.grad is not None

    @pytest.mark.parametrize("size", [1, 3, 16])
    @pytest.mark.parametrize(
        "lengths_q", [LENGTHS_Q, (1, 1, 1, 1, 1), (4, 4, 4, 4, 4), (4, 4, 4, 4, 2), (0, 0, 0, 0, 0)], ids=str
    )
    @pytest.mark.parametrize("alibi", [None, "heads", "sequences"])
    def test_pages(self, size, lengths_q, alibi):
        lengths_k = (9, 4, 37, 0, 16)
        cu_q, cu_k = self.ends(lengths_q), self.ends(lengths_k)
        blocks = sum(-(-n // size) for n in lengths_k) + 3
        pools = [torch.full((blocks, size, 2, 16), torch.nan) for _ in range(2)]
        table = torch.full((5, -(-37 // size)), -1, dtype=torch.int32)
        order = torch.randperm(blocks).tolist()
        kept = []
        for t, length in enumerate(lengths_k):
            parts = [torch.randn(length, 2, 16) for _ in pools]
            kept.append(parts)
            for j in range(length):
                if j % size == 0:
                    table[t, j // size] = order.pop()
                for pool, part in zip(pools, parts, strict=True):
                    pool[table[t, j // size], j % size] = part[j]
        slopes = {None: None, "heads": torch.rand(4), "sequences": torch.rand(5, 4)}[alibi]
        for behind in (0, 2):
            q = torch.randn(sum(lengths_q) + behind, 4, 16)
            for options in ({}, {"causal": True}, {"window": (5, 1), "softcap": 2.0}):
                named = {"window_size" if n == "window" else n: x for n, x in options.items()}
                out, lse, _ = flash_attn_varlen_func(
                    q, *pools, cu_q, cu_k, 37, 37, **named, alibi_slopes=slopes, block_table=table,
                    return_attn_probs=True,
                )  # fmt: skip
                assert out.shape == q.shape
                assert lse.shape == (4, len(q))
                for t, (key, value) in enumerate(kept):
                    queries = slice(cu_q[t], cu_q[t + 1])
                    own = slopes[t] if alibi == "sequences" else slopes
                    wanted = sequence(q[None, queries], key[None], value[None], slopes=own, **options)
                    wanted.out.check(out[None, queries].transpose(1, 2), f"out of sequence {t}")
                    wanted.lse.check(lse[None, :, queries], f"lse of sequence {t}")
                assert out[sum(lengths_q) :].count_nonzero() == 0
        needs = q.requires_grad_()
        out = flash_attn_varlen_func(needs, *pools, cu_q, cu_k, 37, 37, block_table=table)
        with pytest.raises(RuntimeError, match="no backward pass"):
            out.sum().backward()


CU = torch.tensor([0, 3, 7], dtype=torch.int32)
X, PACKED, KV_PACKED = torch.zeros(2, 7, 4, 16), torch.zeros(2, 7, 3, 4, 16), torch.zeros(7, 2, 4, 16)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"q": X[0]}, "q takes 4 dimensions, .B, L, H, D"),
        ({"k": X.half()}, "k takes q's dtype"),
        ({"k": X[:, :, :3], "v": X[:, :, :3]}, "k takes a number of heads"),
        ({"q": X.long()}, "q takes dtype|q takes float16"),
        ({"softmax_scale": float("inf")}, "softmax_scale takes a finite number"),
        ({"softmax_scale": "a"}, "softmax_scale takes a number"),
        ({"softcap": float("nan")}, "softcap takes a finite number"),
        ({"softcap": "a"}, "softcap takes a number"),
        ({"window_size": (1, 2, 3)}, "window_size takes two ints"),
        ({"window_size": (1.5, 2)}, "window_size takes two ints"),
        ({"window_size": None}, "window_size takes two ints"),
        ({"window_size": (2**40, 2)}, "window_size takes ints up to"),
        ({"dropout_p": 1.0}, "dropout_p takes a probability"),
        ({"alibi_slopes": torch.rand(3)}, "alibi_slopes takes shape"),
        ({"alibi_slopes": torch.rand(4).double()}, "alibi_slopes takes q's dtype"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(changed, says):
    with pytest.raises((ValueError, TypeError), match=f"^({says})"):
        flash_attn_func(**{"q": X, "k": X, "v": X} | changed)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"q": X}, "q takes 3 dimensions, .tokens, heads, headdim"),
        ({"v": X}, "v takes 3 dimensions"),
        ({"k": None}, "k takes a torch.Tensor"),
        ({"cu_seqlens_q": [0, 3, 7]}, "cu_seqlens_q takes an int32 tensor"),
        ({"cu_seqlens_q": CU.float()}, "cu_seqlens_q takes an int32 tensor"),
        ({"cu_seqlens_q": CU[None]}, "cu_seqlens_q takes a tensor .sequences . 1"),
        ({"cu_seqlens_q": CU[:1]}, "cu_seqlens_q takes a tensor .sequences . 1"),
        ({"cu_seqlens_k": CU + 1}, "cu_seqlens_k takes 0 there, got 1 as its first element"),
        ({"cu_seqlens_k": CU[[0, 2, 1]]}, "cu_seqlens_k takes elements that never decrease"),
        ({"cu_seqlens_k": CU[[0, 1, 2, 2]]}, "cu_seqlens_k takes as many as cu_seqlens_q, 3, got 4"),
        ({"cu_seqlens_q": 2 * CU}, "cu_seqlens_q takes at most the number of tokens, 7"),
        ({"max_seqlen_q": 3}, "max_seqlen_q takes at least the longest sequence's queries, 4, got 3"),
        ({"alibi_slopes": torch.rand(3, 4)}, "alibi_slopes takes shape .heads,. or .sequences, heads"),
        ({"alibi_slopes": [1.0]}, "alibi_slopes takes a float32 tensor"),
        ({"max_seqlen_k": 2, "dropout_p": 0.1, "return_attn_probs": True}, "max_seqlen_k takes at least the longest"),
        ({"block_table": torch.zeros(2, 4, dtype=torch.int32)}, "k takes 4 dimensions, .blocks"),
        ({"window_size": 4}, "window_size takes two ints"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_packed_sequences_are_named(changed, says):
    x = X[0]
    given = {"q": x, "k": x, "v": x, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 4, "max_seqlen_k": 4}
    flash_attn_varlen_func(**given)
    with pytest.raises((ValueError, TypeError), match=f"^{says}"):
        flash_attn_varlen_func(**given | changed)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"block_table": torch.zeros(3, 4, dtype=torch.int32)}, "block_table takes .2, blocks of a sequence"),
        ({"block_table": torch.full((2, 4), 5, dtype=torch.int32)}, "block_table takes blocks from 0 to 4"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, "cu_seqlens_k takes at most 1 blocks of 3 keys"),
        ({"k": torch.zeros(5, 3, 4, 8)}, "k takes q's head dim"),
        ({"v": torch.zeros(5, 2, 4, 16)}, "v takes k's"),
        ({"dropout_p": 0.1}, "dropout_p takes 0.0 with a block_table"),
        ({"alibi_slopes": torch.rand(5)}, "alibi_slopes takes shape"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_with_pages_are_named(changed, says):
    pool, table = torch.zeros(5, 3, 4, 16), torch.zeros(2, 2, dtype=torch.int32)
    given = {"q": X[0], "k": pool, "v": pool, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "block_table": table}
    given |= {"max_seqlen_q": 4, "max_seqlen_k": 4}
    flash_attn_varlen_func(**given)
    with pytest.raises((ValueError, TypeError), match=f"^{says}"):
        flash_attn_varlen_func(**given | changed)


@pytest.mark.parametrize(
    ("function", "given", "says"),
    [
        (flash_attn_qkvpacked_func, (PACKED[:, :, :2],), "qkv takes a shape .batch, seqlen, 3, heads, headdim"),
        (flash_attn_qkvpacked_func, (None,), "qkv takes a torch.Tensor"),
        (flash_attn_kvpacked_func, (X, PACKED), "kv takes a shape .batch, seqlen, 2, heads, headdim"),
        (flash_attn_varlen_qkvpacked_func, (PACKED, CU, 4), "qkv takes a shape .total, 3, heads, headdim"),
        (flash_attn_varlen_kvpacked_func, (X[0], X[0], CU, CU, 4, 4), "kv takes a shape .total_k, 2, heads, headdim"),
    ],
)
def test_wrong_packed_tensors_are_named(function, given, says):
    with pytest.raises((ValueError, TypeError), match=f"^{says}"):
        function(*given)


def graph_of_whole(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor) -> Tensor:
    out = flash_attn_func(q, k, v, causal=True, window_size=(7, 0), softcap=2.0, softmax_scale=0.3)
    return out + flash_attn_qkvpacked_func(torch.stack([q, k, v], 2))


def graph_of_packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor) -> Tensor:
    return flash_attn_varlen_func(q[0], k[0], v[0], cu, cu_k, 33, 33, causal=True)


def graph_of_slopes(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor) -> Tensor:
    slopes = torch.linspace(0, 1, 12).view(3, 4)
    return flash_attn_varlen_func(q[0], k[0], v[0], cu, cu_k, 33, 33, alibi_slopes=slopes)


def test_pages_in_a_compiled_function():
    q, pool = torch.randn(7, 4, 16), torch.randn(5, 3, 2, 16)
    cu, table = torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([[4, 0], [2, 3]], dtype=torch.int32)

    def function(q: Tensor) -> Tensor:
        return 2 * flash_attn_varlen_func(q * 1.0, pool, pool, cu, cu, 4, 4, causal=True, block_table=table)

    assert torch.equal(torch.compile(function, backend="aot_eager")(q), function(q))


@pytest.mark.parametrize(
    ("function", "dynamic"),
    [(graph_of_whole, False), (graph_of_packed, True), (graph_of_slopes, False)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_whole_graphs(function, dynamic):
    q, k, v = (torch.randn(2, 33, 4, 16, requires_grad=True) for _ in range(3))
    ends = [torch.tensor([0, *lengths, 33], dtype=torch.int32) for lengths in ((5, 5), (9, 12))]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    out, wanted = compiled(q, k, v, *ends), function(q, k, v, *ends)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(wanted, (q, k, v), grad))


SIGNATURES = {
    flash_attn_func: "q k v dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    flash_attn_kvpacked_func: "q kv dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    flash_attn_qkvpacked_func: "qkv dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    flash_attn_varlen_func: "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 "
    "softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False "
    "return_attn_probs=False block_table=None",
    flash_attn_varlen_kvpacked_func: "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 "
    "softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False "
    "return_attn_probs=False",
    flash_attn_varlen_qkvpacked_func: "qkv cu_seqlens max_seqlen dropout_p=0.0 softmax_scale=None causal=False "
    "window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False return_attn_probs=False",
    flash_attn_with_kvcache: "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None "
    "cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1,-1) "
    "softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signatures_are_flash_attn_s(function):
    found = [
        parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
        for parameter in inspect.signature(function).parameters.values()
    ]
    assert " ".join(found).replace(", ", ",") == SIGNATURES[function]
    assert getattr(flash_attn, function.__name__) is function
    assert heedful.flash_attn is flash_attn
