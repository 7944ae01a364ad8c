"""What one call asks for: `Problem`, the hashable part that a backend is chosen by, and `Call`, its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from heedful.patterns import Pattern
    from heedful.patterns.schedule import Schedule

# Every feature that a call may need, and how a sentence names it.
FEATURES = {
    "bias": "an additive bias",
    "alibi": "ALiBi slopes",
    "softcap": "softcap",
    "sinks": "attention sinks",
    "dropout": "dropout",
    "lse": "return_lse",
    "weights": "return_weights",
    "sparse_weights": 'return_weights="sparse"',
    "paged": "keys and values in pages",
    "gradient": "gradients",
    "second_order": "derivatives of torch.func's derivatives",
    "forward_mode": "forward-mode derivatives",
    "vmap": "vmap",
}


def known(condition: bool) -> bool:
    """Whether a condition on sizes holds; under torch.compile and torch.export, whether it holds for all sizes.

    Choices that any outcome is right for ask this way, so that tracing does not specialise on a dynamic length.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return condition


class Attention(NamedTuple):
    """What `heedful.attention` returns when more than the output is asked for.

    Attributes:
        out: as the call without return_lse and return_weights returns it.
        lse: (B, H, Lq), float32 (float64 for float64 inputs): the natural logarithm of each row's sum of
            exponentials, -inf for a row with no key and no sink. None unless return_lse.
        weights: (B, H, Lq, Lk) in the inputs' dtype, after dropout; for return_weights="sparse" a coalesced COO
            tensor that holds the attended pairs alone. None unless return_weights.
    """

    out: Tensor
    lse: Tensor | None
    weights: Tensor | None


class Problem(NamedTuple):
    """One call without its tensors: all that the choice of a backend may depend on.

    `dtype` is the one that attention is computed from, under autocast the one that it casts to.
    """

    batch: int
    heads: int
    kv_heads: int
    q_length: int
    k_length: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device_type: str
    schedule: Schedule
    features: frozenset[str]
    constant: Pattern | None = None
    """The pattern where the schedule refers to tensors that follow from the pattern's ints alone, as BigBird's do.
    None in a traced call."""
    bias_dtype: torch.dtype | None = None

    @property
    def pairs(self) -> int:
        """Query-key pairs over all batch items and heads, attended or not."""
        return self.batch * self.heads * self.q_length * self.k_length

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute: no batch item, query, key or value column."""
        return any(known(size == 0) for size in (self.batch, self.q_length, self.k_length, self.value_dim))


@dataclass(slots=True)
class Call:
    """A validated call as backends receive it: index order (B, H, L, D) whatever the layout, defaults resolved.

    `bias` and `alibi_slopes` have four dimensions that broadcast to (B, H, Lq, Lk); `sinks` is (H,).
    `blhd` asks for an output whose memory order is (B, L, H, Dv).
    `pages` is int32 (B, n) or None: key and value are then pools (blocks, Hkv, P, D or Dv), k_length is n · P, and key
    j of batch item b is row j mod P of block pages[b, ⌊j / P⌋]. Entries that no pair reaches may hold anything.
    `query_offset` is int32, for ALiBi: (B or 1,), the position of each batch item's first query, or (B or 1, Lq), each
    query's position less its index; None is Lk - Lq.
    """

    problem: Problem
    query: Tensor
    key: Tensor
    value: Tensor
    pattern: Pattern
    scale: float
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    blhd: bool = False
    pages: Tensor | None = None
    query_offset: Tensor | None = None
