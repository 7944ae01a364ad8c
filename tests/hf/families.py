"""Tiny random models of each family, with weights and a softcap large enough that an error shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

WINDOW = 6
VOCABULARY = 96

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
LOCAL_GLOBAL = ["sliding_attention", "full_attention"]


def disturbed(model: Any) -> Any:
    """The model with noise on parameters that start at 0 or 1 (norms, biases), which would hide what passes through."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (parameter.ndim == 1 and "sinks" not in name) or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@dataclass(frozen=True)
class Family:
    name: str
    config: str
    model: str
    arguments: dict[str, Any]
    generates: bool = True

    def build(self, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
        """The model with seeded weights, in eval mode and with eager attention."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.arguments, **changes}, attn_implementation="eager")
        return disturbed(getattr(transformers, self.model)(config).to(dtype).eval())


FAMILIES = [
    Family("bert", "BertConfig", "BertForMaskedLM", SMALL, generates=False),
    Family(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        },
    ),
    Family("llama", "LlamaConfig", "LlamaForCausalLM", GROUPED),
    Family("mistral", "MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": WINDOW}),
    Family("phi3", "Phi3Config", "Phi3ForCausalLM", {**GROUPED, "sliding_window": WINDOW}),
    Family(
        "qwen2",
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LOCAL_GLOBAL},
    ),
    Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    Family(
        "gemma2",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **GROUPED,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "layer_types": LOCAL_GLOBAL,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 20.0,
        },
    ),
    Family(
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **GROUPED,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "layer_types": LOCAL_GLOBAL,
        },
    ),
    Family(
        "modernbert",
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {
            **SMALL,
            "local_attention": WINDOW,
            "layer_types": LOCAL_GLOBAL,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "initializer_cutoff_factor": 2.0,
            "attention_bias": True,
        },
        generates=False,
    ),
    Family(
        "gpt_oss",
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **GROUPED,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": LOCAL_GLOBAL,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    Family(
        "llama4",
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **GROUPED,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
]
BY_NAME = {family.name: family for family in FAMILIES}
GENERATING = [family for family in FAMILIES if family.generates]


def tokens(batch: int, length: int) -> torch.Tensor:
    """Random token ids (batch, length), none of them the padding."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def padding(lengths: list[int], total: int, side: str) -> torch.Tensor:
    """attention_mask (len(lengths), total): that many real tokens in each row, padded on `side`."""
    position = torch.arange(total)
    real = torch.tensor(lengths)[:, None]
    return ((position < real) if side == "right" else (position >= total - real)).long()


def under(model: PreTrainedModel, implementation: str, run: Callable[[PreTrainedModel], Any]) -> Any:
    """`run(model)` with that attention implementation."""
    model.set_attn_implementation(implementation)
    return run(model)


def gradients(model: Any, run: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of the parameters, of a sum of `run(model)` with fixed random weights."""
    model.zero_grad()
    out = run(model)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], share: float = 2e-5, rtol: float = 1e-4
) -> None:
    """Gradients are the same but for a share of the parameter's largest."""
    assert actual.keys() == expected.keys()
    # Some gradients are zero but for rounding (a key's bias shifts all scores alike), hence a floor from the largest.
    floor = 0.015 * share * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        atol = share * float(gradient.abs().max()) + floor
        torch.testing.assert_close(actual[name], gradient, atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}")  # noqa: B023
