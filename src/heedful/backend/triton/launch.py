"""From tensors to launches: what a kernel is compiled for, looked up, and what it is given, put together."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.backend.triton.plan import Plan, attends_to_all, plan
from heedful.backend.triton.tuning import Tiles, architecture, forward_tiles, key_runs, split_dim, takes_dense_tiles

LOG2E = math.log2(math.e)
# Multiprocessors that a call under Triton's interpreter is cut for.
_INTERPRETED = 16
INT32 = 2**31


@functools.cache
def kernels() -> Any:
    from heedful.backend.triton import kernels as loaded

    return loaded


@functools.cache
def device_limits(index: int) -> tuple[int, int]:
    """Architecture and multiprocessors."""
    if index < 0:
        return 90, _INTERPRETED
    properties = torch.cuda.get_device_properties(index)
    return architecture((properties.major, properties.minor)), properties.multi_processor_count


class Forward(NamedTuple):
    """What the forward is compiled for, and how its grid is made."""

    plan: Plan
    tiles: Tiles
    pack: int
    constants: tuple[Any, ...]
    widths: tuple[int, int]
    """Columns of a tile of keys and of values that descriptors bring in."""
    compiled: dict[Hashable, Any]
    """Kernels by what triton compiles anew for and `constants` do not hold."""


@functools.lru_cache(maxsize=4096)
def _forward(
    code: tuple[int, ...],
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    rows: int,
    pack: int,
    page: int,
    split: bool,
    has: tuple[bool, ...],
    fold: bool,
    unit: int,
    tf32: bool,
    plain: bool,
) -> Forward:
    made = plan(code)
    softcap, bias, alibi, sinks, dropout, offset = has
    heavy = softcap or bias or dropout or alibi or not made.gapless
    d0, d1 = split_dim(head_dim, unit)
    v0, v1 = split_dim(value_dim, unit)
    able = plain and not (bias or d1 or v1 or page) and made.step == 1 and unit == 8
    tiles = forward_tiles(
        arch,
        dtype,
        head_dim,
        value_dim,
        rows,
        made.block,
        heavy,
        able and takes_dense_tiles(made.dense, made.one_sided, max(head_dim, value_dim)),
    )
    if unit == 1:
        tiles = tiles._replace(rows=min(tiles.rows, 64), columns=min(tiles.columns, 32))
    if dropout and tiles.columns < 64:
        tiles = tiles._replace(columns=64)
    interpreted = kernels().INTERPRETED
    dependent = split and dependent_launches(arch)
    descriptors = tiles.descriptors and able
    tiles = tiles._replace(descriptors=descriptors)
    constants = (
        made.code, made.step, made.intervals, made.solid, made.monotone[0], made.gapless and not bias, d0, d1, v0, v1,
        d0 + d1 != head_dim, v0 + v1 != value_dim, tiles.rows, tiles.columns, pack, page, split, softcap, bias, alibi,
        sinks and not split, dropout, offset, fold, unit, "tf32" if tf32 else "ieee",
        interpreted and dtype == torch.bfloat16, descriptors, descriptors and pack == 1 and not split,
        dependent, tiles.stages,
    )  # fmt: skip
    return Forward(made, tiles, pack, constants, (d0, v0), {})


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    schedule: Sequence[int],
    scale: float,
    blhd: bool,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    pages: Tensor | None = None,
    query_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, Lq, Dv), in (B, L, H, D) memory order where `blhd`, and the log-sum-exp (B, H, Lq)."""
    batch, heads, q_length, head_dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    page = 0
    if pages is None:
        k_length = key.shape[2]
    else:
        page = key.shape[2]
        k_length = pages.shape[1] * page
    query, key, value = in_rows(query), in_rows(key), in_rows(value)
    if blhd:
        out = query.new_empty(batch, q_length, heads, value_dim).transpose(1, 2)
    else:
        out = query.new_empty(batch, heads, q_length, value_dim)
    lse = query.new_empty((batch, heads, q_length), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    index = query.get_device()
    arch, multiprocessors = device_limits(index)
    code = tuple(schedule)
    group = heads // kv_heads
    numbers, per_head, usual = operand_numbers(operands)
    pack = group if 1 < group <= 64 and q_length * group <= 64 and not per_head and plan(code).step == 1 else 1
    few = q_length * pack
    rows = 1 << (few - 1).bit_length() if few <= 64 else 0

    featured = bool(softcap) or bias is not None or alibi_slopes is not None
    has = (
        bool(softcap), bias is not None, alibi_slopes is not None, sinks is not None, dropout_p > 0,
        query_offset is not None,
    )  # fmt: skip
    strides = query.stride(), key.stride(), value.stride(), out.stride()
    bits = 0
    for tensor_strides in strides:
        bits |= tensor_strides[0] | tensor_strides[1] | tensor_strides[2]
    unit = 1 if bits & 7 else 8
    # Where it is not, triton looks for itself what the kernel may count on.
    pointers = query.data_ptr() | key.data_ptr() | value.data_ptr() | (0 if bias is None else bias.data_ptr())
    usual = usual and not pointers & 15 and bits < INT32 // 2
    # Of descriptors: every axis has a stride of its own, in multiples of 16 bytes.
    plain = usual and query.element_size() == 2 and 0 not in strides[0] and 0 not in strides[1] and 0 not in strides[2]
    plain = plain and attends_to_all(code, q_length, k_length)
    tf32 = query.dtype == torch.float32 and query.is_cuda and torch.backends.cuda.matmul.allow_tf32
    fold = scale > 0 and not featured
    made = _forward(code, arch, query.dtype, head_dim, value_dim, rows, pack, page, False, has, fold, unit, tf32, plain)
    step = made.plan.step
    row_tiles = -(-(-(-q_length // step) * pack) // made.tiles.rows)
    grid_heads = heads // pack
    programs = row_tiles * step * batch * grid_heads
    splits, chunk = key_runs(programs, multiprocessors, k_length, step, rows > 0)
    target, target_lse, target_strides = out, lse, strides[3]
    if splits > 1:
        target = query.new_empty((splits, batch, heads, q_length, value_dim), dtype=torch.float32)
        target_lse = query.new_empty((splits, batch, heads, q_length), dtype=torch.float32)
        target_strides = target.stride()[1:]
        unit = unit if value_dim % 8 == 0 else 1
        made = _forward(
            code, arch, query.dtype, head_dim, value_dim, rows, pack, page, True, has, fold, unit, tf32, plain
        )
    query_tiles = key_tiles = value_tiles = out_tiles = None
    if made.tiles.descriptors and pack == 1 and splits == 1:
        block = made.tiles.rows
        query_tiles = kernels().TensorDescriptor(query, query.shape, strides[0], [1, 1, block, made.widths[0]])
        out_tiles = kernels().TensorDescriptor(out, out.shape, strides[3], [1, 1, block, made.widths[1]])
    if made.tiles.descriptors:
        columns = made.tiles.columns
        key_tiles = kernels().TensorDescriptor(key, key.shape, strides[1], [1, 1, columns, made.widths[0]])
        value_tiles = kernels().TensorDescriptor(value, value.shape, strides[2], [1, 1, columns, made.widths[1]])
    arguments = (
        query, key, value, target, target_lse, query_tiles, key_tiles, value_tiles, out_tiles, bias, alibi_slopes,
        sinks, seed, pages, query_offset, tuple(operands),
        in_units(strides[0], unit), in_units(strides[1], unit), in_units(strides[2], unit),
        in_units(target_strides, unit), broadcast_strides(bias, 4), broadcast_strides(alibi_slopes, 3),
        broadcast_strides(query_offset, 2), 0 if pages is None else pages.stride(0), numbers,
        grid_heads, group, q_length, k_length, head_dim, value_dim, row_tiles, chunk,
        scale if featured else scale * LOG2E, softcap, threshold(dropout_p),
        1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
    )  # fmt: skip
    kernels().launch(
        kernels().attention_forward, (programs, splits), arguments, made.constants, made.tiles.warps,
        made.tiles.stages, index, made.compiled if usual else None, dtypes_of(bias, alibi_slopes, sinks),
        splits > 1 and dependent_launches(arch),
    )  # fmt: skip
    if splits > 1:
        rows_of_all = batch * heads * q_length
        block = min(128, max(16, 1 << (value_dim - 1).bit_length()))
        split_block = min(64, 1 << (splits - 1).bit_length())
        kernels().launch(
            kernels().combine_splits, (rows_of_all, -(-value_dim // block)),
            (target, target_lse, out, lse, sinks, hidden(strides[3][:3]), rows_of_all, heads, q_length, value_dim,
            splits),
            (split_block, block, sinks is not None, splits <= split_block, dependent_launches(arch)), 4, 1, index,
            made.compiled, ("combine", split_block, splits <= split_block, dtypes_of(sinks)), dependent_launches(arch),
        )  # fmt: skip
    return out, lse


def dependent_launches(arch: int) -> bool:
    """Whether a kernel may begin while the one before it ends, and wait inside."""
    return arch >= 90 and not kernels().INTERPRETED


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def dtypes_of(*tensors: Tensor | None) -> Hashable:
    """None where there is no tensor."""
    for tensor in tensors:
        if tensor is not None:
            return tuple([None if tensor is None else tensor.dtype for tensor in tensors])
    return None


def in_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def hidden(numbers: Sequence[int]) -> tuple[int, ...]:
    """Integers as the kernels take them inside tuples, where triton would compile anew for 1 and multiples of 16."""
    return tuple([2 * number + 3 for number in numbers])


def in_units(strides: Sequence[int], unit: int) -> tuple[int, ...]:
    """The first three of four strides, hidden."""
    return 2 * (strides[0] // unit) + 3, 2 * (strides[1] // unit) + 3, 2 * (strides[2] // unit) + 3


_NO_STRIDES = {4: (3, 3, 3, 3), 3: (3, 3, 3), 2: (3, 3)}


def broadcast_strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """Strides of the first axes, 0 where there is one element or no such axis; hidden."""
    if tensor is None:
        return _NO_STRIDES[count]
    found = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return hidden(found + [0] * (count - len(found)))


def operand_numbers(operands: Sequence[Tensor]) -> tuple[tuple[tuple[int, ...], ...], bool, bool]:
    """What the kernels know of each operand, hidden; whether one differs between heads; whether all of it is usual.

    Of a vector the stride between batch items (0 where it has one element), that between elements, how many documents
    it makes and the steps of a search among them; of a map or mask the strides of its four axes.
    """
    numbers = []
    per_head = False
    usual = True
    for operand in operands:
        if operand.ndim == 4:
            strides = broadcast_strides(operand, 4)
            numbers.append(strides)
            per_head |= operand.shape[1] > 1
            usual &= max(strides) < INT32
        else:
            count, stride = operand.shape[0], operand.stride(0)
            numbers.append(hidden((0 if count == 1 else stride, stride, count - 1, max(count - 1, 0).bit_length())))
        usual &= not operand.data_ptr() & 15
    return tuple(numbers), per_head, usual


def threshold(dropout_p: float) -> int:
    """dropout_p·2^32, less 2^31: words with their top bit flipped are compared as signed."""
    return int(dropout_p * 2**32) - INT32
