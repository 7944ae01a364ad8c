"""Unions of steps with bands, which run as two calls that share no pair."""

from __future__ import annotations

import pytest
import torch
from comparison import check
from inputs import DTYPES, all_features, attention_inputs

from heedful import Causal, Dilated, Documents, Longformer, Padding, SlidingWindow, attention, clear_caches
from heedful.backend.native import backend as native

PATTERNS = (
    Dilated(9, 4) | SlidingWindow(6),
    (Dilated(9, 4) | SlidingWindow(6)) & Causal(),
    Dilated(5, 7) | Dilated(4, 14) | Longformer(3, 2),
    (Dilated(5, 7, offset=-40) | SlidingWindow(2, 0, offset=-40)) & Padding(0, torch.tensor([70, 3])),
)


@pytest.fixture(autouse=True)
def _parted(monkeypatch):
    """As if every call had many pairs."""
    monkeypatch.setattr(native, "PARTED_PAIRS", 1)
    clear_caches()
    yield
    clear_caches()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("through", (("out",), ("out", "lse", "weights")), ids=str)
def test_both_parts_and_their_gradients(dtype, pattern, through):
    assert len(pattern.schedule.parted()) == 2
    for q_length, k_length in ((113, 120), (120, 113)):
        q, k, v = attention_inputs(kv_heads=2, q_length=q_length, k_length=k_length, head_dim=24, dtype=dtype)
        features = all_features(2, 4, q_length, k_length, dtype)
        for _ in range(2):  # the second call takes the short way
            check(q, k, v, pattern=pattern, through=through)
        check(q, k, v, pattern=pattern, through=through, dropout_p=0.3, **features)


def test_what_is_given_to_the_engine(monkeypatch):
    q, k, v = attention_inputs(q_length=50, k_length=50)
    calls = []
    operator = torch.ops.heedful.attention_forward.default

    def count(*arguments):
        calls.append(arguments[4])
        return operator(*arguments)

    monkeypatch.setattr(torch.ops.heedful.attention_forward, "default", count)
    for pattern, parts in ((PATTERNS[0], 2), (Dilated(2, 4) | SlidingWindow(20), 1)):
        calls.clear()
        attention(q, k, v, pattern=pattern, backend="native", return_weights=True)
        assert tuple(calls) == tuple(part.encode() for part in pattern.schedule.parted())
        assert len(calls) == parts


def test_one_graph(monkeypatch):
    q, k, v = attention_inputs(q_length=50, k_length=50)
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, pattern=PATTERNS[0], backend="native"), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, pattern=PATTERNS[0], backend="native"))


def test_inside_documents_it_is_one():
    pattern = Documents(torch.tensor([0, 50, 113]), within=PATTERNS[0])
    assert len(pattern.schedule.parted()) == 1
    q, k, v = attention_inputs(q_length=113, k_length=113)
    check(q, k, v, pattern=pattern, through=("out",))
