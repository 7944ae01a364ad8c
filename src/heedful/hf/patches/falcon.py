"""Falcon, with rotary embeddings or ALiBi: keys are not repeated for their queries, ALiBi is a bias of one row."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from transformers import AttentionMaskInterface, Cache
from transformers.models.falcon import modeling_falcon as original

from heedful.hf.forward import attention_forward
from heedful.hf.masks import PatternMask, pattern_mask
from heedful.hf.patches.family import Family, Patched


class HeedfulFalconAttention(Patched, original.FalconAttention):
    replaces = original.FalconAttention
    layer_idx: int
    num_kv_heads: int

    @classmethod
    def describe(cls, module: Any) -> str:
        positions = "ALiBi as a bias of one row" if module.config.alibi else "causal attention"
        return f"{positions}, {module.num_heads} heads to {module.num_kv_heads} of keys"

    @classmethod
    def notes(cls, module: Any) -> tuple[str, ...]:
        found = []
        if module.new_decoder_architecture:
            found.append("a cache holds each key head once, where Falcon's own repeats it for its queries")
        if module.config.alibi and module.config._attn_implementation == "eager":
            found.append("ALiBi counts once, as under Falcon's sdpa; its eager attention adds it twice")
        return tuple(found)

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Carried | Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (states.transpose(1, 2) for states in self._heads(self.query_key_value(hidden_states)))
        if alibi is None:
            assert position_embeddings is not None
            query, key = original.apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        mask = attention_mask.mask if isinstance(attention_mask, Carried) else attention_mask
        bias = None
        if alibi is not None and not isinstance(mask, Tensor):
            # Falcon rounds slope · position to bfloat16, so that slopes alone would not say the same. A mask that is
            # a tensor has it in it.
            row = alibi.view(-1, self.num_heads, 1, alibi.shape[-1])
            bias = (row if row.dtype.itemsize > 2 else row.float()) * self.inv_norm_factor
        context, weights = attention_forward(
            self,
            query,
            key,
            value,
            mask,
            # Falcon drops weights beside ALiBi only.
            dropout=0.0 if alibi is None else self.attention_dropout.p,
            scaling=self.inv_norm_factor,
            position_bias=bias,
            output_attentions=output_attentions,
        )
        return self.dense(context.flatten(2)), weights

    def _heads(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, L, H, D), keys and values (B, L, Hkv, D)."""
        if not self.new_decoder_architecture:
            query, key, value = self._split_heads(fused)
            return query, key, value
        shape = (*fused.shape[:2], self.num_kv_heads, self.num_heads // self.num_kv_heads + 2, self.head_dim)
        grouped = fused.view(shape)
        return grouped[:, :, :, :-2].flatten(2, 3), grouped[:, :, :, -2], grouped[:, :, :, -1]


class Carried(NamedTuple):
    """A mask that FalconModel takes for none of four dimensions, to which it would add ALiBi for all pairs."""

    mask: PatternMask
    ndim: int = 0


def falcon_mask(*args: Any, **kwargs: Any) -> Carried | Tensor:
    """The mask function of `heedful.hf`, for what FalconModel does with masks."""
    mask = pattern_mask(*args, **kwargs)
    return Carried(mask) if isinstance(mask, PatternMask) else mask


AttentionMaskInterface.register("heedful_falcon", falcon_mask)

FAMILY = Family(
    attention={original.FalconAttention: HeedfulFalconAttention},
    masks={original.FalconModel: "heedful_falcon"},
)
