"""`Softmax`: with the scale, the cap and the mask of attention's scores."""

from __future__ import annotations

from torch import Tensor, nn

from heedful.ops import softmax


class Softmax(nn.Module):
    """Over the last dimension, as `heedful.ops.softmax` computes it.

    Args:
        scale: what the input is multiplied by.
        softcap: the bound that scores approach, or None for none.
    """

    def __init__(self, scale: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.scale, self.softcap = scale, softcap

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., C) to the same; mask broadcasts to it: bool, True where an element counts, or floating, added."""
        return softmax(x, self.scale, mask, self.softcap)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"scale={self.scale}" + ("" if self.softcap is None else f", softcap={self.softcap}")
