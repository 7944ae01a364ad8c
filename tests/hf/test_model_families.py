"""Every family against eager: logits, gradients and generated tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import (
    BY_NAME,
    FAMILIES,
    GENERATING,
    Family,
    assert_same_gradients,
    gradients,
    padding,
    tokens,
    under,
)
from torch import Tensor
from transformers import PreTrainedModel

TOLERANCE = 2e-4


def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def assert_same_logits(model: PreTrainedModel, real: Tensor | None = None, **inputs: Any) -> None:
    expected = under(model, "eager", lambda m: logits(m, **inputs))
    actual = under(model, "heedful", lambda m: logits(m, **inputs))
    assert expected.std() > 1
    where = torch.ones(expected.shape[:2], dtype=torch.bool) if real is None else real.bool()
    torch.testing.assert_close(actual[where], expected[where], atol=TOLERANCE, rtol=0)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("length", [1, 5, 23])
def test_logits(family: Family, length: int) -> None:
    assert_same_logits(family.build(), input_ids=tokens(2, length))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_batches(family: Family, side: str) -> None:
    mask = padding([5, 19, 12], 19, side)
    assert_same_logits(family.build(), real=mask, input_ids=tokens(3, 19) * mask, attention_mask=mask)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_with_holes_in_the_padding(family: Family) -> None:
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, 3:6] = 0
    mask[1, :2] = 0
    mask[1, 9] = 0
    assert_same_logits(family.build(), real=mask, input_ids=tokens(2, 19) * mask, attention_mask=mask)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("family", GENERATING, ids=lambda family: family.name)
def test_logits_of_packed_sequences(family: Family) -> None:
    model = family.build()
    lengths = [4, 11, 2, 6]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = {"input_ids": tokens(1, sum(lengths)), "position_ids": positions, "use_cache": False}
    assert_same_logits(model, **packed)
    if family.name == "gpt_oss":
        return  # it does not give its mask the positions
    alone = under(
        model, "heedful", lambda m: [logits(m, input_ids=ids) for ids in packed["input_ids"].split(lengths, dim=1)]
    )
    together = under(model, "heedful", lambda m: logits(m, **packed))
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "gpt2"], ids=lambda family: family.name)
def test_logits_of_sequences_packed_by_cu_seq_lens(family: Family) -> None:
    model = family.build()
    lengths = [4, 11, 2, 6]
    ids, cu_seqlens = tokens(1, sum(lengths)), torch.tensor([0, 4, 15, 17, 23])
    packed = {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), cu_seqlens),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(lengths)),
        **({"use_cache": False} if family.generates else {}),
    }
    alone = under(model, "eager", lambda m: [logits(m, input_ids=part) for part in ids.split(lengths, dim=1)])
    together = under(model, "heedful", lambda m: logits(m, input_ids=ids, **packed))
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", GENERATING, ids=lambda family: family.name)
def test_logits_of_rows_packed_differently(family: Family) -> None:
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in ([4, 11, 8], [9, 3, 1, 10], [23])]
    )
    assert_same_logits(family.build(), input_ids=tokens(3, 23), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_gradients(family: Family, padded: bool) -> None:
    model = family.build()
    mask = padding([5, 17], 17, "left") if padded else torch.ones(2, 17, dtype=torch.long)
    ids = tokens(2, 17) * mask

    def run(model: PreTrainedModel) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits * mask[..., None]

    expected, actual = (under(model, name, lambda m: gradients(m, run)) for name in ("eager", "heedful"))
    assert_same_gradients(actual, expected)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("family", GENERATING, ids=lambda family: family.name)
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("lengths", [[9], [4, 13, 9]], ids=["single", "left_padded"])
def test_generated_tokens(family: Family, cache: str | None, lengths: list[int]) -> None:
    model = family.build()
    mask = padding(lengths, max(lengths), "left")

    def generate(model: PreTrainedModel) -> Any:
        return model.generate(
            input_ids=tokens(*mask.shape) * mask,
            attention_mask=mask,
            max_new_tokens=10,
            do_sample=False,
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )

    expected, actual = under(model, "eager", generate), under(model, "heedful", generate)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(actual.logits), torch.stack(expected.logits), atol=TOLERANCE, rtol=0, equal_nan=False
    )


@pytest.mark.parametrize("family", GENERATING, ids=lambda family: family.name)
def test_generated_tokens_without_a_cache_and_with_beams(family: Family) -> None:
    model = family.build()
    mask = padding([5, 9], 9, "left")
    inputs = {"input_ids": tokens(2, 9) * mask, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    for options in ({"use_cache": False}, {"num_beams": 3}):
        expected, actual = (
            under(model, name, lambda m: m.generate(**inputs, **options))  # noqa: B023 (called at once)
            for name in ("eager", "heedful")
        )
        assert torch.equal(actual, expected), options


@pytest.mark.parametrize("family", GENERATING, ids=lambda family: family.name)
def test_generated_tokens_with_an_assistant(family: Family) -> None:
    """A draft that is a prefix of the prompt, and one of another model."""
    model, assistant = family.build(), BY_NAME["llama"].build(num_hidden_layers=1)
    inputs = {"input_ids": tokens(1, 9), "max_new_tokens": 8, "do_sample": False}
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
        expected, actual = (
            under(assistant, name, lambda _: under(model, name, lambda m: m.generate(**inputs, **options)))  # noqa: B023
            for name in ("eager", "heedful")
        )
        assert torch.equal(actual, expected), options


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss", "llama4"])
def test_a_cache_continued_by_several_tokens(name: str) -> None:
    model = BY_NAME[name].build()
    ids = tokens(2, 21)

    def continued(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            first = model(input_ids=ids[:, :8], use_cache=True)
            second = model(input_ids=ids[:, 8:12], past_key_values=first.past_key_values, use_cache=True)
            third = model(input_ids=ids[:, 12:], past_key_values=second.past_key_values, use_cache=True)
        return torch.cat([first.logits, second.logits, third.logits], dim=1)

    expected, actual = under(model, "eager", continued), under(model, "heedful", continued)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    whole = under(model, "heedful", lambda m: logits(m, input_ids=ids))
    torch.testing.assert_close(actual, whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_bfloat16(family: Family) -> None:
    model = family.build(torch.bfloat16)
    actual = under(model, "heedful", lambda m: logits(m, input_ids=tokens(2, 19)))
    exact = family.build()
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    reference = logits(exact, input_ids=tokens(2, 19))
    plain = under(model, "eager", lambda m: logits(m, input_ids=tokens(2, 19)))
    assert actual.dtype == torch.bfloat16
    assert actual.isfinite().all()
    if "experts" not in " ".join(name for name, _ in model.named_parameters()):
        # An expert chosen otherwise by a rounding error is another model, so mixtures are only run.
        assert (actual - reference).square().mean() < 2 * (plain - reference).square().mean()
