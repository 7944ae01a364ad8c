"""Bad input, case by case: refused by name before any work, whether or not a like call was made before."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import attention_inputs

from heedful import (
    BlockSparse,
    Causal,
    Chunked,
    Dilated,
    Documents,
    Mask,
    Padding,
    Prefix,
    SlidingWindow,
    attention,
    choose,
    explain,
)

Q, K, V = (2, 4, 7, 16), (2, 2, 9, 16), (2, 2, 9, 12)


def tensors(q=Q, k=K, v=V):
    return torch.randn(q), torch.randn(k), torch.randn(v)


def refused(error, words, q, k, v, **options) -> None:
    """Both doors refuse the call, the first time and after a good call of the same kind, and change nothing."""
    copies = [t.clone() for t in (q, k, v) if isinstance(t, torch.Tensor)]
    for door in (attention, attention, explain):
        with pytest.raises(error) as raised:
            door(q, k, v, **options)
        for word in words:
            assert word in str(raised.value)
        attention(*tensors())
    kept = [t for t in (q, k, v) if isinstance(t, torch.Tensor)]
    assert all(torch.equal(t, copy) for t, copy in zip(kept, copies, strict=True) if t.device.type == "cpu")


@pytest.fixture(autouse=True)
def _no_backend_runs_bad_input(monkeypatch):
    good = {tuple(t.shape for t in tensors())}
    for backend in choose.BACKENDS.values():
        run = backend.run

        def checked(call, run=run):
            assert (call.query.shape, call.key.shape, call.value.shape) in good
            return run(call)

        monkeypatch.setattr(backend, "run", checked)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("shape", [(), (7, 16), (4, 7, 16), (1, 2, 4, 7, 16)], ids=str)
def test_rank(name, shape) -> None:
    q, k, v = tensors()
    bad = {"q": q, "k": k, "v": v} | {name: torch.randn(shape)}
    refused(ValueError, [f"{name} takes 4 dimensions, (B, H, L, D)", str(shape)], **bad)


def test_rank_names_the_layout() -> None:
    refused(ValueError, ["(B, L, H, D)"], *tensors(q=(7, 16)), layout="blhd")


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"k": (3, 2, 9, 16)}, ["k takes q's batch, 2", "got batch 3"]),
        ({"v": (1, 2, 9, 12)}, ["v takes q's batch, 2", "got batch 1"]),
        ({"k": (2, 2, 9, 8)}, ["k takes q's head dim, 16", "got head dim 8"]),
        ({"v": (2, 4, 9, 12)}, ["v takes as many heads as k, 2", "got 4 heads"]),
        ({"v": (2, 2, 8, 12)}, ["v takes k's length, 9", "got length 8"]),
        ({"k": (2, 3, 9, 16), "v": (2, 3, 9, 12)}, ["k takes a number of heads that divides q's, 4", "got 3 heads"]),
        ({"k": (2, 8, 9, 16), "v": (2, 8, 9, 12)}, ["k takes a number of heads that divides q's, 4", "got 8 heads"]),
        ({"k": (2, 0, 9, 16), "v": (2, 0, 9, 12)}, ["k takes a number of heads", "got 0 heads"]),
        ({"q": (2, 0, 7, 16)}, ["q takes 1 or more", "got 0 heads"]),
        ({"q": (2, 4, 7, 0), "k": (2, 2, 9, 0)}, ["q takes 1 or more", "got head dim 0"]),
    ],
    ids=str,
)
def test_shapes(shapes, words) -> None:
    refused(ValueError, words, *tensors(**shapes))


def test_shapes_in_the_other_layout() -> None:
    q, k, v = (t.transpose(1, 2) for t in tensors(v=(2, 2, 8, 12)))
    refused(ValueError, ["v takes k's length, 9", "got length 8"], q, k, v, layout="blhd")


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [None, 1.0, [[1.0]], "text"], ids=repr)
def test_not_a_tensor(name, value) -> None:
    bad = dict(zip("qkv", tensors(), strict=True)) | {name: value}
    refused(TypeError, [f"{name} takes a torch.Tensor", repr(value)], **bad)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtype_that_attention_does_not_have(name, dtype) -> None:
    good = dict(zip("qkv", tensors(), strict=True))
    refused(TypeError, [f"{name} takes float16, bfloat16, float32", str(dtype)], **good | {name: good[name].to(dtype)})


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_mismatched_dtypes(name, dtype) -> None:
    good = dict(zip("qkv", tensors(), strict=True))
    words = [f"{name} takes q's dtype, torch.float32", str(dtype)]
    refused(TypeError, words, **good | {name: good[name].to(dtype)})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_mismatched_devices(name) -> None:
    good = dict(zip("qkv", tensors(), strict=True))
    refused(ValueError, [" takes q's device", "cpu", "meta"], **good | {name: good[name].to("meta")})


@pytest.mark.parametrize("backend", [name for name in choose.BACKENDS if name not in choose.UNAVAILABLE])
@pytest.mark.parametrize("name", ["k", "v"])
def test_mismatches_after_a_good_call(backend, name) -> None:
    good = dict(zip("qkv", tensors(), strict=True))
    for bad in (good[name].double(), good[name].half(), good[name].to("meta"), good[name][:, :, 1:]):
        attention(**good, backend=backend)
        with pytest.raises((TypeError, ValueError), match=r"[kv] takes .*, got"):
            attention(**good | {name: bad}, backend=backend)


def test_nested_and_sparse_tensors() -> None:
    q, k, v = tensors()
    nested = torch.nested.nested_tensor([torch.randn(4, n, 16) for n in (3, 5)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"q takes a strided tensor.*heedful\.Documents"):
        attention(nested, k, v)
    with pytest.raises(TypeError, match="k takes a strided tensor"):
        attention(q, k.to_sparse(), v)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scale_value(value) -> None:
    refused(ValueError, ["scale takes a finite number", str(value)], *tensors(), scale=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_softcap_value(value) -> None:
    refused(ValueError, ["softcap takes a positive finite number", str(value)], *tensors(), softcap=value)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan, None])
def test_dropout_value(value) -> None:
    refused(ValueError, ["dropout_p takes a probability in [0, 1)", str(value)], *tensors(), dropout_p=value)


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p"])
@pytest.mark.parametrize("value", ["0.5", [0.5], torch.tensor(0.5), 1j], ids=repr)
def test_numbers_that_are_none(name, value) -> None:
    refused(TypeError, [f"{name} takes a number"], *tensors(), **{name: value})


@pytest.mark.parametrize("name", ["causal", "return_lse"])
@pytest.mark.parametrize("value", [None, "yes", [True]], ids=repr)
def test_flags_that_are_none(name, value) -> None:
    refused(TypeError, [f"{name} takes a bool", repr(value)], *tensors(), **{name: value})


@pytest.mark.parametrize("value", [None, "dense", [True]], ids=repr)
def test_return_weights(value) -> None:
    refused(ValueError, ["return_weights takes True, False or 'sparse'", repr(value)], *tensors(), return_weights=value)


@pytest.mark.parametrize("value", ["BHLD", "bshd", None, ["bhld"]], ids=repr)
def test_layout(value) -> None:
    refused(ValueError, ["layout takes 'bhld' or 'blhd'", repr(value)], *tensors(), layout=value)


@pytest.mark.parametrize("value", ["cuda", "", 3, ["sdpa"]], ids=repr)
def test_unknown_backend(value) -> None:
    refused(
        ValueError,
        ["backend takes None or one of 'native', 'triton', 'sdpa', 'reference'", repr(value)],
        *tensors(),
        backend=value,
    )


@pytest.mark.parametrize("value", [Causal, "causal", 5, [Causal()]], ids=repr)
def test_pattern_that_is_none(value) -> None:
    refused(TypeError, ["pattern takes a heedful.Pattern"], *tensors(), pattern=value)


def test_float_mask_as_pattern() -> None:
    refused(TypeError, ["pattern takes", "float mask goes to bias="], *tensors(), pattern=torch.zeros(7, 9))


@pytest.mark.parametrize("shape", [(7, 8), (6, 9), (3, 7, 9), (3, 1, 7, 9), (1, 2, 4, 7, 9)], ids=str)
def test_mask_that_does_not_broadcast(shape) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    if len(shape) <= 4:
        refused(
            ValueError, ["pattern takes a shape that broadcasts to (2, 4, 7, 9)", str(shape)], *tensors(), pattern=mask
        )
        refused(ValueError, ["broadcasts to (2, 4, 7, 9)", str(shape)], *tensors(), pattern=Mask(mask))
    else:
        refused(ValueError, ["at most 4 dimensions"], *tensors(), pattern=mask)


@pytest.mark.parametrize("shape", [(7, 8), (6, 9), (3, 7, 9), (3, 1, 7, 9), (1, 2, 4, 7, 9), (8,)], ids=str)
def test_bias_that_does_not_broadcast(shape) -> None:
    words = ["bias takes a shape that broadcasts to (B, H, Lq, Lk) = (2, 4, 7, 9)", str(shape)]
    refused(ValueError, words, *tensors(), bias=torch.zeros(shape))


@pytest.mark.parametrize(
    ("bias", "error", "words"),
    [
        (torch.ones(7, 9) > 0, TypeError, ["a bool mask is pattern=heedful.Mask(mask)"]),
        (torch.zeros(7, 9, dtype=torch.float64), TypeError, ["q's dtype", "torch.float64"]),
        (torch.zeros(7, 9, dtype=torch.int32), TypeError, ["q's dtype", "torch.int32"]),
        (torch.zeros(7, 9, device="meta"), ValueError, ["q's device, cpu", "meta"]),
        (0.5, TypeError, ["a float tensor", "0.5"]),
    ],
    ids=["bool", "float64", "int32", "meta", "float"],
)
def test_bias_of_a_wrong_kind(bias, error, words) -> None:
    refused(error, ["bias takes", *words], *tensors(), bias=bias)


@pytest.mark.parametrize(
    ("name", "shapes"), [("alibi_slopes", [(), (3,), (2, 3), (3, 4), (1, 4), (4, 1, 1)]), ("sinks", [(), (3,), (2, 4)])]
)
def test_per_head_values(name, shapes) -> None:
    for shape in shapes:
        refused(ValueError, [f"{name} takes shape", str(shape)], *tensors(), **{name: torch.zeros(shape)})
    refused(TypeError, [f"{name} takes q's dtype"], *tensors(), **{name: torch.zeros(4, dtype=torch.float64)})
    refused(TypeError, [f"{name} takes a float tensor"], *tensors(), **{name: [0.0] * 4})
    refused(ValueError, [f"{name} takes q's device"], *tensors(), **{name: torch.zeros(4, device="meta")})


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SlidingWindow(-1), ["left takes", "-1"]),
        (lambda: SlidingWindow(1, -2), ["right takes", "-2"]),
        (lambda: Dilated(-1, 2), ["radius takes", "-1"]),
        (lambda: Dilated(1, 0), ["step takes", "0"]),
        (lambda: Chunked(0), ["size takes", "0"]),
        (lambda: Prefix(-1), ["n takes", "-1"]),
        (lambda: Documents(torch.tensor([1, 7])), ["cu_q takes 0 as its first element", "1"]),
        (lambda: Documents(torch.tensor([0, 5, 3])), ["cu_q takes elements that never decrease"]),
    ],
)
def test_patterns_refuse_when_they_are_made(build, words) -> None:
    with pytest.raises(ValueError, match=words[0]) as raised:
        build()
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (Documents(torch.tensor([0, 3, 6]), torch.tensor([0, 4, 9])), ["cu_q takes", "7", "6"]),
        (Documents(torch.tensor([0, 3, 7]), torch.tensor([0, 4, 8])), ["cu_k takes", "9", "8"]),
        (Documents(torch.tensor([0, 3, 7])), ["cu_k", "9", "7"]),
        (Causal(torch.tensor([1, 2, 3])), ["offset takes", "2 here", "(3,)"]),
        (Padding(torch.zeros(3, dtype=torch.int32), torch.ones(3, dtype=torch.int32)), ["start takes", "(3,)"]),
        (BlockSparse(torch.ones(2, 2, dtype=torch.bool), 4), ["blocks takes", "(2, 4, 2, 3)", "(2, 2)"]),
        (Causal() & Mask(torch.ones(7, 8, dtype=torch.bool)), ["tensor takes", "(2, 4, 7, 9)", "(7, 8)"]),
    ],
    ids=repr,
)
def test_patterns_that_do_not_fit_the_call(pattern, words) -> None:
    refused(ValueError, words, *tensors(), pattern=pattern)


def test_unknown_argument() -> None:
    q, k, v = attention_inputs()
    for name in ("is_causal", "attn_mask"):
        with pytest.raises(TypeError, match=name):
            attention(q, k, v, **{name: None})
