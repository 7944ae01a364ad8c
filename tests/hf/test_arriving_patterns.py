"""What arrives at heedful.attention: the family's pattern, and a Mask only where nothing else can say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import BY_NAME, WINDOW, padding, tokens

import heedful
from heedful import Causal, Chunked, Documents, Full, Padding, Pattern, SlidingWindow

WINDOWED = Causal() & SlidingWindow(WINDOW - 1, None)
EXPECTED = {
    "bert": [Full(), Full()],
    "gpt2": [Causal(), Causal()],
    "llama": [Causal(), Causal()],
    "mistral": [WINDOWED, WINDOWED],
    "phi3": [WINDOWED, WINDOWED],
    "qwen2": [WINDOWED, Causal()],
    "qwen3": [Causal(), Causal()],
    "gemma2": [WINDOWED, Causal()],
    "gemma3": [WINDOWED, Causal()],
    "modernbert": [SlidingWindow(WINDOW // 2), Full()],
    "gpt_oss": [WINDOWED, Causal()],
    "llama4": [Causal() & Chunked(WINDOW), Causal()],
}


def same(actual: Pattern, expected: Pattern, q_length: int, k_length: int) -> bool:
    """Whether two patterns have the same schedule and mean the same; the order of an intersection is not ours."""
    return set(actual.schedule.atoms) == set(expected.schedule.atoms) and torch.equal(
        *torch.broadcast_tensors(actual.dense(q_length, k_length), expected.dense(q_length, k_length))
    )


def run(name: str, calls: list[dict[str, Any]], **inputs: Any) -> list[Pattern]:
    model = BY_NAME[name].build()
    model.set_attn_implementation("heedful")
    with torch.no_grad():
        model(**inputs)
    assert len(calls) == 2
    return [call["pattern"] for call in calls]


def lengths(call: dict[str, Any]) -> tuple[int, int]:
    dim = 1 if call["layout"] == "blhd" else 2
    return call["query"].shape[dim], call["key"].shape[dim]


def has_mask(pattern: Pattern) -> bool:
    return any(operand.dtype == torch.bool for operand in pattern.operands(19, 19))


@pytest.mark.parametrize("name", EXPECTED)
def test_prefill(name: str, calls: list[dict[str, Any]]) -> None:
    for pattern, expected in zip(run(name, calls, input_ids=tokens(2, 19)), EXPECTED[name], strict=True):
        assert same(pattern, expected, 19, 19)
        assert not pattern.operands(19, 19)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_mask_of_ones_changes_nothing(name: str, calls: list[dict[str, Any]]) -> None:
    ones = torch.ones(2, 19, dtype=torch.long)
    patterns = run(name, calls, input_ids=tokens(2, 19), attention_mask=ones)
    assert all(same(pattern, expected, 19, 19) for pattern, expected in zip(patterns, EXPECTED[name], strict=True))


def test_left_padding_before_chunks(calls: list[dict[str, Any]]) -> None:
    mask = padding([7, 19], 19, "left")
    patterns = run("llama4", calls, input_ids=tokens(2, 19) * mask, attention_mask=mask)
    assert not any(map(has_mask, patterns))


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - {"llama4"}))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name: str, side: str, calls: list[dict[str, Any]]) -> None:
    mask = padding([7, 19], 19, side)
    start, stop = (
        (torch.tensor([12, 0]), torch.tensor([19, 19]))
        if side == "left"
        else (
            torch.tensor([0, 0]),
            torch.tensor([7, 19]),
        )
    )
    patterns = run(name, calls, input_ids=tokens(2, 19) * mask, attention_mask=mask)
    for pattern, expected in zip(patterns, EXPECTED[name], strict=True):
        assert not has_mask(pattern)
        wanted = expected & Padding(start.to(torch.int32), stop.to(torch.int32))
        assert torch.equal(pattern.dense(19, 19), wanted.dense(19, 19))


def test_layers_share_one_pattern(calls: list[dict[str, Any]]) -> None:
    first, second = run("mistral", calls, input_ids=tokens(2, 19), attention_mask=padding([7, 19], 19, "left"))
    assert first is second


def test_holes_in_the_padding_are_a_mask_over_keys(calls: list[dict[str, Any]]) -> None:
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, 4] = 0
    pattern = run("mistral", calls, input_ids=tokens(2, 19), attention_mask=mask)[0]
    assert [tuple(operand.shape) for operand in pattern.operands(19, 19)] == [(2, 1, 1, 19)]
    assert torch.equal(pattern.dense(19, 19), WINDOWED.dense(19, 19) & mask.bool()[:, None, None])


def test_packed_sequences(calls: list[dict[str, Any]]) -> None:
    positions = torch.cat([torch.arange(8), torch.arange(11)])[None]
    patterns = run("qwen2", calls, input_ids=tokens(1, 19), position_ids=positions, use_cache=False)
    cu_seqlens = torch.tensor([0, 8, 19], dtype=torch.int32)
    for pattern, within in zip(patterns, EXPECTED["qwen2"], strict=True):
        assert same(pattern, Documents(cu_seqlens, within=within), 19, 19)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma3", "llama4"])
def test_rows_packed_differently_make_no_mask(name: str, calls: list[dict[str, Any]]) -> None:
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(19 - n)]) for n in (8, 11)])
    patterns = run(name, calls, input_ids=tokens(2, 19), position_ids=positions, use_cache=False)
    # Chunks count from where a sequence begins, which rectangles do not say.
    assert [has_mask(pattern) for pattern in patterns] == [name == "llama4", False]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_generate_never_makes_a_mask(name: str, cache: str | None, calls: list[dict[str, Any]]) -> None:
    model = BY_NAME[name].build()
    model.set_attn_implementation("heedful")
    mask = padding([4, 9], 9, "left")
    model.generate(
        input_ids=tokens(2, 9) * mask,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        cache_implementation=cache,
    )
    assert len(calls) == 2 * 8
    for call in calls:
        assert all(operand.dtype == torch.int32 for operand in call["pattern"].operands(*lengths(call)))
    # From one token to the next only operands change, so that the choice of a backend is looked up.
    assert len({call["pattern"].schedule for call in calls[-8::2]}) == 1


def test_static_cache_offset_is_not_the_caches_tensor(calls: list[dict[str, Any]]) -> None:
    """The cache adds to its length in place while the layers run, after the mask was made."""
    from transformers import StaticCache

    model = BY_NAME["llama"].build()
    model.set_attn_implementation("heedful")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(input_ids=tokens(1, 8), past_key_values=cache)
        model(input_ids=tokens(1, 3), past_key_values=cache)
    keys_seen = [call["pattern"].dense(*lengths(call))[0, 0].sum(-1).tolist() for call in calls]
    assert keys_seen == [list(range(1, 9))] * 2 + [[9, 10, 11]] * 2


def test_explain_says_that_a_mask_is_dense(calls: list[dict[str, Any]]) -> None:
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, 4] = 0
    run("llama", calls, input_ids=tokens(2, 19), attention_mask=mask)
    arguments = dict(calls[0])
    q, k, v = (arguments.pop(name) for name in ("query", "key", "value"))
    assert "Mask(tensor[2, 1, 1, 19])" in str(heedful.explain(q, k, v, **arguments))
