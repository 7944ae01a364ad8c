"""ViT, and Gemma 3 with images, whose tokens see all of their own image, through the interface, against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import BY_NAME, assert_same_gradients, disturbed, gradients, tokens, under
from torch import Tensor

from heedful import Full

TOLERANCE = 2e-4
BEGIN, END, IMAGE = 90, 91, 92
# How many tokens an image becomes, and how many pixels along its side.
IMAGE_TOKENS, PIXELS = 4, 16


def vit() -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=PIXELS,
        patch_size=4,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return disturbed(transformers.ViTForImageClassification(config).eval())


def gemma3() -> Any:
    torch.manual_seed(0)
    text = BY_NAME["gemma3"].arguments
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": PIXELS,
        "patch_size": 4,
        "initializer_range": 0.3,
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        image_token_index=IMAGE,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return disturbed(transformers.Gemma3ForConditionalGeneration(config).eval())


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(5))


def prompts(*places: list[int], length: int = 21, padded: int = 0) -> dict[str, Tensor]:
    """Text with images at these places of each row; the first row is padded by so many tokens on the left."""
    ids = tokens(len(places), length) % BEGIN
    ids[ids == 0] = 1
    mask = torch.ones_like(ids)
    for row, images in enumerate(places):
        for place in images:
            ids[row, place] = BEGIN
            ids[row, place + 1 : place + 1 + IMAGE_TOKENS] = IMAGE
            ids[row, place + 1 + IMAGE_TOKENS] = END
    ids[0, :padded] = 0
    mask[0, :padded] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": pictures(sum(map(len, places))),
    }


CASES = {
    "alike": prompts([3, 12], [3, 12]),
    "elsewhere_in_each_row": prompts([2, 12], [6]),
    "left_padded": prompts([5], [1, 9], padded=4),
    "one_row": prompts([3, 12]),
}


@pytest.mark.usefixtures("engine")
def test_vit() -> None:
    model = vit()
    with torch.no_grad():
        expected, actual = (under(model, kind, lambda m: m(pictures(3)).logits) for kind in ("eager", "heedful"))
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    run = lambda m: m(pictures(3)).logits  # noqa: E731
    expected, actual = (under(model, kind, lambda m: gradients(m, run)) for kind in ("eager", "heedful"))
    assert_same_gradients(actual, expected)


def test_attentions_of_vit(calls: list[dict[str, Any]]) -> None:
    model = vit()
    run = lambda m: m(pictures(2), output_attentions=True).attentions  # noqa: E731
    with torch.no_grad():
        expected, actual = (under(model, kind, run) for kind in ("eager", "heedful"))
    assert [call["pattern"] for call in calls] == [Full(), Full()]
    for weights, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(weights, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("case", CASES)
def test_logits_of_gemma3(case: str) -> None:
    model, real = gemma3(), CASES[case]["attention_mask"].bool()
    with torch.no_grad():
        expected, actual = (
            under(model, kind, lambda m: m(**CASES[case]).logits[real]) for kind in ("eager", "heedful")
        )
        blind = model(**{**CASES[case], "token_type_ids": torch.zeros_like(CASES[case]["input_ids"])}).logits[real]
    assert (blind - expected).abs().max() > 0.1
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["elsewhere_in_each_row", "left_padded"])
def test_gradients_of_gemma3(case: str) -> None:
    model, real = gemma3(), CASES[case]["attention_mask"][..., None]
    run = lambda m: m(**CASES[case], use_cache=False).logits * real  # noqa: E731
    expected, actual = (under(model, kind, lambda m: gradients(m, run)) for kind in ("eager", "heedful"))
    assert_same_gradients(actual, expected, share=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=["dynamic", "static", "beams"]
)
def test_tokens_that_gemma3_generates(case: str, options: dict[str, Any], calls: list[dict[str, Any]]) -> None:
    model = gemma3()
    arguments = {**CASES[case], "max_new_tokens": 6, "do_sample": False, **options}
    expected, actual = (under(model, kind, lambda m: m.generate(**arguments)) for kind in ("eager", "heedful"))
    assert torch.equal(actual, expected)
    assert calls
    for call in calls:
        lengths = (call[name].shape[1 if call["layout"] == "blhd" else 2] for name in ("query", "key"))
        assert all(operand.dtype == torch.int32 for operand in call["pattern"].operands(*lengths))
