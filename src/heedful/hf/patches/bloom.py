"""BLOOM: ALiBi as slope · j, which under a causal mask is −slope · (i − j) but for a constant in each row."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache
from transformers.models.bloom import modeling_bloom as original

from heedful.hf.forward import attention_forward
from heedful.hf.masks import PatternMask
from heedful.hf.patches.family import Family, Patched


class HeedfulBloomAttention(Patched, original.BloomAttention):
    replaces = original.BloomAttention
    layer_idx: int

    @classmethod
    def describe(cls, module: Any) -> str:
        return f"ALiBi slopes of {module.num_heads} heads, no bias tensor"

    @classmethod
    def notes(cls, module: Any) -> tuple[str, ...]:
        if module.dense.weight.dtype.itemsize > 2:
            return ()
        return ("ALiBi is exact, where BLOOM's own rounds slope · position to the model's dtype",)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: PatternMask | Tensor | None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        # Positions are counted among the real tokens, which with holes between them is not the distance.
        straight = isinstance(attention_mask, PatternMask) and attention_mask.causal and not attention_mask.has_holes
        context, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p,
            scaling=self.inv_norm_factor,
            is_causal=False,
            alibi_slopes=slopes(self.num_heads, query.device) if straight else None,
            position_bias=None if straight else alibi.view(-1, self.num_heads, 1, alibi.shape[-1]),
            output_attentions=output_attentions,
        )
        output = original.dropout_add(self._project(context.flatten(2)), residual, self.hidden_dropout, self.training)
        return output, weights

    def _project(self, context: Tensor) -> Tensor:
        if self.pretraining_tp <= 1 or not self.slow_but_exact:
            return self.dense(context)  # type: ignore[no-any-return]
        width = self.hidden_size // self.pretraining_tp
        parts = zip(context.split(width, -1), self.dense.weight.split(width, 1), strict=True)
        return torch.stack([F.linear(part, weight) for part, weight in parts]).sum(0)


# torch.compile warns of caches, and traces what they hold.
def slopes(heads: int, device: torch.device) -> Tensor:
    return original._get_alibi_slopes(heads, device) if torch.compiler.is_compiling() else _kept_slopes(heads, device)


@lru_cache(maxsize=16)
def _kept_slopes(heads: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return original._get_alibi_slopes(heads, device)


FAMILY = Family(
    attention={original.BloomAttention: HeedfulBloomAttention},
    masks={original.BloomModel: "heedful"},
)
