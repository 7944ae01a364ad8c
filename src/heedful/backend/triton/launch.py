"""The forward from tensors to launches: what it is compiled for, looked up, and what it is given, put together."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.backend.triton.bias import A_ROW, FLAGS, IN_NUMBERS, bias_descriptor, bias_form, look_for_nonfinite
from heedful.backend.triton.plan import FAR, Plan, attends_to_all, keys_between, plan
from heedful.backend.triton.tuning import (
    Tiles,
    biased_tiles,
    forward_tiles,
    items_together,
    key_runs,
    split_dim,
    takes_all,
    takes_dense_tiles,
)
from heedful.backend.triton.work import (
    INT32,
    LOG2E,
    Features,
    Launch,
    Work,
    cdiv,
    dependent_launches,
    device_limits,
    dtypes_of,
    hidden,
    in_rows,
    in_units,
    kernels,
    operand_numbers,
    takes_tf32,
)


class Forward(NamedTuple):
    """What the forward is compiled for, and how its grid is made."""

    plan: Plan
    tiles: Tiles
    pack: int
    constants: tuple[Any, ...]
    widths: tuple[int, int]
    """Columns of a tile of keys and of values that descriptors bring in."""
    compiled: dict[Hashable, Any]
    """As `Launch` has them."""


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
    narrow: bool,
    has: tuple[bool, ...],
    fold: bool,
    unit: int,
    tf32: bool,
    plain: bool,
    tiled: int,
) -> Forward:
    made = plan(code)
    softcap, bias, alibi, dropout, offset, sinks = has
    d0, d1 = split_dim(head_dim, unit)
    v0, v1 = split_dim(value_dim, unit)
    dim = max(head_dim, value_dim)
    # Under a bias that comes in tiles, keys that no query sees are taken out of theirs.
    able = bool(tiled if bias else plain) and not (d1 or v1 or page) and made.step == 1 and unit == 8
    features = softcap or bias or dropout or alibi
    light = able and takes_all(arch, dim) and not rows
    tiles = forward_tiles(
        arch,
        dtype,
        head_dim,
        value_dim,
        rows,
        made.block,
        (features and not light) or not made.gapless,
        able and not features and takes_dense_tiles(made.dense, made.one_sided, dim),
    )
    if tiled and has == (False, True, False, False, False, sinks) and not (made.block or rows):
        tiles = biased_tiles("forward", arch, dim, tiles)
    if unit == 1:
        tiles = tiles._replace(rows=min(tiles.rows, 64), columns=min(tiles.columns, 32))
    if dropout and tiles.columns < 64:
        tiles = tiles._replace(columns=64)
    interpreted = kernels().INTERPRETED
    dependent = split and dependent_launches(arch)
    descriptors = tiles.descriptors and able
    tiles = tiles._replace(descriptors=descriptors)
    constants = (
        made.code, made.step, made.intervals, made.solid, made.monotone[0],
        made.gapless and (descriptors or not bias), d0, d1, v0, v1,
        d0 + d1 != head_dim, v0 + v1 != value_dim, tiles.rows, tiles.columns, pack, page, split, narrow, softcap,
        bias, alibi, sinks and not split, dropout, offset, fold, unit, "tf32" if tf32 else "ieee",
        interpreted and dtype == torch.bfloat16, descriptors, descriptors and pack == 1 and not split,
        FLAGS if descriptors and bias else 0, descriptors and tiled == A_ROW,
        dependent, split and descriptors and rows > 0, tiles.stages,
    )  # fmt: skip
    return Forward(made, tiles, pack, constants, (d0, v0), {})


def forward_work(
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
) -> Work:
    """What computes the output (B, H, Lq, Dv), in (B, L, H, D) memory order where `blhd`, and the log-sum-exp
    (B, H, Lq)."""
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query is {query.dtype}, key {key.dtype} and value {value.dtype}")
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
    index = query.get_device()
    if lse.numel() == 0:
        return Work(index, (out, lse), (), ())
    arch, multiprocessors = device_limits(index)
    code = tuple(schedule)
    group = heads // kv_heads
    numbers, per_head, usual = operand_numbers(operands)
    pack = group if 1 < group <= 64 and q_length * group <= 64 and not per_head and plan(code).step == 1 else 1
    few = q_length * pack
    rows = 1 << (few - 1).bit_length() if few <= 64 else 0

    features = Features(bias, alibi_slopes, softcap, dropout_p, seed, query_offset)
    has = *features.present, sinks is not None
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
    tiled = bias_form(bias, k_length) if plain and pack == 1 and bias is not None else IN_NUMBERS
    plain = plain and attends_to_all(code, q_length, k_length)
    tf32 = takes_tf32(query)
    fold = scale > 0 and features.plain
    common = has, fold, unit, tf32, plain, tiled
    made = _forward(code, arch, query.dtype, head_dim, value_dim, rows, pack, page, False, False, *common)
    step = made.plan.step
    row_tiles = -(-(-(-q_length // step) * pack) // made.tiles.rows)
    grid_heads = heads // pack
    programs = row_tiles * step * batch * grid_heads
    rows_of_all = lse.numel()
    reach = keys_between(code, min(q_length, cdiv(made.tiles.rows, pack) + 1)) if step == 1 else FAR
    splits, chunk = key_runs(programs, multiprocessors, min(cdiv(k_length, step), reach), rows > 0, rows_of_all)
    target, target_lse, target_strides = out, lse, strides[3]
    scratch: tuple[Tensor, ...] = ()
    if splits > 1:
        target = query.new_empty((splits, batch, heads, q_length, value_dim), dtype=torch.float32)
        target_lse = query.new_empty((splits, batch, heads, q_length), dtype=torch.float32)
        scratch = target, target_lse
        target_strides = target.stride()[1:]
        unit = unit if value_dim % 8 == 0 else 1
        # So that the unit is that of the partial results.
        common = has, fold, unit, tf32, plain, tiled
        made = _forward(code, arch, query.dtype, head_dim, value_dim, rows, pack, page, True, reach < k_length, *common)
    query_tiles = key_tiles = value_tiles = out_tiles = bias_tiles = flags = None
    if made.tiles.descriptors and pack == 1 and splits == 1:
        block = made.tiles.rows
        query_tiles = kernels().TensorDescriptor(query, query.shape, strides[0], [1, 1, block, made.widths[0]])
        out_tiles = kernels().TensorDescriptor(out, out.shape, strides[3], [1, 1, block, made.widths[1]])
    if made.tiles.descriptors:
        columns = made.tiles.columns
        key_tiles = kernels().TensorDescriptor(key, key.shape, strides[1], [1, 1, columns, made.widths[0]])
        value_tiles = kernels().TensorDescriptor(value, value.shape, strides[2], [1, 1, columns, made.widths[1]])
        if bias is not None:
            bias_tiles = bias_descriptor(bias, made.tiles, tiled)
            flags = query.new_empty(FLAGS, dtype=torch.int32)
            scratch = *scratch, flags
    together = items_together(made.plan.slanted, row_tiles * step, multiprocessors)
    arguments = (
        query, key, value, target, target_lse, query_tiles, key_tiles, value_tiles, out_tiles, bias_tiles, flags,
        bias, alibi_slopes, sinks, seed, pages, query_offset, tuple(operands),
        in_units(strides[0], unit), in_units(strides[1], unit), in_units(strides[2], unit),
        in_units(target_strides, unit), *features.strides, 0 if pages is None else pages.stride(0), numbers,
        grid_heads, group, q_length, k_length, head_dim, value_dim, row_tiles, together, chunk,
        scale * LOG2E if features.plain else scale, *features.numbers,
    )  # fmt: skip
    launches = [
        Launch(
            kernels().attention_forward, (programs, splits), arguments, made.constants, made.tiles.warps,
            made.tiles.stages, made.compiled if usual else None, dtypes_of(bias, alibi_slopes, sinks),
            splits > 1 and dependent_launches(arch),
        )
    ]  # fmt: skip
    if flags is not None:
        launches.insert(0, look_for_nonfinite(key, value, flags, 0, unit, made.compiled))
    if splits > 1:
        block = min(128, max(16, 1 << (value_dim - 1).bit_length()))
        several = min(64, 1 << (splits - 1).bit_length())
        launches.append(
            Launch(
                kernels().combine_splits, (rows_of_all, -(-value_dim // block)),
                (target, target_lse, out, lse, sinks, hidden(strides[3][:3]), rows_of_all, heads, q_length, value_dim,
                splits),
                (several, block, sinks is not None, splits <= several, dependent_launches(arch)), 4, 1, made.compiled,
                ("combine", several, splits <= several, dtypes_of(sinks)), dependent_launches(arch),
            )
        )  # fmt: skip
    # A bias, a table of pages or operands may have to do with the length.
    growing = pages is None and bias is None and not operands and step == 1
    work = Work(index, (out, lse), scratch, tuple(launches))
    if not growing:
        return work
    return work._replace(
        lengths=functools.partial(
            _lengths_like, code, q_length, k_length, reach, (programs, multiprocessors, rows > 0, rows_of_all)
        )
    )


def forward(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The results of `forward_work`, computed."""
    work = forward_work(*arguments, **options)
    work.run()
    out, lse = work.results
    return out, lse


# Of lengths that fit one piece of work so many are looked for.
_MOST_LENGTHS = 512


def _lengths_like(
    code: tuple[int, ...], q_length: int, k_length: int, reach: int, cut: tuple[int, int, bool, int]
) -> tuple[int, int] | None:
    """The lengths around one that keys are cut for in the same way."""
    programs, multiprocessors, few_rows, rows = cut

    def runs(length: int) -> tuple[object, ...]:
        return reach < length, key_runs(programs, multiprocessors, min(length, reach), few_rows, rows)

    low = high = k_length
    while low > 1 and k_length - low < _MOST_LENGTHS and runs(low - 1) == runs(k_length):
        low -= 1
    while high - k_length < _MOST_LENGTHS and runs(high + 1) == runs(k_length):
        high += 1
    alike = {attends_to_all(code, q_length, length) for length in (low, k_length, high)}
    return (low, high) if len(alike) == 1 else None
