"""heedful.nn.TransformerEncoderLayer against torch.nn.TransformerEncoderLayer, alone and in an encoder."""

from __future__ import annotations

import copy
import pickle

import attention_calls
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heedful import Causal, Documents, Global, SlidingWindow
from heedful.nn import MultiheadAttention, TransformerEncoderLayer

MODEL, HEADS, HIDDEN, LENGTH = 24, 4, 40, 9
KINDS = {
    "default": {},
    "norm first": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "other activation": {"activation": F.silu, "bias": False},
    "odd heads": {"nhead": 3},
}


def made(kind: type[nn.Module], **options) -> nn.Module:
    """A layer whose weights are the same for every kind."""
    torch.manual_seed(2)
    return kind(**{"d_model": MODEL, "nhead": HEADS, "dim_feedforward": HIDDEN, "dtype": torch.float64} | options)


def pair(**options) -> tuple[nn.Module, nn.Module]:
    return made(nn.TransformerEncoderLayer, **options), made(TransformerEncoderLayer, **options)


MASKS = ("none", "causal", "causal hint", "padding", "both")


def source(batch_first: bool) -> Tensor:
    x = torch.randn(3, LENGTH, MODEL, dtype=torch.float64)
    return x if batch_first else x.transpose(0, 1).contiguous()


def masks(kind: str) -> dict[str, Tensor | bool]:
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    padding = torch.arange(LENGTH) >= torch.tensor([[4], [9], [1]])
    as_float = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(causal, -torch.inf)
    return {
        "none": {},
        "causal": {"mask": causal},
        "causal hint": {"mask": as_float, "is_causal": True},
        "padding": {"src_key_padding_mask": padding},
        "both": {"mask": causal, "src_key_padding_mask": padding},
    }[kind]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_same_parameters_outputs_and_gradients(options, batch_first, kind) -> None:
    theirs, ours = pair(batch_first=batch_first, dropout=0.0, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x, given = source(batch_first), masks(kind)
    if "mask" in given:
        given["src_mask"] = given.pop("mask")
    wanted, found = theirs(x, **given), ours(x, **given)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    gradients = (
        torch.autograd.grad(out.square().sum(), m.parameters()) for out, m in ((found, ours), (wanted, theirs))
    )
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x, **given), theirs(x, **given), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_in_an_encoder(monkeypatch, batch_first, kind, training) -> None:
    calls = attention_calls.record(monkeypatch)
    norm = nn.LayerNorm(MODEL, dtype=torch.float64)
    layers = pair(batch_first=batch_first, dropout=0.0)
    theirs, ours = (nn.TransformerEncoder(layer, 2, norm).train(training) for layer in layers)
    with torch.set_grad_enabled(training):
        x, given = source(batch_first), masks(kind)
        wanted, found = theirs(x, **given), ours(x, **given)
    assert len(calls) == 2
    assert all((call["pattern"] == Causal(0)) == (kind == "causal hint" or kind == "causal") for call in calls)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_without_a_batch() -> None:
    theirs, ours = pair(batch_first=True, dropout=0.0)
    x = source(batch_first=True)[0]
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-10)


def test_patterns() -> None:
    ours = made(TransformerEncoderLayer, batch_first=True, dropout=0.0, pattern=SlidingWindow(2))
    x = source(batch_first=True)
    assert ours.self_attn.pattern == SlidingWindow(2)
    excluded = ~(SlidingWindow(2) & Causal()).dense(LENGTH, LENGTH)[0, 0]
    found = ours(x, pattern=Causal())
    ours.pattern = None
    torch.testing.assert_close(found, ours(x, src_mask=excluded), rtol=1e-9, atol=1e-10)
    packed, cu = x.flatten(0, 1), torch.arange(4) * LENGTH
    found = ours(packed, pattern=Documents(cu, within=Global(1))).view(x.shape)
    ours.pattern = Global(1)
    torch.testing.assert_close(found, ours(x), rtol=1e-9, atol=1e-10)
    with pytest.raises(TypeError, match="pattern takes"):
        ours.pattern = SlidingWindow
    with pytest.raises(TypeError, match="pattern takes"):
        TransformerEncoderLayer(MODEL, HEADS, pattern=torch.ones(3, 3, dtype=torch.bool))


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_in_training_alone(norm_first) -> None:
    layers = pair(dropout=0.5, norm_first=norm_first)
    x = source(batch_first=False)
    found = []
    for layer in layers:
        # Within attention, torch draws other numbers.
        layer.self_attn.dropout = 0.0
        torch.manual_seed(4)
        found.append(layer(x))
        assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def test_copies_and_compilation() -> None:
    ours = made(TransformerEncoderLayer, batch_first=True, dropout=0.0, pattern=SlidingWindow(2))
    x = source(batch_first=True)
    wanted = ours(x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other.self_attn) is MultiheadAttention
        assert torch.equal(other(x), wanted)
    torch._dynamo.reset()
    encoder, padding = nn.TransformerEncoder(ours, 2), torch.arange(LENGTH) >= torch.tensor([[4], [9], [1]])
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    found, expected = (call(x, src_key_padding_mask=padding) for call in (compiled, encoder))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), wanted)
    with pytest.raises(RuntimeError, match="cannot read heedful"):
        torch.jit.script(ours)
