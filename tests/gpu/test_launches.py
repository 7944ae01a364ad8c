"""Launches on a device: the second call of a kind past Python, streams, threads, devices, graphs, large tensors."""

from __future__ import annotations

import threading

import pytest
import torch
from inputs import all_features
from tolerance import expected

import heedful
from heedful import BigBird, Causal, Dilated, Documents, Full, Longformer, Padding, Pattern, SlidingWindow, choose
from heedful.backend.triton import kept, shortcuts

pytestmark = pytest.mark.gpu
needs_bridge = pytest.mark.skipif("native" in choose.UNAVAILABLE, reason="the engine is not built")
DEVICE = "cuda"


def inputs(
    q_length: int = 300, k_length: int = 300, kv_heads: int = 2, dim: int = 64, device: str | torch.device = DEVICE
) -> list[torch.Tensor]:
    shapes = (2, 4, q_length, dim), (2, kv_heads, k_length, dim), (2, kv_heads, k_length, dim)
    return [torch.randn(shape, device=device).to(torch.float16) for shape in shapes]


def check(found: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> None:
    options = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    expected(q.cpu(), k.cpu(), v.cpu(), **options).out.check(found.cpu(), "out")


def patterns() -> dict[str, tuple[Pattern, int, int]]:
    ends = torch.tensor([0, 100, 130, 300], dtype=torch.int32)
    return {
        "full": (Full(), 300, 300),
        "causal": (Causal(), 300, 300),
        "window": (SlidingWindow(50, 3), 300, 300),
        "documents": (Documents(ends, within=Causal()), 300, 300),
        "longformer": (Longformer(20, 3), 300, 300),
        "dilated": (Dilated(9, 4), 300, 300),
        "padding": (Padding(torch.tensor([3, 0], dtype=torch.int32), 290), 300, 300),
        "decoding": (Full(), 1, 3000),
        "decoding in a window": (SlidingWindow(2000, 0), 2, 3000),
    }


def on_device(pattern: Pattern) -> Pattern:
    if isinstance(pattern, Documents):
        ends = torch.tensor([0, 100, 130, 300], dtype=torch.int32, device=DEVICE)
        return Documents(ends, within=Causal())
    return pattern


@pytest.fixture
def short_way(monkeypatch):
    """From its call on, no launch is put together in Python."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a launch was put together again")

    def arm() -> None:
        monkeypatch.setattr(kept.Kept, "_keep", refuse)
        monkeypatch.setattr(kept.Work, "run", refuse)

    heedful.clear_caches()
    return arm


@needs_bridge
@pytest.mark.parametrize("name", patterns())
def test_the_second_call_is_repeated_by_the_bridge(short_way, name) -> None:
    pattern, q_length, k_length = patterns()[name]
    there = on_device(pattern)
    for turn in range(4):
        q, k, v = inputs(q_length, k_length)
        check(heedful.attention(q, k, v, pattern=there, backend="triton"), q, k, v, pattern=pattern)
        if turn == 1:
            short_way()


@needs_bridge
@pytest.mark.parametrize("name", ["softcap", "bias", "alibi_slopes", "sinks", None])
def test_features_are_repeated_too(short_way, name) -> None:
    for turn in range(4):
        q, k, v = inputs(130, 200)
        options = all_features(2, 4, 130, 200, torch.float16)
        options = {key: value for key, value in options.items() if name in (None, key)}
        there = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        found = heedful.attention(q, k, v, causal=True, backend="triton", return_lse=True, **there)
        check(found.out, q, k, v, pattern=Causal(), **options)
        if turn == 1:
            short_way()


@needs_bridge
def test_dropout_draws_anew_in_each_call(short_way) -> None:
    q, k, v = inputs()
    outs = []
    for turn in range(4):
        outs.append(heedful.attention(q, k, v, dropout_p=0.5, backend="triton"))
        if turn == 1:
            short_way()
    torch.cuda.manual_seed(5)
    first = heedful.attention(q, k, v, dropout_p=0.5, backend="triton")
    torch.cuda.manual_seed(5)
    assert torch.equal(first, heedful.attention(q, k, v, dropout_p=0.5, backend="triton"))
    assert len({float(out.double().sum()) for out in outs}) == 4


@needs_bridge
def test_gradients_are_repeated_too(short_way) -> None:
    for turn in range(4):
        leaves = [tensor.requires_grad_() for tensor in inputs(200, 260)]
        grad = torch.randn_like(leaves[0])
        out = heedful.attention(*leaves, causal=True, backend="triton")
        found = torch.autograd.grad(out, leaves, grad)
        wanted = expected(*(leaf.detach().cpu() for leaf in leaves), pattern=Causal(), grad_out=grad.cpu())
        for name, gradient in zip("qkv", found, strict=True):
            wanted.gradients[name].check(gradient.cpu(), name)
        if turn == 1:
            short_way()


def test_other_strides_and_addresses_of_the_same_sizes() -> None:
    for _ in range(3):
        q, k, v = inputs()
        for memory in ("contiguous", "blhd", "odd address", "odd stride", "one tensor"):
            if memory == "blhd":
                k = k.transpose(1, 2).contiguous().transpose(1, 2)
            elif memory == "odd address":
                v = torch.empty(v.numel() + 1, device=DEVICE, dtype=v.dtype)[1:].view(v.shape).copy_(v)
            elif memory == "odd stride":
                q = torch.empty(2, 4, 300, 65, device=DEVICE, dtype=q.dtype)[..., :64].copy_(q)
            tensors = (q, q, q) if memory == "one tensor" else (q, k, v)
            check(heedful.attention(*tensors, causal=True, backend="triton"), *tensors, pattern=Causal())


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_keys_of_another_dtype_are_refused_however_often_it_was_right(calls) -> None:
    q, k, v = inputs()
    for _ in range(calls):
        heedful.attention(q, k, v, backend="triton")
    for wrong in ((q, k.bfloat16(), v), (q, k, v.float())):
        with pytest.raises((TypeError, ValueError), match="dtype"):
            heedful.attention(*wrong, backend="triton")


def test_a_change_of_the_precision_is_noticed(monkeypatch) -> None:
    q, k, v = (tensor.float() for tensor in inputs())
    outs = {}
    for allowed in (False, True, False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        for _ in range(3):
            out = heedful.attention(q, k, v, softcap=9.0, backend="triton")
            again = heedful.attention(q, k, v, backend="triton")
        assert torch.equal(outs.setdefault(allowed, (out, again))[0], out)
        assert torch.equal(outs[allowed][1], again)
    assert not torch.equal(outs[False][0], outs[True][0])
    assert not torch.equal(outs[False][1], outs[True][1])


@needs_bridge
@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize("pattern", [Full(), SlidingWindow(700, 0)], ids=repr)
def test_keys_that_grow(pattern, remade) -> None:
    """One form serves many lengths, in a buffer or in memory of their own; that of each call counts."""
    q, k, v = inputs(1, 4000)
    made, code = kept.Kept(0), pattern.schedule.encode()

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> kept.Work:
        anew.append(k.shape[2])
        return shortcuts.forward_work(q, k, v, (), code, 0.125, False)

    anew: list[int] = []
    for length in (*range(600, 700, 3), *range(3000, 3300, 10), 601):
        tensors = q, k[:, :, :length], v[:, :, :length]
        if remade:
            tensors = q, tensors[1].contiguous(), tensors[2].contiguous()
        check(made.run(tensors, make)[0], *tensors, pattern=pattern)
        check(heedful.attention(*tensors, pattern=pattern, backend="triton"), *tensors, pattern=pattern)
    assert len(anew) < 12


@needs_bridge
@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 9.0, "sinks": torch.zeros(4)}], ids=repr)
def test_steps_of_a_length_of_their_own_are_repeated(short_way, options) -> None:
    """Keys as a cache gives them that is put together anew for each step."""
    options = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    q, k, v = inputs(1, 4000)

    def step(length: int) -> None:
        tensors = q, k[:, :, :length].contiguous(), v[:, :, :length].contiguous()
        check(heedful.attention(*tensors, backend="triton", **options), *tensors, **options)

    heedful.clear_caches()
    step(1500)
    short_way()
    for length in range(1501, 1530):
        step(length)


def test_a_thread_of_its_own() -> None:
    q, k, v = inputs()
    for _ in range(3):
        heedful.attention(q, k, v, backend="triton")
    outs: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: outs.extend(heedful.attention(q, k, v, backend="triton") for _ in range(50)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 200
    assert all(torch.equal(out, outs[0]) for out in outs)
    check(outs[0], q, k, v)


def test_streams_of_their_own() -> None:
    """Each waits for nothing but its own inputs, which are made on it just before."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    made = []
    for turn in range(12):
        with torch.cuda.stream(streams[turn % 4]):
            torch.cuda._sleep(1_000_000)
            tensors = inputs(260, 260)
            made.append((heedful.attention(*tensors, causal=True, backend="triton"), *tensors))
    torch.cuda.synchronize()
    for out, *tensors in made:
        check(out, *tensors, pattern=Causal())


def test_a_device_that_is_not_the_current_one(two_devices) -> None:
    for _ in range(4):
        for device in (two_devices, torch.device("cuda", 0)):
            leaves = [tensor.requires_grad_() for tensor in inputs(device=device)]
            out = heedful.attention(*leaves, causal=True, backend="triton")
            torch.autograd.grad(out, leaves, torch.ones_like(out))
            assert out.device == device
            check(out.detach(), *(leaf.detach() for leaf in leaves), pattern=Causal())
        assert torch.cuda.current_device() == 0


def test_patterns_and_caches_on_a_device_that_is_not_the_current_one(two_devices) -> None:
    for device in (two_devices, torch.device("cuda", 0)):
        q, k, v = inputs(device=device)
        bias = torch.randn(1, 1, q.shape[2], k.shape[2], device=device, dtype=q.dtype)
        for pattern in (SlidingWindow(40), Longformer(20, 3), BigBird(32, 3, 1, 1)):
            for _ in range(3):
                check(heedful.attention(q, k, v, pattern=pattern, backend="triton"), q, k, v, pattern=pattern)
            out = heedful.attention(q, k, v, pattern=pattern, bias=bias, backend="triton")
            wanted = heedful.attention(q, k, v, pattern=pattern, bias=bias, backend="reference")
            torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)
        for options in ({}, {"block_size": 64}, {"window": 63}):
            cache = heedful.KVCache(**options)
            for length in (100, 1, 1, 1):
                given = [torch.randn(2, heads, length, 64, device=device, dtype=q.dtype) for heads in (8, 2, 2)]
                out = heedful.attention(*given, causal=True, cache=cache, backend="triton")
            assert out.device == device
            assert out.isfinite().all()
    assert torch.cuda.current_device() == 0


def test_tensors_of_several_devices_are_refused(two_devices) -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="device"):
        heedful.attention(q, k.to(two_devices), v)


def test_what_looks_on_sees_an_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    tensors = inputs()
    leaves = [tensor.clone().requires_grad_() for tensor in inputs()]
    for _ in range(3):
        heedful.attention(*tensors, backend="triton")
        heedful.attention(*leaves, backend="triton").sum().backward()
    for wanted, arguments in (("attention_forward", tensors), ("attention_backward", leaves)):
        seen: list[str] = []
        with Names():
            out = heedful.attention(*arguments, backend="triton")
            if out.requires_grad:
                out.sum().backward()
        assert f"heedful_triton.{wanted}.default" in seen


@needs_bridge
@pytest.mark.parametrize("name", ["full", "documents", "decoding"])
def test_a_captured_graph_replays(short_way, name) -> None:
    pattern, q_length, k_length = patterns()[name]
    there = on_device(pattern)
    tensors = inputs(q_length, k_length)
    for _ in range(2):
        heedful.attention(*tensors, pattern=there, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = heedful.attention(*tensors, pattern=there, backend="triton")
    short_way()
    for _ in range(3):
        for tensor, other in zip(tensors, inputs(q_length, k_length), strict=True):
            tensor.copy_(other)
        graph.replay()
        check(out, *tensors, pattern=pattern)


def test_training_as_one_graph() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    grad = torch.randn_like(leaves[0])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(heedful.attention(*leaves, causal=True, backend="triton"), leaves, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(heedful.attention(*leaves, causal=True, backend="triton"), leaves, grad)
    with torch.no_grad():
        for leaf, other in zip(leaves, inputs(), strict=True):
            leaf.copy_(other)
    graph.replay()
    wanted = expected(*(leaf.detach().cpu() for leaf in leaves), pattern=Causal(), grad_out=grad.cpu())
    for name, gradient in zip("qkv", found, strict=True):
        wanted.gradients[name].check(gradient.cpu(), name)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph(dynamic) -> None:
    documents = on_device(patterns()["documents"][0])

    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        windowed = heedful.attention(q, k, v, pattern=SlidingWindow(20, 0), softcap=30.0)
        return windowed + heedful.attention(q, k, v, pattern=documents, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic)
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    grad = torch.randn_like(leaves[0])
    found = torch.autograd.grad(compiled(*leaves), leaves, grad)
    wanted = torch.autograd.grad(both(*leaves), leaves, grad)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_more_elements_than_an_int32_counts() -> None:
    """Tensors of 2.3 · 10^9 numbers each, in both memory orders; the last rows are checked."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB of free memory")
    heads, length, dim = 68, 262144, 128
    pattern = SlidingWindow(70, 0)
    for blhd in (False, True):
        shape = (1, length, heads, dim) if blhd else (1, heads, length, dim)
        q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
        q, k, v = (tensor.transpose(1, 2) if blhd else tensor for tensor in (q, k, v))
        assert q.numel() > 2**31
        for _ in range(2):
            out = heedful.attention(q, k, v, pattern=pattern, backend="triton")
            rows = slice(length - 200, None)
            for head in (0, heads - 1):
                parts = [tensor[:, head : head + 1, rows].cpu() for tensor in (q, k, v)]
                bounded = expected(*parts, pattern=pattern).out
                bounded.value, bounded.bound = bounded.value[:, :, 70:], bounded.bound[:, :, 70:]
                bounded.check(out[:, head : head + 1, rows].cpu()[:, :, 70:])
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        grad = torch.zeros_like(q)
        grad[:, :, length - 100 :].normal_()
        found = torch.autograd.grad(heedful.attention(*leaves, pattern=pattern, backend="triton"), leaves, grad)
        parts = [tensor.detach()[:, -1:, length - 400 :].cpu() for tensor in (q, k, v, grad)]
        wanted = expected(*parts[:3], pattern=pattern, grad_out=parts[3])
        for name, gradient in zip("qkv", found, strict=True):
            bounded = wanted.gradients[name]
            bounded.value, bounded.bound = bounded.value[:, :, 100:], bounded.bound[:, :, 100:]
            bounded.check(gradient[:, -1:, length - 300 :].cpu(), name)
        assert not found[0][:, :, : length - 100].any()
        del q, k, v, leaves, grad, found, out
        torch.cuda.empty_cache()


def test_a_bias_of_more_elements_than_an_int32_counts() -> None:
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of free memory")
    length = 47000
    bias = torch.randn(1, 1, length, length, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = (torch.randn(1, 1, length, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    for _ in range(2):
        out = heedful.attention(q, k, v, bias=bias, backend="triton")
        rows = slice(length - 40, None)
        found = out[:, :, rows].cpu()
        expected(q[:, :, rows].cpu(), k.cpu(), v.cpu(), bias=bias[:, :, rows].cpu()).out.check(found)


@needs_bridge
def test_the_bridge_says_why_it_repeats_nothing() -> None:
    """Copies that Python makes of a tensor are no part of what the bridge can repeat."""
    q, k, v = inputs()
    strided = torch.randn(2, 4, 64, 300, device=DEVICE, dtype=q.dtype).transpose(2, 3)
    made = kept.Kept(0)
    code = Full().schedule.encode()
    for _ in range(2):
        found = made.run([strided, k, v], lambda q, k, v: shortcuts.forward_work(q, k, v, (), code, 0.125, False))
        check(found[0], strided, k, v)
    assert "a copy" in made.refused
