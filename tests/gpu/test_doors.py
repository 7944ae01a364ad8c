"""Every door on a device: results against fp64 or PyTorch, and that nothing waits for the device."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from device_calls import DEVICE, close, decoded, exact, held, made, no_waiting
from torch import Tensor, nn
from torch.nn import functional as F

import heedful
from heedful import flash_attn
from heedful.graphs import capture, compare

pytestmark = pytest.mark.gpu


def _patterns() -> dict[str, heedful.Pattern]:
    # Operands on the host on purpose, as well as on the device.
    starts = torch.tensor([3, 0], dtype=torch.int32)
    ends = torch.tensor([0, 100, 180, 300], dtype=torch.int32)
    return {
        "full": heedful.Full(),
        "causal": heedful.Causal(),
        "window": heedful.SlidingWindow(50, 0),
        "padding on the host": heedful.Padding(starts, starts + 250),
        "documents on the host": heedful.Documents(ends, within=heedful.Causal()),
        "documents": heedful.Documents(ends.to(DEVICE)),
        "bigbird": heedful.BigBird(32, 3, 1, 1),
        "mask": heedful.Mask(torch.rand(2, 1, 300, 300, device=DEVICE) < 0.3),
    }


def test_attention() -> None:
    """Patterns, the second call by the short way and without waiting."""
    torch.manual_seed(0)
    q, k, v = made(2, 4, 300, 64), made(2, 2, 300, 64), made(2, 2, 300, 64)
    for pattern in _patterns().values():
        wanted = exact(q, k, v, pattern=pattern)
        close(heedful.attention(q, k, v, pattern=pattern), wanted)
        heedful.attention(q, k, v, pattern=pattern)
        with no_waiting():
            again = heedful.attention(q, k, v, pattern=pattern)
        close(again, wanted)
        assert heedful.explain(q, k, v, pattern=pattern).backend in ("triton", "sdpa")


def test_features() -> None:
    q, k, v = made(2, 4, 200, 64), made(2, 2, 200, 64), made(2, 2, 200, 64)
    for name, options in {
        "softcap": {"softcap": 20.0},
        "sinks": {"sinks": torch.randn(4, device=DEVICE)},
        "bias": {"bias": torch.randn(1, 4, 200, 200, device=DEVICE)},
        "alibi": {"alibi_slopes": torch.rand(4, device=DEVICE)},
        "lse": {"return_lse": True},
        "blhd": {"layout": "blhd"},
    }.items():
        tensors = [t.transpose(1, 2) for t in (q, k, v)] if name == "blhd" else [q, k, v]
        for _ in range(2):
            out, wanted = heedful.attention(*tensors, causal=True, **options), exact(*tensors, causal=True, **options)
            if name == "lse":
                close(out.lse, wanted.lse, 1e-3)
                out, wanted = out.out, wanted.out
            close(out, wanted)
        assert heedful.explain(*tensors, causal=True, **options).backend in ("triton", "sdpa")


def test_gradients() -> None:
    tensors = [made(2, 4, 150, 64).requires_grad_() for _ in range(3)]
    grad = made(2, 4, 150, 64)
    for pattern in (heedful.Causal(), heedful.SlidingWindow(20)):
        wanted = torch.autograd.grad(exact(*tensors, pattern=pattern), tensors, grad)
        for _ in range(2):
            found = torch.autograd.grad(heedful.attention(*tensors, pattern=pattern), tensors, grad)
            for a, b in zip(found, wanted, strict=True):
                close(a, b)


def test_sdpa() -> None:
    """heedful.scaled_dot_product_attention and F's under activate(), against PyTorch's math."""
    q, k, v = made(2, 4, 256, 64), made(2, 4, 256, 64), made(2, 4, 256, 64)
    shared = made(2, 2, 256, 64)
    cases: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
        "full": ((q, k, v), {}),
        "causal": ((q, k, v), {"is_causal": True}),
        "scale": ((q, k, v), {"scale": 0.3}),
        "bool mask": ((q, k, v), {"attn_mask": torch.rand(256, 256, device=DEVICE) < 0.5}),
        "float mask": ((q, k, v), {"attn_mask": made(1, 4, 256, 256)}),
        "gqa": ((q, shared, shared), {"enable_gqa": True}),
        "three dimensions": ((q[0], k[0], v[0]), {}),
        "transposed": (tuple(made(2, 256, 4, 64).transpose(1, 2) for _ in range(3)), {"is_causal": True}),
        "float64": ((q.double(), k.double(), v.double()), {}),
    }
    for tensors, options in cases.values():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            wanted = F.scaled_dot_product_attention(*tensors, **options)
        for _ in range(2):
            close(heedful.scaled_dot_product_attention(*tensors, **options), wanted)
            with heedful.activate():
                close(F.scaled_dot_product_attention(*tensors, **options), wanted)
        with no_waiting(), heedful.activate():
            F.scaled_dot_product_attention(*tensors, **options)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    wanted_grads = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).float().square().sum(), leaves)
    with heedful.activate():
        found = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).float().square().sum(), leaves)
    for a, b in zip(found, wanted_grads, strict=True):
        close(a, b)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert heedful.scaled_dot_product_attention(q.float(), k.float(), v.float()).dtype == torch.bfloat16


def test_flash_dense_and_varlen() -> None:
    """On the device against fp64 and against the same call sequence by sequence."""
    q, k, v = made(2, 130, 4, 64), made(2, 130, 2, 64), made(2, 130, 2, 64)
    wanted = exact(q, k, v, causal=True, layout="blhd")
    close(flash_attn.flash_attn_func(q, k, v, causal=True), wanted)
    ends = torch.tensor([0, 50, 50, 200, 260], dtype=torch.int32, device=DEVICE)
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    slopes = torch.rand(4, 4, device=DEVICE)
    for alibi in (None, slopes):
        for _ in range(2):
            with no_waiting():
                out = flash_attn.flash_attn_varlen_func(*packed, ends, ends, 150, 150, causal=True, alibi_slopes=alibi)
        for n, (start, stop) in enumerate(zip(ends.tolist(), ends.tolist()[1:], strict=False)):
            if start == stop:
                continue
            part = [t[None, start:stop] for t in packed]
            own = None if alibi is None else alibi[n]
            close(out[start:stop], exact(*part, causal=True, layout="blhd", alibi_slopes=own)[0])


def test_flash_with_kvcache() -> None:
    """Lengths on the device: contiguous, with rows of its own, in pages; nothing waits."""
    lengths = torch.tensor([5, 190, 77], dtype=torch.int32, device=DEVICE)
    q, k, v = held(lengths)
    for kind in ("contiguous", "index", "pages"):
        if kind == "pages":
            keys, values = made(40, 16, 2, 64), made(40, 16, 2, 64)
            table = torch.randperm(40, device=DEVICE)[:39].view(3, 13).int()
            where = {"block_table": table}
        else:
            keys, values = made(5, 208, 2, 64), made(5, 208, 2, 64)
            where = {"cache_batch_idx": torch.tensor([4, 0, 2], device=DEVICE)} if kind == "index" else {}
        options = {"cache_seqlens": lengths, "causal": True, **where}
        flash_attn.flash_attn_with_kvcache(q, keys, values, k, v, **options)
        with no_waiting():
            out = flash_attn.flash_attn_with_kvcache(q, keys, values, k, v, **options)
        if kind == "pages":
            dense = [pool[table.long()].flatten(1, 2) for pool in (keys, values)]
        else:
            rows = where.get("cache_batch_idx", torch.arange(3, device=DEVICE))
            dense = [cache[rows] for cache in (keys, values)]
        for n, length in enumerate(lengths.tolist()):
            assert torch.equal(dense[0][n, length], k[n, 0]), "the new key is not where it belongs"
        close(out, decoded(q, *dense, [length + 1 for length in lengths.tolist()]))


def test_varlen_in_pages() -> None:
    q, pool = made(30, 4, 64), made(2, 12, 16, 2, 64)
    cu_q = torch.tensor([0, 10, 11, 30], dtype=torch.int32, device=DEVICE)
    cu_k = torch.tensor([0, 40, 63, 100], dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[3, 7, 0], [8, 1, 4], [2, 6, 5]], dtype=torch.int32, device=DEVICE)
    out = flash_attn.flash_attn_varlen_func(q, *pool, cu_q, cu_k, 19, 40, causal=True, block_table=table)
    for n in range(3):
        rows, length = slice(int(cu_q[n]), int(cu_q[n + 1])), int(cu_k[n + 1] - cu_k[n])
        key, value = (blocks[table[n].long()].flatten(0, 1)[None, :length] for blocks in pool)
        close(out[rows], exact(q[None, rows], key, value, causal=True, layout="blhd")[0])


def test_key_value_cache() -> None:
    """Kinds of KVCache, step by step against the whole; a step without waiting."""
    q, k, v = made(2, 4, 100, 64), made(2, 2, 100, 64), made(2, 2, 100, 64)
    for name, options in {"contiguous": {}, "ring": {"window": 30}, "paged": {"block_size": 16, "blocks": 40}}.items():
        window = heedful.SlidingWindow(30, 0) if name == "ring" else heedful.Causal()
        wanted = exact(q, k, v, pattern=window)
        cache = heedful.KVCache(**options)
        outs = [heedful.attention(q[:, :, :90], k[:, :, :90], v[:, :, :90], cache=cache, causal=True)]
        for n in range(90, 100):
            new = [t[:, :, n : n + 1] for t in (q, k, v)]
            if n == 94:
                with no_waiting():
                    outs.append(heedful.attention(*new, cache=cache, causal=True))
            else:
                outs.append(heedful.attention(*new, cache=cache, causal=True))
        close(torch.cat(outs, 2), wanted)


def test_multihead_attention() -> None:
    theirs = nn.MultiheadAttention(256, 8, batch_first=True, device=DEVICE, dtype=torch.bfloat16)
    ours = heedful.nn.MultiheadAttention(256, 8, batch_first=True, device=DEVICE, dtype=torch.bfloat16)
    ours.load_state_dict(theirs.state_dict())
    x = made(2, 65, 256)
    padding = torch.zeros(2, 65, dtype=torch.bool, device=DEVICE)
    padding[0, 50:] = True
    for need_weights in (False, True):
        for mask in (None, padding):
            found, weights = ours(x, x, x, key_padding_mask=mask, need_weights=need_weights)
            wanted, their_weights = theirs(x, x, x, key_padding_mask=mask, need_weights=need_weights)
            close(found, wanted)
            if need_weights:
                close(weights, their_weights)


def test_converted() -> None:
    layer = nn.TransformerEncoderLayer(256, 8, 512, dropout=0.0, batch_first=True, device=DEVICE, dtype=torch.bfloat16)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = made(2, 65, 256)
    wanted = model(x)
    model, _ = heedful.convert(model)
    found = model(x)
    found.float().sum().backward()
    close(found, wanted)


def test_activated_module() -> None:
    model = nn.MultiheadAttention(256, 8, batch_first=True, device=DEVICE, dtype=torch.bfloat16)
    x = made(2, 65, 256)
    wanted = model(x, x, x, need_weights=False)[0]
    with heedful.activate():
        close(model(x, x, x, need_weights=False)[0], wanted)


def _language_model(implementation: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    importlib.import_module("heedful.hf")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=implementation, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DEVICE, torch.bfloat16).eval()


def test_hugging_face() -> None:
    ours, theirs = _language_model("heedful"), _language_model("sdpa")
    ids = torch.randint(0, 500, (2, 60), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}):
            wanted, found = theirs(ids, **options).logits, ours(ids, **options).logits
            real = mask.bool() if options else torch.ones_like(mask, dtype=torch.bool)
            close(found[real], wanted[real], 3e-2)
        text = ours.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        static = ours.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation="static",
            disable_compile=True,
        )  # fmt: skip
        assert text.shape == static.shape == (2, 68)
    loss = ours(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_other_streams_and_dtypes() -> None:
    if DEVICE.type != "cuda":
        return None
    q = made(2, 4, 300, 64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = heedful.attention(q, q, q, pattern=heedful.Padding(torch.tensor([1, 2]), 200))
    torch.cuda.current_stream().wait_stream(stream)
    close(found, exact(q, q, q, pattern=heedful.Padding(torch.tensor([1, 2]), 200)))
    for dtype in (torch.float16, torch.float32):
        q = made(1, 2, 200, 64, dtype=dtype)
        close(heedful.attention(q, q, q, causal=True), exact(q, q, q, causal=True))


def test_doctor() -> None:
    from heedful.cli.diagnosis import _gpu
    from heedful.measure import machine

    assert torch.cuda.get_device_name() in str(_gpu(machine.gpu()))


def test_compiled() -> None:
    """fullgraph, the SDPA door and a pattern."""
    q = made(2, 4, 256, 64)
    window = heedful.SlidingWindow(40, 0)

    def both(q: Tensor) -> Tensor:
        windowed = heedful.attention(q, q, q, pattern=window)
        return heedful.scaled_dot_product_attention(q, q, q, is_causal=True) + windowed

    function = torch.compile(both, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "eager")
    close(function(q), exact(q, q, q, pattern=heedful.Causal(0)) + exact(q, q, q, pattern=window), 3e-2)


def test_graph_of_hugging_face() -> None:
    model = _language_model("heedful")
    ids = torch.randint(0, 500, (1, 64), device=DEVICE)
    with torch.no_grad():
        fast = capture(lambda ids: model(ids, use_cache=False).logits, ids, modules=[model])
        close(fast(ids), model(ids, use_cache=False).logits)
        ids = torch.randint(0, 500, (1, 64), device=DEVICE)
        close(fast(ids), model(ids, use_cache=False).logits)
        assert compare(fast, ids).speedup > 0
