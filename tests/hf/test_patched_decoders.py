"""BLOOM, MPT, Falcon and BigBird as a decoder, patched, against the model's own attention."""

from __future__ import annotations

from typing import Any

import outside
import pytest
import torch
from families import assert_same_gradients, gradients, padding, tokens
from torch import Tensor

from heedful import Causal
from heedful.hf import HeedfulCache

TOLERANCE = 2e-4
HOLES = torch.tensor([[1] * 3 + [0] * 2 + [1] * 12, [0] * 2 + [1] * 7 + [0] + [1] * 7])
MASKS: dict[str, Tensor | None] = {
    "none": None,
    "left": padding([9, 17], 17, "left"),
    "right": padding([9, 17], 17, "right"),
    "holes": HOLES,
}


def both(name: str, run: Any, **changes: Any) -> tuple[Any, Any]:
    own, ours = outside.pair(name, **changes)
    with torch.no_grad():
        return run(own), run(ours)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", outside.DECODERS)
@pytest.mark.parametrize("padded", MASKS)
def test_logits(name: str, padded: str) -> None:
    mask = MASKS[padded]
    real = torch.ones(2, 17, dtype=torch.bool) if mask is None else mask.bool()
    expected, actual = both(name, lambda m: m(input_ids=tokens(2, 17) * real, attention_mask=mask).logits[real])
    assert expected.std() > 1
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", outside.DECODERS)
def test_gradients(name: str) -> None:
    mask = padding([9, 17], 17, "left")
    own, ours = outside.pair(name)

    def run(model: Any) -> Tensor:
        return model(input_ids=tokens(2, 17) * mask, attention_mask=mask, use_cache=False).logits * mask[..., None]

    assert_same_gradients(gradients(ours, run), gradients(own, run))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", outside.DECODERS)
@pytest.mark.parametrize("lengths", [[9], [4, 13, 9]], ids=["single", "left_padded"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}],
    ids=["dynamic", "static", "beams", "no_cache"],
)
def test_generated_tokens(name: str, lengths: list[int], options: dict[str, Any]) -> None:
    if "cache_implementation" in options and name == "falcon_rw":
        pytest.skip("transformers' Falcon with ALiBi takes no static cache")
    mask = padding(lengths, max(lengths), "left")
    arguments = {
        "input_ids": tokens(*mask.shape) * mask,
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        **({"use_cache": True} | options),
    }
    expected, actual = both(name, lambda m: m.generate(**arguments))
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon_rw", "falcon_40b"])
def test_generated_tokens_with_an_assistant_and_our_cache(name: str) -> None:
    own, ours = outside.pair(name)
    arguments = {"input_ids": tokens(1, 9), "max_new_tokens": 8, "do_sample": False, "use_cache": True}
    expected = own.generate(**arguments)
    assert torch.equal(ours.generate(**arguments, assistant_model=own), expected)
    assert torch.equal(ours.generate(**arguments, prompt_lookup_num_tokens=3), expected)
    cache = HeedfulCache(config=ours.config)
    assert torch.equal(ours.generate(**arguments, past_key_values=cache), expected)
    assert cache.get_seq_length() == 16


@pytest.mark.parametrize("name", ["big_bird_decoder", "bloom", "mpt", "falcon_rw", "falcon_40b"])
def test_a_cache_continued_by_several_tokens(name: str) -> None:
    ids = tokens(2, 21)

    def continued(model: Any) -> Tensor:
        found, cache = [], None
        for part in ids.split([8, 4, 9], dim=1):
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            found.append(out.logits)
            cache = out.past_key_values
        return torch.cat(found, dim=1)

    expected, actual = both(name, continued)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", outside.DECODERS)
def test_output_attentions(name: str) -> None:
    mask = padding([6, 11], 11, "right")
    changes = {"attn_implementation": "eager"} if name.startswith("falcon") and name != "falcon_rw" else {}
    run = lambda m: m(input_ids=tokens(2, 11) * mask, attention_mask=mask, output_attentions=True).attentions  # noqa: E731
    expected, actual = both(name, run, **changes)
    assert len(actual) == len(expected) == 2
    real = mask.bool()[:, None].expand(-1, actual[0].shape[1], -1)
    for weights, reference in zip(actual, expected, strict=True):
        if name == "falcon_rw":
            # Asked for weights, Falcon adds its ALiBi twice.
            torch.testing.assert_close(weights[real].sum(-1), torch.ones(int(real.sum())))
        else:
            torch.testing.assert_close(weights[real], reference[real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["big_bird_decoder", "bloom"])
def test_output_attentions_by_the_config(name: str) -> None:
    expected, actual = both(name, lambda m: m(input_ids=tokens(2, 11)).attentions, output_attentions=True)
    for weights, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(weights, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bloom", "bloom_6_heads", "mpt", "falcon_rw", "falcon_7b", "falcon_40b"])
def test_what_arrives(name: str, calls: list[dict[str, Any]]) -> None:
    _, ours = outside.pair(name)
    with torch.no_grad():
        ours(input_ids=tokens(2, 13))
    assert len(calls) == 2
    for call in calls:
        assert call["pattern"] == Causal()
        if name == "falcon_rw":
            assert call["bias"].shape == (2, 4, 1, 13)
        else:
            assert call["bias"] is None
    assert (calls[0]["alibi_slopes"] is not None) == (name.startswith(("bloom", "mpt")))
    heads = {"falcon_7b": 1, "falcon_40b": 2, "bloom_6_heads": 6, "mpt": 6}.get(name, 4)
    assert calls[0]["key"].shape[2] == heads


def test_holes_in_the_padding_make_alibi_a_row(calls: list[dict[str, Any]]) -> None:
    """BLOOM counts positions among real tokens."""
    _, ours = outside.pair("bloom")
    with torch.no_grad():
        ours(input_ids=tokens(2, 17) * HOLES, attention_mask=HOLES)
    assert calls[0]["alibi_slopes"] is None
    assert calls[0]["bias"].shape == (2, 4, 1, 17)


def test_a_decoder_as_an_encoder() -> None:
    """Without causality BLOOM's ALiBi is no distance."""
    expected, actual = both("bloom", lambda m: m(input_ids=tokens(2, 17)).logits, is_causal=False)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_falcon_rounds_its_alibi() -> None:
    """Beyond position 256 slope · position has no exact bfloat16."""
    expected, actual = both("falcon_rw", lambda m: m(input_ids=tokens(1, 700)).logits, num_attention_heads=8)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_mpt_beyond_its_longest_sequence() -> None:
    """Its own bias ends there; ALiBi does not."""
    _, ours = outside.pair("mpt", max_seq_len=8)
    longer = outside.build("mpt", max_seq_len=64)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(input_ids=tokens(2, 23)).logits, longer(input_ids=tokens(2, 23)).logits, atol=TOLERANCE, rtol=0
        )


def test_mpt_clips() -> None:
    changes = {"attn_config": {"clip_qkv": 0.4}}
    expected, actual = both("mpt", lambda m: m(input_ids=tokens(2, 17)).logits, **changes)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    assert not torch.equal(expected, both("mpt", lambda m: m(input_ids=tokens(2, 17)).logits)[0])


def test_bloom_in_slices() -> None:
    changes = {"pretraining_tp": 2, "slow_but_exact": True}
    expected, actual = both("bloom", lambda m: m(input_ids=tokens(2, 17)).logits, **changes)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_cross_attention_of_big_bird() -> None:
    states = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    mask = padding([5, 9], 9, "right")
    expected, actual = both(
        "big_bird_decoder",
        lambda m: (
            m(input_ids=tokens(2, 7), encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False).logits
        ),
        add_cross_attention=True,
    )
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon_rw", "falcon_40b"])
def test_bfloat16(name: str) -> None:
    own, ours = outside.pair(name, torch.bfloat16)
    exact = outside.build(name)
    exact.load_state_dict({key: tensor.float() for key, tensor in own.state_dict().items()})
    with torch.no_grad():
        reference, plain, actual = (m(input_ids=tokens(2, 19)).logits for m in (exact, own, ours))
    assert actual.dtype == torch.bfloat16
    assert (actual - reference).square().mean() < 2 * (plain - reference).square().mean()


@pytest.mark.parametrize("name", ["bloom", "falcon_40b"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    _, ours = outside.pair(name)
    mask = padding([9, 17], 17, "left")
    inputs = {"input_ids": tokens(2, 17) * mask, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        expected = ours(**inputs).logits
        actual = torch.compile(ours, backend="eager", fullgraph=True)(**inputs).logits
    torch._dynamo.reset()
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=TOLERANCE, rtol=0)
