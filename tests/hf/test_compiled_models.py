"""torch.compile without graph breaks; the compiler's back end does not matter here, so it is the plainest."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from families import BY_NAME, padding, tokens, under
from transformers import CompileConfig, ViTConfig, ViTModel


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["bert", "mistral"])
def test_forward(name: str) -> None:
    model = BY_NAME[name].build()
    real = padding([7, 19], 19, "left")
    inputs = {"input_ids": tokens(2, 19) * real, "attention_mask": real}
    if name == "mistral":
        inputs["use_cache"] = False
    with torch.no_grad():
        expected = under(model, "eager", lambda m: m(**inputs).logits)
        compiled = under(model, "heedful", lambda m: torch.compile(m, fullgraph=True, backend="eager"))
        actual = compiled(**inputs).logits
    torch.testing.assert_close(actual[real.bool()], expected[real.bool()], atol=2e-4, rtol=0)


def test_generate_with_a_static_cache() -> None:
    model = BY_NAME["mistral"].build()
    real = padding([5, 9], 9, "left")
    arguments = {
        "input_ids": tokens(2, 9) * real,
        "attention_mask": real,
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": "static",
    }
    compiling = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True
    expected = under(model, "eager", lambda m: m.generate(**arguments))
    actual = under(model, "heedful", lambda m: m.generate(**arguments, compile_config=compiling))
    assert torch.equal(actual, expected)


def test_a_model_without_masks() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    model = ViTModel(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = under(model, "eager", lambda m: m(pixels).last_hidden_state)
        compiled = under(model, "heedful", lambda m: torch.compile(m, fullgraph=True, backend="eager"))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lru_cache.*")
            actual = compiled(pixels).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)
