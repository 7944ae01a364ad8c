"""Where the queries and keys of one mask stand."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing


class Grid:
    """Query i stands at position i + q_offset and key j at position j + k_offset, as transformers counts positions.

    A static cache gives q_offset as a tensor that the cache's update then changes in place, so it is read or copied
    here and not kept for later.

    Attributes:
        readable: whether the contents of tensors can be looked at: not while a graph is being traced.
        q_start: q_offset as a number, or None where it cannot be read without waiting for a device.
        offset: the `offset` of a pattern in coordinates i and j. None (the last query meets the last key) and 0 are
            constants; anything else is a tensor, so that a pattern's hashable part stays the same from one generated
            token to the next.
    """

    __slots__ = ("batch", "device", "k_length", "k_offset", "offset", "q_length", "q_offset", "q_start", "readable")

    def __init__(
        self, batch: int, q_length: int, k_length: int, q_offset: int | Tensor, k_offset: int, device: torch.device
    ) -> None:
        self.batch, self.q_length, self.k_length = batch, q_length, k_length
        self.q_offset, self.k_offset, self.device = q_offset, k_offset, device
        self.readable = device.type != "meta" and not is_tracing()
        self.q_start: int | None
        self.offset: int | Tensor | None
        if not isinstance(q_offset, Tensor):
            self.q_start = q_offset
        else:
            self.q_start = int(q_offset) if self.readable and q_offset.device.type == "cpu" else None
            if self.q_start is None:
                self.offset = (q_offset - k_offset).to(torch.int32).reshape(1)
                return
        shift = self.q_start - k_offset
        if shift == k_length - q_length and (shift == 0 or not isinstance(q_offset, Tensor)):
            self.offset = None
        elif shift == 0:
            self.offset = 0
        else:
            # Filled, not copied, which waits for a device.
            self.offset = torch.full((1,), shift, dtype=torch.int32, device=device)
