"""BigBird-Pegasus: BigBird's attention in the encoder; the decoder is in transformers' attention interface already."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers.models.bigbird_pegasus import modeling_bigbird_pegasus as original

from heedful.hf.patches.big_bird import BlockSparseAttention, FullAttention, Switching
from heedful.hf.patches.family import Family, Patched


class HeedfulBigBirdPegasusBlockSparseAttention(BlockSparseAttention, original.BigBirdPegasusBlockSparseAttention):
    replaces: ClassVar[type[nn.Module]] = original.BigBirdPegasusBlockSparseAttention


class HeedfulBigBirdPegasusSelfAttention(FullAttention, original.BigBirdPegasusSelfAttention):
    replaces: ClassVar[type[nn.Module]] = original.BigBirdPegasusSelfAttention


KNOWN: dict[type[nn.Module], type[Patched]] = {
    original.BigBirdPegasusBlockSparseAttention: HeedfulBigBirdPegasusBlockSparseAttention,
    original.BigBirdPegasusSelfAttention: HeedfulBigBirdPegasusSelfAttention,
}


class HeedfulBigBirdPegasusEncoderAttention(Switching, original.BigBirdPegasusEncoderAttention):
    replaces: ClassVar[type[nn.Module]] = original.BigBirdPegasusEncoderAttention
    known = KNOWN


class HeedfulBigBirdPegasusDecoderAttention(Patched, original.BigBirdPegasusDecoderAttention):
    """Its own, which looks at its config for the attention to call."""

    replaces = original.BigBirdPegasusDecoderAttention

    @classmethod
    def describe(cls, module: Any) -> str:
        return "causal or cross attention, through the attention interface"


FAMILY = Family(
    attention={
        **KNOWN,
        original.BigBirdPegasusEncoderAttention: HeedfulBigBirdPegasusEncoderAttention,
        original.BigBirdPegasusDecoderAttention: HeedfulBigBirdPegasusDecoderAttention,
    },
    masks=dict.fromkeys(
        (
            original.BigBirdPegasusEncoder,
            original.BigBirdPegasusDecoder,
            original.BigBirdPegasusDecoderAttention,
        ),
        "heedful",
    ),
)
