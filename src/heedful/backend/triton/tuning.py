"""Tile sizes: a pure function of the architecture, the dtype, the head dims and what a call does beside attention."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """How a kernel is cut: rows and columns of a tile, warps of a program, tiles under way at once."""

    rows: int
    columns: int
    warps: int
    stages: int
    descriptors: bool = False
    """Whether the copy engine of sm_90 brings in tiles that need no mask."""


# Forward tiles of 16-bit types by the larger head dim (up to 64, 128, 256, 512). Those of 90 up to 256, and of its
# backward up to 128, are the best of sweeps on an H200 (triton 3.6): docs/performance/gpu.md. Those of 80 and 86, which
# has 99 KiB of shared memory, are chosen by what the compiler says of registers and spills, and were never measured.
_FORWARD = {
    80: {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 8, 2), 512: Tiles(32, 16, 4, 1)},
    86: {64: Tiles(128, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 8, 2), 512: Tiles(32, 16, 4, 1)},
    90: {
        64: Tiles(64, 64, 4, 2, True),
        128: Tiles(64, 64, 4, 3, True),
        256: Tiles(128, 64, 8, 2, True),
        512: Tiles(64, 32, 8, 1),
    },
}
# The same for what `takes_dense_tiles`, by descriptors.
_DENSE = {
    90: {
        64: Tiles(64, 128, 4, 2, True),
        128: Tiles(128, 64, 4, 2, True),
        256: Tiles(64, 64, 4, 3, True),
        512: Tiles(64, 32, 8, 1),
    }
}
# The same in float32 on the cores for single numbers, which no tile size makes fast.
_FORWARD_SINGLE = {
    64: Tiles(64, 32, 4, 2),
    128: Tiles(32, 32, 4, 2),
    256: Tiles(32, 16, 8, 1),
    512: Tiles(16, 16, 4, 1),
}

overrides: dict[tuple[object, ...], Tiles] = {}
"""Tiles that were measured on this machine, by the arguments of `forward_tiles` or of `backward_tiles`."""


def architecture(capability: tuple[int, int]) -> int:
    """The table for a device: that of the newest architecture which is no newer and has as much shared memory."""
    found = capability[0] * 10 + capability[1]
    if found >= 120:
        return 86
    return max([known for known in _FORWARD if known <= found], default=min(_FORWARD))


def _by_dim(table: dict[int, Tiles], dim: int) -> Tiles:
    return table[min(size for size in table if size >= dim)]


def takes_all(arch: int, dim: int) -> bool:
    """Whether features need no smaller tiles where descriptors bring in whatever is a tile: smaller ones took 1.1 times
    as long in the forward and up to 3 times in the backward."""
    return arch == 90 and dim <= 128


def takes_dense_tiles(full: bool, one_sided: bool, dim: int) -> bool:
    """Whether tiles are those of full attention; at D 128 smaller ones are faster as soon as there is an edge.

    full: every query attends to every key. one_sided: the keys of a query end at a diagonal at most on one side.
    """
    return full or (one_sided and not 64 < dim <= 128)


@functools.lru_cache(maxsize=1024)
def forward_tiles(
    arch: int, dtype: torch.dtype, head_dim: int, value_dim: int, rows: int, block: int, heavy: bool, dense: bool
) -> Tiles:
    """Tiles of the forward.

    rows: query rows of a program's head, where they are few (a power of 2 up to 64), otherwise 0. block: the smallest
    block of a map, 0 without one. heavy: whether there is what keeps further tiles of numbers alive.
    dense: whether it `takes_dense_tiles`, and descriptors can bring them in.
    """
    key = (arch, dtype, head_dim, value_dim, rows, block, heavy, dense)
    if key in overrides:
        return overrides[key]
    dim = max(head_dim, value_dim)
    if dtype == torch.float32:
        tiles = _by_dim(_FORWARD_SINGLE, dim)
    else:
        tiles = _by_dim(_FORWARD[arch], dim)
        if dense and not (heavy or rows):
            tiles = _by_dim(_DENSE.get(arch, _FORWARD[arch]), dim)
    if heavy:
        tiles = Tiles(
            min(tiles.rows, 64), min(tiles.columns, 64), min(tiles.warps, 4), min(tiles.stages, 2), tiles.descriptors
        )
        if dim > 128:
            tiles = tiles._replace(columns=min(tiles.columns, 32), warps=8)
    if rows and rows < tiles.rows:
        if arch >= 90 and dtype != torch.float32 and dim <= 128 and not heavy:
            tiles = Tiles(max(rows, 16), 128, 4, 3, True)
        else:
            columns = min(max(tiles.columns, 64), 128 if dim <= 128 else 64)
            tiles = Tiles(max(rows, 16), columns, 4, max(tiles.stages, 2))
    if block >= 16:
        size = 1 << (block.bit_length() - 1)
        tiles = tiles._replace(rows=min(tiles.rows, size), columns=min(tiles.columns, size))
        if tiles.rows <= 64 and dim <= (128 if arch >= 90 else 64):
            tiles = tiles._replace(warps=4)
    return tiles


# Runs of keys are no shorter than this.
_LEAST_RUN = 256
# What putting runs together takes, in keys that a program goes through in that time: by itself, and for each row.
_JOIN, _JOIN_ROW = 200, 1 / 12
# Two programs on a multiprocessor take this much longer than one.
_SHARED = 4 / 3


def key_runs(programs: int, multiprocessors: int, keys: int, few_rows: bool, rows: int) -> tuple[int, int]:
    """Into how many runs keys are cut, and how long one is (in n, see schedule.py): by sizes alone.

    A program for each multiprocessor reads memory as fast as two, and what it leaves is put together sooner. Where
    there are many rows to multiply, two hide each other's waits, but what they leave is much.

    few_rows: a program has few. rows: those of all programs.
    """
    wanted = min((1 if few_rows else 2) * multiprocessors // max(programs, 1), -(-keys // _LEAST_RUN))
    if wanted < 2:
        return 1, 0
    run = (-(-keys // wanted) + 127) // 128 * 128
    count = -(-keys // run)
    if not few_rows:
        shared = _SHARED if programs * count > multiprocessors else 1
        if run * shared + _JOIN + rows * _JOIN_ROW > 0.9 * keys:
            return 1, 0
    return count, run


# Programs that a multiprocessor runs at once, or nearly.
_AT_ONCE = 4


def items_together(slanted: bool, tiles: int, multiprocessors: int) -> int:
    """How many of the last items take turns, where some of an item's tiles have more to do: as many as run at once."""
    return max(1, _AT_ONCE * multiprocessors // tiles) if slanted else 1


# Of the two kernels of the backward: tiles of queries x keys.
_QUERY_GRADIENT = {
    80: {64: Tiles(128, 64, 8, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(64, 32, 8, 1)},
    86: {64: Tiles(128, 64, 8, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(64, 32, 8, 1)},
    90: {64: Tiles(64, 64, 4, 2, True), 128: Tiles(64, 64, 4, 2, True), 256: Tiles(64, 64, 8, 2, True)},
}
_KEY_GRADIENT = {
    80: {64: Tiles(32, 128, 8, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 64, 8, 1)},
    86: {64: Tiles(32, 128, 8, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 32, 8, 1)},
    90: {64: Tiles(64, 64, 4, 2, True), 128: Tiles(64, 64, 4, 2, True), 256: Tiles(32, 64, 8, 2, True)},
}
_GRADIENT_SINGLE = {64: Tiles(32, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)}


@functools.lru_cache(maxsize=1024)
def backward_tiles(
    arch: int, dtype: torch.dtype, head_dim: int, value_dim: int, block: int, heavy: bool, keys: bool
) -> Tiles:
    """Tiles of the gradient of queries or, with `keys`, of that of keys and values; arguments as `forward_tiles`."""
    key = (arch, dtype, head_dim, value_dim, block, heavy, keys)
    if key in overrides:
        return overrides[key]
    dim = max(head_dim, value_dim)
    if dtype == torch.float32:
        tiles = _by_dim(_GRADIENT_SINGLE, dim)
    else:
        tiles = _by_dim((_KEY_GRADIENT if keys else _QUERY_GRADIENT)[arch], dim)
        if heavy:
            rows, columns = (32, 64) if keys else (64, 64 if dim <= 128 else 32)
            tiles = tiles._replace(
                rows=min(tiles.rows, rows), columns=min(tiles.columns, columns), warps=4 if dim <= 64 else 8
            )
    if block >= 16:
        size = 1 << (block.bit_length() - 1)
        tiles = tiles._replace(rows=min(tiles.rows, size), columns=min(tiles.columns, size))
        if tiles.rows * tiles.columns <= 64 * 64 and dim <= (128 if arch >= 90 else 64):
            tiles = tiles._replace(warps=4)
    return tiles


# Of sm_90, where a bias comes in tiles and there is no other feature; the best of a sweep on an H200 (triton 3.6).
_BIASED = {
    "forward": {64: Tiles(64, 64, 4, 3, True), 128: Tiles(128, 64, 8, 3, True)},
    "queries": {64: Tiles(128, 64, 4, 3, True), 128: Tiles(128, 64, 8, 3, True)},
    "keys": {64: Tiles(64, 64, 4, 3, True), 128: Tiles(64, 64, 4, 2, True)},
}


def biased_tiles(kernel: str, arch: int, dim: int, otherwise: Tiles) -> Tiles:
    """Tiles of the kernel "forward", "queries" or "keys" under a bias that comes in tiles."""
    return _by_dim(_BIASED[kernel], dim) if arch == 90 and dim <= 128 else otherwise


def split_dim(dim: int, unit: int = 8) -> tuple[int, int]:
    """A head dim as one power of 2 or two of them, the second 0 where there is one: 80 is 64 + 16.

    Not so where strides are no multiple of 8 elements, `unit` 1: rows then come one number at a time, which is slow
    anyway, and triton 3.6 gets the parts of 96 and 33 wrong on sm_90, whatever the stages.
    """
    whole = max(16, 1 << (dim - 1).bit_length())
    if unit == 1:
        return whole, 0
    first = max(16, 1 << (dim.bit_length() - 1))
    if first >= dim:
        return first, 0
    rest = max(16, 1 << (dim - first - 1).bit_length())
    return (first, rest) if first + rest < whole else (whole, 0)
