"""heedful.activate: behind everything that PyTorch builds on scaled_dot_product_attention, and gone without a trace."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from sdpa_calls import (
    Call,
    calls,
    compare,
    engine_pays_always,  # noqa: F401
    make_mask,
    torch_sdpa,
)
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as early
from torch.utils.checkpoint import checkpoint

import heedful
from heedful.backend.native import prefer
from heedful.sdpa import activation, patched, record

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FAST_PATH = torch.ops.aten._native_multi_head_attention
pytestmark = [
    pytest.mark.usefixtures("engine_pays_always"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    operators = FLASH, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, FAST_PATH
    public = F.scaled_dot_product_attention
    kernels = [torch._C._dispatch_dump(operator.default.name()) for operator in operators]
    yield
    assert activation._depth == 0
    assert activation._hooks is None
    assert F.scaled_dot_product_attention is public
    assert kernels == [torch._C._dispatch_dump(operator.default.name()) for operator in operators]
    assert torch.nn.attention.current_flash_attention_impl() is None


def qkv(*lead, length=70, dim=16, dtype=torch.float32, requires_grad=False):
    return [torch.randn(*lead, length, dim).to(dtype).requires_grad_(requires_grad) for _ in range(3)]


def taken(function, *arguments):
    """What the function gives while heedful is active, and what was taken over: (what, backward), with counts."""
    with heedful.activate(), record.recording() as recorder:
        result = function(*arguments)
        rows = recorder.rows()
    assert not [row for row in rows if not row["taken"]], rows
    counts = {}
    for row in rows:
        kind = row["what"], row["backward"]
        counts[kind] = counts.get(kind, 0) + row["calls"]
    return result, counts


def close(found, wanted, tolerance=1e-4):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_nesting_and_restoring():
    before = F.scaled_dot_product_attention
    heedful.activate()
    inside = F.scaled_dot_product_attention
    assert inside is not before
    assert torch.nn.attention.current_flash_attention_impl() == "heedful"
    with heedful.activate():
        heedful.activate()
        heedful.deactivate()
        assert F.scaled_dot_product_attention is inside
    assert F.scaled_dot_product_attention is inside
    heedful.deactivate()
    assert F.scaled_dot_product_attention is before
    heedful.deactivate()
    with heedful.activate():
        assert F.scaled_dot_product_attention is inside
    assert F.scaled_dot_product_attention is before


def test_the_context_ends_once_and_at_errors():
    active = heedful.activate()
    with pytest.raises(ZeroDivisionError), active:
        raise ZeroDivisionError
    assert activation._depth == 0
    with heedful.activate(), active:
        pass
    assert activation._depth == 0


def test_an_activation_that_fails_leaves_nothing(monkeypatch):
    def broken():
        raise ImportError("no engine")

    monkeypatch.setattr(activation, "_limits", broken)
    with pytest.raises(ImportError, match="no engine"):
        heedful.activate()
    q, k, v = qkv(2, 3)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), torch_sdpa(q, k, v))


@example(Call(((2, 4, 17, 8),) * 3, mask="bool", mask_shape=(17, 17), options={"is_causal": True}, gradients=True))
@example(Call(((2, 4, 17, 8),) * 3, torch.bfloat16, "blhd", mask="padding", mask_shape=(2, 1, 1, 17), gradients=True))
@example(Call(((2, 4, 17, 8), (2, 2, 33, 8), (2, 2, 33, 8)), options={"enable_gqa": True}, gradients=True))
@example(Call(((2, 4, 17, 8),) * 3, mask="empty rows", mask_shape=(17, 17), gradients=True))
@example(Call(((2, 4, 17, 8),) * 3, memory="lbhd", mask="float32", mask_shape=(4, 17, 17), gradients=True))
@given(calls())
@settings(max_examples=100)
def test_as_pytorch(call):
    compare(lambda *a, **options: F.scaled_dot_product_attention(*a, **options), call, heedful.activate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("mask", "what"),
    [
        (None, "every pair"),
        ("causal", "causal"),
        ("band", "a mask that is a band"),
        ("padding", "a mask that is a band and padding of keys"),
        ("documents", "a mask read by tiles"),
        ("random", "a mask"),
        ("float", "a bias"),
    ],
)
def test_what_masks_are_taken_for(mask, what, dtype):
    length = 300
    inputs = qkv(1, 2, length=length, dtype=dtype, requires_grad=True)
    ones = torch.ones(length, length, dtype=torch.bool)
    document = torch.arange(length) // 70
    attn_mask = {
        None: None,
        "causal": ones.tril(),
        "band": ones.tril(3).triu(-20),
        "padding": (torch.arange(length) < 250)[None],
        "documents": document[:, None] == document,
        "random": torch.rand(length, length) < 0.5,
        "float": torch.randn(length, length).to(dtype),
    }[mask]

    def step(attn_mask):
        out = F.scaled_dot_product_attention(*inputs, attn_mask)
        return out.detach(), *torch.autograd.grad(out, inputs, out.detach())

    wanted = step(attn_mask)
    found, counts = taken(step, attn_mask)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}.get(dtype, 3e-2)
    close(found, wanted, tolerance)
    assert counts == {(what, False): 1, (what, True): 1}
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        as_float = torch.zeros(attn_mask.shape, dtype=dtype).masked_fill(~attn_mask, -torch.inf)
        found, counts = taken(step, as_float)
        close(found, wanted, tolerance)
        # PyTorch's float mask leaves no room for the answer that a random one deserves.
        what = "a bias" if mask == "random" else what
        assert counts == {(what, False): 1, (what, True): 1}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_transposed_mask(dtype):
    q, k, v = qkv(2, 3)
    mask = torch.ones(70, 70, dtype=torch.bool).triu().mT
    mask = mask if dtype == torch.bool else torch.zeros(70, 70).masked_fill(~mask, -torch.inf).T.contiguous().T
    assert mask.stride(1) != 1
    wanted = torch_sdpa(q, k, v, mask)
    found, counts = taken(lambda: F.scaled_dot_product_attention(q, k, v, mask))
    close(found, wanted)
    assert counts == {("a mask" if dtype == torch.bool else "a bias", False): 1}


def test_calls_that_pytorch_has_no_kernel_for():
    q, k, v = qkv(2, 3)
    cases = [
        lambda: F.scaled_dot_product_attention(q[0], k[0], v[0]),
        lambda: F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0], is_causal=True),
        lambda: F.scaled_dot_product_attention(q, k, v[..., :5]),
        lambda: F.scaled_dot_product_attention(q, k, v, torch.randn(3, 70, 70)[:, :1]),
        lambda: F.scaled_dot_product_attention(q[None], k[None], v[None]),
    ]
    for case in cases:
        torch.manual_seed(1)
        wanted = case()
        torch.manual_seed(1)
        found, counts = taken(case)
        close(found, wanted)
        assert counts == {(record.WRITTEN_OUT, False): 1}
    _, counts = taken(lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1))
    assert counts == {(record.WRITTEN_OUT, False): 1}


def test_forward_and_backward_on_either_side():
    """What the kernel saves suits PyTorch's backward, and the other way about, rows without a key included."""
    mask = make_mask("empty rows", (70, 70), torch.float32)
    inputs = qkv(2, 3, requires_grad=True)
    arriving = torch.randn(2, 3, 70, 16)

    def gradients(forward_active, backward_active):
        with heedful.activate() if forward_active else torch.enable_grad():
            out = F.scaled_dot_product_attention(*inputs, torch.zeros(70, 70).masked_fill(~mask, -torch.inf))
        with heedful.activate() if backward_active else torch.enable_grad():
            return torch.autograd.grad(out, inputs, arriving)

    wanted = gradients(False, False)
    for sides in ((True, False), (False, True), (True, True)):
        close(gradients(*sides), wanted)


def test_the_kernel_is_reached_by_other_names():
    q, k, v = qkv(2, 3)
    wanted = torch_sdpa(q, k, v)
    for function in (early, torch_sdpa, torch.ops.aten.scaled_dot_product_attention, lambda *a: FLASH(*a)[0]):
        found, counts = taken(function, q, k, v)
        close(found, wanted)
        assert counts == {("every pair", False): 1}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "error::torch.jit.TracerWarning")
def test_torchscript():
    class Layer(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = qkv(2, 3)
    wanted = torch_sdpa(q, k, v, is_causal=True)
    for make in (torch.jit.script, lambda layer: torch.jit.trace(layer, (q, k, v))):
        with heedful.activate():
            scripted = make(Layer())
        found, counts = taken(scripted, q, k, v)
        close(found, wanted)
        assert set(counts) == {("causal", False)}
        close(scripted(q, k, v), wanted)
    x = torch.randn(2, 70, 16)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    with heedful.activate(), record.recording():
        torch.jit.script(attention)(x, x, x)


def multihead(**options):
    torch.manual_seed(3)
    return nn.MultiheadAttention(16, 2, batch_first=True, **options)


EXCLUDED = ~torch.ones(70, 70, dtype=torch.bool).tril()
PADDED = torch.arange(70) >= torch.tensor([70, 50])[:, None]


@pytest.mark.parametrize(
    "masks",
    [{}, {"attn_mask": EXCLUDED}, {"key_padding_mask": PADDED}, {"attn_mask": EXCLUDED, "key_padding_mask": PADDED}],
    ids=["none", "causal", "padding", "both"],
)
@pytest.mark.parametrize("mode", ["train", "eval", "fast"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(mode, masks, need_weights):
    layer, x = multihead(), torch.randn(2, 70, 16)
    layer.train(mode == "train")

    def step():
        out, weights = layer(x, x, x, need_weights=need_weights, **masks)
        gradients = () if mode == "fast" else torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        return out.detach(), weights, *gradients

    with torch.set_grad_enabled(mode != "fast"):
        wanted = step()
        if need_weights and mode != "fast":
            with heedful.activate(), record.recording() as recorder:
                found = step()
                (row,) = recorder.rows()
            assert (row["taken"], row["what"], row["calls"]) == (False, record.WEIGHTS, 1)
        else:
            found, counts = taken(step)
            fast = {("the fast path of nn.MultiheadAttention", False)}
            assert set(counts) == fast if mode == "fast" else len(counts) == 2
    close(found, wanted)
    assert found[0].stride() == wanted[0].stride()


def test_multihead_attention_with_dropout_unbatched_and_cross():
    layer = multihead(dropout=0.2).train()
    x, y = torch.randn(2, 70, 16), torch.randn(2, 33, 16)
    _, counts = taken(lambda: layer(x, y, y, need_weights=False)[0].sum().backward())
    assert counts == {(record.WRITTEN_OUT, False): 1}
    layer.eval()
    for function in (
        lambda: layer(x, y, y, need_weights=False)[0],
        lambda: layer(x[0], y[0], y[0], need_weights=False)[0],
    ):
        wanted = function()
        found, _ = taken(function)
        close(found, wanted)


@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "fast"])
def test_transformer_encoder(mode, padded, mask):
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train(mode == "train")
    x = torch.randn(2, 70, 16)
    options = {"mask": None if mask is None else EXCLUDED, "src_key_padding_mask": PADDED if padded else None}
    with torch.set_grad_enabled(mode != "fast"):
        wanted = encoder(x, **options)
        found, counts = taken(lambda: encoder(x, **options))
    close(found, wanted)
    assert sum(counts.values()) == 2
    if mode == "fast" and padded and mask is None:
        # The fast path's zeros in the place of padding.
        assert (found[1, 50:] == 0).all()


def test_transformer_decoder():
    torch.manual_seed(3)
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 2)
    x, memory = torch.randn(2, 70, 16), torch.randn(2, 33, 16)

    def step():
        out = decoder(x, memory, tgt_mask=EXCLUDED, memory_key_padding_mask=PADDED[:, 37:])
        return out.detach(), *torch.autograd.grad(out.square().sum(), list(decoder.parameters()))

    wanted = step()
    found, counts = taken(step)
    close(found, wanted, 1e-3)
    assert sum(counts.values()) == 8


def test_the_fast_path_of_nested_tensors():
    layer = multihead().eval()
    x = torch.nested.nested_tensor([torch.randn(length, 16) for length in (5, 70, 1)])
    with torch.no_grad():
        wanted = layer(x, x, x, need_weights=False)[0]
        found, counts = taken(lambda: layer(x, x, x, need_weights=False)[0])
        assert counts == {("the fast path of nn.MultiheadAttention", False): 1}
        assert found.is_nested
        for mine, right in zip(found.unbind(), wanted.unbind(), strict=True):
            close(mine, right)
        with heedful.activate():
            # With weights it is PyTorch's.
            close(layer(x, x, x)[1], layer(x, x, x)[1])


def test_a_padded_item_of_nothing_else_is_no_nan_on_the_fast_path():
    """PyTorch's fast path gives NaN there, its other path what this gives."""
    layer, x = multihead().eval(), torch.randn(2, 70, 16)
    padding = torch.tensor([[False], [True]]).expand(2, 70)
    wanted = layer(x, x, x, need_weights=False, key_padding_mask=padding)[0].detach()
    with torch.no_grad():
        found, _ = taken(lambda: layer(x, x, x, need_weights=False, key_padding_mask=padding)[0])
    close(found, wanted)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_compile(backend, mask):
    torch._dynamo.reset()
    inputs = qkv(2, 3, requires_grad=True)
    attn_mask = make_mask("band", (70, 70), torch.float32)
    if mask != "bool":
        attn_mask = None if mask is None else torch.zeros(70, 70).masked_fill(~attn_mask, -torch.inf)

    def layer(q, k, v, attn_mask):
        return F.scaled_dot_product_attention(q * 2, k, v, attn_mask).relu()

    def step(function):
        out = function(*inputs, attn_mask)
        return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)

    wanted = step(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    found, counts = taken(step, compiled)
    close(found, wanted, 1e-3)
    what = "every pair" if mask is None else "a mask that is a band"
    assert counts == {(what, False): 1, (what, True): 1}
    close(step(compiled), wanted, 1e-3)


@pytest.mark.parametrize("lead", [(3,), ()])
@pytest.mark.parametrize("masked", [False, True])
def test_compile_of_calls_that_pytorch_has_no_kernel_for(lead, masked):
    torch._dynamo.reset()
    inputs = qkv(*lead, requires_grad=True)
    attn_mask = make_mask("band", (70, 70), torch.float32) if masked else None

    def step(function):
        out = function(*inputs, attn_mask)
        return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)

    compiled = torch.compile(lambda *a: F.scaled_dot_product_attention(*a), fullgraph=True, backend="aot_eager")
    wanted = step(torch_sdpa)
    found, counts = taken(step, compiled)
    close(found, wanted, 1e-3)
    assert counts == {(f"{record.WRITTEN_OUT}, in a compiled graph, counted once", False): 1}
    close(step(compiled), wanted, 1e-3)


def test_a_graph_compiled_before_is_taken_over_and_activations_share_graphs():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), backend=counter)
    q, k, v = qkv(2, 3)
    function(q, k, v)
    for _ in range(3):
        _, counts = taken(function, q, k, v)
        assert counts == {("causal", False): 1}
        function(q, k, v)
    assert counter.frame_count == 2
    torch._dynamo.reset()
    exported = torch.export.export(nn.MultiheadAttention(16, 2), (torch.randn(70, 2, 16),) * 3).module()
    assert exported(*(torch.randn(70, 2, 16),) * 3)[0].shape == (70, 2, 16)


def test_compiled_multihead_attention():
    torch._dynamo.reset()
    layer, x = multihead().eval(), torch.randn(2, 70, 16)

    def step():
        return layer(x, x, x, need_weights=False, attn_mask=EXCLUDED)[0]

    wanted = step()
    found, counts = taken(torch.compile(step, backend="aot_eager", fullgraph=True))
    close(found, wanted)
    assert sum(counts.values()) == 1


def test_checkpoint_autocast_inference_and_deepcopy():
    inputs = qkv(2, 3, requires_grad=True)
    mask = make_mask("band", (70, 70), torch.float32)
    call = lambda *a: F.scaled_dot_product_attention(*a, mask)  # noqa: E731
    wanted = torch.autograd.grad(call(*inputs).sum(), inputs)
    with heedful.activate():
        close(torch.autograd.grad(checkpoint(call, *inputs, use_reentrant=False).sum(), inputs), wanted)
        with torch.inference_mode():
            close(call(*(t.detach() for t in inputs)), call(*inputs).detach())
        with torch.autocast("cpu"):
            assert call(*inputs).dtype == torch.bfloat16
        with torch.autocast("cpu"):
            out, theirs = F.scaled_dot_product_attention(*inputs), torch_sdpa(*inputs)
        assert torch.equal(out, theirs)
        copied = copy.deepcopy(multihead().eval())
        assert copied(*(torch.randn(2, 70, 16),) * 3)[0].shape == (2, 70, 16)


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_causal_bias_and_default_device():
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k, v = qkv(2, 3)
    for bias in (causal_lower_right(60, 70), causal_upper_left(60, 70)):
        arguments = q[:, :, :60], k, v, bias
        wanted = F.scaled_dot_product_attention(*arguments)
        found, counts = taken(lambda arguments=arguments: F.scaled_dot_product_attention(*arguments))
        close(found, wanted)
        assert sum(counts.values()) == 1
    with torch.device("cpu"):
        _, counts = taken(lambda: F.scaled_dot_product_attention(q[0], k[0], v[0]))
    assert counts == {(record.WRITTEN_OUT, False): 1}


def test_threads():
    q, k, v = qkv(2, 3)
    mask = make_mask("band", (70, 70), torch.float32)
    wanted = torch_sdpa(q, k, v, mask)
    found, failed = [], []

    def work():
        try:
            found.extend(F.scaled_dot_product_attention(q, k, v, mask) for _ in range(20))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    with heedful.activate():
        for thread in threads:
            thread.start()
        for _ in range(20):
            with heedful.activate():
                pass
        for thread in threads:
            thread.join()
    assert not failed
    for out in found:
        close(out, wanted)


def test_heedfuls_own_sdpa_backend_is_pytorchs_kernel():
    q, k, v = qkv(2, 3)
    wanted = torch_sdpa(q, k, v)
    plain = heedful.attention(q, k, v, backend="sdpa")
    with heedful.activate(), record.recording() as recorder:
        for _ in range(2):
            assert torch.equal(heedful.attention(q, k, v, backend="sdpa"), plain)
        assert torch.equal(plain, wanted)
        found = F.scaled_dot_product_attention(q, k, v)
        rows = {row["what"]: row["calls"] for row in recorder.rows()}
    assert rows == {'backend="sdpa" was asked for': 2, "every pair": 1}
    assert not torch.equal(found, wanted)
    with heedful.activate():
        with pytest.raises(TypeError):
            activation._past_the_hook(q, k, None)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), found)


def test_small_calls_are_pytorchs(monkeypatch):
    monkeypatch.setitem(prefer._table, "few_pairs", dict.fromkeys(prefer._PAIRS, 10**9))
    heedful.clear_caches()
    q, k, v = qkv(2, 3)
    mask = make_mask("bool", (70, 70), torch.float32)
    with heedful.activate(), record.recording() as recorder:
        for arguments in ((q, k, v), (q, k, v, mask), (q, k, v)):
            found = F.scaled_dot_product_attention(*arguments)
        (row,) = recorder.rows()
        assert (row["taken"], row["what"], row["calls"]) == (False, record.SMALL, 3)
    assert torch.equal(found, torch_sdpa(q, k, v))


def test_a_processor_without_fast_kernels(monkeypatch):
    monkeypatch.setattr(prefer, "_table", None)
    q, k, v = qkv(2, 3)
    with heedful.activate(), record.recording() as recorder:
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), heedful.attention(q, k, v, backend="sdpa"))
        rows = {row["what"]: row["taken"] for row in recorder.rows()}
    assert rows == {"the engine has no fast kernels for this processor": False, 'backend="sdpa" was asked for': False}


def test_sdpa_kernel_is_heeded():
    q, k, v = qkv(2, 3)
    mask = make_mask("bool", (70, 70), torch.float32)
    for arguments in ((q, k, v), (q, k, v, mask), (q[0], k[0], v[0])):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            wanted = F.scaled_dot_product_attention(*arguments)
            with heedful.activate():
                assert torch.equal(F.scaled_dot_product_attention(*arguments), wanted)


def test_errors_are_pytorchs():
    q, k, v = qkv(2, 3)
    for arguments in ((q, k.double(), v), (q, k, v, torch.zeros(69, 70)), (q, k), (q, k, None), (q, k, v, 3)):
        with pytest.raises((RuntimeError, TypeError)) as theirs:
            torch_sdpa(*arguments)
        with heedful.activate(), pytest.raises(theirs.type):
            F.scaled_dot_product_attention(*arguments)


def test_function_transforms():
    inputs, mask = qkv(3, 2, 2), make_mask("band", (70, 70), torch.float32)

    def step(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = torch.vmap(step)(*inputs), torch.func.grad(lambda q: step(q, *inputs[1:]).square().sum())(inputs[0])
        with heedful.activate():
            found = torch.vmap(step)(*inputs), torch.func.grad(lambda q: step(q, *inputs[1:]).square().sum())(inputs[0])
    close(found, wanted)


class TestRegistry:
    def test_through_pytorchs_own_names(self):
        from torch.nn import attention

        assert "heedful" in attention.list_flash_attention_impls()
        before = F.scaled_dot_product_attention
        attention.activate_flash_attention_impl("heedful")
        try:
            assert F.scaled_dot_product_attention is patched.scaled_dot_product_attention
            with heedful.activate():
                pass
            assert F.scaled_dot_product_attention is patched.scaled_dot_product_attention
            assert attention.current_flash_attention_impl() == "heedful"
        finally:
            attention.restore_flash_attention_impl()
        assert F.scaled_dot_product_attention is before

    def test_another_implementation_is_left_alone(self, monkeypatch):
        from torch.nn import attention
        from torch.nn.attention import _registry

        class Handle:
            removed = False

            def remove(self):
                self.removed = True

        handle = Handle()
        monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "another", lambda: handle)
        attention.activate_flash_attention_impl("another")
        try:
            with heedful.activate():
                assert attention.current_flash_attention_impl() == "another"
                assert F.scaled_dot_product_attention is patched.scaled_dot_product_attention
            assert not handle.removed
            heedful.activate()
        finally:
            attention.restore_flash_attention_impl()
        assert F.scaled_dot_product_attention is patched.scaled_dot_product_attention
        heedful.deactivate()

    def test_replaced_by_another_implementation(self, monkeypatch):
        from torch.nn import attention
        from torch.nn.attention import _registry

        monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "another", lambda: None)
        before = F.scaled_dot_product_attention
        with heedful.activate():
            attention.activate_flash_attention_impl("another")
            assert F.scaled_dot_product_attention is before
            with heedful.activate():
                assert F.scaled_dot_product_attention is patched.scaled_dot_product_attention

    def test_a_pytorch_without_it(self, monkeypatch):
        monkeypatch.setattr(activation, "_registry", lambda: None)
        with heedful.activate():
            assert F.scaled_dot_product_attention is patched.scaled_dot_product_attention


def test_a_function_put_in_front_of_ours_stays():
    q, k, v = qkv(2, 3)
    builtin = F.scaled_dot_product_attention
    seen = []
    heedful.activate()
    inner = F.scaled_dot_product_attention

    def theirs(*arguments, **options):
        seen.append("called")
        return inner(*arguments, **options)

    F.scaled_dot_product_attention = theirs
    try:
        heedful.deactivate()
        assert F.scaled_dot_product_attention is theirs
        assert torch.equal(theirs(q, k, v), builtin(q, k, v))
        with heedful.activate(), record.recording() as recorder:
            assert F.scaled_dot_product_attention is theirs
            theirs(q[0], k[0], v[0])
            assert [row["taken"] for row in recorder.rows()] == [True]
        assert len(seen) == 2
    finally:
        F.scaled_dot_product_attention = builtin
    with heedful.activate():
        assert F.scaled_dot_product_attention is inner
    assert F.scaled_dot_product_attention is builtin


def test_only_one_recorder():
    with record.recording(), pytest.raises(RuntimeError, match="recorded already"), record.recording():
        pass


def test_nothing_is_said_on_stderr():
    code = "import heedful, torch; heedful.activate(); x = torch.randn(1, 2, 200, 16); "
    code += "torch.nn.functional.scaled_dot_product_attention(x, x, x); heedful.deactivate()"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_rows_are_there_when_the_recording_is_over():
    q, k, v = qkv(2, 3, length=300)
    with heedful.activate():
        with record.recording() as first:
            F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q, k, v)
        with record.recording() as second:
            F.scaled_dot_product_attention(q, k, v)
            assert [row["calls"] for row in first.rows()] == [1]
        F.scaled_dot_product_attention(q, k, v)
    for recorder in (first, second, second):
        assert [row["calls"] for row in recorder.rows()] == [1]
