"""heedful.nn.MultiheadAttention in use: wrong calls, tracing, copies, and torch's layers around it."""

from __future__ import annotations

import copy
import io
import pickle

import attention_calls
import pytest
import torch
from multihead_inputs import EMBED, HEADS, excluding, pair
from torch import Tensor, nn

from heedful import Causal, Documents, Mask, Padding, SlidingWindow
from heedful.nn import MultiheadAttention

WRONG = {
    "query of 4 dimensions": lambda q, k, v: ((q[None], k, v), {}),
    "key of 2 dimensions": lambda q, k, v: ((q, k[0], v), {}),
    "value of 2 dimensions": lambda q, k, v: ((q, k, v[0]), {}),
    "no batch, key of 3 dimensions": lambda q, k, v: ((q[0], k, v[0]), {}),
    "embedding": lambda q, k, v: ((q[..., 1:], k, v), {}),
    "key and value of other lengths": lambda q, k, v: ((q, k, v[:, 1:]), {}),
    "key of other batch": lambda q, k, v: ((q, k[1:], v[1:]), {}),
    "features of key": lambda q, k, v: ((q, k[..., 1:], v[..., 1:]), {}),
    "attn_mask of 1 dimension": lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(7)}),
    "attn_mask of other lengths": lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(7, 5)}),
    "attn_mask for other heads": lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(3, 5, 7)}),
    "attn_mask per head without batch": lambda q, k, v: ((q[0], k[0], v[0]), {"attn_mask": torch.zeros(3, 5, 7)}),
    "attn_mask of ints": lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(5, 7, dtype=torch.int64)}),
    "attn_mask of half": lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(5, 7).half()}),
    "key_padding_mask of 1 dimension": lambda q, k, v: ((q, k, v), {"key_padding_mask": torch.zeros(7)}),
    "key_padding_mask of other length": lambda q, k, v: ((q, k, v), {"key_padding_mask": torch.zeros(3, 6)}),
    "key_padding_mask of other batch": lambda q, k, v: ((q, k, v), {"key_padding_mask": torch.zeros(2, 7)}),
    "key_padding_mask of ints": lambda q, k, v: ((q, k, v), {"key_padding_mask": torch.zeros(3, 7).int()}),
    "no batch, key_padding_mask of 2": lambda q, k, v: ((q[0], k[0], v[0]), {"key_padding_mask": torch.zeros(3, 7)}),
    "is_causal alone": lambda q, k, v: ((q, k, v), {"is_causal": True}),
}
# Where torch fails deep inside, the front door says what is wrong.
OTHER_ERRORS = {"key of other batch": (ValueError, "batch 2"), "attn_mask of half": (TypeError, "attn_mask takes")}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_fail_as_torch_says(case) -> None:
    theirs, ours = pair(torch.float32, batch_first=True, kdim=EMBED if case != "features of key" else 20)
    tensors, options = WRONG[case](*(torch.randn(3, n, EMBED) for n in (5, 7, 7)))
    options["need_weights"] = False
    with pytest.raises(Exception) as wanted:  # noqa: PT011
        theirs(*tensors, **options)
    kind, message = OTHER_ERRORS.get(case, (wanted.type, ""))
    with pytest.raises(kind, match=message):
        ours(*tensors, **options)


@pytest.mark.parametrize("arguments", [(0, 4), (8, 0), (10, 3)])
def test_wrong_constructors_fail_as_torchs(arguments) -> None:
    with pytest.raises(Exception) as wanted:  # noqa: PT011
        nn.MultiheadAttention(*arguments)
    with pytest.raises(wanted.type, match=str(wanted.value)[:20]):
        MultiheadAttention(*arguments)


def test_a_pattern_is_a_pattern() -> None:
    with pytest.raises(TypeError, match="pattern takes a heedful"):
        MultiheadAttention(EMBED, HEADS, pattern=torch.ones(5, 5, dtype=torch.bool))
    x = torch.randn(5, EMBED)
    with pytest.raises(TypeError, match="pattern takes a heedful"):
        MultiheadAttention(EMBED, HEADS)(x, x, x, pattern=SlidingWindow)
    for options in ({}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="per batch item"):
            MultiheadAttention(EMBED, HEADS, **options)(x, x, x, pattern=Padding(0, torch.tensor([1, 2])))


class Caller(nn.Module):
    """A model around the module, with the arguments that are no tensors fixed."""

    def __init__(self, module: nn.Module, **options) -> None:
        super().__init__()
        self.module, self.options = module, options

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        out, weights = self.module(x, x, x, **masks, **self.options)
        return out if weights is None else torch.cat([out.flatten(), weights.flatten()])


TRACED = {
    "weights": ({}, {}),
    "output": ({}, {"need_weights": False}),
    "window": ({"pattern": SlidingWindow(2)}, {"need_weights": False}),
    "documents": ({}, {"pattern": Documents(torch.tensor([0, 3, 7]), within=Causal())}),
    "appended": ({"add_bias_kv": True, "add_zero_attn": True, "pattern": SlidingWindow(2)}, {}),
    "sequence first": ({"batch_first": False}, {}),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", TRACED)
def test_compile_and_export(case, masked) -> None:
    constructor, options = TRACED[case]
    caller = Caller(MultiheadAttention(EMBED, HEADS, **{"batch_first": True} | constructor), **options)
    x = torch.randn(2, 7, EMBED) if caller.module.batch_first else torch.randn(7, 2, EMBED)
    given = {}
    if masked:
        given = {"attn_mask": excluding((7, 7), "bool"), "key_padding_mask": excluding((2, 7), "bool")}
    torch._dynamo.reset()
    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager")
    wanted = caller(x, **given)
    torch.testing.assert_close(compiled(x, **given), wanted)
    found, expected = (
        torch.autograd.grad(f(x, **given).square().sum(), caller.parameters()) for f in (compiled, caller)
    )
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        program = torch.export.export(caller, (x,), given)
        torch.testing.assert_close(program.module()(x, **given), wanted)


def test_export_with_any_length() -> None:
    class Padded(Caller):
        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return super().forward(x, key_padding_mask=padding)

    model = Padded(MultiheadAttention(EMBED, HEADS, batch_first=True, pattern=SlidingWindow(3)))
    length = torch.export.Dim("length", min=2, max=1000)
    example = torch.randn(2, 7, EMBED), torch.zeros(2, 7, dtype=torch.bool)
    x, padding = torch.randn(2, 33, EMBED), torch.arange(33) >= torch.tensor([[20], [33]])
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=({1: length}, {1: length}))
        torch.testing.assert_close(program.module()(x, padding), model(x, padding))


def test_inductor() -> None:
    caller = Caller(MultiheadAttention(EMBED, HEADS, batch_first=True, pattern=SlidingWindow(3)))
    x, padding = torch.randn(2, 9, EMBED), torch.arange(9) >= torch.tensor([[5], [9]])
    torch._dynamo.reset()
    compiled = torch.compile(caller, fullgraph=True)
    torch.testing.assert_close(compiled(x, key_padding_mask=padding), caller(x, key_padding_mask=padding))


def test_scripting_is_refused_in_words() -> None:
    with pytest.raises(RuntimeError, match="cannot read heedful"):
        torch.jit.script(nn.Sequential(MultiheadAttention(EMBED, HEADS)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "saved"])
def test_copies(copied, monkeypatch) -> None:
    module = MultiheadAttention(EMBED, HEADS, pattern=SlidingWindow(2) | Mask(torch.rand(5, 5) < 0.2))
    if copied == "saved":
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = copied(module)
    x = torch.randn(5, 2, EMBED)
    torch.testing.assert_close(other(x, x, x), module(x, x, x), rtol=0, atol=0)
    assert other.pattern == module.pattern
    assert repr(other) == repr(module)
    assert "pattern=SlidingWindow(2, 2)" in repr(module)


def test_functional_call_and_vmap_over_models() -> None:
    modules = [MultiheadAttention(EMBED, HEADS, pattern=SlidingWindow(2)) for _ in range(2)]
    x = torch.randn(5, EMBED)
    found = torch.func.functional_call(modules[0], dict(modules[1].named_parameters()), (x, x, x))
    torch.testing.assert_close(found, modules[1](x, x, x))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pattern", [None, SlidingWindow(1)])
def test_torchs_encoder_layer_calls_it_in_evaluation(monkeypatch, pattern, masked) -> None:
    """That layer's fused path would compute from this module's weights, past its pattern."""
    calls = attention_calls.record(monkeypatch)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True).eval()
    layer.self_attn = MultiheadAttention(EMBED, HEADS, batch_first=True, pattern=pattern).eval()
    x = torch.randn(2, 7, EMBED)
    given = {"src_key_padding_mask": torch.arange(7) >= torch.tensor([[4], [7]])} if masked else {}
    with torch.no_grad():
        out = layer(x, **given)
    assert len(calls) == 1
    torch.testing.assert_close(out, layer(x, **given))
    if pattern is not None:
        layer.self_attn.out_proj._forward_pre_hooks.clear()
        with pytest.raises(RuntimeError, match="a fused layer was about to ignore pattern"), torch.no_grad():
            layer(x, **given)
