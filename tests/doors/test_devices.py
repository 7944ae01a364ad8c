"""Doors on tensors that are not on the CPU, on torch's device "meta", for which a backend is invented: which way calls
take, what is handed on, and that operands are moved there once."""

import logging
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

import heedful
from heedful import choose
from heedful.backend.base import Backend
from heedful.patterns import moved
from heedful.problem import Attention, Problem
from heedful.sdpa import call as door
from heedful.sdpa import elsewhere, record

META = torch.device("meta")


class Imaginary(Backend):
    """Runs on "meta" what the sizes of a call decide, and notes what it was given."""

    name = "imaginary"
    devices = frozenset({"meta"})
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32})
    max_head_dim = 256
    features = frozenset({"bias", "alibi", "softcap", "sinks", "lse", "paged"})
    gradient = True

    def __init__(self):
        self.calls, self.shortcuts, self.operands = [], 0, []

    def run(self, call):
        self.calls.append(call)
        self.operands.append(call.pattern.operands(call.problem.q_length, call.problem.k_length, call.query.device))
        return Attention(_out(call.query, call.value), call.query.new_empty(call.query.shape[:3]), None)

    def shortcut(self, call):
        def run(q, k, v, operands, *extras):
            self.shortcuts += 1
            return _out(q, v)

        return run


def _out(query, value):
    return query.new_empty(*query.shape[:3], value.shape[3]) + 0 * query.sum()


@pytest.fixture
def imaginary(monkeypatch):
    backend = Imaginary()
    before = dict(choose.BACKENDS)
    choose.BACKENDS.clear()
    choose.BACKENDS.update({backend.name: backend, **before})
    heedful.clear_caches()
    yield backend
    choose.BACKENDS.clear()
    choose.BACKENDS.update(before)
    heedful.clear_caches()


def inputs(*shape, dtype=torch.float32, **options):
    return [torch.empty(shape or (2, 4, 17, 16), dtype=dtype, device=META, **options) for _ in range(3)]


def test_attention_runs_there(imaginary):
    q, k, v = inputs()
    assert heedful.attention(q, k, v, causal=True).device == META
    assert len(imaginary.calls) == 1
    heedful.attention(q, k, v, causal=True)
    assert (len(imaginary.calls), imaginary.shortcuts) == (1, 1)
    assert heedful.explain(q, k, v).backend == "imaginary"


def test_a_mask_on_the_host_is_moved_at_every_call(imaginary):
    q, k, v = inputs()
    for _ in range(3):
        heedful.attention(q, k, v, pattern=torch.ones(17, 17, dtype=torch.bool))
    assert (len(imaginary.calls), imaginary.shortcuts) == (3, 0)
    assert [operand.device for (operand,) in imaginary.operands] == [META] * 3


def test_what_no_backend_of_the_device_supports_is_pytorchs_and_said(imaginary, caplog):
    q, k, v = inputs(dtype=torch.float64)
    choose._logged.clear()
    with caplog.at_level(logging.WARNING, "heedful"):
        assert heedful.attention(q, k, v).dtype == torch.float64
    assert "runs on sdpa" in caplog.text
    assert heedful.explain(q, k, v).reasons["imaginary"] == ["takes bfloat16, float16, float32, not float64"]
    assert not imaginary.calls


@pytest.mark.parametrize("features", [frozenset(), frozenset({"bias"}), frozenset({"gradient"})])
def test_mps_takes_pytorchs(features):
    schedule = heedful.Causal().schedule
    problem = Problem(1, 2, 2, 64, 64, 32, 32, torch.float16, "mps", schedule, features)
    found = choose.reasons(problem)
    assert choose.decide(problem, None, found).name == "sdpa"
    assert found["native"] == ["takes cpu tensors, not mps"]
    assert elsewhere.ours(problem) == "heedful has no backend of its own for mps tensors"


def test_mps_refuses_what_pytorchs_cannot():
    problem = Problem(1, 2, 2, 8, 8, 32, 32, torch.float16, "mps", heedful.Causal().schedule, frozenset({"softcap"}))
    with pytest.raises(heedful.UnsupportedError, match="no backend can run this call"):
        choose.choose(problem)


@contextmanager
def recorded():
    with record.recording() as calls:
        yield calls


@pytest.mark.parametrize(
    ("options", "features", "pattern"),
    [
        ({}, set(), heedful.Full()),
        ({"is_causal": True}, set(), heedful.Causal(0)),
        ({"scale": 0.3}, set(), heedful.Full()),
        ({"attn_mask": torch.empty(17, 17, dtype=torch.bool, device=META)}, set(), heedful.Mask),
        ({"attn_mask": torch.empty(17, 17, device=META)}, {"bias"}, heedful.Full()),
    ],
)
@pytest.mark.parametrize("function", ["own", "public"])
def test_the_sdpa_door_hands_on(imaginary, options, features, pattern, function):
    q, k, v = inputs()
    if function == "own":
        out = heedful.scaled_dot_product_attention(q, k, v, **options)
        again = heedful.scaled_dot_product_attention(q, k, v, **options)
    else:
        with heedful.activate():
            out = F.scaled_dot_product_attention(q, k, v, **options)
            again = F.scaled_dot_product_attention(q, k, v, **options)
    assert out.shape == again.shape == (2, 4, 17, 16)
    assert out.device == META
    masked = "attn_mask" in options
    assert len(imaginary.calls) + imaginary.shortcuts == 2
    if imaginary.calls:
        seen = imaginary.calls[0]
        assert seen.problem.features == features
        assert isinstance(seen.pattern, pattern) if isinstance(pattern, type) else seen.pattern == pattern
        assert seen.scale == options.get("scale", 0.25)
    assert masked or imaginary.shortcuts == 1


@pytest.mark.parametrize("shape", [(17, 16), (4, 17, 16), (2, 3, 4, 17, 16)])
def test_other_ranks(imaginary, shape):
    q, k, v = inputs(*shape)
    assert heedful.scaled_dot_product_attention(q, k, v).shape == shape
    assert len(imaginary.calls) == 1
    assert imaginary.calls[0].query.ndim == 4


def test_memory_order_is_the_querys(imaginary):
    q, k, v = (t.transpose(1, 2) for t in inputs(2, 17, 4, 16))
    out = heedful.scaled_dot_product_attention(q, k, v)
    assert out.shape == (2, 4, 17, 16)
    assert imaginary.calls[0].blhd


def test_grouped_heads(imaginary):
    q, _, _ = inputs(2, 4, 17, 16)
    _, k, v = inputs(2, 2, 9, 16)
    assert heedful.scaled_dot_product_attention(q, k, v, enable_gqa=True).shape == (2, 4, 17, 16)
    assert imaginary.calls[0].problem.kv_heads == 2


def test_gradients_reach_it(imaginary):
    q, k, v = inputs(requires_grad=True)
    for _ in range(2):
        heedful.scaled_dot_product_attention(q, k, v)
    assert imaginary.calls[0].problem.features == {"gradient"}
    with torch.no_grad():
        heedful.scaled_dot_product_attention(q, k, v)
    assert imaginary.calls[1].problem.features == set()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float64}, "heedful's imaginary backend takes bfloat16, float16, float32, not float64"),
        ({"dim": 512}, "heedful's imaginary backend takes a head dim up to 256, not 512"),
        ({"dropout_p": 0.5}, "heedful's imaginary backend does not support dropout"),
    ],
)
def test_what_is_left_to_pytorch_has_its_reason(imaginary, change, why):
    dtype, dim = change.get("dtype", torch.float32), change.get("dim", 16)
    q, k, v = inputs(2, 4, 17, dim, dtype=dtype)
    found = door.attend(q, k, v, None, change.get("dropout_p", 0.0), False, None, False)
    assert isinstance(found, str)
    assert found.startswith(why)
    assert door.attend(q, k, v, None, change.get("dropout_p", 0.0), False, None, False) == found
    assert not imaginary.calls
    with heedful.activate(), record.recording() as calls:
        F.scaled_dot_product_attention(q, k, v, dropout_p=change.get("dropout_p", 0.0))
    (row,) = calls.rows()
    assert (row["taken"], row["what"]) == (False, found)


def test_without_a_backend_for_the_device():
    q, k, v = inputs()
    assert door.attend(q, k, v, None, 0.0, False, None, False) == "heedful has no backend of its own for meta tensors"


def test_a_backend_that_cannot_run_here(imaginary, monkeypatch):
    monkeypatch.setitem(choose.UNAVAILABLE, "imaginary", "there is no such device")
    q, k, v = inputs()
    why = "heedful's imaginary backend cannot run here: there is no such device"
    assert door.attend(q, k, v, None, 0.0, False, None, False) == why


def test_a_choice_by_measurement(imaginary, monkeypatch):
    from heedful.choose import BACKENDS

    monkeypatch.setattr(elsewhere, "decide", lambda *arguments: BACKENDS["sdpa"])
    q, k, v = inputs()
    assert door.attend(q, k, v, None, 0.0, False, None, False) == elsewhere.FASTER


def test_wrong_arguments_are_pytorchs(imaginary):
    q, k, v = inputs()
    mask = torch.empty(17, 17, dtype=torch.bool, device=META)
    assert isinstance(door.attend(q, k, v, mask, 0.0, True, None, False), str)
    assert isinstance(door.attend(q, k[..., :8], v, None, 0.0, False, None, False), str)
    assert (
        door.attend(q, torch.zeros(2, 4, 17, 16), v, None, 0.0, False, None, False)
        == "tensors are on different devices"
    )
    assert (
        door.attend(torch.zeros(2, 4, 17, 16), k, v, None, 0.0, False, None, False)
        == "tensors are on different devices"
    )
    assert not imaginary.calls


def test_another_kernel_of_pytorchs_is_heeded(imaginary):
    q, k, v = inputs()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "leaves out the flash kernel" in door.attend(q, k, v, None, 0.0, False, None, False)


def test_small_calls_on_the_cpu_say_nothing_of_other_devices(imaginary):
    here = [torch.randn(1, 1, 2, 16) for _ in range(3)]
    heedful.scaled_dot_product_attention(*here)
    heedful.scaled_dot_product_attention(*inputs(1, 1, 2, 16))
    assert len(imaginary.calls) + imaginary.shortcuts == 1


def test_compiled_calls_take_the_same_way(imaginary):
    q, k, v = inputs(1, 2, 16, 8)
    compiled = torch.compile(lambda q, k, v: heedful.scaled_dot_product_attention(q, k, v), backend="eager")
    assert compiled(q, k, v).device == META


def test_multihead_attention(imaginary):
    module = heedful.nn.MultiheadAttention(32, 4, batch_first=True, device=META)
    x = torch.empty(2, 9, 32, device=META)
    padding = torch.empty(2, 9, dtype=torch.bool, device=META)
    out, weights = module(x, x, x, key_padding_mask=padding, need_weights=False)
    assert out.device == META
    assert weights is None
    assert imaginary.calls[0].problem.device_type == "meta"


def test_ma_core_insists_on_the_devices_backend(monkeypatch):
    from heedful.nn import bare

    asked = []
    monkeypatch.setattr(bare, "attention", lambda q, *args, backend, **options: asked.append(backend) or q)
    module = heedful.nn.MACoreAttention(fallback_training=False)
    q = torch.randn(1, 3, 2, 8)
    module(q, q, q)
    module.eval()(q, q, q)
    assert asked == ["native", None]


def test_flash_attn_functions(imaginary):
    from heedful import flash_attn

    q, k, v = inputs(2, 17, 4, 16, dtype=torch.bfloat16)
    assert flash_attn.flash_attn_func(q, k, v, causal=True).shape == q.shape
    ends = torch.empty(4, dtype=torch.int32, device=META)
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    assert flash_attn.flash_attn_varlen_func(*packed, ends, ends, 17, 17).shape == packed[0].shape
    slopes = torch.empty(3, 4, device=META)
    assert flash_attn.flash_attn_varlen_func(*packed, ends, ends, 17, 17, alibi_slopes=slopes).shape == packed[0].shape
    assert [call.problem.device_type for call in imaginary.calls] == ["meta"] * 3
    assert all(operand.device == META for operands in imaginary.operands for operand in operands)


def test_varlen_with_pages(imaginary):
    from heedful import flash_attn

    q = torch.empty(30, 4, 16, device=META)
    pool = torch.empty(7, 16, 2, 16, device=META)
    ends = torch.empty(4, dtype=torch.int32, device=META)
    table = torch.empty(3, 2, dtype=torch.int32, device=META)
    out = flash_attn.flash_attn_varlen_func(q, pool, pool, ends, ends, 10, 32, block_table=table, causal=True)
    assert out.shape == q.shape
    (call,) = imaginary.calls
    assert call.pages.shape == (1, 6)


@pytest.mark.parametrize("kind", [{}, {"window": 20}, {"block_size": 8}])
def test_key_value_cache(imaginary, kind):
    cache = heedful.KVCache(**kind)
    for count in (9, 1, 1):
        q, k, v = inputs(2, 4, count, 16)
        assert heedful.attention(q, k, v, cache=cache, causal=True).shape == q.shape
    assert len(cache) == 11
    assert cache.key.device == META
    assert all(operand.device == META for operands in imaginary.operands for operand in operands)


@pytest.mark.parametrize("table", [False, True])
def test_decoding_without_reading_lengths(imaginary, table):
    from heedful import flash_attn

    lengths = torch.empty(2, dtype=torch.int32, device=META)
    q, k, v = inputs(2, 1, 4, 16)
    cache = torch.empty((6, 16, 4, 16) if table else (2, 64, 4, 16), device=META)
    blocks = torch.empty(2, 3, dtype=torch.int32, device=META) if table else None
    out = flash_attn.flash_attn_with_kvcache(
        q, cache, cache.clone(), k, v, cache_seqlens=lengths, block_table=blocks, causal=True
    )
    assert out.shape == q.shape
    (call,) = imaginary.calls
    assert call.problem.k_length == (48 if table else 64)


def test_operands_are_moved_once_and_follow_their_contents():
    moved.forget()
    starts = torch.tensor([0, 3], dtype=torch.int32)
    pattern = heedful.Padding(starts, starts + 5)
    (first, _), (second, _) = (pattern.operands(8, 8, META) for _ in range(2))
    assert first is second
    assert first.device == META
    starts[1] = 2
    assert pattern.operands(8, 8, META)[0] is not first
    starts.numpy()[0] = 1
    third = pattern.operands(8, 8, META)[0]
    assert pattern.operands(8, 8, META)[0] is third
    heedful.clear_caches()
    assert pattern.operands(8, 8, META)[0] is not third


def test_operands_made_of_ints_are_moved_once():
    moved.forget()
    pattern = heedful.BigBird(4, 3, 1, 1)
    (first,), (second,) = (pattern.operands(32, 32, META) for _ in range(2))
    assert first is second
    assert pattern.operands(64, 64, META)[0].shape[-1] == 16


def test_moved_operands_are_bounded(monkeypatch):
    moved.forget()
    monkeypatch.setattr(moved, "MOST_KEPT", 1000)
    masks = [torch.rand(20, 20) < 0.5 for _ in range(10)]
    for mask in masks:
        heedful.Mask(mask).operands(20, 20, META)
        assert moved._bytes == sum(found[0].nbytes for found in moved._kept.values()) <= 1000
    monkeypatch.setattr(moved, "_LARGEST", 100)
    one, other = (heedful.Mask(masks[-1]).operands(20, 20, META)[0] for _ in range(2))
    assert one is not other
    moved.forget()
    assert moved._bytes == 0
