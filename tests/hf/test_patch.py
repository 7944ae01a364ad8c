"""`patch` itself: what it changes, what it says, what it refuses, and that all of it can be taken back."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import outside
import pytest
import torch
import transformers
from families import BY_NAME, tokens
from torch import Tensor, nn

import heedful.hf
from heedful.hf.patches.family import Patched
from heedful.hf.patches.masks import Begin, MaskConfig


def logits(model: Any) -> Tensor:
    name = type(model).__name__
    inputs = {"input_ids": tokens(2, 45 if name.startswith("BigBird") else 23)}
    if hasattr(model, "get_decoder") and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(2, 7)
    with torch.no_grad():
        return model(**inputs).logits


def state(model: nn.Module) -> list[Any]:
    """All that could be different about a model that was patched and is not any more."""
    found = []
    for name, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if not isinstance(value, Tensor | dict)}
        hooks = module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_always_called
        found.append((name, type(module), attributes, id(getattr(module, "config", None)), *map(len, hooks)))
    return found


def is_ours(model: nn.Module) -> bool:
    """Whether something in a model is heedful's, and everything that should be."""
    return any(isinstance(module, Patched) for module in model.modules())


@pytest.mark.parametrize("name", outside.MODELS)
def test_in_place_and_back(name: str) -> None:
    own = outside.build(name)
    before, other, expected = state(own), outside.build(name), logits(own)
    names, config = list(own.state_dict()), own.config
    report = heedful.hf.patch(own)
    assert is_ours(own)
    assert not is_ours(other)
    assert list(own.state_dict()) == names
    assert own.config is config
    torch.testing.assert_close(logits(own), expected, atol=2e-4, rtol=0)
    assert own.config is config
    assert not any(isinstance(getattr(m, "config", None), MaskConfig) for m in own.modules())
    report.undo()
    assert state(own) == before
    assert torch.equal(logits(own), expected)
    heedful.hf.patch(own)
    heedful.hf.unpatch(own)
    heedful.hf.unpatch(own)
    assert state(own) == before
    assert torch.equal(logits(own), expected)


@pytest.mark.parametrize("name", ["longformer", "led", "big_bird", "bloom", "mpt", "falcon_rw"])
def test_copies_and_checkpoints(name: str, tmp_path: Any) -> None:
    _, ours = outside.pair(name)
    expected = logits(ours)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(m) for m in again.modules()] == [type(m) for m in ours.modules()]
        assert torch.equal(logits(again), expected)
        heedful.hf.unpatch(again)
        assert not is_ours(again)
        torch.testing.assert_close(logits(again), expected, atol=2e-4, rtol=0)
    assert is_ours(ours)
    ours.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "heedful" not in text.lower()
    assert json.loads(text)["architectures"] == [type(ours).__name__]
    loaded = type(ours).from_pretrained(tmp_path).eval()
    assert not is_ours(loaded)
    torch.testing.assert_close(logits(loaded), expected, atol=2e-4, rtol=0)


def test_the_report() -> None:
    report = heedful.hf.patch(outside.build("longformer"))
    assert report.model == "LongformerForMaskedLM"
    assert [entry.name for entry in report.replaced] == [
        f"longformer.encoder.layer.{layer}.attention.self" for layer in range(2)
    ]
    assert "window of 4 on each side" in report.replaced[0].attention
    assert "window of 8 on each side" in str(report)
    assert str(report).startswith("LongformerForMaskedLM: 2 attention modules run on heedful")
    found = json.loads(report.to_json())
    assert found == {"model": report.model, "replaced": [entry._asdict() for entry in report.replaced], "notes": []}


def test_what_is_alike_is_one_line_of_the_report() -> None:
    text = str(heedful.hf.patch(outside.build("falcon_40b")))
    assert "transformer.h.0.self_attention … transformer.h.1.self_attention (2): FalconAttention" in text
    assert "4 heads to 2 of keys" in text
    assert "note: a cache holds each key head once" in text


@pytest.mark.parametrize(
    ("name", "dtype", "implementation", "note"),
    [
        ("bloom", torch.float32, None, None),
        ("bloom", torch.bfloat16, None, "ALiBi is exact"),
        ("falcon_rw", torch.float32, "sdpa", None),
        ("falcon_rw", torch.float32, "eager", "ALiBi counts once"),
        ("falcon_7b", torch.float32, "eager", None),
    ],
)
def test_notes(name: str, dtype: torch.dtype, implementation: str | None, note: str | None) -> None:
    changes = {} if implementation is None else {"attn_implementation": implementation}
    notes = heedful.hf.patch(outside.build(name, dtype, **changes)).notes
    assert notes == () if note is None else note in notes[0]


def test_twice() -> None:
    model = outside.build("bloom")
    first, second = heedful.hf.patch(model), heedful.hf.patch(model)
    assert first.replaced
    assert not second.replaced
    assert "nothing left to do" in str(second)
    assert json.loads(second.to_json())["replaced"] == []
    assert sum(isinstance(hook, Begin) for hook in model.transformer._forward_pre_hooks.values()) == 1
    second.undo()
    assert is_ours(model)
    first.undo()
    assert not is_ours(model)


def test_a_part_of_a_model_and_then_the_rest() -> None:
    model = outside.build("bloom")
    heedful.hf.patch(model.transformer.h[0])
    assert [is_ours(block) for block in model.transformer.h] == [True, False]
    expected = logits(outside.build("bloom"))
    # The mask is a tensor then.
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=0)
    report = heedful.hf.patch(model)
    assert [entry.name for entry in report.replaced] == ["transformer.h.1.self_attention"]
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=0)
    report.undo()
    assert [is_ours(block) for block in model.transformer.h] == [True, False]


def test_a_shared_config_is_not_touched() -> None:
    """Two models may be made of one config object; the other one goes on making masks."""
    _, name, arguments = outside.MODELS["bloom"]
    config = transformers.BloomConfig(**arguments)
    first, second = (getattr(transformers, name)(config).eval() for _ in range(2))
    expected = logits(second)
    heedful.hf.patch(first)
    seen: list[Any] = []
    first.transformer.h[1].register_forward_hook(lambda *_: seen.append(logits(second)))
    logits(first)
    assert torch.equal(seen[0], expected)
    assert config._attn_implementation == second.config._attn_implementation


def test_a_forward_that_raises_leaves_the_config_as_it_was() -> None:
    _, ours = outside.pair("bloom")
    config = ours.config
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        ours()
    assert ours.transformer.config is config


@pytest.mark.parametrize("name", ["longformer", "led", "big_bird_decoder", "bloom", "mpt"])
def test_these_models_by_name_say_what_to_do(name: str) -> None:
    """transformers lets the name of an implementation pass for models that do not ask for it."""
    expected = logits(outside.build(name))
    model = outside.build(name, attn_implementation="heedful")
    mask = torch.ones(2, 23, dtype=torch.long)
    decoder = {"decoder_input_ids": tokens(2, 7)} if name == "led" else {}
    with pytest.raises(TypeError, match=r"heedful\.hf\.patch\(model\)"):
        model(input_ids=tokens(2, 23), attention_mask=mask, **decoder)
    heedful.hf.patch(model)
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=0)


def test_unknown_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model takes a torch\.nn\.Module, got a str"):
        heedful.hf.patch("longformer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"attention of longformer, led, big_bird, .*, got a Linear$"):
        heedful.hf.patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r'which takes heedful by attn_implementation="heedful"'):
        heedful.hf.patch(BY_NAME["llama"].build())


def test_what_is_derived_from_a_known_class_is_refused() -> None:
    from transformers.models.bloom.modeling_bloom import BloomAttention

    class OtherAttention(BloomAttention):
        pass

    model = outside.build("bloom")
    for block in model.transformer.h:
        block.self_attention.__class__ = OtherAttention
    with pytest.raises(ValueError, match="got a BloomForCausalLM"):
        heedful.hf.patch(model)
    assert state(model)


def test_a_forward_that_was_replaced_is_refused_before_any_change() -> None:
    model = outside.build("bloom")
    last = model.transformer.h[-1].self_attention
    last.forward = last.forward
    with pytest.raises(ValueError, match=r"got 'transformer.h.1.self_attention' with another; patch before"):
        heedful.hf.patch(model)
    assert not is_ours(model)
    assert not model.transformer._forward_pre_hooks


def test_a_forward_that_was_replaced_since_is_not_undone() -> None:
    model = outside.build("bloom")
    report = heedful.hf.patch(model)
    last = model.transformer.h[-1].self_attention
    last.forward = last.forward
    for take_back in (report.undo, lambda: heedful.hf.unpatch(model)):
        with pytest.raises(ValueError, match="take accelerate's hooks or other wrappers off first"):
            take_back()
    assert all(is_ours(block) for block in model.transformer.h)
    del last.forward
    report.undo()
    assert not is_ours(model)


@pytest.mark.parametrize("name", outside.MODELS)
def test_autocast(name: str) -> None:
    """BigBird's own cannot."""
    _, ours = outside.pair(name)
    exact = logits(ours)
    with torch.autocast("cpu", torch.bfloat16):
        actual = logits(ours)
    assert (actual - exact).square().mean() < 0.02 * exact.var()
