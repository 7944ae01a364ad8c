"""LED: Longformer's attention in the encoder, plain attention in the decoder."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.models.led import modeling_led as original

from heedful.hf.forward import attention_forward
from heedful.hf.masks import PatternMask
from heedful.hf.patches.family import Family, Patched
from heedful.hf.patches.longformer import WindowedAttention


class HeedfulLEDEncoderSelfAttention(WindowedAttention, original.LEDEncoderSelfAttention):
    replaces: ClassVar[type[nn.Module]] = original.LEDEncoderSelfAttention


class HeedfulLEDDecoderAttention(Patched, original.LEDDecoderAttention):
    replaces = original.LEDDecoderAttention
    layer_idx: Any
    dropout: float

    @classmethod
    def describe(cls, module: Any) -> str:
        return "causal or cross attention"

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: PatternMask | Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, Cache | None]:
        key, value = self._keys(hidden_states, key_value_states, past_key_values)
        context, weights = attention_forward(
            self,
            self._heads(self.q_proj(hidden_states)),
            key,
            value,
            attention_mask,
            dropout=self.dropout,
            scaling=self.scaling,
            is_causal=False,
            output_attentions=output_attentions,
        )
        return self.out_proj(context.flatten(2)), weights, past_key_values

    def _keys(
        self, hidden_states: Tensor, key_value_states: Tensor | None, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, Lk, D): the encoder's, projected once where there is a cache, or those so far."""
        crossing = key_value_states is not None
        cache, updated = past_key_values, False
        if isinstance(past_key_values, EncoderDecoderCache):
            updated = past_key_values.is_updated.get(self.layer_idx, False)
            cache = past_key_values.cross_attention_cache if crossing else past_key_values.self_attention_cache
        if crossing and cache is not None and updated:
            kept: Any = cache.layers[self.layer_idx]
            return kept.keys, kept.values
        states = key_value_states if key_value_states is not None else hidden_states
        key, value = self._heads(self.k_proj(states)), self._heads(self.v_proj(states))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            if crossing and isinstance(past_key_values, EncoderDecoderCache):
                past_key_values.is_updated[self.layer_idx] = True
        return key, value

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)


class RowMask(Tensor):
    """A mask (B, L) that LEDEncoder expands to (B, 1, L, L) for no more than its first row."""

    def expand(self, *sizes: int) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).expand(sizes[0], 1, 1, sizes[-1])


def unpadded(
    input_ids: Tensor | None, attention_mask: Tensor, inputs_embeds: Tensor | None, pad_token_id: int
) -> tuple[int, Tensor | None, Tensor, Tensor | None]:
    """LEDEncoder._pad_to_window_size where any length will do."""
    return 0, input_ids, attention_mask.as_subclass(RowMask), inputs_embeds


FAMILY = Family(
    attention={
        original.LEDEncoderSelfAttention: HeedfulLEDEncoderSelfAttention,
        original.LEDDecoderAttention: HeedfulLEDDecoderAttention,
    },
    masks={original.LEDDecoder: "heedful"},
    methods={original.LEDEncoder: {"_pad_to_window_size": unpadded}},
)
