"""How a bias comes to the kernels, and the look at tensors that comes before one in tiles."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from heedful.backend.triton.tuning import Tiles
from heedful.backend.triton.work import Launch, cdiv, in_units, kernels

# How a bias comes: number by number, as a tile of queries and keys by a descriptor, or as a row for all queries.
IN_NUMBERS, IN_TILES, A_ROW = 0, 1, 2


def bias_form(bias: Tensor, k_length: int) -> int:
    """The best of these; descriptors take rows in multiples of 16 bytes."""
    size, strides = bias.element_size(), bias.stride()
    if bias.shape[3] != k_length or size not in (2, 4):
        return IN_NUMBERS
    if bias.shape[2] == 1 or strides[2] == 0:
        return A_ROW
    return IN_TILES if strides[3] == 1 and not any(stride * size % 16 for stride in strides[:3]) else IN_NUMBERS


# Of one launch of `look_for_nonfinite`, and rows of a tile.
FLAGS, FLAG_ROWS = 256, 64


def look_for_nonfinite(
    first: Tensor, second: Tensor, flags: Tensor, place: int, unit: int, compiled: dict[Hashable, Any]
) -> Launch:
    """Sets FLAGS flags from `place` on, for two tensors (B, H, L, D or Dv)."""
    batch, heads, length, width = first.shape
    tiles = cdiv(length, FLAG_ROWS)
    columns = [max(16, 1 << (tensor.shape[3] - 1).bit_length()) for tensor in (first, second)]
    return Launch(
        kernels().find_nonfinite, (FLAGS, 1),
        (first, second, flags, in_units(first.stride(), unit), in_units(second.stride(), unit), heads, length, width,
        second.shape[3], tiles, tiles * batch * heads, place),
        (FLAG_ROWS, *columns, unit), 4, 1, compiled, "flags",
    )  # fmt: skip


def bias_descriptor(bias: Tensor, tiles: Tiles, form: int) -> Any:
    """Of a bias that comes in tiles, otherwise None; an axis that repeats is one element long."""
    if form != IN_TILES:
        return None
    sizes, strides = list(bias.shape), list(bias.stride())
    for axis in (0, 1):
        if strides[axis] == 0 or sizes[axis] == 1:
            sizes[axis], strides[axis] = 1, strides[2]
    return kernels().TensorDescriptor(bias, sizes, strides, [1, 1, tiles.rows, tiles.columns])
