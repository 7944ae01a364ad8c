"""`TransformerEncoderLayer`: torch.nn.TransformerEncoderLayer with heedful's attention in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.nn.multihead_attention import MultiheadAttention, check_pattern, keep_from_being_bypassed
from heedful.patterns import Pattern


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer whose `self_attn` is a `heedful.nn.MultiheadAttention`.

    Constructor, parameters, state_dict and initialisation are that class's, and it goes into a
    torch.nn.TransformerEncoder. It runs module by module in training and in evaluation: torch's fused layer knows no
    pattern. All arguments but `pattern` are torch.nn.TransformerEncoderLayer's.

    Args:
        pattern: which positions see which, besides the masks of a call. None is all.

    Raises:
        TypeError: `pattern` is not a heedful.Pattern.
    """

    self_attn: MultiheadAttention

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | None = None,
    ) -> None:
        check_pattern(pattern)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        # A second module would draw its weights anew, and those of the rest would not be torch's for the same seed.
        self.self_attn.__class__ = MultiheadAttention
        self.pattern = pattern
        keep_from_being_bypassed(self.self_attn)

    @property
    def pattern(self) -> Pattern | None:
        """The pattern of `self_attn`."""
        return self.self_attn.pattern

    @pattern.setter
    def pattern(self, pattern: Pattern | None) -> None:
        self.self_attn.pattern = check_pattern(pattern)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        pattern: Pattern | None = None,
    ) -> Tensor:
        """Self-attention and feed-forward network, each with its residual and norm.

        Args:
            src: (L, N, E); with batch_first (N, L, E); without a batch (L, E); a nested tensor (N, L*, E).
            src_mask: (L, L) or (N · nhead, L, L): bool, True excludes a pair, or float, added to its score.
            src_key_padding_mask: (N, L) or (L,): bool, True excludes a key, or float, added to its scores.
            is_causal: says that src_mask is the causal mask.
            pattern: which positions see which, besides the layer's own pattern and the masks.

        Returns:
            As src.

        Raises:
            AssertionError, RuntimeError, ValueError, TypeError: as `MultiheadAttention.forward`.
        """
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal, pattern)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal, pattern))
        out: Tensor = self.norm2(x + self._ff_block(x))
        return out

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        pattern: Pattern | None = None,
    ) -> Tensor:
        out, _ = self.self_attn(
            x, x, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask, need_weights=False, is_causal=is_causal,
            pattern=pattern,
        )  # fmt: skip
        dropped: Tensor = self.dropout1(out)
        return dropped

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "torch.jit.script cannot read heedful.nn.TransformerEncoderLayer; use torch.compile or "
            "torch.export, or undo heedful.convert before scripting"
        )
