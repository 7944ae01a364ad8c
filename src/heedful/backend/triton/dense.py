"""What has the size of the scores where a caller asks for it: the weights, and the gradient of a bias.

Both compute tiles of weights again from the log-sum-exp. Where a bias repeats along an axis, its gradient is a sum over
it, which one program takes in order.
"""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors

import triton
import triton.language as tl

from heedful.backend.triton.loads import head_of, load_rows
from heedful.backend.triton.schedule import FAR, hulls, row_intervals, shown_strides, tile_mask
from heedful.backend.triton.scores import LOG2E, dropout_keep, load_bias, row_features, with_features


@triton.jit
def _tile(
    batch, head, row, column, tensors, strides, scalars, operands, numbers,
    CODE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Weights after dropout of the tile at (row, column), or with GRADIENT the gradient of its scores."""
    query, key, value, grad, grad_weights, lse, delta, bias, slopes, seed, query_offset = tensors
    query_strides, key_strides, value_strides, grad_strides, bias_strides, slope_strides, offset_strides = strides
    heads, group, q_length, k_length, head_dim, value_dim, scale, softcap, threshold, growth = scalars
    query_strides = shown_strides(query_strides)
    key_strides = shown_strides(key_strides)
    value_strides = shown_strides(value_strides)
    grad_strides = shown_strides(grad_strides)
    x = row + tl.arange(0, BLOCK_M)
    y = column + tl.arange(0, BLOCK_N)
    there = x < q_length
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lows, highs = row_intervals(CODE, x, operands, numbers, batch, q_length, k_length, 0, 0, FAR, False, 1)
    low, high = hulls(CODE, lows, highs)
    if (low < column + BLOCK_N) & (high > column):
        keep = tile_mask(CODE, lows, highs, x, y, y, batch, head + x * 0, operands, numbers, q_length, k_length, False)
        key_head = head // group
        query_base = head_of(query, batch, head, query_strides, 1)
        query_rows = x.to(tl.int64) * query_strides[2]
        key_base = head_of(key, batch, key_head, key_strides, 1)
        key_rows = y.to(tl.int64) * key_strides[2]
        within = y < k_length
        columns = tl.arange(0, D0)
        queries = load_rows(query_base, query_rows, there, columns, head_dim, True, True, WIDE)
        keys = load_rows(key_base, key_rows, within, columns, head_dim, True, True, WIDE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if D1 > 0:
            columns = D0 + tl.arange(0, D1)
            queries = load_rows(query_base, query_rows, there, columns, head_dim, True, True, WIDE)
            keys = load_rows(key_base, key_rows, within, columns, head_dim, True, True, WIDE)
            scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        bias_rows, bias_stride, slope, place = row_features(
            x, batch, head, there, k_length - q_length, slopes, query_offset, bias_strides, slope_strides,
            offset_strides, HAS_BIAS, HAS_ALIBI, HAS_OFFSET,
        )  # fmt: skip
        biases = keep
        if HAS_BIAS:
            biases = load_bias(
                bias, bias_rows, bias_stride, y, k_length, keep, bias, (row, row, row, row, row), BLOCK_M, BLOCK_N,
                False, False,
            )  # fmt: skip
            keep = keep & (biases != float("-inf"))
        distance = tl.abs(place[:, None] - y[None, :]).to(tl.float32)
        scores, _bend = with_features(
            scores * scale, softcap, biases, slope[:, None], distance, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI,
            query.dtype.element_ty == tl.float32,
        )  # fmt: skip
        statistics = (batch.to(tl.int64) * heads + head) * q_length + x
        lse_rows = tl.load(lse + statistics, mask=there, other=float("inf"))
        lse_rows = tl.where(lse_rows == float("-inf"), float("inf"), lse_rows)
        weights = tl.where(keep, tl.exp2((scores - lse_rows[:, None]) * LOG2E), 0.0)
        kept = keep
        if HAS_DROPOUT:
            drawn = tl.load(seed)
            kept = dropout_keep(drawn, threshold, x, head + x * 0, batch, column, y, BLOCK_M, BLOCK_N, True)
        if GRADIENT:
            grad_base = head_of(grad, batch, head, grad_strides, 1)
            grad_rows = x.to(tl.int64) * grad_strides[2]
            value_base = head_of(value, batch, key_head, value_strides, 1)
            value_rows = y.to(tl.int64) * value_strides[2]
            columns = tl.arange(0, V0)
            grads = load_rows(grad_base, grad_rows, there, columns, value_dim, True, True, WIDE)
            values = load_rows(value_base, value_rows, within, columns, value_dim, True, True, WIDE)
            arriving = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            if V1 > 0:
                columns = V0 + tl.arange(0, V1)
                grads = load_rows(grad_base, grad_rows, there, columns, value_dim, True, True, WIDE)
                values = load_rows(value_base, value_rows, within, columns, value_dim, True, True, WIDE)
                arriving = tl.dot(grads, tl.trans(values), arriving, input_precision=PRECISION)
            if HAS_WEIGHTS:
                at = (statistics * k_length)[:, None] + y[None, :]
                arriving += tl.load(grad_weights + at, mask=keep, other=0.0).to(tl.float32)
            if HAS_DROPOUT:
                arriving = tl.where(kept, arriving * growth, 0.0)
            delta_rows = tl.load(delta + statistics, mask=there, other=0.0)
            result = tl.where(keep, weights * (arriving - delta_rows[:, None]), 0.0)
        elif HAS_DROPOUT:
            result = tl.where(kept, weights * growth, 0.0)
        else:
            result = weights
    return result


@triton.jit(
    do_not_specialize=["operands", "strides", "numbers", "heads", "group", "q_length", "k_length", "head_dim",
    "value_dim", "result_strides", "row_tiles", "column_tiles",
                       "result_heads", "items", "members", "row_steps", "threshold"],
    do_not_specialize_on_alignment=[
        "result", "query", "key", "value", "grad", "grad_weights", "lse", "delta", "bias", "slopes", "seed",
        "query_offset", "operands",
    ],
)  # fmt: skip
def dense_tiles(
    result, query, key, value, grad, grad_weights, lse, delta, bias, slopes, seed, query_offset, operands, strides,
    numbers,
    heads, group, q_length, k_length, head_dim, value_dim, result_strides, row_tiles, column_tiles, result_heads,
    items, members, row_steps, scale, softcap, threshold, growth,
    CODE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    SUM_ROWS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of the result (B or 1, H or 1, Lq or 1, Lk), the sum over `items` batch items, `members` heads and, with
    SUM_ROWS, `row_steps` tiles of rows."""
    result_strides = shown_strides(result_strides)
    index = tl.program_id(0)
    column_tile = index % column_tiles
    row_tile = index // column_tiles % row_tiles
    head = index // column_tiles // row_tiles % result_heads
    batch = index // column_tiles // row_tiles // result_heads
    column = column_tile * BLOCK_N
    tensors = (query, key, value, grad, grad_weights, lse, delta, bias, slopes, seed, query_offset)
    scalars = (heads, group, q_length, k_length, head_dim, value_dim, scale, softcap, threshold, growth)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for item in range(items):
        for member in range(members):
            for step in range(row_steps):
                total += _tile(
                    batch + item, head + member, (row_tile + step) * BLOCK_M, column, tensors, strides, scalars,
                    operands, numbers, CODE, D0, D1, V0, V1, BLOCK_M, BLOCK_N, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI,
                    HAS_DROPOUT, HAS_OFFSET, HAS_WEIGHTS, GRADIENT, PRECISION, WIDE,
                )  # fmt: skip
    base = result + batch.to(tl.int64) * result_strides[0] + head.to(tl.int64) * result_strides[1]
    y = column + tl.arange(0, BLOCK_N)
    if SUM_ROWS:
        tl.store(base + y, tl.sum(total, 0).to(result.dtype.element_ty), mask=y < k_length)
    else:
        x = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        at = (x.to(tl.int64) * result_strides[2])[:, None] + y[None, :]
        tl.store(base + at, total.to(result.dtype.element_ty), mask=(x < q_length)[:, None] & (y < k_length)[None, :])
