"""Every door and CUDA graphs on a GPU: results against fp64 or PyTorch, that nothing waits for the device, and what a
graph saves. Each check is on its own; the first that is slow or broken keeps no other from running.

python benchmarks/gpu_doors.py [--only PART,PART] [--out FILE.json] [--seconds 120] [--device cpu]
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import heedful
from heedful import flash_attn
from heedful.graphs import Buckets, CaptureError, capture, compare
from heedful.sdpa import call as sdpa_door

DEVICE = torch.device("cuda")
CHECKS: dict[str, Callable[[], Any]] = {}
NEEDS_CUDA: set[str] = set()
# Share of the norm: several roundings of the output's type, which attention's own tests bound tightly.
CLOSE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    CHECKS[function.__name__] = function
    return function


def check_cuda(function: Callable[[], Any]) -> Callable[[], Any]:
    NEEDS_CUDA.add(function.__name__)
    return check(function)


def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(found: Tensor, wanted: Tensor, bound: float | None = None) -> float:
    """How far off, as a share of the norm; raises beyond the bound."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert found.dtype == wanted.dtype, (found.dtype, wanted.dtype)
    bound = CLOSE.get(found.dtype, 1e-9) if bound is None else bound
    a, b = found.detach().double(), wanted.detach().double()
    assert torch.isfinite(a).equal(torch.isfinite(b)), "NaN or infinity"
    a, b = a.nan_to_num(), b.nan_to_num()
    off = float((a - b).norm() / b.norm().clamp(min=1e-30))
    assert off <= bound, f"off by {off:.2e} of the norm, at most {bound:.0e}"
    return off


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return heedful.attention(q, k, v, backend="reference", **options)


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


@check
def attention() -> Any:
    """Patterns, the second call by the short way and without waiting."""
    torch.manual_seed(0)
    q, k, v = made(2, 4, 300, 64), made(2, 2, 300, 64), made(2, 2, 300, 64)
    backends = {}
    for name, pattern in _patterns().items():
        wanted = exact(q, k, v, pattern=pattern)
        close(heedful.attention(q, k, v, pattern=pattern), wanted)
        heedful.attention(q, k, v, pattern=pattern)
        with no_waiting():
            again = heedful.attention(q, k, v, pattern=pattern)
        close(again, wanted)
        backends[name] = heedful.explain(q, k, v, pattern=pattern).backend
    return backends


@check
def features() -> Any:
    q, k, v = made(2, 4, 200, 64), made(2, 2, 200, 64), made(2, 2, 200, 64)
    found = {}
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
        found[name] = heedful.explain(*tensors, causal=True, **options).backend
    return found


@check
def gradients() -> Any:
    tensors = [made(2, 4, 150, 64).requires_grad_() for _ in range(3)]
    grad = made(2, 4, 150, 64)
    for pattern in (heedful.Causal(), heedful.SlidingWindow(20)):
        wanted = torch.autograd.grad(exact(*tensors, pattern=pattern), tensors, grad)
        for _ in range(2):
            found = torch.autograd.grad(heedful.attention(*tensors, pattern=pattern), tensors, grad)
            for a, b in zip(found, wanted, strict=True):
                close(a, b)
    return heedful.explain(*tensors, causal=True).backend


@check
def sdpa() -> Any:
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
    ways = {}
    for name, (tensors, options) in cases.items():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            wanted = F.scaled_dot_product_attention(*tensors, **options)
        for _ in range(2):
            close(heedful.scaled_dot_product_attention(*tensors, **options), wanted)
            with heedful.activate():
                close(F.scaled_dot_product_attention(*tensors, **options), wanted)
        with no_waiting(), heedful.activate():
            F.scaled_dot_product_attention(*tensors, **options)
        plan = sdpa_door.attend(
            *tensors, options.get("attn_mask"), 0.0, options.get("is_causal", False), options.get("scale"),
            options.get("enable_gqa", False),
        )  # fmt: skip
        ways[name] = plan if isinstance(plan, str) else "heedful"
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    wanted_grads = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).float().square().sum(), leaves)
    with heedful.activate():
        found = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).float().square().sum(), leaves)
    for a, b in zip(found, wanted_grads, strict=True):
        close(a, b)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert heedful.scaled_dot_product_attention(q.float(), k.float(), v.float()).dtype == torch.bfloat16
    return ways


@check
def flash_dense_and_varlen() -> Any:
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
    return heedful.explain(q, k, v, causal=True, layout="blhd").backend


def _held(lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch = len(lengths)
    return made(batch, 1, 8, 64), made(batch, 1, 2, 64), made(batch, 1, 2, 64)


def _decoded(q: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    parts = [(q[n, None], key[n, None, :stop], value[n, None, :stop]) for n, stop in enumerate(lengths)]
    return torch.cat([exact(*part, causal=True, layout="blhd") for part in parts])


@check
def flash_with_kvcache() -> Any:
    """Lengths on the device: contiguous, with rows of its own, in pages; nothing waits."""
    lengths = torch.tensor([5, 190, 77], dtype=torch.int32, device=DEVICE)
    q, k, v = _held(lengths)
    found = {}
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
        found[kind] = close(out, _decoded(q, *dense, [length + 1 for length in lengths.tolist()]))
    return found


@check
def varlen_in_pages() -> Any:
    q, pool = made(30, 4, 64), made(2, 12, 16, 2, 64)
    cu_q = torch.tensor([0, 10, 11, 30], dtype=torch.int32, device=DEVICE)
    cu_k = torch.tensor([0, 40, 63, 100], dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[3, 7, 0], [8, 1, 4], [2, 6, 5]], dtype=torch.int32, device=DEVICE)
    out = flash_attn.flash_attn_varlen_func(q, *pool, cu_q, cu_k, 19, 40, causal=True, block_table=table)
    for n in range(3):
        rows, length = slice(int(cu_q[n]), int(cu_q[n + 1])), int(cu_k[n + 1] - cu_k[n])
        key, value = (blocks[table[n].long()].flatten(0, 1)[None, :length] for blocks in pool)
        close(out[rows], exact(q[None, rows], key, value, causal=True, layout="blhd")[0])


@check
def key_value_cache() -> Any:
    """Kinds of KVCache, step by step against the whole; a step without waiting."""
    q, k, v = made(2, 4, 100, 64), made(2, 2, 100, 64), made(2, 2, 100, 64)
    found = {}
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
        found[name] = close(torch.cat(outs, 2), wanted)
    return found


@check
def multihead_attention() -> Any:
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


@check
def converted() -> Any:
    layer = nn.TransformerEncoderLayer(256, 8, 512, dropout=0.0, batch_first=True, device=DEVICE, dtype=torch.bfloat16)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = made(2, 65, 256)
    wanted = model(x)
    model, report = heedful.convert(model)
    found = model(x)
    found.float().sum().backward()
    close(found, wanted)
    return str(report).splitlines()[0]


@check
def activated_module() -> Any:
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


@check
def hugging_face() -> Any:

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
    loss = ours(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    return {"tokens that agree with a static cache": float((text == static).float().mean())}


@check
def other_streams_and_dtypes() -> Any:
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
    return None


class Block(nn.Module):
    def __init__(self, pattern: heedful.Pattern, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(256, 768), nn.Linear(256, 256)
        self.pattern, self.dropout = pattern, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).unflatten(-1, (3, 4, 64)).unbind(-3)
        out = heedful.attention(q, k, v, pattern=self.pattern, layout="blhd")
        return x + self.dropout(self.out(out.flatten(-2)))


def _net(depth: int = 4, dropout: float = 0.0, pattern: heedful.Pattern | None = None) -> nn.Module:
    pattern = pattern or heedful.Causal()
    net = nn.Sequential(*[Block(pattern, dropout) for _ in range(depth)])
    return net.to(DEVICE, torch.bfloat16).eval()


@check_cuda
def graphs() -> Any:
    """Replays, other shapes, weights in place and moved, two models, eviction, streams, what is held."""
    starts = torch.tensor([0, 7], dtype=torch.int32)
    net, other = (_net(pattern=heedful.Padding(starts, 100)) for _ in range(2))
    x = made(2, 100, 256)
    with torch.no_grad():
        fast, second = capture(net, x), capture(other, x)
        for length in (100, 64, 100):
            x = made(2, length, 256)
            close(fast(x), net(x))
        close(second(made(2, 100, 256)) * 0, x * 0)
        close(second(x), other(x))
        net[0].out.weight.mul_(2)
        close(fast(x), net(x))
        assert fast.captures == 2
        net.load_state_dict({name: value * 1.5 for name, value in net.state_dict().items()}, assign=True)
        close(fast(x), net(x))
        assert fast.captures == 3
        # What the graph reads must not be given back, whatever else is made meanwhile.
        heedful.clear_caches()
        torch.cuda.empty_cache()
        rubbish = [torch.full((2, 100), -1, dtype=torch.int32, device=DEVICE) for _ in range(200)]
        close(fast(x), net(x))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = fast(x)
        torch.cuda.current_stream().wait_stream(stream)
        close(found, net(x))
        small = capture(net, x, limit=2)
        for length in (10, 20, 30, 10):
            y = made(2, length, 256)
            close(small(y), net(y))
        assert len(small) == 2
        with no_waiting():
            fast(x)
        del rubbish
    return {"captures": fast.captures}


@check_cuda
def graph_buckets() -> Any:
    net = _net()
    buckets = Buckets([32, 64, 128], dim=1, pad={0: 0.0}, output_dim=1)
    with torch.no_grad():
        fast = capture(net, made(2, 20, 256), buckets=buckets)
        for length in (20, 31, 32, 33, 100):
            x = made(2, length, 256)
            close(fast(x), net(x))
    return {"graphs": len(fast)}


@check_cuda
def graph_dropout() -> Any:
    """Each replay draws other numbers, and a seed brings them back."""
    net = _net(dropout=0.5).train()
    x = made(2, 50, 256)
    fast = capture(net, x)
    with torch.no_grad():
        torch.manual_seed(3)
        one, other = fast(x), fast(x)
        torch.manual_seed(3)
        again = fast(x)
    assert not torch.equal(one, other)
    assert torch.equal(one, again)
    q = made(1, 2, 64, 64)
    dropped = capture(lambda q: heedful.attention(q, q, q, dropout_p=0.5), q)
    assert not torch.equal(dropped(q), dropped(q))


def _refused(model: Callable[..., Any], x: Tensor) -> CaptureError:
    try:
        capture(model, x)
    except CaptureError as error:
        return error
    raise AssertionError("it was captured")


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


@check_cuda
def graph_errors() -> Any:
    """What breaks a capture is named, and PyTorch works on behind it."""
    x = made(2, 50, 256)
    cases = {
        "reads a number": (nn.Sequential(nn.Identity(), Reads()), "1 (Reads)"),
        "a shape from data": (lambda x: x[x > 0].sum() + x, None),
        "from the CPU": (lambda x: x + torch.ones(256).to(DEVICE), None),
        "waits": (lambda x: torch.cuda.synchronize() or x, None),
    }
    texts = {}
    for name, (model, where) in cases.items():
        error = _refused(model, x)
        texts[name] = str(error)
        assert error.where == where, error.where
        assert where is None or error.findings[0].module == where
        assert (name == "waits") == (not error.findings)
        torch.cuda.synchronize()
        assert torch.isfinite(torch.rand(1000, device=DEVICE)).all()
        net = _net(1)
        with torch.no_grad():
            close(capture(net, x)(x), net(x))
    return texts


@check_cuda
def graph_of_decoding() -> Any:
    """A step whose lengths lie on the device: written into between replays."""
    lengths = torch.tensor([5, 90], dtype=torch.int32, device=DEVICE)
    keys, values = made(2, 128, 2, 64), made(2, 128, 2, 64)
    mine = keys.clone(), values.clone()

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn.flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=lengths, causal=True)

    fast = capture(step, _held(lengths))
    keys.copy_(mine[0])
    values.copy_(mine[1])
    held = lengths.tolist()
    for _ in range(5):
        q, k, v = _held(lengths)
        for n, length in enumerate(held):
            mine[0][n, length], mine[1][n, length] = k[n, 0], v[n, 0]
        held = [length + 1 for length in held]
        close(fast(q, k, v), _decoded(q, *mine, held))
        lengths += 1
    cache = heedful.KVCache()
    q = made(1, 2, 1, 64)
    assert "keeps lengths in Python" in str(_refused(lambda q: heedful.attention(q, q, q, cache=cache), q))


@check_cuda
def graph_of_hugging_face() -> Any:

    model = _language_model("heedful")
    ids = torch.randint(0, 500, (1, 64), device=DEVICE)
    with torch.no_grad():
        fast = capture(lambda ids: model(ids, use_cache=False).logits, ids, modules=[model])
        close(fast(ids), model(ids, use_cache=False).logits)
        ids = torch.randint(0, 500, (1, 64), device=DEVICE)
        close(fast(ids), model(ids, use_cache=False).logits)
        cost = compare(fast, ids)
    return {"eager_us": 1e6 * cost.eager_seconds, "graph_us": 1e6 * cost.graph_seconds, "speedup": cost.speedup}


@check_cuda
def graph_cost() -> Any:
    """What a graph saves: small and large calls of the same model, and the optimizer's verdict."""
    from heedful.compat.kernel_pytorch.compiler_integration import PyGraphCUDAOptimizer

    found = {}
    with torch.no_grad():
        for name, shape in {"small": (1, 16, 256), "large": (16, 4096, 256)}.items():
            net, x = _net(), made(*shape)
            result = PyGraphCUDAOptimizer(cost_threshold=0.1, strategy="balanced").benchmark_vs_eager(net, [x], 10)
            found[name] = result["performance"] | {
                "eager_us": 1e6 * result["eager_execution"]["median_time"],
                "graph_us": 1e6 * result["graph_execution"]["median_time"],
            }
    return found


@check_cuda
def graphed_training() -> Any:
    """PyTorch's own capture of forward and backward, with heedful's attention inside."""
    net, plain = _net(2).train(), _net(2).train()
    plain.load_state_dict(net.state_dict())
    x = made(2, 64, 256).requires_grad_()
    graphed = torch.cuda.make_graphed_callables(net, (x,))
    grad = made(2, 64, 256)
    y = made(2, 64, 256).requires_grad_()
    found = torch.autograd.grad(graphed(y), (y, *net.parameters()), grad)
    wanted = torch.autograd.grad(plain(y), (y, *plain.parameters()), grad)
    return max(close(a, b) for a, b in zip(found, wanted, strict=True))


@check_cuda
def doctor() -> Any:
    from heedful.cli.diagnosis import _gpu
    from heedful.measure import machine

    return _gpu(machine.gpu())


@check
def compiled() -> Any:
    """fullgraph, the SDPA door and a pattern."""
    q = made(2, 4, 256, 64)
    window = heedful.SlidingWindow(40, 0)

    def both(q: Tensor) -> Tensor:
        windowed = heedful.attention(q, q, q, pattern=window)
        return heedful.scaled_dot_product_attention(q, q, q, is_causal=True) + windowed

    function = torch.compile(both, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "eager")
    close(function(q), exact(q, q, q, pattern=heedful.Causal(0)) + exact(q, q, q, pattern=window), 3e-2)


def main() -> None:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), help="checks, by name")
    parser.add_argument("--out", help="a JSON file for all results")
    parser.add_argument("--seconds", type=float, default=120, help="after which no other check begins")
    parser.add_argument("--device", default="cuda", help="cpu runs what needs no GPU, for work on this file")
    arguments = parser.parse_args()
    DEVICE = torch.device(arguments.device)
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu_doors.py needs a CUDA device, and torch sees none")
        return
    begun, failed = time.monotonic(), 0
    results: dict[str, Any] = {}
    for name, function in CHECKS.items():
        if (arguments.only and name not in arguments.only) or (DEVICE.type != "cuda" and name in NEEDS_CUDA):
            continue
        if time.monotonic() - begun > arguments.seconds:
            results[name] = {"passed": None, "found": "no time left"}
            print(f"{name:26} no time left", flush=True)
            continue
        torch.manual_seed(0)
        start = time.monotonic()
        try:
            results[name] = {"passed": True, "found": function()}
        except Exception as error:
            failed += 1
            results[name] = {"passed": False, "found": traceback.format_exc()}
            print(f"{name:26} FAILED {type(error).__name__}: {error}\n{traceback.format_exc()}", flush=True)
        seconds = results[name]["seconds"] = round(time.monotonic() - start, 2)
        if results[name]["passed"]:
            print(f"{name:26} {seconds:6.1f} s  {results[name]['found'] or ''}", flush=True)
        if arguments.out:
            with open(arguments.out, "w") as file:
                json.dump(results, file, indent=2, default=str)
    print(f"{failed} failed of {len(results)}, {time.monotonic() - begun:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
