"""Pairs of multi-head attention modules with the same weights, torch's and heedful's, and calls of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from heedful.nn import MultiheadAttention

EMBED, HEADS = 24, 4


def pair(dtype: torch.dtype = torch.float64, **options) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and heedful's with the same weights, whose biases are not 0."""
    ours = MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    options.pop("pattern", None)
    theirs = nn.MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def sequences(
    theirs: nn.MultiheadAttention, kind: str, batch: int = 3, q_length: int = 5, k_length: int = 7
) -> list[Tensor]:
    """Query, key and value as this kind of call has them."""
    dtype = theirs.out_proj.weight.dtype
    shapes = [(batch, q_length, EMBED), (batch, k_length, theirs.kdim), (batch, k_length, theirs.vdim)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if kind == "no batch":
        return [tensor[0] for tensor in tensors]
    return [tensor.transpose(0, 1).contiguous() for tensor in tensors] if kind == "sequence first" else tensors


def excluding(shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """A mask, True or -inf for a third of the pairs and never for the first key."""
    excluded = torch.rand(shape) < 0.3
    excluded[..., 0] = False
    return excluded if "bool" in kind else torch.randn(shape, dtype=dtype).masked_fill(excluded, -math.inf)


def masks(attention: str | None, padding: str | None, kind: str, batch: int = 3, q_length: int = 5, k_length: int = 7):
    batch = 1 if kind == "no batch" else batch
    given = {}
    if attention is not None:
        lead = (batch * HEADS,) if "head" in attention else ()
        given["attn_mask"] = excluding((*lead, q_length, k_length), attention)
    if padding is not None:
        mask = excluding((batch, k_length), padding)
        given["key_padding_mask"] = mask[0] if kind == "no batch" else mask
    return given
