"""The backward from tensors to launches, as launch.py has the forward."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.backend.triton.bias import A_ROW, FLAGS, IN_NUMBERS, bias_descriptor, bias_form, look_for_nonfinite
from heedful.backend.triton.plan import Plan, attends_to_all, plan
from heedful.backend.triton.tuning import (
    Tiles,
    backward_tiles,
    biased_tiles,
    items_together,
    split_dim,
    takes_all,
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
from heedful.patterns.schedule import Schedule


class Backward(NamedTuple):
    """What the backward is compiled for."""

    plan: Plan
    query_tiles: Tiles
    key_tiles: Tiles
    query_constants: tuple[Any, ...]
    key_constants: tuple[Any, ...]
    widths: tuple[int, int]
    compiled: dict[Hashable, Any]


@functools.lru_cache(maxsize=4096)
def _backward(
    code: tuple[int, ...],
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    has: tuple[bool, ...],
    want_slopes: bool,
    unit: int,
    tf32: bool,
    plain: tuple[bool, bool, bool],
    tiled: int,
) -> Backward:
    made = plan(code)
    softcap, bias, alibi, dropout, _, _ = has
    d0, d1 = split_dim(head_dim, unit)
    v0, v1 = split_dim(value_dim, unit)
    dim = max(head_dim, value_dim)
    features = softcap or bias or dropout or alibi
    whole = not (d1 or v1) and made.step == 1 and unit == 8
    able = [bool(tiled if bias else plain[keys]) and whole for keys in (False, True)]
    over_queries, over_keys = (
        backward_tiles(
            arch,
            dtype,
            head_dim,
            value_dim,
            made.block,
            (features and not (able[keys] and takes_all(arch, dim))) or not made.gapless,
            keys,
        )
        for keys in (False, True)
    )
    if tiled and has == (False, True, False, False, False, has[5]) and not made.block:
        over_queries = biased_tiles("queries", arch, dim, over_queries)
        over_keys = biased_tiles("keys", arch, dim, over_keys)
    if dropout and over_queries.columns < 64:
        over_queries = over_queries._replace(columns=64)
    over_queries = over_queries._replace(descriptors=over_queries.descriptors and able[0])
    over_keys = over_keys._replace(descriptors=over_keys.descriptors and able[1])
    common = d0, d1, v0, v1, d0 + d1 != head_dim, v0 + v1 != value_dim
    last = unit, "tf32" if tf32 else "ieee", kernels().INTERPRETED and dtype == torch.bfloat16
    return Backward(
        made,
        over_queries,
        over_keys,
        (
            *made[:4],
            made.monotone[0],
            made.gapless and (over_queries.descriptors or not bias),
            *common,
            over_queries.rows,
            over_queries.columns,
            *has,
            want_slopes,
            *last,
            over_queries.descriptors,
            2 * FLAGS if over_queries.descriptors and bias else 0,
            over_queries.descriptors and tiled == A_ROW,
            dependent_launches(arch),
            over_queries.stages,
        ),
        (
            *made[:4],
            made.monotone[1],
            made.gapless and (over_keys.descriptors or not bias),
            *common,
            over_keys.rows,
            over_keys.columns,
            *has,
            *last,
            over_keys.descriptors,
            2 * FLAGS if over_keys.descriptors and bias else 0,
            over_keys.descriptors and tiled == A_ROW,
            plain[2],
            dependent_launches(arch),
            over_keys.stages,
        ),
        (d0, v0),
        {},
    )


def backward_work(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    schedule: Sequence[int],
    scale: float,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    bias_gradient: bool,
    slopes_gradient: bool,
    query_offset: Tensor | None = None,
) -> Work:
    """What computes the gradients of query, key and value, delta (B, H, Lq), that of the bias with its keys spelled
    out, and that of the slopes (B, H, Lq); the last two of shape (0,) where they are not asked for."""
    batch, heads, q_length, head_dim = query.shape
    kv_heads, k_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    query, key, value, grad_out, out = map(in_rows, (query, key, value, grad_out, out))
    grad_query, grad_key, grad_value = _gradient(query), _gradient(key), _gradient(value)
    delta = torch.empty_like(lse)
    grad_slopes = torch.empty_like(lse) if slopes_gradient else lse.new_empty(0)
    index = query.get_device()
    arch, multiprocessors = device_limits(index)
    code = tuple(schedule)
    numbers, _, usual = operand_numbers(operands)
    features = Features(bias, alibi_slopes, softcap, dropout_p, seed, query_offset)
    has = *features.present, grad_weights is not None
    tensors = query, key, value, grad_out, grad_query, grad_key, grad_value
    strides = [tensor.stride() for tensor in tensors]
    bits = 0
    for tensor_strides in (*strides, out.stride()):
        bits |= tensor_strides[0] | tensor_strides[1] | tensor_strides[2]
    unit = 1 if bits & 7 else 8
    pointers = 0 if bias is None else bias.data_ptr()
    for tensor in (query, key, value, grad_out, out):
        pointers |= tensor.data_ptr()
    usual = usual and not pointers & 15 and bits < INT32 // 2
    able = usual and query.element_size() == 2 and not any(0 in tensor_strides for tensor_strides in strides)
    statistics = usual and arch >= 90 and plan(code).step == 1 and batch * heads * (q_length + 3) < INT32
    plain = (
        able and attends_to_all(code, q_length, k_length),
        able and attends_to_all(code, k_length, q_length, True),
        statistics,
    )
    tiled = bias_form(bias, k_length) if able and bias is not None else IN_NUMBERS
    made = _backward(
        code, arch, query.dtype, head_dim, value_dim, has, slopes_gradient, unit, takes_tf32(query), plain, tiled
    )
    if grad_weights is not None:
        grad_weights = grad_weights.contiguous()
        usual = False
    compiled = made.compiled if usual else None
    kind = dtypes_of(bias, alibi_slopes)

    block_v = max(16, 1 << (value_dim - 1).bit_length())
    block_r = max(1, 2048 // block_v)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    scales = scale * LOG2E if features.plain else scale, scale
    units = [in_units(tensor_strides, unit) for tensor_strides in strides]
    given = query, key, value, grad_out, grad_weights, lse, delta
    extras = *features.tensors, tuple(operands)
    sizes = heads, heads // kv_heads, q_length, k_length, head_dim, value_dim
    step = made.plan.step
    delta_tiles = cdiv(q_length, block_r)
    query_tiles = cdiv(cdiv(q_length, step), made.query_tiles.rows)
    key_tiles = cdiv(cdiv(k_length, step), made.key_tiles.columns)
    scratch: tuple[Tensor, ...] = ()
    row_statistics: tuple[Tensor, ...] = lse, delta
    spaced = statistics and q_length % 4 != 0
    if spaced:
        # A descriptor reads from multiples of 16 bytes on. Number by number keys' gradients took 1.75 times as long.
        scratch = row_statistics = tuple(lse.new_empty(batch, heads, cdiv(q_length, 4) * 4) for _ in range(2))
    flags = None
    if bias is not None and (made.query_tiles.descriptors or made.key_tiles.descriptors):
        flags = query.new_empty(2 * FLAGS, dtype=torch.int32)
    launches = [
        Launch(
            kernels().row_delta, (delta_tiles * batch * heads, 1),
            (out, grad_out, lse, grad_lse, delta, *(row_statistics if spaced else (None, None)),
            in_units(out.stride(), unit), in_units(strides[3], unit), delta_tiles, heads, q_length, value_dim),
            (block_r, block_v, grad_lse is not None, spaced, unit), 4, 1, compiled,
            ("delta", grad_lse is not None, spaced),
        ),
        Launch(
            kernels().query_gradient, (query_tiles * step * batch * heads, 1),
            (*given, grad_query, grad_slopes, *extras,
            *_descriptors(made.query_tiles, made.query_tiles.columns, key, value, made.widths, bias, tiled), flags,
            *units[:5], *features.strides, numbers, *sizes, query_tiles,
            items_together(made.plan.slanted, query_tiles * step, multiprocessors), *scales, *features.numbers),
            made.query_constants, made.query_tiles.warps, made.query_tiles.stages, compiled, ("query", kind),
        ),
        Launch(
            kernels().key_value_gradients, (key_tiles * step * batch * kv_heads, 1),
            (*given, grad_key, grad_value, *extras,
            *_descriptors(made.key_tiles, made.key_tiles.rows, query, grad_out, made.widths, bias, tiled),
            *_flat_descriptors(made.key_tiles.rows if statistics else 0, *row_statistics), flags, *units[:4],
            *units[5:], *features.strides, numbers, *sizes,
            key_tiles, items_together(made.plan.slanted, key_tiles * step, multiprocessors),
            row_statistics[0].shape[2], *scales, *features.numbers),
            made.key_constants, made.key_tiles.warps, made.key_tiles.stages, compiled, ("key", kind),
            dependent_launches(arch),
        ),
    ]  # fmt: skip
    grad_bias = lse.new_empty(0)
    if bias_gradient and bias is not None:
        grad_bias = lse.new_empty((*bias.shape[:3], k_length))
        launches.append(
            _dense(grad_bias, query, key, value, grad_out, grad_weights, lse, delta, operands, code, scale, features)
        )
    if flags is not None:
        scratch = *scratch, flags
        launches[:0] = [
            look_for_nonfinite(key, value, flags, 0, unit, made.compiled),
            look_for_nonfinite(query, grad_out, flags, FLAGS, unit, made.compiled),
        ]
    return Work(index, (grad_query, grad_key, grad_value, delta, grad_bias, grad_slopes), scratch, tuple(launches))


def backward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    """The results of `backward_work`, computed."""
    work = backward_work(*arguments, **options)
    work.run()
    return work.results


def weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    schedule: Sequence[int],
    scale: float,
    *features: Any,
) -> Tensor:
    """The weights (B, H, Lq, Lk) after dropout, in the query's dtype; the rest of the arguments are a `Features`."""
    query, key = in_rows(query), in_rows(key)
    result = query.new_empty((*query.shape[:3], key.shape[2]))
    launch = _dense(
        result, query, key, None, None, None, lse, None, operands, tuple(schedule), scale, Features(*features)
    )
    Work(query.get_device(), (result,), (), (launch,)).run()
    return result


def sparse_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    schedule: Sequence[int],
    scale: float,
    *features: Any,
) -> tuple[Tensor, Tensor]:
    """Indices (4, n), in ascending order, and weights (n,) of the pairs that count."""
    dense = weights(query, key, lse, operands, schedule, scale, *features)
    q_length, k_length = dense.shape[2:]
    pairs = Schedule.decode(schedule).rows(0, q_length, q_length, k_length, operands).to(dense.device)
    bias = Features(*features).bias
    if bias is not None:
        pairs = pairs & (bias != -torch.inf)
    indices = pairs.expand(dense.shape).nonzero().T.contiguous()
    return indices, dense[tuple(indices)]


def _dense(
    result: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_out: Tensor | None,
    grad_weights: Tensor | None,
    lse: Tensor,
    delta: Tensor | None,
    operands: Sequence[Tensor],
    code: tuple[int, ...],
    scale: float,
    features: Features,
) -> Launch:
    """What fills weights, or with a delta the gradient of a bias."""
    batch, heads, q_length, head_dim = query.shape
    kv_heads, k_length = key.shape[1:3]
    gradient = value is not None
    value_dim = value.shape[3] if value is not None else 1
    numbers, _, _ = operand_numbers(operands)
    made = plan(code, False)
    rows, columns = (
        (16, 64) if max(head_dim, value_dim) > 128 else (64, 64) if query.dtype != torch.float32 else (32, 64)
    )
    strides = [hidden((0, 0, 0) if t is None else t.stride()[:3]) for t in (query, key, value, grad_out)]
    sums = result.shape[0] < batch, result.shape[1] < heads, result.shape[2] < q_length
    row_tiles, column_tiles = -(-q_length // rows), -(-k_length // columns)
    interpreted = kernels().INTERPRETED and query.dtype == torch.bfloat16
    return Launch(
        kernels().dense_tiles,
        (column_tiles * (1 if sums[2] else row_tiles) * result.shape[1] * result.shape[0], 1),
        (
            result, query, key, value, grad_out, grad_weights, lse, delta, *features.tensors, tuple(operands),
            (*strides, *features.strides), numbers,
            heads, heads // kv_heads, q_length, k_length, head_dim, value_dim, hidden(result.stride()[:3]),
            1 if sums[2] else row_tiles, column_tiles, result.shape[1], batch if sums[0] else 1,
            heads if sums[1] else 1, row_tiles if sums[2] else 1, scale, *features.numbers,
        ),
        (
            made.code, *split_dim(head_dim), *split_dim(value_dim), rows, columns, *features.present,
            grad_weights is not None, gradient, sums[2], "tf32" if takes_tf32(query) else "ieee", interpreted,
        ),
        8, 1, None, None,
    )  # fmt: skip


def _descriptors(
    tiles: Tiles, rows: int, first: Tensor, second: Tensor, widths: tuple[int, int], bias: Tensor | None, form: int
) -> tuple[Any, Any, Any]:
    """Of what a kernel's loop goes over, `rows` at a time, and of the bias; None where it takes pointers."""
    if not tiles.descriptors:
        return None, None, None
    make = kernels().TensorDescriptor
    return (
        make(first, first.shape, first.stride(), [1, 1, rows, widths[0]]),
        make(second, second.shape, second.stride(), [1, 1, rows, widths[1]]),
        None if bias is None else bias_descriptor(bias, tiles, form),
    )


def _flat_descriptors(rows: int, *tensors: Tensor) -> list[Any]:
    """Of numbers that each query has one of, `rows` at a time; None where that is 0."""
    if not rows:
        return [None] * len(tensors)
    return [kernels().TensorDescriptor(tensor, [tensor.numel()], [1], [rows]) for tensor in tensors]


def _gradient(of: Tensor) -> Tensor:
    """Dense, in (B, L, H, D) memory order where the tensor is."""
    batch, heads, length, dim = of.shape
    if of.stride(1) < of.stride(2):
        return of.new_empty(batch, length, heads, dim).transpose(1, 2)
    return of.new_empty(batch, heads, length, dim)
