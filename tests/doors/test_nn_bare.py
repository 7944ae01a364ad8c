"""MACoreAttention, SparseAttention and create_attention_layer against the reference."""

from __future__ import annotations

import pickle

import pytest
import torch
from tolerance import expected

import heedful
from heedful import Causal, Full, SlidingWindow
from heedful.nn import MACoreAttention, SparseAttention, bare, create_attention_layer

PATTERNS = {
    "dense": ({}, Full()),
    "causal": ({"use_causal_mask": True}, Causal()),
    "window": ({"sparse": True, "window_size": 3}, SlidingWindow(3)),
    "causal window": ({"sparse": True, "window_size": 3, "use_causal_mask": True}, SlidingWindow(3, 0)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [1, 3, 113])
@pytest.mark.parametrize("case", PATTERNS)
def test_every_kind(case, length, training) -> None:
    options, pattern = PATTERNS[case]
    layer = MACoreAttention(**options).train(training)
    q, k, v = (torch.randn(2, length, 4, 16, requires_grad=True) for _ in range(3))
    out = layer(q, k, v)
    assert out.is_contiguous()
    upstream = torch.randn_like(out)
    heads = [tensor.detach().transpose(1, 2) for tensor in (q, k, v)]
    wanted = expected(*heads, pattern=pattern, grad_out=upstream.transpose(1, 2))
    wanted.out.check(out.transpose(1, 2))
    for name, gradient in zip("qkv", torch.autograd.grad(out, (q, k, v), upstream), strict=True):
        wanted.gradients[name].check(gradient.transpose(1, 2), name)


@pytest.mark.parametrize("use_ma_core", [False, True])
def test_one_head_within_a_window(use_ma_core) -> None:
    layer = SparseAttention(2, use_ma_core)
    q, k, v = (torch.randn(2, 19, 24, requires_grad=True) for _ in range(3))
    out = layer(q, k, v)
    upstream = torch.randn_like(out)
    heads = [tensor.detach()[:, None] for tensor in (q, k, v)]
    wanted = expected(*heads, pattern=SlidingWindow(2), grad_out=upstream[:, None])
    wanted.out.check(out[:, None])
    for name, gradient in zip("qkv", torch.autograd.grad(out, (q, k, v), upstream), strict=True):
        wanted.gradients[name].check(gradient[:, None], name)


def test_which_backend_runs(monkeypatch) -> None:
    asked = []

    def recorded(*tensors, backend, **options):
        asked.append(backend)
        return heedful.attention(*tensors, backend=backend, **options)

    monkeypatch.setattr(bare, "attention", recorded)
    q = torch.randn(1, 5, 2, 8)
    insisting = MACoreAttention(fallback_training=False)
    for layer, training in ((MACoreAttention(), True), (insisting, True), (insisting, False)):
        layer.train(training)(q, q, q)
    for use_ma_core in (True, False):
        SparseAttention(3, use_ma_core)(q[:, :, 0], q[:, :, 0], q[:, :, 0])
    assert asked == [None, "native", None, None, "sdpa"]


def test_the_factory() -> None:
    assert not create_attention_layer().sparse
    assert create_attention_layer("dense", use_causal_mask=True).pattern == Causal()
    for kind in ("sparse", "auto"):
        assert create_attention_layer(kind, window_size=5).pattern == SlidingWindow(5)
    with pytest.raises(ValueError, match="attention_type takes"):
        create_attention_layer("linear")
    with pytest.raises(TypeError):
        create_attention_layer("dense", heads=3)


@pytest.mark.parametrize("kind", [SparseAttention, lambda size: MACoreAttention(sparse=True, window_size=size)])
@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-3, ValueError), (1.5, TypeError), ("3", TypeError)])
def test_wrong_windows(kind, size, error) -> None:
    with pytest.raises(error, match="window_size takes"):
        kind(size)


def test_wrong_shapes() -> None:
    q = torch.randn(2, 5, 3, 8)
    for layer, good in ((MACoreAttention(), q), (SparseAttention(), q[:, :, 0])):
        for bad, message in (
            ((good[0], good, good), "query takes"),
            ((good, good[:, 1:], good[:, 1:]), "key takes query's .* mismatch"),
            ((good, good, good[..., 1:]), "value takes query's"),
            ((good[:, :0],) * 3, "sizes of at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                layer(*bad)
        with pytest.raises(TypeError, match="query takes a torch"):
            layer(good.numpy(), good, good)


def test_compile_and_pickle() -> None:
    q = torch.randn(2, 9, 3, 8)
    layer = MACoreAttention(sparse=True, window_size=2)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(q, q, q), layer(q, q, q))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(q, q, q), layer(q, q, q))
    assert repr(layer) == "MACoreAttention(pattern=SlidingWindow(2, 2))"
    assert repr(SparseAttention(4)) == "SparseAttention(window_size=4, use_ma_core=True)"
