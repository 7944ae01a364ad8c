"""heedful.convert: what it changes, what it keeps, what it leaves alone, and the way back."""

from __future__ import annotations

import copy
import io
import json

import attention_calls
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import heedful
from heedful import Causal, Global, SlidingWindow
from heedful.nn import MultiheadAttention, TransformerEncoderLayer


class Model(nn.Module):
    """Attention in a list, an encoder, a decoder, and something that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2)])
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, 0.0, batch_first=True), 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = x + block(x, x, x, key_padding_mask=padding)[0]
        memory = self.encoder(x, src_key_padding_mask=padding)
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        out = self.decoder(x, memory, causal, memory_key_padding_mask=padding, tgt_is_causal=True)
        return self.head(out)


ATTENTION = [
    "blocks.0",
    "blocks.1",
    "encoder.layers.0.self_attn",
    "encoder.layers.1.self_attn",
    "decoder.layers.0.self_attn",
    "decoder.layers.0.multihead_attn",
]
LAYERS = ["encoder.layers.0", "encoder.layers.1"]


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 9, 16), torch.arange(9) >= torch.tensor([[5], [9]])


def state(model: nn.Module) -> dict[str, object]:
    """Everything that a module holds, by identity."""
    return {
        f"{name}.{key}": dict(value) if isinstance(value, dict) else value
        for name, module in model.named_modules()
        for key, value in {"class": type(module), **module.__dict__}.items()
    }


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_every_attention_runs_on_heedful_with_the_same_result(monkeypatch, training, gradient) -> None:
    model = Model().train(training)
    before = copy.deepcopy(model)
    (x, padding), given = inputs(), list(model.parameters())
    converted, report = heedful.convert(model)
    assert converted is model
    assert sorted(report.converted) == sorted(ATTENTION + LAYERS)
    assert not report.left
    assert all(a is b for a, b in zip(model.parameters(), given, strict=True))
    assert model.training == training
    assert all(module.training == training for module in model.modules())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    assert list(model.state_dict()) == list(before.state_dict())
    calls = attention_calls.record(monkeypatch)
    with torch.set_grad_enabled(gradient):
        for mask in (None, padding):
            calls.clear()
            found, wanted = model(x, mask), before(x, mask)
            assert len(calls) == len(ATTENTION)
            # torch's own weights of padded queries are those of its paths; only real positions mean something.
            real = slice(None) if mask is None else ~padding
            torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-5)
    before.load_state_dict(model.state_dict())


def test_training_goes_on() -> None:
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in models]
    losses: list[list[float]] = [[], []]
    for step in range(4):
        if step == 2:
            heedful.convert(models[1])
        x, _ = inputs()
        for model, optimizer, seen in zip(models, optimizers, losses, strict=True):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_undo_restores_everything() -> None:
    model = Model().eval()
    seen = []
    model.blocks[0].register_forward_hook(lambda *arguments: seen.append("forward"))
    model.blocks[0].out_proj.register_forward_pre_hook(lambda *arguments: None)
    model.encoder.layers[0].register_forward_pre_hook(lambda *arguments: seen.append("layer"))
    before = state(model)
    _, report = heedful.convert(model, pattern=SlidingWindow(2))
    with torch.no_grad():
        model(inputs()[0])
    assert seen == ["forward", "layer"]
    assert state(model) != before
    report.undo()
    assert state(model) == before
    report.undo()
    assert state(model) == before


def test_a_module_alone_and_one_that_is_used_twice() -> None:
    module = nn.MultiheadAttention(16, 4)
    holder = nn.ModuleDict({"a": module, "b": module})
    reference = [module]
    converted, report = heedful.convert(module)
    assert converted is module is reference[0]
    assert isinstance(module, MultiheadAttention)
    assert report.converted == [""]
    report.undo()
    _, report = heedful.convert(holder)
    assert report.converted == ["a"]
    assert isinstance(holder["b"], MultiheadAttention)


@pytest.mark.parametrize("form", ["pattern", "function", "globs"])
def test_patterns(form) -> None:
    model = Model().eval()
    wanted = {
        "pattern": dict.fromkeys(ATTENTION, SlidingWindow(2)),
        "function": {name: Causal() if name.startswith("blocks") else None for name in ATTENTION},
        "globs": dict.fromkeys(ATTENTION, Global(1)) | {"blocks.1": None, ATTENTION[-1]: SlidingWindow(3)},
    }[form]
    argument = {
        "pattern": SlidingWindow(2),
        "function": lambda name: Causal() if name.startswith("blocks") else None,
        "globs": {"blocks.1": None, "*.multihead_attn": SlidingWindow(3), "*": Global(1)},
    }[form]
    _, report = heedful.convert(model, argument)
    assert {name: model.get_submodule(name).pattern for name in ATTENTION} == wanted
    assert {e.name: e.pattern for e in report.entries if e.name in ATTENTION} == {
        name: None if pattern is None else repr(pattern) for name, pattern in wanted.items()
    }
    x = torch.randn(2, 9, 16)
    block, plain = model.blocks[0], nn.MultiheadAttention(16, 4, batch_first=True)
    plain.load_state_dict(block.state_dict())
    excluded = None if wanted["blocks.0"] is None else ~wanted["blocks.0"].dense(9, 9)[0, 0]
    torch.testing.assert_close(block(x, x, x), plain(x, x, x, attn_mask=excluded))


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (SlidingWindow, TypeError, "pattern takes a heedful"),
        (torch.ones(3, 3, dtype=torch.bool), TypeError, "pattern takes a heedful"),
        (lambda name: name, TypeError, "pattern for blocks.0 takes"),
        ({"blocks.*": Causal(), "attention.*": Causal()}, ValueError, r"got 'attention\.\*'"),
        ({"encoder.layers.0": Causal()}, ValueError, "blocks.0, blocks.1"),
        ({"*": 3}, TypeError, "pattern for blocks.0 takes"),
    ],
)
def test_wrong_patterns_change_nothing(argument, error, message) -> None:
    model = Model()
    before = state(model)
    with pytest.raises(error, match=message):
        heedful.convert(model, argument)
    assert state(model) == before


def test_only_modules_are_converted() -> None:
    with pytest.raises(TypeError, match="model takes a torch"):
        heedful.convert([nn.MultiheadAttention(16, 4)])
    _, report = heedful.convert(nn.Linear(3, 3))
    assert str(report) == "no torch.nn.MultiheadAttention in the model: nothing was changed"


class Subclass(nn.MultiheadAttention):
    pass


class LayerSubclass(nn.TransformerEncoderLayer):
    pass


def quantizable() -> nn.Module:
    return torch.ao.nn.quantizable.MultiheadAttention(16, 4)


def parametrized() -> nn.Module:
    module = nn.MultiheadAttention(16, 4)
    return nn.utils.parametrize.register_parametrization(module, "in_proj_weight", nn.Identity())


def with_forward_of_its_own() -> nn.Module:
    module = nn.MultiheadAttention(16, 4)
    module.forward = lambda *arguments, **options: None
    return module


def with_quantized_output() -> nn.Module:
    module = nn.MultiheadAttention(16, 4)
    module.out_proj = torch.ao.nn.quantized.dynamic.Linear(16, 16)
    return module


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: Subclass(16, 4), r"is a subclass, .*test_convert\.Subclass"),
        (quantizable, r"is a subclass, torch\.ao"),
        (parametrized, "is parametrized"),
        (with_forward_of_its_own, "has a forward of its own"),
        (with_quantized_output, "has a quantized or unknown out_proj"),
        (lambda: torch.jit.script(nn.MultiheadAttention(16, 4)), "is scripted"),
    ],
    ids=["subclass", "quantizable", "parametrized", "own forward", "quantized output", "scripted"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_left_alone(made, why) -> None:
    model = nn.ModuleDict({"special": made(), "plain": nn.MultiheadAttention(16, 4)})
    kind = type(model["special"])
    _, report = heedful.convert(model, SlidingWindow(3))
    assert report.converted == ["plain"]
    assert list(report.left) == ["special"]
    assert type(model["special"]) is kind
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(report.left["special"])


def test_layers_that_are_subclasses_run_their_attention(monkeypatch) -> None:
    model = nn.Sequential(LayerSubclass(16, 4, 32, batch_first=True)).eval()
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        wanted = model(x)
        _, report = heedful.convert(model)
        calls = attention_calls.record(monkeypatch)
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
    assert type(model[0]) is LayerSubclass
    assert report.converted == ["0.self_attn"]
    assert "is a subclass" in report.left["0"]


def test_a_layer_follows_its_attention() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32)
    layer.self_attn = Subclass(16, 4)
    _, report = heedful.convert(layer)
    assert report.converted == []
    assert "self_attn that is left alone" in report.left[""]
    assert type(layer) is nn.TransformerEncoderLayer


def test_patterns_for_one_length_keep_an_encoder_from_nested_tensors() -> None:
    """Which would give its layers sequences of other lengths."""
    model = Model().eval()
    before = state(model)
    x, padding = inputs()
    excluded = torch.rand(9, 9) < 0.3
    excluded[:, 0] = False
    with torch.no_grad():
        wanted = model.encoder(x, mask=excluded, src_key_padding_mask=padding)
        _, report = heedful.convert(model, {"encoder.*": heedful.Mask(~excluded)})
        torch.testing.assert_close(model.encoder(x, src_key_padding_mask=padding), wanted, rtol=1e-4, atol=1e-5)
    assert "encoder" in report.converted
    report.undo()
    assert state(model) == before


def test_twice() -> None:
    model = Model()
    before = state(model)
    _, first = heedful.convert(model)
    _, second = heedful.convert(model)
    assert not second.converted
    assert set(second.left.values()) == {"is heedful's already"}
    _, third = heedful.convert(model, {"blocks.*": Causal()})
    assert third.converted == ["blocks.0", "blocks.1"]
    third.undo()
    assert all(model.get_submodule(name).pattern is None for name in ATTENTION)
    first.undo()
    assert state(model) == before
    _, first = heedful.convert(model)
    _, second = heedful.convert(model, Causal())
    first.undo()
    with pytest.raises(RuntimeError, match="is a MultiheadAttention now"):
        second.undo()
    assert state(model) == before


def test_a_model_that_was_compiled_before() -> None:
    model = Model().eval()
    x, _ = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(x)
        heedful.convert(compiled, SlidingWindow(1))
        found = compiled(x)
        torch.testing.assert_close(found, model(x))
        assert not torch.allclose(found, before)


def test_the_report_prints() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(16, 4), "b": Subclass(16, 4)})
    _, report = heedful.convert(model, SlidingWindow(3, 0))
    lines = str(report).splitlines()
    assert lines[0] == "1 modules converted, 1 left alone"
    assert lines[1] == "  a (MultiheadAttention): runs on heedful: SlidingWindow(3, 0)"
    stream = io.StringIO()
    Console(file=stream, width=200).print(report)
    for word in ("a (MultiheadAttention)", "runs on heedful", "SlidingWindow(3, 0)", "b (Subclass)", "is a subclass"):
        assert word in stream.getvalue()
    written = json.loads(report.to_json())
    assert written["converted"] == written["left"] == 1
    assert written["modules"][0] == {
        "name": "a",
        "kind": "MultiheadAttention",
        "converted": True,
        "what": "runs on heedful",
        "pattern": "SlidingWindow(3, 0)",
    }


def test_copies_of_a_converted_model() -> None:
    model, _ = heedful.convert(Model().eval(), SlidingWindow(2))
    x, padding = inputs()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(other.encoder.layers[0]) is TransformerEncoderLayer
        torch.testing.assert_close(other(x, padding), model(x, padding), rtol=0, atol=0)
