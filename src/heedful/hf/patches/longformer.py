"""Longformer: a window and some global keys for every query, and all keys for the global queries.

Both have projections of their own, so that a layer is two calls. LED's encoder is the same.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface
from transformers.models.longformer import modeling_longformer as original

from heedful.api import attention
from heedful.hf.patches.family import Family, Patched
from heedful.hf.patches.long_documents import Layout
from heedful.problem import Attention

Outputs: TypeAlias = tuple[Tensor] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class WindowedAttention(Patched):
    """The forward that Longformer's and LED's self-attention share."""

    num_heads: int
    head_dim: int
    one_sided_attn_window_size: int
    dropout: float
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    query_global: nn.Linear
    key_global: nn.Linear
    value_global: nn.Linear

    @classmethod
    def describe(cls, module: Any) -> str:
        return f"a window of {module.one_sided_attn_window_size} on each side, and global keys; global queries apart"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> Outputs:
        """As the original's, which reads `attention_mask` for what the two after it say.

        Of hidden_states (B, L, E): the output (B, L, E); with output_attentions also the weights (B, L, H, G + 2w + 1)
        of G global keys and the window, and where there are global tokens theirs, (B, H, G, L).
        """
        assert is_index_masked is not None
        assert is_index_global_attn is not None
        layout = Layout.of(is_index_masked, is_index_global_attn)
        pattern = layout.window(self.one_sided_attn_window_size)
        found = self._attend(
            *(self._heads(project(hidden_states)) for project in (self.query, self.key, self.value)),
            pattern=pattern,
            return_weights="sparse" if output_attentions else False,
        )
        out, weights = (found, None) if isinstance(found, Tensor) else (found.out, found.weights)
        if layout.has_padding:
            out = out.masked_fill(is_index_masked[:, :, None, None], 0.0)
        outputs: list[Tensor] = []
        if weights is not None:
            outputs.append(layout.banded(weights, self.one_sided_attn_window_size, is_index_global_attn))
        if layout.global_count:
            found = self._attend_globally(hidden_states, layout, output_attentions)
            global_out, global_weights = (found, None) if isinstance(found, Tensor) else (found.out, found.weights)
            out = out.index_put(layout.places, global_out[layout.slots])
            if global_weights is not None:
                outputs.append(global_weights.masked_fill(layout.free_slots[:, None, :, None], 0.0))
        return (out.flatten(2), *outputs)  # type: ignore[return-value]

    def _attend_globally(self, hidden_states: Tensor, layout: Layout, output_attentions: bool) -> Tensor | Attention:
        """The global queries over all keys: the output is (B, G, H, D)."""
        queries = self._heads(self.query_global(hidden_states[layout.places]))
        query = queries.new_zeros(hidden_states.shape[0], layout.global_count, *queries.shape[1:])
        query = query.index_put(layout.slots, queries)
        key, value = (self._heads(project(hidden_states)) for project in (self.key_global, self.value_global))
        return self._attend(query, key, value, pattern=layout.real, return_weights=output_attentions)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor | Attention:
        dropout = self.dropout if self.training else 0.0
        found: Tensor | Attention = attention(query, key, value, dropout_p=dropout, layout="blhd", **options)
        return found

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], self.num_heads, self.head_dim)


class HeedfulLongformerSelfAttention(WindowedAttention, original.LongformerSelfAttention):
    replaces: ClassVar[type[nn.Module]] = original.LongformerSelfAttention


def unpadded(
    input_ids: Tensor | None,
    attention_mask: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    pad_token_id: int,
) -> tuple[int, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """LongformerModel._pad_to_window_size where any length will do."""
    return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds


def row_mask(
    batch_size: int, kv_length: int, attention_mask: Tensor, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> Tensor:
    """The mask that LongformerModel cuts to its first row, (B, 1, 1, L): 0 at tokens, the least number at padding."""
    mask = torch.zeros(batch_size, 1, 1, kv_length, dtype=dtype, device=attention_mask.device)
    return mask.masked_fill_(~attention_mask[:, None, None, :], torch.finfo(dtype).min)


AttentionMaskInterface.register("heedful_longformer", row_mask)

FAMILY = Family(
    attention={original.LongformerSelfAttention: HeedfulLongformerSelfAttention},
    masks={original.LongformerModel: "heedful_longformer"},
    methods={original.LongformerModel: {"_pad_to_window_size": unpadded}},
)
