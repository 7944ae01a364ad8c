"""CUDA graphs on a device: replays, forms, weights, what breaks a capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_calls import DEVICE, close, decoded, held, made, no_waiting
from torch import Tensor, nn

import heedful
from heedful import flash_attn
from heedful.graphs import Buckets, CaptureError, capture

pytestmark = pytest.mark.gpu


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


def test_graphs() -> None:
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


def test_graph_buckets() -> None:
    net = _net()
    buckets = Buckets([32, 64, 128], dim=1, pad={0: 0.0}, output_dim=1)
    with torch.no_grad():
        fast = capture(net, made(2, 20, 256), buckets=buckets)
        for length in (20, 31, 32, 33, 100):
            x = made(2, length, 256)
            close(fast(x), net(x))


def test_graph_dropout() -> None:
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


def test_graph_errors() -> None:
    """What breaks a capture is named, and PyTorch works on behind it."""
    x = made(2, 50, 256)
    cases = {
        "reads a number": (nn.Sequential(nn.Identity(), Reads()), "1 (Reads)"),
        "a shape from data": (lambda x: x[x > 0].sum() + x, None),
        "from the CPU": (lambda x: x + torch.ones(256).to(DEVICE), None),
        "waits": (lambda x: torch.cuda.synchronize() or x, None),
    }
    for name, (model, where) in cases.items():
        error = _refused(model, x)
        assert str(error)
        assert error.where == where, error.where
        assert where is None or error.findings[0].module == where
        assert (name == "waits") == (not error.findings)
        torch.cuda.synchronize()
        assert torch.isfinite(torch.rand(1000, device=DEVICE)).all()
        net = _net(1)
        with torch.no_grad():
            close(capture(net, x)(x), net(x))


def test_graph_of_decoding() -> None:
    """A step whose lengths lie on the device: written into between replays."""
    lengths = torch.tensor([5, 90], dtype=torch.int32, device=DEVICE)
    keys, values = made(2, 128, 2, 64), made(2, 128, 2, 64)
    mine = keys.clone(), values.clone()

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn.flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=lengths, causal=True)

    fast = capture(step, held(lengths))
    keys.copy_(mine[0])
    values.copy_(mine[1])
    counts = lengths.tolist()
    for _ in range(5):
        q, k, v = held(lengths)
        for n, length in enumerate(counts):
            mine[0][n, length], mine[1][n, length] = k[n, 0], v[n, 0]
        counts = [length + 1 for length in counts]
        close(fast(q, k, v), decoded(q, *mine, counts))
        lengths += 1
    cache = heedful.KVCache()
    q = made(1, 2, 1, 64)
    assert "keeps lengths in Python" in str(_refused(lambda q: heedful.attention(q, q, q, cache=cache), q))


@pytest.mark.parametrize("shape", [(1, 16, 256), (16, 4096, 256)])
def test_the_optimizer_s_verdict(shape) -> None:
    from heedful.compat.kernel_pytorch.compiler_integration import PyGraphCUDAOptimizer

    with torch.no_grad():
        net, x = _net(), made(*shape)
        result = PyGraphCUDAOptimizer(cost_threshold=0.1, strategy="balanced").benchmark_vs_eager(net, [x], 10)
    assert result["eager_execution"]["median_time"] > 0
    assert result["graph_execution"]["median_time"] > 0


def test_graphed_training() -> None:
    """PyTorch's own capture of forward and backward, with heedful's attention inside."""
    net, plain = _net(2).train(), _net(2).train()
    plain.load_state_dict(net.state_dict())
    x = made(2, 64, 256).requires_grad_()
    graphed = torch.cuda.make_graphed_callables(net, (x,))
    grad = made(2, 64, 256)
    y = made(2, 64, 256).requires_grad_()
    found = torch.autograd.grad(graphed(y), (y, *net.parameters()), grad)
    wanted = torch.autograd.grad(plain(y), (y, *plain.parameters()), grad)
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
