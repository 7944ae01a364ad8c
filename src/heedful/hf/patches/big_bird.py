"""BigBird: blocks in a window, at both ends and at random; full attention where a sequence is too short for them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.big_bird import modeling_big_bird as original

from heedful.api import attention
from heedful.hf.forward import attention_forward
from heedful.hf.masks import PatternMask
from heedful.hf.patches.big_bird_plan import Plan, plan
from heedful.hf.patches.family import Family, Patched
from heedful.patterns import Pattern


class BlockSparseAttention(Patched):
    """The forward that the block sparse attention of BigBird and BigBird-Pegasus share."""

    num_attention_heads: int
    attention_head_size: int
    block_size: int
    num_random_blocks: int
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear

    @classmethod
    def describe(cls, module: Any) -> str:
        random = f"{module.num_random_blocks} random blocks of {module.block_size}"
        return f"a window of three, both ends and {random}; short sequences in full"

    def forward(
        self,
        hidden_states: Tensor,
        band_mask: Tensor | None = None,
        from_mask: Tensor | None = None,
        to_mask: Tensor | None = None,
        from_blocked_mask: Tensor | None = None,
        to_blocked_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original's, which takes from the masks what `to_blocked_mask` (B, blocks, block size) says.

        Of hidden_states (B, L, E): the output (B, L, E), and the weights (B, H, L, L) where they are asked for.
        """
        length = hidden_states.shape[1]
        if length % self.block_size:
            raise ValueError(f"hidden_states takes a length that {self.block_size} divides, got {length}")
        assert to_blocked_mask is not None
        blocks = plan(self, length)
        padding, pattern = _pattern(to_blocked_mask, blocks)
        query, key, value = (self._heads(project(hidden_states)) for project in (self.query, self.key, self.value))
        if blocks.appended:
            key, value = blocks.extend(key), blocks.extend(value)
        bias = blocks.bias
        if bias is not None and query.dtype != bias.dtype:
            bias = bias.float()
        found = attention(
            query,
            key,
            value,
            pattern=pattern,
            bias=bias,
            layout="blhd",
            return_weights=bool(output_attentions),
        )
        out, weights = (found, None) if isinstance(found, Tensor) else (found.out, found.weights)
        if padding is not None:
            out = out.masked_fill(padding[:, :, None, None], 0.0)
        return out.flatten(2), None if weights is None else blocks.weights(weights)

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], self.num_attention_heads, self.attention_head_size)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _pattern(blocked_mask: Tensor, blocks: Plan) -> tuple[Tensor | None, Pattern]:
    """Which tokens are padding, (B, L) or None for none, and the pattern; the same for all layers of a pass."""
    found = getattr(blocked_mask, "_heedful_pattern", None)
    if found is None or found[0] is not blocks:
        kept = blocked_mask.flatten(1) != 0
        found = (blocks, None, blocks.blocks)
        if not bool(kept.all()):
            found = (blocks, ~kept, blocks.blocks & blocks.real(kept))
        # On the tensor, so that it lives as long as the pass.
        blocked_mask._heedful_pattern = found  # type: ignore[attr-defined]
    return found[1], found[2]


class HeedfulBigBirdBlockSparseAttention(BlockSparseAttention, original.BigBirdBlockSparseAttention):
    replaces: ClassVar[type[nn.Module]] = original.BigBirdBlockSparseAttention


class FullAttention(Patched):
    """The forward that the full attention of BigBird and BigBird-Pegasus share."""

    num_attention_heads: int
    attention_head_size: int
    layer_idx: int
    dropout: nn.Dropout
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear

    @classmethod
    def describe(cls, module: Any) -> str:
        return "full attention, causal in a decoder"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: PatternMask | Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: PatternMask | Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        crossing = encoder_hidden_states is not None
        if crossing and past_key_values is not None and past_key_values.get_seq_length(self.layer_idx) > 0:
            kept: Any = past_key_values.layers[self.layer_idx]
            key, value = kept.keys, kept.values
        else:
            states = encoder_hidden_states if encoder_hidden_states is not None else hidden_states
            key, value = self._heads(self.key(states)), self._heads(self.value(states))
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
        context, weights = attention_forward(
            self,
            self._heads(self.query(hidden_states)),
            key,
            value,
            encoder_attention_mask if crossing else attention_mask,
            dropout=self.dropout.p,
            scaling=self.attention_head_size**-0.5,
            is_causal=False,
            output_attentions=output_attentions,
        )
        return context.flatten(2), weights

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], self.num_attention_heads, self.attention_head_size).transpose(1, 2)


class HeedfulBigBirdSelfAttention(FullAttention, original.BigBirdSelfAttention):
    replaces: ClassVar[type[nn.Module]] = original.BigBirdSelfAttention


class Switching(Patched):
    """What holds a self-attention and exchanges it for one of the other kind where a sequence is too short."""

    known: ClassVar[dict[type[nn.Module], type[Patched]]]
    config: Any

    def set_attention_type(self, *args: Any, **kwargs: Any) -> None:
        super().set_attention_type(*args, **kwargs)  # type: ignore[misc]
        inner: nn.Module = self.self  # type: ignore[assignment]
        inner.__class__ = self.known.get(type(inner), type(inner))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Where the config asks for weights, a module is not told: the original returns them always.
        if kwargs.get("output_attentions") is None and self.config.output_attentions:
            kwargs["output_attentions"] = True
        return super().forward(*args, **kwargs)


KNOWN: dict[type[nn.Module], type[Patched]] = {
    original.BigBirdBlockSparseAttention: HeedfulBigBirdBlockSparseAttention,
    original.BigBirdSelfAttention: HeedfulBigBirdSelfAttention,
}


class HeedfulBigBirdAttention(Switching, original.BigBirdAttention):
    replaces = original.BigBirdAttention
    known = KNOWN


FAMILY = Family(
    attention={**KNOWN, original.BigBirdAttention: HeedfulBigBirdAttention},
    masks={original.BigBirdModel: "heedful"},
)
