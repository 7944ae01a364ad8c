"""MPT: ALiBi as slope · (j − last key), which under a causal mask is −slope · (i − j) but for a constant in a row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache
from transformers.models.mpt import modeling_mpt as original

from heedful.hf.forward import attention_forward
from heedful.hf.masks import PatternMask
from heedful.hf.patches.family import Family, Patched


class Asked(NamedTuple):
    """What a block hands to its attention where that expects the bias alone."""

    position_bias: Tensor
    output_attentions: bool


class HeedfulMptBlock(Patched, original.MptBlock):
    """MptBlock, which does not tell its attention whether weights are wanted."""

    replaces = original.MptBlock

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        attention_mask: PatternMask | Tensor,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        asked = Asked(position_bias, bool(output_attentions))
        forward: Any = super().forward
        found: tuple[Tensor, Tensor | None] = forward(hidden_states, asked, attention_mask, layer_past, **kwargs)
        return found


class HeedfulMptAttention(Patched, original.MptAttention):
    replaces = original.MptAttention
    layer_idx: int

    @classmethod
    def describe(cls, module: Any) -> str:
        return f"ALiBi slopes of {module.n_heads} heads, no bias tensor"

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Asked | Tensor | None,
        past_key_values: Cache | None = None,
        attention_mask: PatternMask | Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        output_attentions = isinstance(position_bias, Asked) and position_bias.output_attentions
        alibi = position_bias.position_bias if isinstance(position_bias, Asked) else position_bias
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        heads = (*hidden_states.shape[:2], self.n_heads, self.head_dim)
        query, key, value = (states.view(heads).transpose(1, 2) for states in mixed.chunk(3, dim=2))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        slopes = bias = None
        if alibi is not None:
            if isinstance(attention_mask, PatternMask) and attention_mask.causal and alibi.shape[2] > 1:
                slopes = -alibi[:, 0, -2]
            else:
                bias = alibi[None, :, :, max(0, alibi.shape[2] - key.shape[2]) :].to(torch.float32)
        if isinstance(attention_mask, Tensor):
            # Here True is what is hidden.
            attention_mask = ~attention_mask
        context, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout_p,
            scaling=self.softmax_scale,
            is_causal=False,
            alibi_slopes=slopes,
            position_bias=bias,
            output_attentions=output_attentions,
        )
        return self.out_proj(context.flatten(2)), weights


FAMILY = Family(
    attention={original.MptBlock: HeedfulMptBlock, original.MptAttention: HeedfulMptAttention},
    masks={original.MptModel: "heedful"},
)
