"""The attention function: what it takes from a call, and what it refuses."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import BY_NAME, FAMILIES, Family, padding, tokens, under
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from heedful.hf import attention_forward, pattern_mask


def layer(**attributes: Any) -> Any:
    return SimpleNamespace(**{"training": False, "is_causal": True, "num_key_value_groups": 2, **attributes})


def qkv(q_length: int = 9, k_length: int = 9, dim: int = 16, value_dim: int = 16) -> list[Tensor]:
    """Transposed views of (B, L, H, D) memory, as models pass them, with two query heads to a key head."""
    generator = torch.Generator().manual_seed(q_length * 100 + k_length)
    shapes = [(2, q_length, 4, dim), (2, k_length, 2, dim), (2, k_length, 2, value_dim)]
    return [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("is_causal", [None, False, True])
@pytest.mark.parametrize("module_is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(9, 9), (1, 9), (4, 9), (1, 1)])
def test_calls_without_a_mask_are_aligned_as_under_sdpa(
    is_causal: bool | None, module_is_causal: bool, lengths: tuple[int, int]
) -> None:
    module = layer(is_causal=module_is_causal)
    expected, _ = sdpa_attention_forward(module, *qkv(*lengths), None, is_causal=is_causal)
    out, weights = attention_forward(module, *qkv(*lengths), None, is_causal=is_causal)
    assert weights is None
    assert out.is_contiguous()
    assert out.shape == (2, lengths[0], 4, 16)
    torch.testing.assert_close(out, expected)


def test_no_copy_of_the_inputs(calls: list[dict[str, Any]]) -> None:
    query, key, value = qkv()
    attention_forward(layer(), query, key, value, None)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        assert calls[0][name].data_ptr() == tensor.data_ptr()
        assert calls[0][name].is_contiguous()


def test_value_dim_and_scaling() -> None:
    query, key, value = qkv(value_dim=24)
    expected, _ = sdpa_attention_forward(layer(), query, key, value, None, scaling=0.5)
    out, _ = attention_forward(layer(), query, key, value, None, scaling=0.5)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("broadcast", [(2, 1, 9, 9), (2, 4, 9, 9), (1, 1, 9, 9), (2, 1, 1, 9)])
def test_masks_of_the_callers_own(broadcast: tuple[int, ...]) -> None:
    keep = torch.rand(broadcast, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[..., 0] = True
    added = torch.randn(broadcast, generator=torch.Generator().manual_seed(2))
    for mask in (keep, added):
        expected, _ = sdpa_attention_forward(layer(), *qkv(), mask)
        out, _ = attention_forward(layer(), *qkv(), mask)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "pattern"])
def test_position_bias(mask: str) -> None:
    bias = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(2))
    keep = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    theirs, ours = {
        "none": (None, None),
        "bool": (keep, keep),
        "float": (bias.flip(-1), bias.flip(-1)),
        "pattern": (keep, pattern_mask(2, 9, 9)),
    }[mask]
    expected, _ = sdpa_attention_forward(layer(), *qkv(), theirs, position_bias=bias)
    out, _ = attention_forward(layer(), *qkv(), ours, position_bias=bias)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_window_without_a_mask(causal: bool) -> None:
    distance = torch.arange(9)[:, None] - torch.arange(9)
    keep = ((distance >= 0) if causal else True) & (distance.abs() < 3)
    expected, _ = sdpa_attention_forward(layer(), *qkv(), keep[None, None])
    out, _ = attention_forward(layer(), *qkv(), None, is_causal=causal, sliding_window=3)
    torch.testing.assert_close(out, expected)


def test_a_mask_overrules_the_window() -> None:
    """As under eager: layers that say sliding_window have it in their mask."""
    expected, _ = attention_forward(layer(), *qkv(), None)
    out, _ = attention_forward(layer(), *qkv(), pattern_mask(2, 9, 9), sliding_window=3)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", ["s_aux", "sinks"])
def test_sinks(name: str) -> None:
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(5))
    query, key, value = qkv()
    out, _ = attention_forward(layer(), query, key, value, None, **{name: sinks})
    scores = query @ key.repeat_interleave(2, 1).mT / 4
    scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), float("-inf"))
    weights = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, 9, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out, (weights @ value.repeat_interleave(2, 1)).transpose(1, 2))


def test_dropout_only_in_training(calls: list[dict[str, Any]]) -> None:
    attention_forward(layer(training=True), *qkv(), None, dropout=0.25)
    attention_forward(layer(training=False), *qkv(), None, dropout=0.25)
    assert [call["dropout_p"] for call in calls] == [0.25, 0.0]


# GPT-2 keeps the argument from its attention, also under transformers' own sdpa.
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "gpt2"], ids=lambda family: family.name)
def test_output_attentions(family: Family) -> None:
    model = family.build()
    mask = padding([6, 11], 11, "right")

    def attentions(model: PreTrainedModel) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return model(input_ids=tokens(2, 11) * mask, attention_mask=mask, output_attentions=True).attentions

    expected, actual = under(model, "eager", attentions), under(model, "heedful", attentions)
    assert len(actual) == 2
    real = mask.bool()[:, None].expand(-1, 4, -1)
    for weights, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(weights[real], reference[real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", [None, "pattern"])
def test_cu_seq_lens(mask: str | None) -> None:
    cu_seqlens = torch.tensor([0, 4, 9])
    query, key, value = (tensor[:1] for tensor in qkv())
    attention_mask = None if mask is None else pattern_mask(1, 9, 9)
    lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 5, "max_length_k": 5}
    out, _ = attention_forward(layer(), query, key, value, attention_mask, **lengths)
    parts = [
        attention_forward(layer(), *(tensor[:, :, start:stop] for tensor in (query, key, value)), None)[0]
        for start, stop in ((0, 4), (4, 9))
    ]
    torch.testing.assert_close(out, torch.cat(parts, dim=1))


def test_cu_seq_lens_beside_packed_positions() -> None:
    model = BY_NAME["mistral"].build()
    cu_seqlens = torch.tensor([0, 7, 12])
    inputs = {
        "input_ids": tokens(1, 12),
        "position_ids": torch.cat([torch.arange(7), torch.arange(5)])[None],
        "use_cache": False,
    }
    lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 7, "max_length_k": 7}
    with torch.no_grad():
        expected = under(model, "eager", lambda m: m(**inputs).logits)
        actual = under(model, "heedful", lambda m: m(**inputs, **lengths).logits)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


def test_cu_seq_lens_where_the_model_does_not_look_at_positions() -> None:
    model = BY_NAME["gpt_oss"].build()
    cu_seqlens, ids = torch.tensor([0, 7, 12]), tokens(1, 12)
    packed = {"position_ids": torch.cat([torch.arange(7), torch.arange(5)])[None], "use_cache": False}
    with torch.no_grad():
        expected = under(model, "eager", lambda m: [m(input_ids=part).logits for part in ids.split([7, 5], dim=1)])
        actual = under(
            model, "heedful", lambda m: m(input_ids=ids, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, **packed)
        )
    torch.testing.assert_close(actual.logits, torch.cat(expected, dim=1), atol=2e-4, rtol=0)


def test_unknown_arguments_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="block_indices, cache"):
        attention_forward(layer(), *qkv(), None, cache=object(), block_indices=object(), position_ids=None)
    attention_forward(layer(), *qkv(), None, cache=None, position_ids=torch.arange(9), use_cache=True)
    model = BY_NAME["llama"].build()
    with pytest.raises(TypeError, match="attention_temperature"):
        under(model, "heedful", lambda m: m(input_ids=tokens(1, 4), attention_temperature=2.0))


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (torch.ones(2, 1, 9, 9, dtype=torch.int64), TypeError, "attention_mask: got dtype torch.int64"),
        ("causal", TypeError, "attention_mask: got a str"),
        (torch.ones(2, 1, 9, 8, dtype=torch.bool), ValueError, "attention_mask: got shape"),
        (torch.ones(9, 9), ValueError, "attention_mask: got shape"),
    ],
)
def test_masks_that_are_refused(mask: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        attention_forward(layer(), *qkv(), mask)


def test_a_mask_for_other_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="one for 9 queries and 12 keys"):
        attention_forward(layer(), *qkv(), pattern_mask(2, 9, 12))


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_as_an_encoder(padded: bool) -> None:
    model = BY_NAME["mistral"].build()
    mask = padding([5, 9], 9, "left") if padded else torch.ones(2, 9, dtype=torch.long)
    inputs = {"input_ids": tokens(2, 9) * mask, "attention_mask": mask, "is_causal": False}
    with torch.no_grad():
        expected = under(model, "eager", lambda m: m(**inputs).logits)
        actual = under(model, "heedful", lambda m: m(**inputs).logits)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=2e-4, rtol=0)


def test_a_4d_mask_given_to_the_model() -> None:
    model = BY_NAME["llama"].build()
    keep = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril().logical_or(torch.eye(9, dtype=torch.bool).flip(0))
    added = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = under(model, "eager", lambda m: m(input_ids=tokens(1, 9), attention_mask=added).logits)
        for mask in (keep, added):
            actual = under(model, "heedful", lambda m: m(input_ids=tokens(1, 9), attention_mask=mask).logits)  # noqa: B023
            torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = BY_NAME["mistral"].build()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="heedful")
    assert loaded.config._attn_implementation == "heedful"
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=tokens(1, 9)).logits, model(input_ids=tokens(1, 9)).logits, atol=2e-4, rtol=0
        )


def test_gradient_checkpointing() -> None:
    model = BY_NAME["mistral"].build()
    mask = padding([5, 11], 11, "left")

    def gradient(model: PreTrainedModel) -> Tensor:
        model.zero_grad()
        model(input_ids=tokens(2, 11) * mask, attention_mask=mask, use_cache=False).logits[mask.bool()].sum().backward()
        return model.model.embed_tokens.weight.grad.clone()

    expected = under(model, "eager", gradient)
    model.gradient_checkpointing_enable()
    model.train()
    torch.testing.assert_close(under(model, "heedful", gradient), expected, atol=1e-3, rtol=1e-4)


def test_gemma3_images_see_all_of_themselves(calls: list[dict[str, Any]]) -> None:
    from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

    model = BY_NAME["gemma3"].build().model
    embeds = torch.randn(2, 19, 64, generator=torch.Generator().manual_seed(1))
    blocks = torch.tensor([-1] * 3 + [0] * 8 + [-1] * 2 + [1] * 4 + [-1] * 2).expand(2, -1)
    real = padding([17, 19], 19, "left")

    def hidden(model: PreTrainedModel) -> Tensor:
        masks = create_masks_for_vision_model(model.config, embeds, real, None, None, blocks)
        with torch.no_grad():
            return model(inputs_embeds=embeds, attention_mask=masks, use_cache=False).last_hidden_state

    expected, actual = under(model, "eager", hidden), under(model, "heedful", hidden)
    torch.testing.assert_close(actual[real.bool()], expected[real.bool()], atol=2e-4, rtol=0)
    for call in calls:
        assert all(operand.dtype == torch.int32 for operand in call["pattern"].operands(19, 19))


def test_embedding_gemma_is_bidirectional(calls: list[dict[str, Any]]) -> None:
    model = BY_NAME["gemma3"].build(use_bidirectional_attention=True).model
    real = padding([11, 19], 19, "right")

    def hidden(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            return model(input_ids=tokens(2, 19) * real, attention_mask=real, use_cache=False).last_hidden_state

    expected, actual = under(model, "eager", hidden), under(model, "heedful", hidden)
    torch.testing.assert_close(actual[real.bool()], expected[real.bool()], atol=2e-4, rtol=0)
    assert all(o.dtype == torch.int32 for call in calls for o in call["pattern"].operands(19, 19))


def test_registered() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    assert AttentionInterface()["heedful"] is attention_forward
    assert AttentionMaskInterface()["heedful"] is pattern_mask


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def sdpa_mask(batch_size: int, cache_position: Tensor, kv_length: int) -> None: ...

    monkeypatch.setattr(masking_utils, "sdpa_mask", sdpa_mask)
    with pytest.raises(ImportError, match=r"transformers 5\.8 or newer"):
        importlib.reload(sys.modules["heedful.hf"])
