"""Between padded batches and packed sequences, as `flash_attn.bert_padding` has it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch that a mask has, one after the other.

    Args:
        hidden_states: (B, L, ...).
        attention_mask: bool or int (B, L), 1 for tokens that count.
        unused_mask: the same for tokens that are kept beside them, but do not count as used.

    Returns:
        the tokens (n, ...), their places in the flattened batch (n,), cu_seqlens int32 (B + 1,), the longest sequence's
        length, and how many tokens of each sequence attention_mask has, int32 (B,).
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    used = attention_mask.sum(-1, dtype=torch.int32)
    lengths = used if unused_mask is None else kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        _cumulative(lengths),
        _longest(lengths),
        used,
    )


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same for a batch whose items each hold several sequences, one after the other from the front.

    Args:
        hidden_states: (B, L, ...).
        attention_mask_in_length: int (B, L), the lengths of an item's sequences, and 0 where there are no more.

    Returns:
        the tokens (n, ...), their places in the flattened batch (n,), cu_seqlens int32 (sequences + 1,) and the longest
        sequence's length.
    """
    filled = attention_mask_in_length.sum(-1, keepdim=True)
    places = torch.arange(attention_mask_in_length.shape[1], device=filled.device)
    indices = (places < filled).flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _cumulative(lengths), _longest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Tokens (n, ...) back at their places in a padded batch (batch, seqlen, ...), with zeros between them."""
    padded: Tensor = index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
    return padded


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices] of an input (m, ...) and int64 indices (n,)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, ...) with values (n, ...) at the indices (n,)."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """input[indices], and the input itself for a residual connection."""
    return index_first_axis(input, indices), input.view_as(input)


def _cumulative(lengths: Tensor) -> Tensor:
    return functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths: Tensor) -> int:
    return int(lengths.max())
