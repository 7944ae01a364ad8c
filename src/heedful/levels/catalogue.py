"""The components by their names."""

from __future__ import annotations

from types import MappingProxyType

from heedful.levels.base import Component
from heedful.levels.components import (
    Attention,
    FeedForward,
    LayerNorm,
    LayerNormGELU,
    MultiHeadAttention,
    TransformerBlock,
)
from heedful.levels.decoder import Decoder

COMPONENTS: MappingProxyType[str, type[Component]] = MappingProxyType(
    {
        made.component: made
        for made in (Attention, MultiHeadAttention, LayerNorm, LayerNormGELU, FeedForward, TransformerBlock, Decoder)
    }
)
