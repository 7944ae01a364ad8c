"""BigBird and BigBird-Pegasus, patched, against their own gathered blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import outside
import pytest
import torch
from families import assert_same_gradients, gradients, padding, tokens
from torch import Tensor

import heedful.hf
from heedful import BlockSparse
from heedful.hf.patches import big_bird, big_bird_plan

TOLERANCE = 2e-4
LENGTH = 45
HOLES = torch.ones(3, LENGTH, dtype=torch.long)
HOLES[0, 2:4] = 0
HOLES[1, 20] = 0
MASKS = {
    "none": torch.ones(3, LENGTH, dtype=torch.long),
    "right": padding([19, LENGTH, 2], LENGTH, "right"),
    "left": padding([19, LENGTH, 2], LENGTH, "left"),
    "holes": HOLES,
}


def inputs(name: str, mask: Tensor) -> dict[str, Any]:
    found = {"input_ids": tokens(*mask.shape) * mask, "attention_mask": mask}
    return {**found, "decoder_input_ids": tokens(3, 9), "use_cache": False} if name == "bigbird_pegasus" else found


@pytest.mark.parametrize("name", ["big_bird", "bigbird_pegasus"])
@pytest.mark.parametrize("padded", MASKS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_logits(name: str, padded: str, training: bool) -> None:
    mask = MASKS[padded]
    own, ours = outside.pair(name)
    with torch.no_grad():
        expected, actual = (m.train(training)(**inputs(name, mask)).logits for m in (own, ours))
    assert expected.std() > 1
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (40, {}),
        (37, {"block_size": 3}),
        (73, {"num_random_blocks": 3}),
        (41, {"num_random_blocks": 1}),
        # The paper's own plan, for a model of 4096 positions and for one of 1024, where random blocks may be in the
        # window as well.
        (1024, {"block_size": 64, "num_random_blocks": 3, "max_position_embeddings": 4096}),
        (1024, {"block_size": 64, "num_random_blocks": 3, "max_position_embeddings": 1024}),
    ],
)
def test_plans(length: int, changes: dict[str, Any], training: bool) -> None:
    own, ours = outside.pair("big_bird", **changes)
    arguments = {"input_ids": tokens(1, length)}
    states, found = [], []
    for model in (own, ours):
        np.random.seed(7)
        with torch.no_grad():
            found.append(model.train(training)(**arguments).logits)
        states.append(np.random.get_state()[1])
    torch.testing.assert_close(found[1], found[0], atol=TOLERANCE, rtol=0)
    # Whoever else draws from numpy's generator gets what he would get.
    assert np.array_equal(*states)


def test_random_blocks_that_are_in_the_window_count_twice() -> None:
    _, ours = outside.pair("big_bird", block_size=64, num_random_blocks=3, max_position_embeddings=1024)
    attentions = [m for m in ours.train().modules() if isinstance(m, big_bird.BlockSparseAttention)]
    plans = [big_bird_plan.plan(attention, 1024) for attention in attentions]
    assert any(plan.appended for plan in plans)
    assert plans[0] is big_bird_plan.plan(attentions[0], 1024)
    at_rest = big_bird_plan.plan(attentions[0].eval(), 1024)
    assert (at_rest.appended, at_rest.times) == ((0,), (4,))


def test_without_random_blocks() -> None:
    """Which transformers' own cannot do."""
    _, ours = outside.pair("big_bird", num_random_blocks=0)
    with torch.no_grad():
        assert ours(input_ids=tokens(2, 41)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["big_bird", "bigbird_pegasus"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_gradients(name: str, training: bool) -> None:
    mask = MASKS["right"]
    own, ours = outside.pair(name, torch.float64)

    def run(model: Any) -> Tensor:
        return model.train(training)(**inputs(name, mask)).logits

    assert_same_gradients(gradients(ours, run), gradients(own, run), share=1e-10, rtol=1e-9)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("padded", ["none", "right"])
@pytest.mark.parametrize("by_config", [False, True], ids=["argument", "config"])
def test_output_attentions(training: bool, padded: str, by_config: bool) -> None:
    mask = MASKS[padded]
    own, ours = outside.pair("big_bird", **({"output_attentions": True} if by_config else {}))
    options = {} if by_config else {"output_attentions": True}
    with torch.no_grad():
        expected, actual = (m.train(training)(**inputs("big_bird", mask), **options).attentions for m in (own, ours))
    assert len(actual) == len(expected) == 2
    for ours_, own_ in zip(actual, expected, strict=True):
        rows = (w[:, :, :LENGTH].transpose(1, 2)[mask.bool()] for w in (ours_, own_))
        torch.testing.assert_close(*rows, atol=1e-5, rtol=0)


def test_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any]] = []
    attention = big_bird.attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        seen.append((options["pattern"], options["bias"]))
        return attention(query, key, value, **options)

    monkeypatch.setattr(big_bird, "attention", spy)
    _, ours = outside.pair("big_bird")
    with torch.no_grad():
        ours(input_ids=tokens(2, 44))
        ours.train()(input_ids=tokens(2, 44))
        ours(input_ids=tokens(2, LENGTH))
    assert all(isinstance(pattern, BlockSparse) for pattern, _ in seen[:4])
    # At rest all random blocks are block 0, which stands behind the 11 blocks again with a bias.
    assert tuple(seen[0][0].blocks.shape) == (1, 11, 12)
    assert seen[0][1].shape == (1, 1, 1, 48)
    assert tuple(seen[2][0].blocks.shape) == (4, 11, 11)
    assert seen[2][1] is None
    assert seen[4][0] is not seen[5][0]
    assert all(operand.ndim in (1, 4) for operand in seen[4][0].operands(48, 48))


@pytest.mark.parametrize("name", ["big_bird", "bigbird_pegasus"])
def test_short_sequences_are_attended_in_full_from_then_on(name: str) -> None:
    own, ours = outside.pair(name)
    full_attentions = lambda m: [type(x).__name__ for x in m.modules() if isinstance(x, big_bird.FullAttention)]  # noqa: E731
    assert not full_attentions(ours)
    mask = padding([5, 19, 12], 19, "right")
    for arguments in (inputs(name, mask), inputs(name, MASKS["right"])):
        with torch.no_grad():
            expected, actual = (m(**arguments).logits for m in (own, ours))
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    assert len(full_attentions(ours)) == 2
    for model in (own, ours):
        (model.bert if name == "big_bird" else model.model.encoder).set_attention_type("block_sparse")
    assert not full_attentions(ours)
    with torch.no_grad():
        expected, actual = (m(**arguments).logits for m in (own, ours))
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_an_attention_that_was_exchanged_since_is_taken_back_too() -> None:
    model = outside.build("big_bird")
    report = heedful.hf.patch(model)
    with torch.no_grad():
        model(input_ids=tokens(2, 9))
    assert any(isinstance(m, big_bird.FullAttention) for m in model.modules())
    report.undo()
    assert not any(type(m).__module__.startswith("heedful") for m in model.modules())


def test_a_length_that_blocks_do_not_divide_is_refused() -> None:
    _, ours = outside.pair("big_bird")
    attention = next(m for m in ours.modules() if isinstance(m, big_bird.BlockSparseAttention))
    with pytest.raises(ValueError, match="hidden_states takes a length that 4 divides, got 41"):
        attention(torch.zeros(1, 41, 64), to_blocked_mask=torch.ones(1, 10, 4))


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=["dynamic", "static", "beams"]
)
def test_pegasus_generates_the_same(options: dict[str, Any]) -> None:
    own, ours = outside.pair("bigbird_pegasus")
    arguments = {"input_ids": tokens(2, LENGTH), "max_new_tokens": 8, "do_sample": False, **options}
    assert torch.equal(ours.generate(**arguments), own.generate(**arguments))
