"""A mask that the caller spells out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heedful.patterns.arguments import booleans, check_broadcast, four_dimensional
from heedful.patterns.arrays import as_tensor
from heedful.patterns.base import Pattern
from heedful.patterns.schedule import Schedule, in_mask

if TYPE_CHECKING:
    from torch import Tensor

    from heedful.patterns.arrays import Array


class Mask(Pattern):
    """A query may attend to a key where the tensor is True.

    Args:
        tensor: bool, broadcasts to (B, H, q_length, k_length); True = attend, as in PyTorch's
            scaled_dot_product_attention.

    Raises:
        TypeError, ValueError: `tensor` is not a bool tensor of at most 4 dimensions; at the call, it does not
            broadcast.
    """

    def __init__(self, tensor: Array) -> None:
        self.tensor = booleans("tensor", tensor)

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        return as_tensor(self.arrays(q_length, k_length)[0], i.device)

    def lower(self) -> Schedule:
        return Schedule.of([[in_mask(0)]], 1)

    def arrays(self, q_length: int, k_length: int) -> tuple[Array, ...]:
        mask = four_dimensional(self.tensor)
        check_broadcast("tensor", mask, (*mask.shape[:2], q_length, k_length))
        return (mask,)

    def validate(self, batch: int, heads: int, q_length: int, k_length: int) -> None:
        check_broadcast("tensor", self.tensor, (batch, heads, q_length, k_length))
