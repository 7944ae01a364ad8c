"""Longformer and LED, patched, against their own sliding chunks, at padded tokens too."""

from __future__ import annotations

from typing import Any

import outside
import pytest
import torch
from families import assert_same_gradients, gradients, padding, tokens
from torch import Tensor

from heedful import Longformer, Padding, SlidingWindow
from heedful.hf.patches import longformer
from heedful.hf.patches.long_documents import Layout

TOLERANCE = 2e-4
LENGTH = 37


def chosen(*positions: list[int]) -> Tensor:
    """A global_attention_mask with these positions of each row."""
    mask = torch.zeros(len(positions), LENGTH, dtype=torch.long)
    for row, places in enumerate(positions):
        mask[row, places] = 1
    return mask


HOLES = torch.ones(3, LENGTH, dtype=torch.long)
HOLES[1, 2:4] = 0
HOLES[2, 20] = 0
CASES: dict[str, dict[str, Tensor]] = {
    "window": {},
    "first_token": {"global_attention_mask": chosen([0], [0], [0])},
    "questions": {"global_attention_mask": chosen([0, 1], [0, 1, 2, 3, 4], [])},
    "here_and_there": {"global_attention_mask": chosen([0, 7, 8, 36], [3], [5, 20])},
    "every_other": {"global_attention_mask": chosen(list(range(0, LENGTH, 2)), [], [1])},
    "right_padded": {
        "attention_mask": padding([19, LENGTH, 3], LENGTH, "right"),
        "global_attention_mask": chosen([0], [0, 1], [0]),
    },
    "left_padded": {
        "attention_mask": padding([19, LENGTH, 3], LENGTH, "left"),
        "global_attention_mask": chosen([18, 19], [0], [36]),
    },
    "holes": {"attention_mask": HOLES, "global_attention_mask": chosen([0], [2, 5], [0, 20])},
    "padding_only": {"attention_mask": padding([19, LENGTH, 1], LENGTH, "right")},
}


def inputs(name: str, case: str, length: int = LENGTH) -> dict[str, Any]:
    found: dict[str, Any] = {"input_ids": tokens(3, length), **CASES[case]}
    found.setdefault("attention_mask", torch.ones(3, length, dtype=torch.long))
    if name == "led":
        found["decoder_input_ids"] = tokens(3, 9)
        found["decoder_attention_mask"] = padding([9, 5, 9], 9, "right")
        found["use_cache"] = False
    return found


def assert_close(actual: Any, expected: Any, **options: Any) -> None:
    assert len(actual) == len(expected)
    for ours, own in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, own, **{"atol": TOLERANCE, "rtol": 0, **options})


@pytest.mark.parametrize("name", ["longformer", "led"])
@pytest.mark.parametrize("case", CASES)
def test_outputs(name: str, case: str) -> None:
    own, ours = outside.pair(name)
    with torch.no_grad():
        expected, actual = (m(**inputs(name, case), output_hidden_states=True) for m in (own, ours))
    assert expected.logits.std() > 1
    torch.testing.assert_close(actual.logits, expected.logits, atol=TOLERANCE, rtol=0)
    states = "hidden_states" if name == "longformer" else "encoder_hidden_states"
    assert_close(actual[states], expected[states])


@pytest.mark.parametrize("length", [1, 5, 16, 24])
def test_lengths(length: int) -> None:
    """Those that the window does not divide need no padding."""
    own, ours = outside.pair("longformer")
    arguments = {"input_ids": tokens(2, length), "global_attention_mask": torch.eye(2, length, dtype=torch.long)}
    seen: list[int] = []
    ours.longformer.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        expected, actual = (m(**arguments).logits for m in (own, ours))
    assert seen == [length]
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


# Their own are up to three times further from those in float64 than ours, and nan in float64.
@pytest.mark.parametrize("name", ["longformer", "led"])
@pytest.mark.parametrize("case", ["window", "here_and_there", "right_padded"])
def test_gradients(name: str, case: str) -> None:
    own, ours = outside.pair(name)
    run = lambda model: model(**inputs(name, case)).logits  # noqa: E731
    assert_same_gradients(gradients(ours, run), gradients(own, run), share=1e-4)


@pytest.mark.parametrize("name", ["longformer", "led"])
@pytest.mark.parametrize("case", ["window", "questions", "here_and_there", "right_padded"])
def test_output_attentions(name: str, case: str) -> None:
    own, ours = outside.pair(name)
    arguments = inputs(name, case)
    with torch.no_grad():
        expected, actual = (m(**arguments, output_attentions=True) for m in (own, ours))
        without = ours(**arguments)
    torch.testing.assert_close(actual.logits, without.logits, atol=TOLERANCE, rtol=0)
    prefix = "" if name == "longformer" else "encoder_"
    assert_close(actual[f"{prefix}attentions"], expected[f"{prefix}attentions"], atol=2e-5)
    if name == "led":
        assert_close(actual.decoder_attentions, expected.decoder_attentions, atol=5e-5)
        assert_close(actual.cross_attentions, expected.cross_attentions, atol=5e-5)
    if "global_attention_mask" not in arguments:
        assert f"{prefix}global_attentions" not in actual
        return
    taken = (arguments["global_attention_mask"] * arguments["attention_mask"]).sum(1)
    slots = torch.arange(int(taken.max())) < taken[:, None]
    for ours_, own_ in zip(actual[f"{prefix}global_attentions"], expected[f"{prefix}global_attentions"], strict=True):
        # Its own are as long as it padded the input, and hold something even for tokens that are not there.
        assert ours_.shape == (3, 4, LENGTH, slots.shape[1])
        torch.testing.assert_close(
            ours_.movedim(3, 1)[slots], own_[:, :, :LENGTH].movedim(3, 1)[slots], atol=1e-5, rtol=0
        )
        assert not ours_.movedim(3, 1)[~slots].any()


def test_gradients_through_the_weights() -> None:
    own, ours = outside.pair("longformer")

    def run(model: Any) -> Tensor:
        out = model(**inputs("longformer", "here_and_there"), output_attentions=True)
        return torch.cat([part.flatten() for part in (out.logits, *out.attentions)])

    assert_same_gradients(gradients(ours, run), gradients(own, run), share=1e-4)


def test_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, int, int]] = []
    attention = longformer.attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        seen.append((options["pattern"], query.shape[1], key.shape[1]))
        return attention(query, key, value, **options)

    monkeypatch.setattr(longformer, "attention", spy)
    _, ours = outside.pair("longformer")
    with torch.no_grad():
        ours(input_ids=tokens(2, LENGTH))
        assert [pattern for pattern, _, _ in seen] == [SlidingWindow(4), SlidingWindow(8)]
        seen.clear()
        ours(input_ids=tokens(2, LENGTH), global_attention_mask=chosen([0], [0]))
        ours(
            input_ids=tokens(2, LENGTH),
            attention_mask=padding([19, LENGTH], LENGTH, "right"),
            global_attention_mask=chosen([0], [0, 5]),
        )
    # Window and global keys, then the global queries over everything.
    assert [(q, k) for _, q, k in seen] == [(LENGTH, LENGTH), (1, LENGTH)] * 2 + [(LENGTH, LENGTH), (2, LENGTH)] * 2
    window, everything = seen[0][0], seen[1][0]
    rows = Longformer(4, 1).dense(LENGTH, LENGTH)[:, :, 1:]
    assert torch.equal(window.dense(LENGTH, LENGTH)[:, :, 1:], rows.expand(2, -1, -1, -1))
    assert everything is None
    assert seen[5][0] == Padding(torch.tensor([0, 0]), torch.tensor([19, LENGTH]))
    for pattern, _, _ in seen:
        if pattern is not None:
            assert all(operand.dtype == torch.int32 for operand in pattern.operands(LENGTH, LENGTH))


def test_layers_share_a_layout() -> None:
    masks = torch.zeros(2, 9, dtype=torch.bool), torch.eye(2, 9, dtype=torch.bool)
    layout = Layout.of(*masks)
    assert Layout.of(*masks) is layout
    assert layout.window(3) is layout.window(3)
    assert Layout.of(*(mask.clone() for mask in masks)) is not layout
    assert Layout.of(torch.ones(2, 9, dtype=torch.bool), masks[1]).has_padding


def test_what_arrives_from_leds_decoder(calls: list[dict[str, Any]]) -> None:
    _, ours = outside.pair("led")
    with torch.no_grad():
        ours(**inputs("led", "right_padded"))
    decoder, cross = calls[::2], calls[1::2]
    assert len(decoder) == len(cross) == 2
    for call in calls:
        lengths = call["query"].shape[1], call["key"].shape[1]
        assert all(operand.dtype == torch.int32 for operand in call["pattern"].operands(*lengths))
        assert call["bias"] is None


@pytest.mark.parametrize("name", ["longformer", "led"])
def test_masks_of_all_pairs_are_not_made(name: str) -> None:
    """Both models make them to use their first row."""
    _, ours = outside.pair(name)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim == 4 and out.shape[1] == 1:
                largest = max(largest, out.shape[2] * out.shape[3])
            return out

    arguments = inputs(name, "right_padded")
    arguments.pop("decoder_attention_mask", None)
    with torch.no_grad(), Watch():
        ours(**arguments)
    assert largest <= 9 * LENGTH


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=["dynamic", "static", "beams"]
)
def test_led_generates_the_same(options: dict[str, Any]) -> None:
    own, ours = outside.pair("led")
    arguments = {
        **{key: value for key, value in inputs("led", "right_padded").items() if "decoder" not in key},
        "max_new_tokens": 8,
        "do_sample": False,
        **options,
        "use_cache": True,
    }
    assert torch.equal(ours.generate(**arguments), own.generate(**arguments))


def test_embeddings_instead_of_tokens() -> None:
    for name in ("longformer", "led"):
        own, ours = outside.pair(name)
        arguments = inputs(name, "first_token")
        arguments["inputs_embeds"] = own.get_input_embeddings()(arguments.pop("input_ids")).detach()
        with torch.no_grad():
            expected, actual = (m(**arguments).logits for m in (own, ours))
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_dropout_in_training() -> None:
    _, ours = outside.pair("longformer")
    ours.train()
    for module in ours.modules():
        if hasattr(module, "one_sided_attn_window_size"):
            module.dropout = 0.5
    arguments = inputs("longformer", "questions")
    torch.manual_seed(1)
    first, second = (ours(**arguments).logits for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(ours(**arguments).logits, first)
    assert not torch.allclose(first, second)
    assert torch.equal(ours.eval()(**arguments).logits, ours(**arguments).logits)


def test_gradient_checkpointing() -> None:
    own, ours = outside.pair("longformer")
    for model in (own, ours):
        model.train()
    ours.activation_checkpointing_enable()
    run = lambda model: model(**inputs("longformer", "right_padded")).logits  # noqa: E731
    assert_same_gradients(gradients(ours, run), gradients(own, run), share=1e-4)


def test_bfloat16() -> None:
    for name in ("longformer", "led"):
        own, ours = outside.pair(name, torch.bfloat16)
        exact = outside.build(name)
        exact.load_state_dict({key: tensor.float() for key, tensor in own.state_dict().items()})
        with torch.no_grad():
            reference, plain, actual = (m(**inputs(name, "questions")).logits for m in (exact, own, ours))
        assert actual.dtype == torch.bfloat16
        assert (actual - reference).square().mean() < 2 * (plain - reference).square().mean()
