"""HeedfulCache: what transformers' DynamicCache gives, from buffers that stay where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import BY_NAME, WINDOW, padding, tokens, under
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from heedful.hf import HeedfulCache
from heedful.hf import cache as module
from heedful.hf.cache import BufferLayer

HEADS, DIM, VALUE_DIM = 2, 4, 6


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that are full after a few positions, as with long sequences."""
    monkeypatch.setattr(module, "SMALLEST", 1)


def states(length: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, HEADS, length, DIM), torch.randn(batch, HEADS, length, VALUE_DIM)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_layers_are_transformers_layers(data: st.DataObject) -> None:
    window = data.draw(st.none() | st.integers(2, 9))
    theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
    ours = BufferLayer(sliding_window=window)
    recording = data.draw(st.booleans())
    if recording and window is not None:
        theirs.activate_past_recording()
        ours.activate_past_recording()
    batch = data.draw(st.integers(1, 3))
    for _ in range(data.draw(st.integers(1, 12))):
        length = data.draw(st.sampled_from([1, 1, 1, 2, 3, 7, 20]))
        assert ours.get_mask_sizes(length) == theirs.get_mask_sizes(length)
        new = states(length, batch)
        for actual, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(actual, wanted)
        action = data.draw(st.sampled_from(["go on", "go on", "crop", "reorder", "select", "repeat"]))
        if action == "crop" and (recording or window is None):
            away = -data.draw(st.integers(0, min(length, 3)))
            theirs.crop(away)
            ours.crop(away)
        elif action == "reorder":
            order = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch)))
            theirs.reorder_cache(order)
            ours.reorder_cache(order)
        elif action == "select":
            order = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3)))
            theirs.batch_select_indices(order)
            ours.batch_select_indices(order)
            batch = len(order)
        elif action == "repeat" and batch < 3:
            theirs.batch_repeat_interleave(2)
            ours.batch_repeat_interleave(2)
            batch *= 2
        assert ours.get_seq_length() == theirs.get_seq_length()


def generated(model: PreTrainedModel, cache: Any, lengths: list[int], **options: Any) -> Any:
    mask = padding(lengths, max(lengths), "left")
    return model.generate(
        input_ids=tokens(*mask.shape) * mask,
        attention_mask=mask,
        past_key_values=cache,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **{"max_new_tokens": 12, **options},
    )


@pytest.mark.parametrize("implementation", ["eager", "heedful"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4", "gpt2"])
@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([4, 13, 9], {}),
        ([5, 9], {"num_beams": 3}),
        ([9], {"prompt_lookup_num_tokens": 3}),
    ],
    ids=["greedy", "beams", "lookup"],
)
def test_generates_the_same(name: str, implementation: str, lengths: list[int], options: dict[str, Any]) -> None:
    model = BY_NAME[name].build()
    found = [
        under(model, implementation, lambda m: generated(m, cache(config=m.config), lengths, **options))  # noqa: B023
        for cache in (DynamicCache, HeedfulCache)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    for wanted, actual in zip(found[0].logits, found[1].logits, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_an_assistant(name: str) -> None:
    model, assistant = BY_NAME[name].build(), BY_NAME[name].build(num_hidden_layers=1)
    found = [
        generated(model, cache, [9], assistant_model=assistant).sequences
        for cache in (DynamicCache(config=model.config), HeedfulCache(config=model.config))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_conversation_goes_on(name: str) -> None:
    model = BY_NAME[name].build()
    caches = [DynamicCache(config=model.config), HeedfulCache(config=model.config)]
    with torch.no_grad():
        for ids in tokens(2, 24).split([9, 1, 1, 10, 3], dim=1):
            wanted, actual = (model(input_ids=ids, past_key_values=cache).logits for cache in caches)
            torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_without_a_config_and_reset() -> None:
    model = BY_NAME["llama"].build()
    cache = HeedfulCache()
    wanted = generated(model, DynamicCache(), [4, 9]).sequences
    assert torch.equal(generated(model, cache, [4, 9]).sequences, wanted)
    assert len(cache) == 2
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generated(model, cache, [9]).sequences, generated(model, DynamicCache(), [9]).sequences)


def test_encoder_decoder() -> None:
    cache = EncoderDecoderCache(HeedfulCache(), HeedfulCache())
    cache.self_attention_cache.update(*states(3), 0)
    cache.crop(-1)
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == 2


def test_steps_are_written_in_place() -> None:
    layer = BufferLayer(max_length=32)
    keys, _ = layer.update(*states(9))
    memory = keys.data_ptr()
    for length in range(10, 33):
        new = states(1)
        keys, values = layer.update(*new)
        assert keys.data_ptr() == memory
        assert keys.shape == (2, HEADS, length, DIM)
        assert torch.equal(keys[:, :, -1:], new[0])
        assert torch.equal(values[:, :, -1:], new[1])
    assert layer.get_max_length() == 32
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.keys.data_ptr() == memory


def test_a_window_is_bounded_and_seldom_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = []
    moved = module._moved
    monkeypatch.setattr(module, "_moved", lambda *arguments: moves.append(arguments) or moved(*arguments))
    layer = BufferLayer(sliding_window=WINDOW)
    layer.update(*states(50))
    for _ in range(200):
        keys, _ = layer.update(*states(1))
        assert keys.shape[2] == WINDOW
        assert keys.untyped_storage().nbytes() <= 2 * HEADS * 2 * WINDOW * DIM * 4
    # Keys and values, each time that a window's worth of positions has come.
    assert len(moves) <= 2 * (200 // WINDOW + 1)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_compiled_model(name: str) -> None:
    model = BY_NAME[name].build()
    model.set_attn_implementation("heedful")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    caches = [HeedfulCache(config=model.config), HeedfulCache(config=model.config)]
    with torch.no_grad():
        for ids in tokens(2, 24).split([9, 1, 1, 1, 1, 6, 5], dim=1):
            wanted = model(input_ids=ids, past_key_values=caches[0]).logits
            actual = compiled(input_ids=ids, past_key_values=caches[1]).logits
            torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_memory_doubles() -> None:
    layer, sizes = BufferLayer(), set()
    for _ in range(100):
        sizes.add(layer.update(*states(1))[0].untyped_storage().nbytes() // (2 * HEADS * DIM * 4))
    assert sizes == {1, 2, 4, 8, 16, 32, 64, 128}


def test_inference_mode_and_back() -> None:
    layer = BufferLayer()
    with torch.inference_mode():
        layer.update(*states(3))
    layer.update(*states(4))


def test_refusals() -> None:
    layer = BufferLayer(max_length=5)
    layer.update(*states(3))
    with pytest.raises(ValueError, match="at most 5 in all"):
        layer.update(*states(3))
    with pytest.raises(ValueError, match=r"reset\(\) empties it"):
        layer.update(*states(1, batch=3))
    with pytest.raises(ValueError, match=r"torch\.float64"):
        layer.update(*(state.double() for state in states(1)))
    with pytest.raises(ValueError, match="need a gradient"):
        layer.update(states(1)[0].requires_grad_(), states(1)[1])
    with pytest.raises(ValueError, match="tokens_to_remove takes 0 or less"):
        layer.crop(2)
    assert layer.get_seq_length() == 3
    window = BufferLayer(sliding_window=3)
    window.update(*states(9))
    with pytest.raises(RuntimeError, match="call activate_past_recording"):
        window.crop(-2)
    assert window.get_seq_length() == 9
    for error, length in ((ValueError, 0), (TypeError, 1.5)):
        with pytest.raises(error, match="max_length"):
            HeedfulCache(max_length=length)
