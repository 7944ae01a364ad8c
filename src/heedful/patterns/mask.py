"""A mask that the caller spells out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heedful.patterns.arguments import booleans, check_broadcast, four_dimensional
from heedful.patterns.arrays import as_tensor, is_tracing
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
        self._fitted: tuple[object, tuple[Array]] | None = None
        self._valid_for: object = None

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        return as_tensor(self.arrays(q_length, k_length)[0], i.device)

    def lower(self) -> Schedule:
        return Schedule.of([[in_mask(0)]], 1)

    def arrays(self, q_length: int, k_length: int) -> tuple[Array, ...]:
        # Kept, since a layer or a step asks for the same again and again, and each view costs a microsecond.
        call = q_length, k_length, self.tensor.shape
        if self._fitted is not None and not is_tracing() and self._fitted[0] == call:
            return self._fitted[1]
        mask = four_dimensional(self.tensor)
        check_broadcast("tensor", mask, (*mask.shape[:2], q_length, k_length))
        if not is_tracing():
            self._fitted = call, (mask,)
        return (mask,)

    def validate(self, batch: int, heads: int, q_length: int, k_length: int) -> None:
        call = batch, heads, q_length, k_length, self.tensor.shape
        if is_tracing() or self._valid_for != call:
            check_broadcast("tensor", self.tensor, call[:4])
            if not is_tracing():
                self._valid_for = call
