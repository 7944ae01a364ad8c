"""T5 with its position bias and Whisper, through the interface, against eager: encoder, decoder and cross attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import (
    BY_NAME,
    VOCABULARY,
    assert_same_gradients,
    disturbed,
    gradients,
    padding,
    tokens,
    under,
)
from torch import Tensor

from heedful import Causal, Full
from heedful.hf import HeedfulCache

TOLERANCE = 2e-4
NAMES = ["t5", "whisper"]


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=12,
            initializer_factor=2.0,
            dropout_rate=0.0,
            pad_token_id=0,
            decoder_start_token_id=0,
            eos_token_id=1,
            attn_implementation="eager",
        )
        model: Any = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=40,
            init_std=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            attn_implementation="eager",
        )
        model = transformers.WhisperForConditionalGeneration(config)
        model.generation_config.max_length = None
    return disturbed(model.to(dtype).eval())


def source(name: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    if name == "t5":
        mask = padding([9, 13, 5][:batch], 13, "right")
        return {"input_ids": tokens(batch, 13) * mask, "attention_mask": mask}
    return {"input_features": torch.randn(batch, 8, 40, generator=torch.Generator().manual_seed(4)).to(dtype)}


def both(name: str, run: Any) -> tuple[Any, Any]:
    model = build(name)
    with torch.no_grad():
        return under(model, "eager", run), under(model, "heedful", run)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("padded", [False, True])
def test_logits(name: str, length: int, padded: bool) -> None:
    mask = padding([max(length - 3, 1), length], length, "right") if padded else None
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask.bool()
    arguments = {**source(name), "decoder_input_ids": tokens(2, length) * real, "decoder_attention_mask": mask}
    expected, actual = both(name, lambda m: m(**arguments).logits[real])
    assert expected.std() > 1
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    """T5's position bias is learned, so that its gradient comes from the bias of the attention."""
    model = build(name)
    arguments = {**source(name), "decoder_input_ids": tokens(2, 7), "use_cache": False}
    run = lambda m: m(**arguments).logits  # noqa: E731
    expected, actual = (under(model, kind, lambda m: gradients(m, run)) for kind in ("eager", "heedful"))
    assert name != "t5" or any("relative_attention_bias" in parameter for parameter in actual)
    assert_same_gradients(actual, expected, share=1e-4)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}],
    ids=["dynamic", "static", "beams", "no_cache"],
)
def test_generated_tokens(name: str, options: dict[str, Any]) -> None:
    arguments = {**source(name, 3), "max_new_tokens": 8, "do_sample": False, **options}
    expected, actual = both(name, lambda m: m.generate(**arguments))
    assert torch.equal(actual, expected)


def test_an_assistant() -> None:
    """T5 drafted by a T5 of one layer less."""
    assistant = build("t5")
    assistant.decoder.block = assistant.decoder.block[:1]
    arguments = {key: tensor[:1] for key, tensor in source("t5").items()}
    expected, actual = both(
        "t5", lambda m: m.generate(**arguments, max_new_tokens=8, do_sample=False, assistant_model=assistant)
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_our_cache(name: str) -> None:
    cache = transformers.EncoderDecoderCache(HeedfulCache(), HeedfulCache())
    model = build(name)
    arguments = {**source(name), "max_new_tokens": 8, "do_sample": False}
    expected = under(model, "eager", lambda m: m.generate(**arguments))
    assert torch.equal(under(model, "heedful", lambda m: m.generate(**arguments, past_key_values=cache)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_output_attentions(name: str) -> None:
    arguments = {**source(name), "decoder_input_ids": tokens(2, 7), "output_attentions": True}
    expected, actual = both(name, lambda m: m(**arguments))
    for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(actual[kind]) == len(expected[kind]) == 2
        for weights, reference in zip(actual[kind], expected[kind], strict=True):
            torch.testing.assert_close(weights, reference, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_arrives(name: str, calls: list[dict[str, Any]]) -> None:
    model = build(name)
    arguments = {**source(name), "decoder_input_ids": tokens(2, 7)}
    if name == "t5":
        del arguments["attention_mask"]
    with torch.no_grad():
        under(model, "heedful", lambda m: m(**arguments))
    encoder, decoder, cross = calls[:2], calls[2::2], calls[3::2]
    for layer in range(2):
        assert encoder[layer]["pattern"] == cross[layer]["pattern"] == Full()
        assert decoder[layer]["pattern"] == Causal()
        for call, shape in ((encoder, (1, 4, 13, 13)), (decoder, (1, 4, 7, 7)), (cross, (1, 4, 7, 13))):
            bias = call[layer]["bias"]
            assert (None if bias is None else tuple(bias.shape)) == (shape if name == "t5" else None)


def test_an_encoder_alone() -> None:
    model = build("t5").encoder
    arguments = source("t5")
    with torch.no_grad():
        expected, actual = (under(model, kind, lambda m: m(**arguments)[0]) for kind in ("eager", "heedful"))
    real = arguments["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name: str) -> None:
    model, exact = build(name, torch.bfloat16), build(name)
    exact.load_state_dict({key: tensor.float() for key, tensor in model.state_dict().items()})
    run = lambda m: m(**source(name, dtype=m.dtype), decoder_input_ids=tokens(2, 7)).logits  # noqa: E731
    with torch.no_grad():
        reference = run(exact)
        plain, actual = (under(model, kind, run) for kind in ("eager", "heedful"))
    assert actual.dtype == torch.bfloat16
    assert (actual - reference).square().mean() < 2 * (plain - reference).square().mean()


def test_cross_attention_of_bert() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**BY_NAME["bert"].arguments, is_decoder=True, add_cross_attention=True)
    decoder = disturbed(transformers.BertLMHeadModel(config).eval())
    arguments = {
        "input_ids": tokens(2, 7),
        "encoder_hidden_states": torch.randn(2, 11, 64, generator=torch.Generator().manual_seed(6)),
        "encoder_attention_mask": padding([5, 11], 11, "right"),
        "use_cache": False,
    }
    with torch.no_grad():
        expected, actual = (under(decoder, kind, lambda m: m(**arguments).logits) for kind in ("eager", "heedful"))
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
