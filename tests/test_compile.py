"""torch.compile without a graph break, torch.export strict and not, with lengths and batch static and dynamic."""

from __future__ import annotations

import itertools

import pytest
import torch
from inputs import attention_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

import heedful
from heedful import (
    Attention,
    BigBird,
    BlockSparse,
    Causal,
    Chunked,
    Dilated,
    Documents,
    Full,
    Longformer,
    Mask,
    Padding,
    Prefix,
    SlidingWindow,
    attention,
    choose,
)

FAST = [name for name in ("native", "sdpa") if name not in choose.UNAVAILABLE]
SIZES = {"kv_heads": 2, "q_length": 33, "k_length": 45}

STATIC = {
    "full": Full,
    "causal": Causal,
    "window": lambda: SlidingWindow(5, 1),
    "offset": lambda: Causal(torch.tensor([3])),
    "dilated": lambda: Dilated(2, 3),
    "chunked": lambda: Chunked(8) & Causal(),
    "prefix": lambda: Prefix(3) | Causal(),
    "longformer": lambda: Longformer(3, 2),
    "bigbird": lambda: BigBird(8, 3, 1, 1),
    "padding": lambda: Padding(torch.tensor([2]), torch.tensor([40])),
}
SIZED = {
    "documents": lambda: Documents(torch.tensor([0, 10, 33]), torch.tensor([0, 20, 45]), Causal()),
    "blocks": lambda: BlockSparse(torch.rand(5, 6) > 0.5, 8),
    "mask": lambda: Mask(torch.rand(33, 45) > 0.5),
}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


class Layer(torch.nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return attention(q, k, v, **self.options)


@pytest.mark.parametrize(("backend", "pattern"), [*itertools.product(FAST, [*STATIC, *SIZED]), ("reference", "window")])
def test_compile(backend, pattern) -> None:
    layer = Layer(pattern=(STATIC | SIZED)[pattern](), backend=backend)
    inputs = attention_inputs(**SIZES)
    assert torch.equal(compiled(layer)(*inputs), layer(*inputs))


@pytest.mark.parametrize("pattern", STATIC)
def test_pattern_made_inside(pattern) -> None:
    def layer(q, k, v):
        return attention(q, k, v, pattern=STATIC[pattern]())

    inputs = attention_inputs(**SIZES)
    assert torch.equal(compiled(layer)(*inputs), layer(*inputs))


@pytest.mark.parametrize(("backend", "pattern"), [*itertools.product(FAST, STATIC), ("reference", "window")])
def test_dynamic_batch_and_lengths_compile_once(backend, pattern) -> None:
    layer = Layer(pattern=STATIC[pattern](), backend=backend)
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(layer, fullgraph=True, backend=counter)
    for batch, q_length, k_length in ((2, 33, 45), (3, 37, 41), (5, 80, 80), (4, 99, 64)):
        inputs = attention_inputs(batch=batch, kv_heads=2, q_length=q_length, k_length=k_length)
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_dynamic(tensor, 2)
        torch.testing.assert_close(function(*inputs), layer(*inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("backend", "pattern"),
    [
        *((None, pattern) for pattern in ("full", "causal", "window", "longformer", "padding", "bigbird")),
        *itertools.product([*FAST, "reference"], ["causal", "padding"]),
    ],
)
def test_export(backend, pattern, strict) -> None:
    if backend == "reference" and not strict and torch.__version__ < "2.12":
        pytest.skip("PyTorch 2.11 does not see that min(16*k, 32*k) is 16*k, the stride of grouped keys")
    layer = Layer(pattern=STATIC[pattern](), backend=backend)
    batch, q_length, k_length = Dim("batch", max=64), Dim("q", min=9, max=4096), Dim("k", min=9, max=4096)
    dynamic = ({0: batch, 2: q_length}, {0: batch, 2: k_length}, {0: batch, 2: k_length})
    program = export(layer, attention_inputs(**SIZES), dynamic_shapes=dynamic, strict=strict)
    inputs = attention_inputs(batch=3, kv_heads=2, q_length=50, k_length=77)
    torch.testing.assert_close(program.module()(*inputs), layer(*inputs))


OPTIONS = {
    "softcap": lambda: {"softcap": 2.0},
    "sinks": lambda: {"sinks": torch.randn(4)},
    "bias": lambda: {"bias": torch.randn(4, 33, 45)},
    "alibi": lambda: {"alibi_slopes": torch.rand(4)},
    "dropout": lambda: {"dropout_p": 0.3},
    "lse": lambda: {"return_lse": True},
    "weights": lambda: {"return_weights": True},
    "causal": lambda: {"causal": True, "pattern": SlidingWindow(4)},
    "mask": lambda: {"pattern": torch.rand(33, 45) > 0.5},
    "scale": lambda: {"scale": 0.3},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option) -> None:
    options = OPTIONS[option]()
    inputs = attention_inputs(**SIZES)

    def layer(q, k, v, options):
        return attention(q, k, v, **options)

    results = []
    for function in (compiled(layer), layer):
        torch.manual_seed(5)
        result = function(*inputs, options)
        results.append(result if isinstance(result, Attention) else (result,))
    for mine, eager in zip(*results, strict=True):
        assert mine is eager is None or torch.equal(mine, eager)


def test_layout() -> None:
    inputs = [t.transpose(1, 2) for t in attention_inputs(**SIZES)]
    layer = Layer(layout="blhd", causal=True)
    assert torch.equal(compiled(layer)(*inputs), layer(*inputs))


@pytest.mark.parametrize("backend", [None, "native", "sdpa", "reference"])
def test_gradients(backend) -> None:
    layer = Layer(pattern=SlidingWindow(4), backend=backend)
    inputs = [t.requires_grad_() for t in attention_inputs(**SIZES)]
    mine, eager = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled(layer), layer))
    for a, b in zip(mine, eager, strict=True):
        torch.testing.assert_close(a, b)


def every_tensor() -> dict[str, torch.Tensor]:
    q, k, v = attention_inputs(**SIZES)
    tensors = {"q": q, "k": k, "v": v, "bias": torch.randn(4, 1, 45), "alibi_slopes": torch.rand(2, 4)}
    return {name: t.requires_grad_() for name, t in (tensors | {"sinks": torch.randn(4)}).items()}


@pytest.mark.parametrize("pattern", ["window", "padding", "mask"])
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_gradients_of_every_tensor_through_every_output(pattern, layout) -> None:
    tensors, pattern = every_tensor(), (STATIC | SIZED)[pattern]()

    def step(tensors):
        turned = {name: t.transpose(1, 2) if name in "qkv" and layout == "blhd" else t for name, t in tensors.items()}
        found = attention(
            **turned, pattern=pattern, softcap=3.0, layout=layout, return_lse=True, return_weights=True,
            backend="native",
        )  # fmt: skip
        return found.out.square().sum() + found.lse.nan_to_num(neginf=0).sum() + (found.weights**3).sum()

    losses = [function(tensors) for function in (compiled(step), step)]
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, list(tensors.values())) for loss in losses), strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


def test_gradients_with_dropout() -> None:
    layer, inputs = Layer(dropout_p=0.4, backend="native"), [t.requires_grad_() for t in attention_inputs(**SIZES)]
    found = []
    for function in (compiled(layer), layer):
        torch.manual_seed(5)
        found.append(torch.autograd.grad(function(*inputs).square().sum(), inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_with_dynamic_lengths_compile_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = Layer(pattern=SlidingWindow(4), backend="native")
    function = torch.compile(layer, fullgraph=True, backend=counter)
    for batch, q_length, k_length in ((2, 33, 45), (3, 37, 41), (5, 80, 80)):
        inputs = attention_inputs(batch=batch, kv_heads=2, q_length=q_length, k_length=k_length)
        for tensor in inputs:
            tensor.requires_grad_()
            torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_dynamic(tensor, 2)
        mine, eager = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (function, layer))
        for a, b in zip(mine, eager, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_gradients_of_a_call_under_autocast() -> None:
    inputs = [t.requires_grad_() for t in attention_inputs(**SIZES)]
    layer = Layer(pattern=SlidingWindow(4), backend="native")

    def step(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(*inputs)
        assert out.dtype == torch.bfloat16
        return out.float().square().sum()

    for a, b in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (compiled(step), step)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


def test_autocast_around_and_inside() -> None:
    inputs = attention_inputs(**SIZES)

    def inside(q, k, v):
        with torch.autocast("cpu"):
            return attention(q, k, v, causal=True)

    with torch.autocast("cpu"):
        around = compiled(Layer(causal=True))(*inputs)
    assert around.dtype == torch.bfloat16
    assert torch.equal(around, inside(*inputs))
    assert torch.equal(compiled(inside)(*inputs), around)


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("gradient", [False, True])
def test_numbers_that_change(name, gradient) -> None:
    inputs = [t.requires_grad_(gradient) for t in attention_inputs(**SIZES)]

    def layer(q, k, v, number):
        return attention(q, k, v, **{name: number})

    function = compiled(layer)
    for number in (0.3, 0.4, 0.5):
        torch.testing.assert_close(function(*inputs, number), layer(*inputs, number))


def test_first_use_of_the_names_inside() -> None:
    for name in ("attention", "Causal"):
        heedful.__dict__.pop(name, None)
    inputs = attention_inputs(**SIZES)
    got = compiled(lambda q, k, v: heedful.attention(q, k, v, pattern=heedful.Causal()))(*inputs)
    assert torch.equal(got, attention(*inputs, causal=True))


def test_refusal_shows_its_text() -> None:
    q, k, v = attention_inputs(**SIZES)
    with pytest.raises(Exception, match="k takes q's batch, 2, got batch 1"):
        compiled(Layer())(q, k[:1], v)
    with pytest.raises(Exception, match="sdpa does not support softcap"):
        compiled(Layer(softcap=2.0, backend="sdpa"))(q, k, v)


def test_inductor() -> None:
    layer = Layer(pattern=SlidingWindow(4))
    inputs = [t.requires_grad_() for t in attention_inputs(**SIZES)]
    outputs = [function(*inputs) for function in (torch.compile(layer, fullgraph=True), layer)]
    torch.testing.assert_close(*outputs)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in outputs), strict=True):
        torch.testing.assert_close(a, b)
