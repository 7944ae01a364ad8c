from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import heedful
from heedful.hf import forward


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call of heedful.attention, in order, with its query under "query"."""
    seen: list[dict[str, Any]] = []
    attention = forward.attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any) -> Any:
        seen.append({"query": query, "key": key, "value": value, **arguments})
        return attention(query, key, value, **arguments)

    monkeypatch.setattr(forward, "attention", spy)
    return seen


@pytest.fixture(params=["chosen", "native"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the backends that heedful chooses, and with the engine wherever it can."""
    if request.param == "chosen":
        return
    if not any(backend.name == "native" and backend.available for backend in heedful.list_backends()):
        pytest.skip("the engine is not built")
    attention = forward.attention

    def on_the_engine(*tensors: torch.Tensor, **arguments: Any) -> Any:
        try:
            return attention(*tensors, **arguments, backend="native")
        except heedful.UnsupportedError:
            return attention(*tensors, **arguments)

    monkeypatch.setattr(forward, "attention", on_the_engine)
