"""What heedful.numpy takes as an array, what it copies, in which precision it computes, and what it refuses."""

from __future__ import annotations

import array as buffers
import importlib.util
import sys

import numpy as np
import pytest
import torch
from numpy_arrays import array, check, wanted

import heedful
from heedful.numpy import Attention, MFAError, attention, last_call
from heedful.numpy.arrays import cast, given, widened

needs_ml_dtypes = pytest.mark.skipif(importlib.util.find_spec("ml_dtypes") is None, reason="ml_dtypes is not installed")


@pytest.fixture(autouse=True)
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def qkv(rng, shape=(9, 2, 8), dtype="float32"):
    return [array(rng, shape, dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_torch_tensors(rng, dtype):
    q, k, v = (torch.from_numpy(x).to(dtype) for x in qkv(rng))
    plain = attention(q.numpy(), k.numpy(), v.numpy())
    for _ in range(2):
        found = attention(q, k, v)
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, plain)
        assert last_call().zero_copy
        out = torch.full((9, 8, 2), torch.nan, dtype=dtype).transpose(1, 2)
        assert attention(q, k, v, out=out) is out
        assert last_call().zero_copy
        np.testing.assert_array_equal(out.numpy(), plain)
    mask = torch.rand(9, 9) < 0.5
    np.testing.assert_array_equal(attention(q, k, v, attn_mask=mask), attention(q, k, v, attn_mask=mask.numpy()))


def test_bfloat16_through_dlpack(rng):
    q, k, v = (torch.from_numpy(x).bfloat16().transpose(0, 1).contiguous().transpose(0, 1) for x in qkv(rng))
    turned = [t.transpose(0, 1)[None] for t in (q, k, v)]
    out = torch.full_like(q, torch.nan)
    assert attention(q, k, v, out=out, causal=True) is out
    assert last_call().zero_copy
    same = heedful.attention(*turned, causal=True, backend="native")
    assert torch.equal(out.transpose(0, 1)[None], same)
    wide = attention(q, k, v, output_precision="fp32", causal=True, return_lse=True)
    assert wide.out.dtype == np.float32
    assert list(last_call().copied) == ["q", "k", "v"]
    check(wide, wanted(*(t.float().numpy() for t in (q, k, v)), causal=True))
    assert torch.equal(q, turned[0][0].transpose(0, 1))
    assert q.dtype == torch.bfloat16
    bias = torch.randn(9, 9).bfloat16()
    attention(q, k, v, out=out, attn_mask=bias)
    assert last_call().zero_copy
    same = heedful.attention(*turned, bias=bias, backend="native")
    assert torch.equal(out.transpose(0, 1)[None], same)


def test_bfloat16_results_need_a_dtype(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    q = torch.randn(3, 8).bfloat16()
    with pytest.raises(TypeError, match=r"output_precision takes 'fp32' or .* got bfloat16 and no out="):
        attention(q, q, q)
    with pytest.raises(TypeError, match="output_precision takes"):
        attention(*qkv(rng), output_precision="bf16")
    assert attention(q, q, q, output_precision="fp16").dtype == np.float16


@needs_ml_dtypes
def test_ml_dtypes(rng):
    import ml_dtypes

    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in qkv(rng))
    tensors = [torch.from_numpy(x.astype(np.float32)).bfloat16().transpose(0, 1)[None] for x in (q, k, v)]
    same = heedful.attention(*tensors, causal=True, backend="native")[0].transpose(0, 1).float().numpy()
    for _ in range(2):
        found = attention(q, k, v, causal=True)
        assert found.dtype == ml_dtypes.bfloat16
        assert last_call().zero_copy
        np.testing.assert_array_equal(found.astype(np.float32), same)
        out = np.full((2, 9, 8), np.nan, ml_dtypes.bfloat16).swapaxes(0, 1)
        both = attention(q, k, v, causal=True, out=out, return_weights=True)
        assert both.out is out
        assert both.weights.dtype == ml_dtypes.bfloat16
        assert last_call().zero_copy
        np.testing.assert_array_equal(out.astype(np.float32), same)
    rounded = attention(*(x.astype(np.float32) for x in (q, k, v)), causal=True, input_precision=ml_dtypes.bfloat16)
    np.testing.assert_array_equal(rounded, found)
    halves = attention(*qkv(rng), output_precision="bf16", return_weights=True)
    assert halves.out.dtype == halves.weights.dtype == ml_dtypes.bfloat16
    patterned = attention(q, k, v, attn_mask=np.zeros((9, 9), ml_dtypes.bfloat16))
    assert last_call().zero_copy
    np.testing.assert_array_equal(patterned, attention(q, k, v))


def test_bfloat16_rounding_is_torchs():
    numbers = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e-40])])
    halves = (torch.randint(0x3F80, 0x4080, (100,)) * 65536 + 32768).int().view(torch.float32)
    numbers = torch.cat([numbers, halves, -halves])
    bits = cast(given("x", numbers.numpy()), "bfloat16").array
    np.testing.assert_array_equal(bits, numbers.bfloat16().view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(widened(bits), numbers.bfloat16().float().numpy())
    assert np.isnan(widened(cast(given("x", np.array([np.nan, -np.nan])), "bfloat16").array)).all()


def test_buffers(rng):
    q, k, v = qkv(rng)
    plain = attention(q, k, v)
    for export in (memoryview, Interface, Convertible):
        np.testing.assert_array_equal(attention(*map(export, (q, k, v))), plain)
        assert last_call().zero_copy
    out = np.empty_like(plain)
    view = memoryview(out)
    assert attention(q, k, v, out=view) is view
    np.testing.assert_array_equal(out, plain)
    numbers = buffers.array("f", q.ravel().tolist())
    flat = memoryview(numbers).cast("B").cast("f", (9, 2, 8))
    np.testing.assert_array_equal(attention(flat, k, v), plain)


class Interface:
    def __init__(self, of: np.ndarray) -> None:
        self.__array_interface__ = of.__array_interface__
        self.of = of


class Convertible:
    def __init__(self, of: np.ndarray) -> None:
        self.of = of

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.of


def test_other_byte_orders_and_alignments_are_copied(rng):
    q, k, v = qkv(rng)
    plain = attention(q, k, v)
    swapped = q.astype(">f4")
    packed = np.zeros(9, [("pad", "u1"), ("q", "f4", (2, 8))])
    packed["q"] = q
    for _ in range(2):
        for other, why in (
            (swapped, "in another byte order"),
            (unaligned(q), "not aligned"),
            (packed["q"], "not aligned"),
        ):
            np.testing.assert_array_equal(attention(other, k, v), plain)
            assert dict(last_call().copied) == {"q": why}
            np.testing.assert_array_equal(attention(q, other, v, causal=True), attention(q, q, v, causal=True))
    for out, why in ((np.empty(q.shape, ">f4"), "in another byte order"), (unaligned(q), "not aligned")):
        assert attention(q, k, v, out=out) is out
        assert dict(last_call().copied) == {"out": why}
        np.testing.assert_array_equal(out.astype("f4"), plain)


def unaligned(x: np.ndarray) -> np.ndarray:
    memory = np.zeros(x.nbytes + 1, np.uint8)
    found = memory[1:].view(x.dtype).reshape(x.shape)
    found[...] = x
    return found


def test_an_unaligned_array_of_a_known_kind(rng):
    q, k, v = qkv(rng)
    plain = attention(q, k, v)
    masked = attention(q, k, v, attn_mask=np.zeros((9, 9), np.float32))
    np.testing.assert_array_equal(attention(q, unaligned(k), v), plain)
    assert dict(last_call().copied) == {"k": "not aligned"}
    other = unaligned(np.zeros((9, 9), np.float32))
    np.testing.assert_array_equal(attention(q, k, v, attn_mask=other), masked)
    assert dict(last_call().copied) == {"attn_mask": "not aligned"}


def test_out_that_is_an_input(rng):
    for shape in ((9, 2, 8), (300, 2, 8)):
        q, k, v = qkv(rng, shape)
        plain = attention(q, k, v, out=np.empty_like(q))
        for _ in range(2):
            for place in range(3):
                inputs = [x.copy() for x in (q, k, v)]
                attention(*inputs, out=inputs[place])
                np.testing.assert_array_equal(inputs[place], plain)
                assert dict(last_call().copied) == {"out": "shares memory with what is read"}


@pytest.mark.parametrize("read", [None, "fp16", "fp32", "fp64", "bf16"])
@pytest.mark.parametrize("written", [None, "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("own", ["float16", "float32", "float64"])
def test_precisions(rng, own, read, written):
    names = {"fp16": "float16", "fp32": "float32", "fp64": "float64", "bf16": "bfloat16"}
    if read == "bf16" and written is None:
        written = "fp32"
    q, k, v = qkv(rng, dtype=own)
    used_as = names.get(read, own)
    rounded = [torch.from_numpy(x).to(getattr(torch, used_as)) for x in (q, k, v)]
    final = names.get(written, used_as)
    wide = torch.float64 if "float64" in (used_as, final) else torch.float32 if used_as != final else None
    same = [x if wide is None else x.to(wide) for x in rounded]
    found = attention(q, k, v, input_precision=read, output_precision=written, causal=True, return_lse=True)
    turned = [x.transpose(0, 1)[None] for x in same]
    want = heedful.attention(*turned, causal=True, backend="native", return_lse=True)
    assert found.out.dtype == final
    np.testing.assert_array_equal(found.out, want.out[0].transpose(0, 1).to(getattr(torch, final)).numpy())
    np.testing.assert_array_equal(found.lse, want.lse[0].numpy())
    cast_inputs = used_as != own or wide not in (None, getattr(torch, used_as))
    assert ({"q", "k", "v"} <= last_call().copied.keys()) == cast_inputs
    assert ("out" in last_call().copied) == (wide is not None and final != str(wide).removeprefix("torch."))
    for out in (np.empty(q.shape, final), np.empty((2, 9, 8), final).swapaxes(0, 1)):
        kept = attention(q, k, v, input_precision=read, output_precision=written, causal=True, out=out)
        assert kept is out
        np.testing.assert_array_equal(out, found.out)


def test_out_decides_the_output_precision(rng):
    q, k, v = qkv(rng, dtype="float16")
    out = np.empty(q.shape, np.float32)
    attention(q, k, v, out=out)
    np.testing.assert_array_equal(out, attention(q, k, v, output_precision="fp32"))
    assert not np.array_equal(out, attention(q, k, v))


def test_weights_are_of_the_output_precision(rng):
    q, k, v = qkv(rng)
    found = attention(q, k, v, output_precision=np.float16, return_weights=True)
    assert isinstance(found, Attention)
    assert found.lse is None
    assert found.weights.dtype == np.float16
    exact = attention(q, k, v, return_weights=True)
    np.testing.assert_array_equal(found.weights, exact.weights.astype(np.float16))
    out = np.empty(q.shape, np.float16)
    again = attention(q, k, v, out=out, return_weights=True)
    np.testing.assert_array_equal(again.weights, found.weights)


def test_intermediate_precision(rng):
    q, k, v = qkv(rng, dtype="float16")
    plain = attention(q, k, v)
    for exact in ("fp32", np.float32, None):
        np.testing.assert_array_equal(attention(q, k, v, intermediate_precision=exact), plain)
    for coarse in ("fp16", "bf16", "fp64"):
        with pytest.raises(ValueError, match="intermediate_precision takes 'fp32' or None here: sums and softmax of"):
            attention(q, k, v, intermediate_precision=coarse)
    double = [x.astype(np.float64) for x in (q, k, v)]
    attention(*double, intermediate_precision="fp64")
    with pytest.raises(ValueError, match="intermediate_precision takes 'fp64' or None here"):
        attention(*double, intermediate_precision="fp32")


def ones(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, dtype)


REFUSED = [
    ({"q": ones(8)}, ValueError, r"q takes \(S, D\) or \(S, H, D\) or \(B, S, H, D\), got shape \(8,\)"),
    ({"q": ones(1, 1, 3, 2, 8)}, ValueError, r"q takes \(S, D\) or"),
    ({"k": ones(3, 8)}, ValueError, r"k takes as many dimensions as q, \(S, H, D\), got shape \(3, 8\)"),
    ({"k": ones(3, 2, 7)}, ValueError, "k takes q's head dim, 8, got head dim 7"),
    ({"v": ones(4, 2, 8)}, ValueError, "v takes k's length, 3, got length 4"),
    ({"v": ones(3, 1, 8)}, ValueError, "v takes as many heads as k, 2, got 1 heads"),
    ({"v": ones(3, 2, 0)}, ValueError, "v takes 1 or more, got head dim 0"),
    ({"k": ones(3, 3, 8), "v": ones(3, 3, 8)}, ValueError, "k takes a number of heads that divides q's, 2"),
    ({"q": ones(1, 3, 2, 8), "k": ones(2, 3, 2, 8), "v": ones(2, 3, 2, 8)}, ValueError, "k takes q's batch, 1"),
    ({"k": ones(3, 2, 8, dtype="float16")}, TypeError, "k takes q's dtype, float32; input_precision= casts all three"),
    ({"q": ones(3, 2, 8, dtype="int64")}, TypeError, "q takes float16, .* got dtype int64"),
    ({"v": ones(3, 2, 8, dtype="complex64")}, TypeError, "v takes float16, .* got dtype complex64"),
    ({"v": ones(3, 2, 8, dtype="longdouble")}, TypeError, "v takes float16, .* got dtype float128"),
    ({"q": [[1.0, 2.0]]}, TypeError, "q takes a numpy array, or what exports DLPack or a buffer, got"),
    ({"q": None}, TypeError, "q takes a numpy array, .* got None"),
    ({"k": np.ma.ones((3, 2, 8))}, TypeError, "k takes an array without a mask; .* got a masked array"),
    ({"q": torch.ones(3, 2, 8, requires_grad=True)}, TypeError, "q takes .* got an array that cannot be shared"),
    ({"q": torch.ones(3, 2, 8, device="meta")}, (TypeError, ValueError), "meta|q takes"),
    ({"q": torch.ones(3, 2, 8, dtype=torch.int32)}, TypeError, "q takes float16, .* got dtype int32"),
    ({"causal": "yes"}, TypeError, "causal takes a bool, got 'yes'"),
    ({"window": -1}, ValueError, "left takes an int from 0"),
    ({"window": 2.5}, TypeError, r"window takes an int, the radius, or a pair \(left, right\) .* got 2.5"),
    ({"window": True}, TypeError, "window takes an int"),
    ({"window": (1, 2, 3)}, ValueError, r"window takes a radius or a pair \(left, right\), got \(1, 2, 3\)"),
    ({"pattern": "causal"}, TypeError, "pattern takes a heedful.Pattern .* got 'causal'"),
    ({"pattern": heedful.Causal}, TypeError, "pattern takes a heedful.Pattern"),
    ({"pattern": ones(3, 3)}, TypeError, "tensor takes a bool tensor, .* got a float32 array"),
    ({"pattern": heedful.Padding(0, np.array([1, 2]))}, ValueError, "stop takes one element or one per batch item"),
    ({"attn_mask": ones(3, 3, dtype="int64")}, TypeError, "attn_mask takes bool .* or floats .* got dtype int64"),
    ({"attn_mask": ones(3, 4)}, ValueError, r"attn_mask takes a shape that broadcasts to .* \(1, 2, 3, 3\), got"),
    ({"attn_mask": ones(3, 4, dtype="bool")}, ValueError, "attn_mask takes a shape that broadcasts to"),
    ({"attn_mask": ones(1, 1, 1, 3, 3)}, ValueError, "attn_mask takes a shape that broadcasts to"),
    ({"attn_mask": "causal"}, TypeError, "attn_mask takes a numpy array"),
    ({"alibi_slopes": ones(3)}, ValueError, r"alibi_slopes takes shape \(2,\) or shape \(1, 2\), got shape \(3,\)"),
    ({"sinks": ones(1, 2)}, ValueError, r"sinks takes shape \(2,\), got shape \(1, 2\)"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale takes a finite number"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale takes a number"),
    ({"softcap": 0}, ValueError, "softcap takes a positive finite number"),
    ({"input_precision": "int8"}, ValueError, "input_precision takes 'fp16', .* got 'int8'"),
    ({"input_precision": np.int32}, ValueError, "input_precision takes 'fp16'"),
    ({"output_precision": 7}, ValueError, "output_precision takes 'fp16', .* got 7"),
    ({"return_weights": "sparse"}, ValueError, "return_weights takes True or False, got 'sparse'"),
    ({"out": ones(3, 2, 7)}, ValueError, r"out takes shape \(3, 2, 8\), got shape \(3, 2, 7\)"),
    ({"out": ones(2, 3, 8)}, ValueError, r"out takes shape \(3, 2, 8\)"),
    ({"out": ones(3, 2, 8, dtype="int32")}, ValueError, "out takes 'fp16'"),
    ({"out": ones(3, 2, 8), "output_precision": "fp16"}, TypeError, "out takes output_precision, float16, got dtype"),
    (
        {"out": np.broadcast_to(ones(2, 8), (3, 2, 8))},
        ValueError,
        "out takes an array that can, got memory that cannot",
    ),
    ({"out": np.lib.stride_tricks.as_strided(ones(2, 8), (3, 2, 8), (0, 32, 4))}, ValueError, "share memory"),
    ({"out": [1.0]}, TypeError, "out takes a numpy array"),
    ({"context": 3}, TypeError, "context takes a heedful.numpy.Context, got a int"),
]


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_bad_input_is_refused(changed, error, message):
    arguments = {"q": ones(3, 2, 8), "k": ones(3, 2, 8), "v": ones(3, 2, 8)} | changed
    q, k, v = (arguments.pop(name) for name in "qkv")
    before = np.array(arguments["out"]) if "out" in arguments else None
    for _ in range(2):
        with pytest.raises(error, match=message):
            attention(q, k, v, **arguments)
        attention(ones(3, 2, 8), ones(3, 2, 8), ones(3, 2, 8))
    if before is not None:
        np.testing.assert_array_equal(arguments["out"], before)


def test_what_the_engine_refuses_has_its_code():
    wide = ones(3, 1, 600)
    for _ in range(2):
        with pytest.raises(MFAError, match=r"head dim: is 600, takes 1 to 512 \(status 2\)") as caught:
            attention(wide, wide, wide)
        assert (caught.value.code, caught.value.message) == (2, "head dim: is 600, takes 1 to 512")
