"""What a call may do beside attention, dropout with the engine's bits, weights."""

from __future__ import annotations

import pytest
import torch
from inputs import all_features, attention_inputs

import heedful
from heedful import Causal, Dilated, Full, Longformer, SlidingWindow, choose
from heedful.backend.native import backend as native_backend
from heedful.backend.triton import backend as triton_backend
from heedful.backend.triton import shortcuts


@pytest.mark.parametrize("name", ["softcap", "bias", "alibi_slopes", "sinks", None])
@pytest.mark.parametrize("pattern", [Causal(), Longformer(9, 3)], ids=repr)
def test_features(verify, name, pattern) -> None:
    q, k, v = attention_inputs(batch=1, heads=4, kv_heads=2, q_length=33, k_length=70, dtype=torch.float16)
    options = all_features(1, 4, 33, 70, torch.float16)
    verify(q, k, v, pattern=pattern, **{key: value for key, value in options.items() if name in (None, key)})


@pytest.mark.parametrize("shape", [(1, 1, 33, 70), (2, 2, 1, 70), (70,), (2, 33, 1), (33, 70)])
def test_biases_broadcast(verify, shape) -> None:
    q, k, v = attention_inputs(heads=2, q_length=33, k_length=70)
    verify(q, k, v, bias=torch.randn(shape), through=("out",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("pattern", [Full(), SlidingWindow(20, 5), Longformer(9, 3)], ids=repr)
@pytest.mark.parametrize("shape", [(2, 2, 97, 120), (1, 1, 97, 120), (2, 1, 97, 120), (2, 1, 1, 120)], ids=str)
def test_a_bias_that_comes_in_tiles_or_as_a_row(verify, shape, pattern, dtype) -> None:
    """And excludes keys from all queries, queries from all keys, and whole tiles."""
    q, k, v = attention_inputs(heads=2, q_length=97, k_length=120, dtype=torch.float16)
    bias = torch.randn(shape).to(dtype)
    bias[..., 70:] = -torch.inf
    bias[..., 3::7] = -torch.inf
    if shape[2] > 1:
        bias[:, :, 5::11] = -torch.inf
    verify(q, k, v, pattern=pattern, bias=bias, softcap=20.0)
    unseen = bias.isneginf().expand(2, 2, 97, 120).all(2)
    k, v = (t.masked_fill(unseen[..., None], torch.nan) for t in (k, v))
    q = q.masked_fill(bias.isneginf().expand(2, 2, 97, 120).all(3)[..., None], torch.nan)
    verify(q, k, v, pattern=pattern, bias=bias.expand(2, 2, 97, 120), softcap=20.0)


@pytest.mark.parametrize("pattern", [Causal(), Longformer(9, 3)], ids=repr)
@pytest.mark.parametrize("weights", [True, "sparse"])
def test_weights(verify, pattern, weights) -> None:
    q, k, v = attention_inputs(heads=2, q_length=33, k_length=70)
    verify(q, k, v, pattern=pattern, weights=weights, dropout_p=0.2)


def test_a_negative_scale_and_one_of_0(verify) -> None:
    for scale in (-0.3, 0.0):
        verify(*attention_inputs(heads=2, q_length=33, k_length=70), pattern=SlidingWindow(9), scale=scale)


@pytest.mark.skipif("native" in choose.UNAVAILABLE, reason="the engine is not built")
@pytest.mark.parametrize("pattern", [Causal(), Longformer(9, 3), Dilated(6, 5)], ids=repr)
def test_dropout_has_the_bits_of_the_engine(device, monkeypatch, pattern) -> None:
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    monkeypatch.setattr(native_backend, "draw_seed", lambda where: seed.to(where))
    q, k, v = attention_inputs(heads=2, q_length=33, k_length=150)
    kept = []
    for backend, where in (("triton", device), ("native", "cpu")):
        found = heedful.attention(
            *(t.to(where) for t in (q, k, v)), pattern=pattern, dropout_p=0.4, return_weights=True, backend=backend
        )
        kept.append(found.weights.cpu() != 0)
    assert torch.equal(*kept)
    assert 0.5 < float(kept[0].sum() / pattern.dense(33, 150).expand_as(kept[0]).sum()) < 0.7


@pytest.mark.skipif("native" in choose.UNAVAILABLE, reason="the engine is not built")
@pytest.mark.parametrize("pattern", [Causal(), SlidingWindow(777, 0)], ids=repr)
def test_dropout_where_keys_are_cut_into_runs(device, monkeypatch, pattern) -> None:
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    monkeypatch.setattr(native_backend, "draw_seed", lambda where: seed.to(where))
    monkeypatch.setattr(shortcuts, "draw_seed", lambda where: seed.to(where))
    monkeypatch.setattr(triton_backend, "draw_seed", lambda where: seed.to(where))
    q, k, v = attention_inputs(batch=1, heads=2, q_length=3, k_length=1501)
    outs = [
        heedful.attention(*(t.to(where) for t in (q, k, v)), pattern=pattern, dropout_p=0.4, backend=backend).cpu()
        for backend, where in (("triton", device), ("native", "cpu"))
    ]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bias", "softcap", None])
def test_the_second_call_of_a_kind_runs_here_too(device, monkeypatch, name) -> None:
    """By the shortcut that the first one leaves behind."""
    inputs = [t.to(device) for t in attention_inputs(heads=2, q_length=17, k_length=20)]
    options = {"bias": {"bias": torch.randn(17, 20, device=device)}, "softcap": {"softcap": 3.0}, None: {}}[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    for operator in ("attention_forward", "attention_backward"):
        monkeypatch.setattr(torch.ops.heedful, operator, None, raising=False)
    plain = [heedful.attention(*inputs, backend="triton", **options) for _ in range(2)]
    with_gradients = [heedful.attention(*leaves, backend="triton", **options) for _ in range(2)]
    for out in with_gradients:
        out.sum().backward()
    torch.testing.assert_close(plain[0], plain[1])
    torch.testing.assert_close(with_gradients[0].detach(), plain[0])
