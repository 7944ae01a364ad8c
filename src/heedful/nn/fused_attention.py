"""`FusedAttention`: attention without weights of its own that returns the attention weights too."""

from __future__ import annotations

from torch import Tensor, nn

from heedful.ops import fused_attention


class FusedAttention(nn.Module):
    """softmax(scale · q kᵀ) v and the softmax itself, as `heedful.ops.fused_attention` computes them.

    Args:
        scale: what q kᵀ is multiplied by; None is 1/sqrt(D).
    """

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) or (B, H, S, D) tensors to the output and the weights, (B, S, L) or (B, H, S, L)."""
        return fused_attention(query, key, value, self.scale)

    def extra_repr(self) -> str:
        """The constructor's argument where it is not the default."""
        return "" if self.scale is None else f"scale={self.scale}"
