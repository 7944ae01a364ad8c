"""Tiny random models of the families that `heedful.hf.patch` takes over."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from families import VOCABULARY, disturbed

import heedful.hf

BLOCK = 4
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
BERT: dict[str, Any] = {
    **TOKENS,
    "sep_token_id": 2,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "initializer_range": 0.3,
}
SEQ2SEQ: dict[str, Any] = {
    **TOKENS,
    "decoder_start_token_id": 2,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "init_std": 0.3,
}
BLOCKS = {"block_size": BLOCK, "num_random_blocks": 2, "max_position_embeddings": 128}
FALCON = {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "longformer": (
        "LongformerConfig",
        "LongformerForMaskedLM",
        {**BERT, "attention_window": [8, 16], "max_position_embeddings": 130, "type_vocab_size": 1},
    ),
    "led": (
        "LEDConfig",
        "LEDForConditionalGeneration",
        {
            **SEQ2SEQ,
            "attention_window": [8, 16],
            "max_encoder_position_embeddings": 128,
            "max_decoder_position_embeddings": 64,
        },
    ),
    "big_bird": ("BigBirdConfig", "BigBirdForMaskedLM", {**BERT, **BLOCKS}),
    "bigbird_pegasus": (
        "BigBirdPegasusConfig",
        "BigBirdPegasusForConditionalGeneration",
        {**SEQ2SEQ, **BLOCKS, "attn_implementation": "eager"},
    ),
    "big_bird_decoder": (
        "BigBirdConfig",
        "BigBirdForCausalLM",
        {**BERT, **BLOCKS, "attention_type": "original_full", "is_decoder": True},
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {**TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    ),
    # With heads that are no power of 2 the slopes are of two progressions.
    "bloom_6_heads": (
        "BloomConfig",
        "BloomForCausalLM",
        {**TOKENS, "hidden_size": 48, "n_layer": 2, "n_head": 6, "initializer_range": 0.3},
    ),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {**TOKENS, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64, "initializer_range": 0.3},
    ),
    "falcon_rw": (
        "FalconConfig",
        "FalconForCausalLM",
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "falcon_7b": ("FalconConfig", "FalconForCausalLM", FALCON),
    "falcon_40b": (
        "FalconConfig",
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
}
DECODERS = ["big_bird_decoder", "bloom", "bloom_6_heads", "mpt", "falcon_rw", "falcon_7b", "falcon_40b"]


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model with seeded weights, in eval mode and without dropout."""
    torch.manual_seed(0)
    config, model, arguments = MODELS[name]
    built = getattr(transformers, model)(getattr(transformers, config)(**{**arguments, **changes}))
    for module in built.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attn_dropout_p", "hidden_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return disturbed(built.to(dtype).eval())


def pair(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """The model twice: as transformers has it, and patched."""
    own = build(name, dtype, **changes)
    ours = copy.deepcopy(own)
    heedful.hf.patch(ours)
    return own, ours
