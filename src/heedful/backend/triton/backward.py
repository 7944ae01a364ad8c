"""The gradients of queries, keys and values: weights are computed again from the log-sum-exp.

Two kernels, so that every sum has one order: one over tiles of queries as the forward, one over tiles of keys and the
transposed schedule, which adds up the query heads that share a key head in float32. Both walk the same tiles as the
forward does.
"""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors

import triton
import triton.language as tl

from heedful.backend.triton.forward import load_rows
from heedful.backend.triton.schedule import (
    FAR,
    both_ends,
    extent,
    hulls,
    next_tile,
    residue_class,
    row_intervals,
    seen,
    shown,
    shown_strides,
    tile_flags,
    tile_mask,
    tile_words,
)
from heedful.backend.triton.scores import LOG2E, dropout_keep, with_features

_STRIDES = ["operands", "query_strides", "key_strides", "value_strides", "grad_strides", "query_grad_strides",
            "key_grad_strides", "value_grad_strides", "bias_strides", "slope_strides", "offset_strides"]  # fmt: skip
_SIZES = ["numbers", "heads", "group", "q_length", "k_length", "head_dim", "value_dim", "row_tiles", "threshold"]
_UNALIGNED = ["operands", "slopes", "seed", "query_offset"]


@triton.jit(
    do_not_specialize=["out_strides", "grad_strides", "rows", "heads", "q_length", "value_dim"],
    do_not_specialize_on_alignment=["grad_lse"],
)
def row_delta(
    out, grad, grad_lse, delta, out_strides, grad_strides, rows, heads, q_length, value_dim,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """delta = Σ out·grad - grad_lse of each row, (B, H, Lq)."""
    out_strides = shown_strides(out_strides)
    grad_strides = shown_strides(grad_strides)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = row < rows
    i = row % q_length
    head = row // q_length % heads
    batch = row // q_length // heads
    columns = tl.arange(0, BLOCK_V)
    mask = there[:, None] & (columns < value_dim)[None, :]
    at = batch * out_strides[0] + head * out_strides[1] + i * out_strides[2]
    outs = tl.load(out + at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    at = batch * grad_strides[0] + head * grad_strides[1] + i * grad_strides[2]
    grads = tl.load(grad + at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    found = tl.sum(outs * grads, 1)
    if HAS_LSE:
        found -= tl.load(grad_lse + row, mask=there, other=0.0)
    tl.store(delta + row, found, mask=there)


@triton.jit
def _to_weights(scores, lse):
    return tl.exp2(scores - lse)


@triton.jit
def _rounded(numbers, like, WIDE: tl.constexpr):
    """Numbers in the type of the other side of a product; in the interpreter that of bfloat16 is float32."""
    if WIDE:
        return numbers.to(tl.bfloat16).to(tl.float32)
    else:
        return numbers.to(like.dtype)


@triton.jit
def _query_tile(
    tile, state, query, grad, rows, lows, highs, span, tensors, scalars,
    CODE: tl.constexpr, CLASSES: tl.constexpr, GAPLESS: tl.constexpr, MASKED: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_WEIGHTS: tl.constexpr, WANT_SLOPES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Adds what the keys from n = `tile` on give to the gradient of a tile of queries."""
    sum0, sum1, slope_sum = state
    query0, query1 = query
    grad0, grad1 = grad
    x, head, bias_rows, slope, place, lse, delta, statistics = rows
    key, value, key_stride, value_stride, bias, bias_stride, grad_weights, seed, operands, numbers = tensors
    batch, q_length, k_length, head_dim, value_dim, key_class, scale, softcap, threshold, growth = scalars
    n = tile + tl.arange(0, BLOCK_N)
    y = n
    if CLASSES > 1:
        y = key_class + CLASSES * n
    keep = n < 0
    there = n < 0
    if MASKED:
        keep = tile_mask(CODE, lows, highs, x, y, n, batch, head, operands, numbers, q_length, k_length, False)
    biases = keep
    if HAS_BIAS:
        biases = bias + bias_rows[:, None] + (y.to(tl.int64) * bias_stride)[None, :]
        keep = keep & (tl.load(biases, mask=keep, other=0).to(tl.float32) != float("-inf"))
    if MASKED:
        there = seen(CODE, keep, lows, highs, span, n, GAPLESS)
    first = key_class + CLASSES * tile
    key_base = key + first.to(tl.int64) * key_stride
    value_base = value + first.to(tl.int64) * value_stride
    key_rows = tl.arange(0, BLOCK_N) * (CLASSES * key_stride)
    value_rows = tl.arange(0, BLOCK_N) * (CLASSES * value_stride)
    columns0 = tl.arange(0, D0)
    columns1 = D0 + tl.arange(0, D1 if D1 > 0 else 16)
    keys0 = load_rows(key_base, key_rows, there, columns0, head_dim, MASKED, MASK_D and D1 == 0, WIDE)
    products = tl.dot(query0, tl.trans(keys0), input_precision=PRECISION)
    if D1 > 0:
        keys1 = load_rows(key_base, key_rows, there, columns1, head_dim, MASKED, MASK_D, WIDE)
        products = tl.dot(query1, tl.trans(keys1), products, input_precision=PRECISION)
    values = load_rows(value_base, value_rows, there, tl.arange(0, V0), value_dim, MASKED, MASK_V and V1 == 0, WIDE)
    arriving = tl.dot(grad0, tl.trans(values), input_precision=PRECISION)
    if V1 > 0:
        columns = V0 + tl.arange(0, V1)
        values = load_rows(value_base, value_rows, there, columns, value_dim, MASKED, MASK_V, WIDE)
        arriving = tl.dot(grad1, tl.trans(values), arriving, input_precision=PRECISION)
    if HAS_WEIGHTS:
        at = (statistics.to(tl.int64) * k_length)[:, None] + y[None, :]
        bounds = (x < q_length)[:, None] & (y < k_length)[None, :]
        arriving += tl.load(grad_weights + at, mask=bounds, other=0.0).to(tl.float32)
    scores = products * scale
    bend = scores
    distance = scores
    if HAS_SOFTCAP or HAS_BIAS or HAS_ALIBI:
        distance = tl.abs(place[:, None] - y[None, :]).to(tl.float32)
        scores, bend, keep = with_features(
            scores, softcap, biases, slope[:, None], distance, keep, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI
        )
        scores *= LOG2E
    weights = tl.exp2(scores - lse[:, None])
    if HAS_DROPOUT:
        kept = dropout_keep(seed, threshold, x, head, batch, first, y, BLOCK_M, BLOCK_N, CLASSES == 1)
        arriving = tl.where(kept, arriving * growth, 0.0)
    change = weights * (arriving - delta[:, None])
    if MASKED:
        change = tl.where(keep, change, 0.0)
    if WANT_SLOPES:
        slope_sum -= tl.sum(change * distance, 1)
    if HAS_SOFTCAP:
        change *= 1 - bend * bend
    change = _rounded(change, key, WIDE) if WIDE else change.to(keys0.dtype)
    sum0 = tl.dot(change, keys0, sum0, input_precision=PRECISION)
    if D1 > 0:
        sum1 = tl.dot(change, keys1, sum1, input_precision=PRECISION)
    return sum0, sum1, slope_sum


@triton.jit(do_not_specialize=_STRIDES + _SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def query_gradient(
    query, key, value, grad, grad_weights, lse, delta, grad_query, grad_slopes, bias, slopes, seed, query_offset,
    operands,
    query_strides, key_strides, value_strides, grad_strides, query_grad_strides, bias_strides, slope_strides,
    offset_strides, numbers, heads, group, q_length, k_length, head_dim, value_dim, row_tiles, scale, gradient_scale,
    softcap, threshold, growth,
    CODE: tl.constexpr, CLASSES: tl.constexpr, INTERVALS: tl.constexpr, SOLID: tl.constexpr, MONOTONE: tl.constexpr,
    GAPLESS: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    WANT_SLOPES: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Arguments as of `attention_forward`; scale is times log2(e) where there are no features."""
    query_strides = shown_strides(query_strides)
    key_strides = shown_strides(key_strides)
    value_strides = shown_strides(value_strides)
    grad_strides = shown_strides(grad_strides)
    query_grad_strides = shown_strides(query_grad_strides)
    index = tl.program_id(0)
    if INTERVALS:
        tile = index % (row_tiles * CLASSES)
        item = index // (row_tiles * CLASSES)
        x_first = (row_tiles - 1 - tile // CLASSES) * BLOCK_M
    else:
        items = tl.num_programs(0) // (row_tiles * CLASSES)
        tile = index // items
        item = index % items
        x_first = both_ends(tile // CLASSES, row_tiles) * BLOCK_M
    batch = item // heads
    head = item % heads
    row = x_first + tl.arange(0, BLOCK_M)
    end = k_length - q_length
    key_class = 0
    x = row
    if CLASSES > 1:
        x_class = tile % CLASSES
        x = x_class + CLASSES * row
        x_first = x_class + CLASSES * x_first
        key_class = residue_class(CODE, x_class, operands, numbers, batch, end, CLASSES, False)
    x_last = x_first + (BLOCK_M - 1) * CLASSES
    there = x < q_length
    lows, highs = row_intervals(
        CODE, x, operands, numbers, batch, q_length, k_length, key_class, 0, FAR, False, CLASSES
    )
    query_base = query + batch.to(tl.int64) * (query_strides[0] * UNIT) + head.to(tl.int64) * (query_strides[1] * UNIT)
    grad_base = grad + batch.to(tl.int64) * (grad_strides[0] * UNIT) + head.to(tl.int64) * (grad_strides[1] * UNIT)
    query_rows = x.to(tl.int64) * (query_strides[2] * UNIT)
    grad_rows = x.to(tl.int64) * (grad_strides[2] * UNIT)
    query0 = load_rows(query_base, query_rows, there, tl.arange(0, D0), head_dim, True, MASK_D and D1 == 0, WIDE)
    grad0 = load_rows(grad_base, grad_rows, there, tl.arange(0, V0), value_dim, True, MASK_V and V1 == 0, WIDE)
    query1 = query0
    grad1 = grad0
    if D1 > 0:
        query1 = load_rows(query_base, query_rows, there, D0 + tl.arange(0, D1), head_dim, True, MASK_D, WIDE)
    if V1 > 0:
        grad1 = load_rows(grad_base, grad_rows, there, V0 + tl.arange(0, V1), value_dim, True, MASK_V, WIDE)
    statistics = (batch.to(tl.int64) * heads + head) * q_length + x
    lse_rows = tl.load(lse + statistics, mask=there, other=float("inf")) * LOG2E
    lse_rows = tl.where(lse_rows == float("-inf"), float("inf"), lse_rows)
    delta_rows = tl.load(delta + statistics, mask=there, other=0.0)

    bias_rows = x.to(tl.int64)
    slope = x.to(tl.float32)
    place = x
    bias_stride = 0
    if HAS_BIAS:
        bias_stride = shown(bias_strides[3])
        bias_strides = shown_strides(bias_strides)
        bias_rows = (
            batch.to(tl.int64) * bias_strides[0]
            + head.to(tl.int64) * bias_strides[1]
            + x.to(tl.int64) * bias_strides[2]
        )
    if HAS_ALIBI:
        slope_strides = shown_strides(slope_strides)
        slope = tl.load(
            slopes + batch * slope_strides[0] + head * slope_strides[1] + x * slope_strides[2], mask=there, other=0.0
        ).to(tl.float32)
        place = x + end
        if HAS_OFFSET:
            place = x + tl.load(
                query_offset + batch * shown(offset_strides[0]) + x * shown(offset_strides[1]), mask=there, other=0
            )
    drawn = 0
    if HAS_DROPOUT:
        drawn = tl.load(seed)
    key_head = (head // group).to(tl.int64)
    key_base = key + batch.to(tl.int64) * (key_strides[0] * UNIT) + key_head * (key_strides[1] * UNIT)
    value_base = value + batch.to(tl.int64) * (value_strides[0] * UNIT) + key_head * (value_strides[1] * UNIT)
    tensors = (
        key_base, value_base, key_strides[2] * UNIT, value_strides[2] * UNIT, bias, bias_stride, grad_weights, drawn,
        operands, numbers,
    )  # fmt: skip
    scalars = (batch, q_length, k_length, head_dim, value_dim, key_class, scale, softcap, threshold, growth)
    rows = (x, head + x * 0, bias_rows, slope, place, lse_rows, delta_rows, statistics)
    query_tile = (query0, query1)
    grad_tile = (grad0, grad1)
    sum0 = tl.zeros([BLOCK_M, D0], tl.float32)
    sum1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 16], tl.float32)
    slope_sum = tl.zeros([BLOCK_M], tl.float32)

    if INTERVALS:
        low, high, core_low, core_high = extent(
            CODE, lows[0], highs[0], x, x_first, x_last, operands, numbers, batch, q_length, k_length, key_class, 0,
            FAR, False, CLASSES, MONOTONE,
        )  # fmt: skip
        begin = low
        if HAS_DROPOUT:
            begin = low // BLOCK_N * BLOCK_N
        tiles = (high - begin + BLOCK_N - 1) // BLOCK_N
        left = tiles
        full = 0
        if SOLID and not HAS_BIAS:
            left = tl.minimum((tl.maximum(core_low - begin, 0) + BLOCK_N - 1) // BLOCK_N, tiles)
            full = tl.maximum(tl.minimum((core_high - begin) // BLOCK_N, tiles) - left, 0)
        for step in tl.range(0, tiles - full, num_stages=STAGES):
            at = begin + tl.where(step < left, step, step + full) * BLOCK_N
            sum0, sum1, slope_sum = _query_tile(
                at, (sum0, sum1, slope_sum), query_tile, grad_tile, rows, lows, highs, (low, high), tensors, scalars,
                CODE, CLASSES,
                GAPLESS, True, D0, D1, V0, V1, MASK_D, MASK_V, BLOCK_M, BLOCK_N, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI,
                HAS_DROPOUT, HAS_WEIGHTS, WANT_SLOPES, PRECISION, WIDE,
            )  # fmt: skip
        if SOLID and not HAS_BIAS:
            for step in tl.range(left, left + full, num_stages=STAGES):
                sum0, sum1, slope_sum = _query_tile(
                    begin + step * BLOCK_N, (sum0, sum1, slope_sum), query_tile, grad_tile, rows, lows, highs, (low,
                    high), tensors,
                    scalars, CODE, CLASSES, GAPLESS, False, D0, D1, V0, V1, MASK_D, MASK_V, BLOCK_M, BLOCK_N,
                    HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_WEIGHTS, WANT_SLOPES, PRECISION, WIDE,
                )  # fmt: skip
    else:
        low, high = hulls(CODE, lows, highs)
        x_last = tl.minimum(x_last, q_length - 1)
        SPAN: tl.constexpr = 1024 * BLOCK_N
        for span in tl.range(low // SPAN, (high + SPAN - 1) // SPAN, num_stages=1):
            start = span * SPAN + tl.arange(0, 1024) * BLOCK_N
            some, all = tile_flags(
                CODE, lows, highs, x, x_first, x_last, start, batch, head, operands, numbers, q_length, k_length,
                BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            if HAS_BIAS:
                all = all & (start < 0)
            words, count, pending = tile_words(some & (all == 0))
            which = 0
            rest = 0
            for _ in tl.range(0, count, num_stages=STAGES):
                at, pending, which, rest = next_tile(words, pending, which, rest)
                sum0, sum1, slope_sum = _query_tile(
                    (span * 1024 + at) * BLOCK_N, (sum0, sum1, slope_sum), query_tile, grad_tile, rows, lows, highs,
                    (low, high), tensors, scalars, CODE, CLASSES, GAPLESS, True, D0, D1, V0, V1, MASK_D, MASK_V,
                    BLOCK_M, BLOCK_N,
                    HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_WEIGHTS, WANT_SLOPES, PRECISION, WIDE,
                )  # fmt: skip
            words, count, pending = tile_words(some & all)
            which = 0
            rest = 0
            for _ in tl.range(0, count, num_stages=STAGES):
                at, pending, which, rest = next_tile(words, pending, which, rest)
                sum0, sum1, slope_sum = _query_tile(
                    (span * 1024 + at) * BLOCK_N, (sum0, sum1, slope_sum), query_tile, grad_tile, rows, lows, highs,
                    (low, high), tensors, scalars, CODE, CLASSES, GAPLESS, False, D0, D1, V0, V1, MASK_D, MASK_V,
                    BLOCK_M, BLOCK_N,
                    HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_WEIGHTS, WANT_SLOPES, PRECISION, WIDE,
                )  # fmt: skip

    if WANT_SLOPES:
        tl.store(grad_slopes + statistics, slope_sum, mask=there)
    base = (
        grad_query
        + batch.to(tl.int64) * (query_grad_strides[0] * UNIT)
        + head.to(tl.int64) * (query_grad_strides[1] * UNIT)
    )
    at = x.to(tl.int64) * (query_grad_strides[2] * UNIT)
    columns = tl.arange(0, D0)
    result = (sum0 * gradient_scale).to(grad_query.dtype.element_ty)
    tl.store(base + at[:, None] + columns[None, :], result, mask=there[:, None] & (columns < head_dim)[None, :])
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        result = (sum1 * gradient_scale).to(grad_query.dtype.element_ty)
        tl.store(base + at[:, None] + columns[None, :], result, mask=there[:, None] & (columns < head_dim)[None, :])


@triton.jit
def _key_tile(
    tile, state, key, value, x, lows, highs, span, tensors, scalars,
    CODE: tl.constexpr, CLASSES: tl.constexpr, GAPLESS: tl.constexpr, MASKED: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Adds what the queries from m = `tile` on give to the gradients of a tile of keys (its rows) and values."""
    key_sum0, key_sum1, value_sum0, value_sum1 = state
    key0, key1 = key
    value0, value1 = value
    (
        query, grad, lse, delta, query_stride, grad_stride, bias, bias_strides, slopes, slope_strides, query_offset,
        offset_strides, grad_weights, seed, operands, numbers,
    ) = tensors  # fmt: skip
    (
        batch, head, statistics, key_first, q_length, k_length, head_dim, value_dim, query_class, scale, softcap,
        threshold, growth,
    ) = scalars  # fmt: skip
    n = tile + tl.arange(0, BLOCK_M)
    y = n
    if CLASSES > 1:
        y = query_class + CLASSES * n
    within = y < q_length
    keep = n < 0
    there = n < 0
    if MASKED:
        keep = tile_mask(CODE, lows, highs, x, y, n, batch, head + y * 0, operands, numbers, k_length, q_length, True)
    biases = keep
    if HAS_BIAS:
        biases = (
            bias
            + batch.to(tl.int64) * shown(bias_strides[0])
            + head.to(tl.int64) * shown(bias_strides[1])
            + (x.to(tl.int64) * shown(bias_strides[3]))[:, None]
            + (y.to(tl.int64) * shown(bias_strides[2]))[None, :]
        )
        keep = keep & (tl.load(biases, mask=keep, other=0).to(tl.float32) != float("-inf"))
    if MASKED:
        there = seen(CODE, keep, lows, highs, span, n, GAPLESS)
    first = query_class + CLASSES * tile
    query_base = query + first.to(tl.int64) * query_stride
    grad_base = grad + first.to(tl.int64) * grad_stride
    query_rows = tl.arange(0, BLOCK_M) * (CLASSES * query_stride)
    grad_rows = tl.arange(0, BLOCK_M) * (CLASSES * grad_stride)
    query0 = load_rows(query_base, query_rows, there, tl.arange(0, D0), head_dim, MASKED, MASK_D and D1 == 0, WIDE)
    products = tl.dot(key0, tl.trans(query0), input_precision=PRECISION)
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        query1 = load_rows(query_base, query_rows, there, columns, head_dim, MASKED, MASK_D, WIDE)
        products = tl.dot(key1, tl.trans(query1), products, input_precision=PRECISION)
    grad0 = load_rows(grad_base, grad_rows, there, tl.arange(0, V0), value_dim, MASKED, MASK_V and V1 == 0, WIDE)
    arriving = tl.dot(value0, tl.trans(grad0), input_precision=PRECISION)
    if V1 > 0:
        columns = V0 + tl.arange(0, V1)
        grad1 = load_rows(grad_base, grad_rows, there, columns, value_dim, MASKED, MASK_V, WIDE)
        arriving = tl.dot(value1, tl.trans(grad1), arriving, input_precision=PRECISION)
    if HAS_WEIGHTS:
        at = ((statistics + y).to(tl.int64) * k_length)[None, :] + x[:, None]
        bounds = within[None, :] & (x < k_length)[:, None]
        arriving += tl.load(grad_weights + at, mask=bounds, other=0.0).to(tl.float32)
    if MASKED:
        lse_columns = tl.load(lse + statistics + y, mask=within, other=float("inf")) * LOG2E
        lse_columns = tl.where(lse_columns == float("-inf"), float("inf"), lse_columns)
        delta_columns = tl.load(delta + statistics + y, mask=within, other=0.0)
    else:
        lse_columns = tl.load(lse + statistics + y) * LOG2E
        delta_columns = tl.load(delta + statistics + y)
    scores = products * scale
    bend = scores
    if HAS_SOFTCAP or HAS_BIAS or HAS_ALIBI:
        slope = tl.zeros([BLOCK_M], tl.float32)
        place = y + (k_length - q_length)
        if HAS_ALIBI:
            slope_strides = shown_strides(slope_strides)
            slope = tl.load(
                slopes + batch * slope_strides[0] + head * slope_strides[1] + y * slope_strides[2], mask=within,
                other=0.0,
            ).to(tl.float32)  # fmt: skip
            if HAS_OFFSET:
                place = y + tl.load(
                    query_offset + batch * shown(offset_strides[0]) + y * shown(offset_strides[1]), mask=within, other=0
                )
        distance = tl.abs(place[None, :] - x[:, None]).to(tl.float32)
        scores, bend, keep = with_features(
            scores, softcap, biases, slope[None, :], distance, keep, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI
        )
        scores *= LOG2E
    weights = tl.exp2(scores - lse_columns[None, :])
    if MASKED:
        weights = tl.where(keep, weights, 0.0)
    dropped = weights
    if HAS_DROPOUT:
        kept = dropout_keep(
            seed, threshold, y, head + y * 0, batch, key_first, x, BLOCK_M, BLOCK_N, CLASSES == 1 and BLOCK_N % 64 == 0
        )
        kept = tl.trans(kept.to(tl.int8)) != 0
        dropped = tl.where(kept, weights * growth, 0.0)
        arriving = tl.where(kept, arriving * growth, 0.0)
    dropped = _rounded(dropped, key, WIDE) if WIDE else dropped.to(grad0.dtype)
    value_sum0 = tl.dot(dropped, grad0, value_sum0, input_precision=PRECISION)
    if V1 > 0:
        value_sum1 = tl.dot(dropped, grad1, value_sum1, input_precision=PRECISION)
    change = weights * (arriving - delta_columns[None, :])
    if MASKED:
        change = tl.where(keep, change, 0.0)
    if HAS_SOFTCAP:
        change *= 1 - bend * bend
    change = _rounded(change, key, WIDE) if WIDE else change.to(query0.dtype)
    key_sum0 = tl.dot(change, query0, key_sum0, input_precision=PRECISION)
    if D1 > 0:
        key_sum1 = tl.dot(change, query1, key_sum1, input_precision=PRECISION)
    return key_sum0, key_sum1, value_sum0, value_sum1


@triton.jit(do_not_specialize=_STRIDES + _SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def key_value_gradients(
    query, key, value, grad, grad_weights, lse, delta, grad_key, grad_value, bias, slopes, seed, query_offset, operands,
    query_strides, key_strides, value_strides, grad_strides, key_grad_strides, value_grad_strides, bias_strides,
    slope_strides, offset_strides, numbers, heads, group, q_length, k_length, head_dim, value_dim, row_tiles, scale,
    gradient_scale, softcap, threshold, growth,
    CODE: tl.constexpr, CLASSES: tl.constexpr, INTERVALS: tl.constexpr, SOLID: tl.constexpr, MONOTONE: tl.constexpr,
    GAPLESS: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_N keys of one key head; row_tiles counts their tiles."""
    query_strides = shown_strides(query_strides)
    key_strides = shown_strides(key_strides)
    value_strides = shown_strides(value_strides)
    grad_strides = shown_strides(grad_strides)
    key_grad_strides = shown_strides(key_grad_strides)
    value_grad_strides = shown_strides(value_grad_strides)
    index = tl.program_id(0)
    kv_heads = heads // group
    if INTERVALS:
        # Causal keys that the most queries see begin first.
        tile = index % (row_tiles * CLASSES)
        item = index // (row_tiles * CLASSES)
        x_first = tile // CLASSES * BLOCK_N
    else:
        items = tl.num_programs(0) // (row_tiles * CLASSES)
        tile = index // items
        item = index % items
        x_first = both_ends(tile // CLASSES, row_tiles) * BLOCK_N
    batch = item // kv_heads
    key_head = item % kv_heads
    key_first = x_first
    row = x_first + tl.arange(0, BLOCK_N)
    query_class = 0
    x = row
    if CLASSES > 1:
        x_class = tile % CLASSES
        x = x_class + CLASSES * row
        x_first = x_class + CLASSES * x_first
        query_class = residue_class(CODE, x_class, operands, numbers, batch, k_length - q_length, CLASSES, True)
    x_last = x_first + (BLOCK_N - 1) * CLASSES
    there = x < k_length
    lows, highs = row_intervals(
        CODE, x, operands, numbers, batch, k_length, q_length, query_class, 0, FAR, True, CLASSES
    )
    key_base = key + batch.to(tl.int64) * (key_strides[0] * UNIT) + key_head.to(tl.int64) * (key_strides[1] * UNIT)
    value_base = (
        value + batch.to(tl.int64) * (value_strides[0] * UNIT) + key_head.to(tl.int64) * (value_strides[1] * UNIT)
    )
    key_rows = x.to(tl.int64) * (key_strides[2] * UNIT)
    value_rows = x.to(tl.int64) * (value_strides[2] * UNIT)
    key0 = load_rows(key_base, key_rows, there, tl.arange(0, D0), head_dim, True, MASK_D and D1 == 0, WIDE)
    value0 = load_rows(value_base, value_rows, there, tl.arange(0, V0), value_dim, True, MASK_V and V1 == 0, WIDE)
    key1 = key0
    value1 = value0
    if D1 > 0:
        key1 = load_rows(key_base, key_rows, there, D0 + tl.arange(0, D1), head_dim, True, MASK_D, WIDE)
    if V1 > 0:
        value1 = load_rows(value_base, value_rows, there, V0 + tl.arange(0, V1), value_dim, True, MASK_V, WIDE)
    drawn = 0
    if HAS_DROPOUT:
        drawn = tl.load(seed)
    key_tile = (key0, key1)
    value_tile = (value0, value1)
    key_sum0 = tl.zeros([BLOCK_N, D0], tl.float32)
    key_sum1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 16], tl.float32)
    value_sum0 = tl.zeros([BLOCK_N, V0], tl.float32)
    value_sum1 = tl.zeros([BLOCK_N, V1 if V1 > 0 else 16], tl.float32)

    for member in tl.range(0, group, num_stages=1):
        head = key_head * group + member
        query_base = (
            query + batch.to(tl.int64) * (query_strides[0] * UNIT) + head.to(tl.int64) * (query_strides[1] * UNIT)
        )
        grad_base = grad + batch.to(tl.int64) * (grad_strides[0] * UNIT) + head.to(tl.int64) * (grad_strides[1] * UNIT)
        tensors = (
            query_base, grad_base, lse, delta, query_strides[2] * UNIT, grad_strides[2] * UNIT, bias, bias_strides,
            slopes, slope_strides, query_offset, offset_strides, grad_weights, drawn, operands, numbers,
        )  # fmt: skip
        statistics = (batch.to(tl.int64) * heads + head) * q_length
        scalars = (
            batch, head, statistics, key_first, q_length, k_length, head_dim, value_dim, query_class,
            scale, softcap, threshold, growth,
        )  # fmt: skip
        if INTERVALS:
            low, high, core_low, core_high = extent(
                CODE, lows[0], highs[0], x, x_first, x_last, operands, numbers, batch, k_length, q_length,
                query_class, 0, FAR, True, CLASSES, MONOTONE,
            )  # fmt: skip
            tiles = (high - low + BLOCK_M - 1) // BLOCK_M
            left = tiles
            full = 0
            if SOLID and not HAS_BIAS:
                left = tl.minimum((tl.maximum(core_low - low, 0) + BLOCK_M - 1) // BLOCK_M, tiles)
                full = tl.maximum(tl.minimum((core_high - low) // BLOCK_M, tiles) - left, 0)
            for step in tl.range(0, tiles - full, num_stages=STAGES):
                at = low + tl.where(step < left, step, step + full) * BLOCK_M
                key_sum0, key_sum1, value_sum0, value_sum1 = _key_tile(
                    at, (key_sum0, key_sum1, value_sum0, value_sum1), key_tile, value_tile, x, lows, highs, (low,
                    high), tensors,
                    scalars, CODE, CLASSES, GAPLESS, True, D0, D1, V0, V1, MASK_D, MASK_V, BLOCK_M, BLOCK_N,
                    HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_OFFSET, HAS_WEIGHTS, PRECISION, WIDE,
                )  # fmt: skip
            if SOLID and not HAS_BIAS:
                for step in tl.range(left, left + full, num_stages=STAGES):
                    key_sum0, key_sum1, value_sum0, value_sum1 = _key_tile(
                        low + step * BLOCK_M, (key_sum0, key_sum1, value_sum0, value_sum1), key_tile, value_tile, x,
                        lows, highs, (low, high), tensors, scalars, CODE, CLASSES, GAPLESS, False, D0, D1, V0, V1,
                        MASK_D, MASK_V,
                        BLOCK_M, BLOCK_N, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_OFFSET, HAS_WEIGHTS,
                        PRECISION, WIDE,
                    )  # fmt: skip
        else:
            low, high = hulls(CODE, lows, highs)
            x_last = tl.minimum(x_last, k_length - 1)
            SPAN: tl.constexpr = 1024 * BLOCK_M
            for span in tl.range(low // SPAN, (high + SPAN - 1) // SPAN, num_stages=1):
                start = span * SPAN + tl.arange(0, 1024) * BLOCK_M
                some, all = tile_flags(
                    CODE, lows, highs, x, x_first, x_last, start, batch, head, operands, numbers, k_length, q_length,
                    BLOCK_N, BLOCK_M, True,
                )  # fmt: skip
                if HAS_BIAS:
                    all = all & (start < 0)
                words, count, pending = tile_words(some & (all == 0))
                which = 0
                rest = 0
                for _ in tl.range(0, count, num_stages=STAGES):
                    at, pending, which, rest = next_tile(words, pending, which, rest)
                    key_sum0, key_sum1, value_sum0, value_sum1 = _key_tile(
                        (span * 1024 + at) * BLOCK_M, (key_sum0, key_sum1, value_sum0, value_sum1), key_tile,
                        value_tile, x,
                        lows, highs, (low, high), tensors, scalars, CODE, CLASSES, GAPLESS, True, D0, D1, V0, V1,
                        MASK_D, MASK_V,
                        BLOCK_M, BLOCK_N, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_OFFSET, HAS_WEIGHTS,
                        PRECISION, WIDE,
                    )  # fmt: skip
                words, count, pending = tile_words(some & all)
                which = 0
                rest = 0
                for _ in tl.range(0, count, num_stages=STAGES):
                    at, pending, which, rest = next_tile(words, pending, which, rest)
                    key_sum0, key_sum1, value_sum0, value_sum1 = _key_tile(
                        (span * 1024 + at) * BLOCK_M, (key_sum0, key_sum1, value_sum0, value_sum1), key_tile,
                        value_tile, x,
                        lows, highs, (low, high), tensors, scalars, CODE, CLASSES, GAPLESS, False, D0, D1, V0, V1,
                        MASK_D, MASK_V,
                        BLOCK_M, BLOCK_N, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_OFFSET, HAS_WEIGHTS,
                        PRECISION, WIDE,
                    )  # fmt: skip

    base = (
        grad_key
        + batch.to(tl.int64) * (key_grad_strides[0] * UNIT)
        + key_head.to(tl.int64) * (key_grad_strides[1] * UNIT)
    )
    at = x.to(tl.int64) * (key_grad_strides[2] * UNIT)
    columns = tl.arange(0, D0)
    result = (key_sum0 * gradient_scale).to(grad_key.dtype.element_ty)
    tl.store(base + at[:, None] + columns[None, :], result, mask=there[:, None] & (columns < head_dim)[None, :])
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        result = (key_sum1 * gradient_scale).to(grad_key.dtype.element_ty)
        tl.store(base + at[:, None] + columns[None, :], result, mask=there[:, None] & (columns < head_dim)[None, :])
    base = (
        grad_value
        + batch.to(tl.int64) * (value_grad_strides[0] * UNIT)
        + key_head.to(tl.int64) * (value_grad_strides[1] * UNIT)
    )
    at = x.to(tl.int64) * (value_grad_strides[2] * UNIT)
    columns = tl.arange(0, V0)
    result = value_sum0.to(grad_value.dtype.element_ty)
    tl.store(base + at[:, None] + columns[None, :], result, mask=there[:, None] & (columns < value_dim)[None, :])
    if V1 > 0:
        columns = V0 + tl.arange(0, V1)
        result = value_sum1.to(grad_value.dtype.element_ty)
        tl.store(base + at[:, None] + columns[None, :], result, mask=there[:, None] & (columns < value_dim)[None, :])
