"""Random calls through the front door against the reference; HYPOTHESIS_PROFILE=ci or long runs more of them."""

from __future__ import annotations

import shlex

import torch
from hypothesis import given
from random_calls import Example, examples

from heedful import Causal, Mask, SlidingWindow


@given(examples())
def test_any_call_is_as_the_reference(example: Example) -> None:
    try:
        example.check()
    except Exception as error:
        error.add_note(f"reproduce: {example.line}")
        raise


def test_the_printed_line_is_the_call(monkeypatch) -> None:
    starts = torch.tensor([1, 2], dtype=torch.int32)
    example = Example(
        q_length=3,
        batch=2,
        dtype=torch.bfloat16,
        pattern=(SlidingWindow(None, 2) | Causal(starts)) & Mask(torch.ones(3, 1, dtype=torch.bool)),
        bias=(1, 3, 1),
    )
    found = []
    monkeypatch.setattr(Example, "check", lambda self: found.append(self))
    exec(shlex.split(example.line)[-1], {})
    assert found == [example]
