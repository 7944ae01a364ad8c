"""What modules of heedful.nn hand to heedful.attention."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from heedful.nn import multihead_attention, nested


def record(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A list that gets an entry for each call from now on: its keyword arguments, and q, k and v."""
    calls: list[dict[str, Any]] = []
    attention = multihead_attention.attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        calls.append({"q": q, "k": k, "v": v, **options})
        return attention(q, k, v, **options)

    for module in (multihead_attention, nested):
        monkeypatch.setattr(module, "attention", recorded)
    return calls
