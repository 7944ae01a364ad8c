"""The gradient of queries: weights are computed again from the log-sum-exp, over the tiles that the forward walks.

That of keys and values (key_gradient.py) is a kernel of its own, so that every sum has one order.
"""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors
# ruff: noqa: SIM102

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from heedful.backend.triton.loads import head_of, load_rows, load_tile, store_rows
from heedful.backend.triton.nonfinite import any_flag
from heedful.backend.triton.schedule import FAR, residue_class, row_intervals, seen, shown_strides, tile_mask
from heedful.backend.triton.scores import (
    LOG2E,
    dropout_keep,
    load_bias,
    rounded,
    row_features,
    tile_of_bias,
    with_features,
)
from heedful.backend.triton.walk import (
    EITHER,
    PARTIAL,
    WHOLE,
    both_ends,
    first_kind,
    in_turn,
    last_kind,
    next_tile,
    span_flags,
    start_walk,
    steps_of,
    tiles_of_kind,
)


@triton.jit
def _query_tile(
    tile, partial, state, query, grad, rows, lows, highs, hull, tensors, scalars,
    CODE: tl.constexpr, CLASSES: tl.constexpr, GAPLESS: tl.constexpr, KIND: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_WEIGHTS: tl.constexpr, WANT_SLOPES: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr, BIAS_TILES: tl.constexpr,
    BIAS_ROW: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Adds what the keys from n = `tile` on give to the gradient of a tile of queries; the rest as of `attend_tile`."""
    sum0, sum1, slope_sum = state
    query0, query1 = query
    grad0, grad1 = grad
    x, head, bias_rows, slope, place, lse, delta, statistics = rows
    (
        key, value, key_stride, value_stride, key_tiles, value_tiles, bias, bias_stride, bias_tiles, bias_at,
        grad_weights, seed, operands, numbers,
    ) = tensors  # fmt: skip
    batch, key_head, q_length, k_length, head_dim, value_dim, key_class, scale, softcap, threshold, growth = scalars
    n = tile + tl.arange(0, BLOCK_N)
    y = n
    if CLASSES > 1:
        y = key_class + CLASSES * n
    keep = n < 0
    if KIND == PARTIAL:
        keep = tile_mask(CODE, lows, highs, x, y, n, batch, head, operands, numbers, q_length, k_length, False)
    biases = keep
    if HAS_BIAS:
        biases = load_bias(
            bias, bias_rows, bias_stride, y, k_length, keep, bias_tiles,
            (bias_at[0], bias_at[1], bias_at[2], tile, bias_at[3]), BLOCK_M, BLOCK_N, BIAS_TILES, BIAS_ROW,
        )  # fmt: skip
        if KIND == PARTIAL:
            keep = keep & (biases != float("-inf"))
        elif CLEAN:
            # Rows beyond the last query have a bias of 0.
            keep = (biases != float("-inf")) & (x < q_length)[:, None]
            if partial:
                keep = keep & tile_mask(
                    CODE, lows, highs, x, y, n, batch, head, operands, numbers, q_length, k_length, False
                )
    there = n >= 0
    if CLEAN:
        there = tl.max(keep.to(tl.int32), 0) != 0
    elif KIND != WHOLE and not BIAS_TILES:
        there = seen(CODE, keep, lows, highs, hull, n, GAPLESS)
    first = key_class + CLASSES * tile
    key_base = key + first.to(tl.int64) * key_stride
    value_base = value + first.to(tl.int64) * value_stride
    key_rows = tl.arange(0, BLOCK_N) * (CLASSES * key_stride)
    value_rows = tl.arange(0, BLOCK_N) * (CLASSES * value_stride)
    keys0 = load_tile(
        key_tiles, batch, key_head, tile, key_base, key_rows, there, BLOCK_N, D0, head_dim, KIND != WHOLE,
        MASK_D and D1 == 0, WIDE, DESCRIPTORS,
    )  # fmt: skip
    if CLEAN:
        keys0 = tl.where(there[:, None], keys0, 0.0)
    products = tl.dot(query0, tl.trans(keys0), input_precision=PRECISION)
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        keys1 = load_rows(key_base, key_rows, there, columns, head_dim, KIND != WHOLE, MASK_D, WIDE)
        products = tl.dot(query1, tl.trans(keys1), products, input_precision=PRECISION)
    values = load_tile(
        value_tiles, batch, key_head, tile, value_base, value_rows, there, BLOCK_N, V0, value_dim, KIND != WHOLE,
        MASK_V and V1 == 0, WIDE, DESCRIPTORS,
    )  # fmt: skip
    arriving = tl.dot(grad0, tl.trans(values), input_precision=PRECISION)
    if V1 > 0:
        columns = V0 + tl.arange(0, V1)
        values = load_rows(value_base, value_rows, there, columns, value_dim, KIND != WHOLE, MASK_V, WIDE)
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
        scores, bend = with_features(
            scores, softcap, biases, slope[:, None], distance, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI,
            key.dtype.element_ty == tl.float32,
        )  # fmt: skip
        scores *= LOG2E
    weights = tl.exp2(scores - lse[:, None])
    if HAS_DROPOUT:
        kept = dropout_keep(seed, threshold, x, head, batch, first, y, BLOCK_M, BLOCK_N, CLASSES == 1)
        arriving = tl.where(kept, arriving * growth, 0.0)
    change = weights * (arriving - delta[:, None])
    if KIND == PARTIAL or CLEAN:
        change = tl.where(keep, change, 0.0)
    elif KIND == EITHER:
        if partial:
            mask = tile_mask(CODE, lows, highs, x, y, n, batch, head, operands, numbers, q_length, k_length, False)
            change = tl.where(mask, change, 0.0)
    if WANT_SLOPES:
        slope_sum -= tl.sum(change * distance, 1)
    if HAS_SOFTCAP:
        change *= 1 - bend * bend
    change = rounded(change, keys0, WIDE)
    sum0 = tl.dot(change, keys0, sum0, input_precision=PRECISION)
    if D1 > 0:
        sum1 = tl.dot(change, keys1, sum1, input_precision=PRECISION)
    return sum0, sum1, slope_sum


@triton.jit(
    do_not_specialize=[
        "operands", "query_strides", "key_strides", "value_strides", "grad_strides", "query_grad_strides",
        "bias_strides", "slope_strides", "offset_strides", "numbers", "heads", "group", "q_length", "k_length",
        "head_dim", "value_dim", "row_tiles", "together", "threshold",
    ],
    do_not_specialize_on_alignment=["operands", "slopes", "seed", "query_offset"],
)  # fmt: skip
def query_gradient(
    query, key, value, grad, grad_weights, lse, delta, grad_query, grad_slopes, bias, slopes, seed, query_offset,
    operands, key_tiles, value_tiles, bias_tiles, flags,
    query_strides, key_strides, value_strides, grad_strides, query_grad_strides, bias_strides, slope_strides,
    offset_strides, numbers, heads, group, q_length, k_length, head_dim, value_dim, row_tiles, together, scale,
    gradient_scale, softcap, threshold, growth,
    CODE: tl.constexpr, CLASSES: tl.constexpr, INTERVALS: tl.constexpr, SOLID: tl.constexpr, MONOTONE: tl.constexpr,
    GAPLESS: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    WANT_SLOPES: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    FLAGS: tl.constexpr, BIAS_ROW: tl.constexpr, DEPENDENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Arguments as of `attention_forward`; scale is times log2(e) where there are no features.

    DEPENDENT: the kernel after this one may begin while the last programs run.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    query_strides = shown_strides(query_strides)
    key_strides = shown_strides(key_strides)
    value_strides = shown_strides(value_strides)
    grad_strides = shown_strides(grad_strides)
    query_grad_strides = shown_strides(query_grad_strides)
    index = tl.program_id(0)
    if INTERVALS:
        tile, item = in_turn(index, row_tiles * CLASSES, together)
        x_first = (row_tiles - 1 - tile // CLASSES) * BLOCK_M
    else:
        items = tl.num_programs(0) // (row_tiles * CLASSES)
        tile = index // items
        item = index % items
        x_first = both_ends(tile // CLASSES, row_tiles) * BLOCK_M
    batch = item // heads
    head = item % heads
    key_head = head // group
    x = x_first + tl.arange(0, BLOCK_M)
    end = k_length - q_length
    key_class = 0
    if CLASSES > 1:
        x_class = tile % CLASSES
        x = x_class + CLASSES * x
        x_first = x_class + CLASSES * x_first
        key_class = residue_class(CODE, x_class, operands, numbers, batch, end, CLASSES, False)
    x_last = x_first + (BLOCK_M - 1) * CLASSES
    there = x < q_length
    lows, highs = row_intervals(
        CODE, x, operands, numbers, batch, q_length, k_length, key_class, 0, FAR, False, CLASSES
    )
    query_base = head_of(query, batch, head, query_strides, UNIT)
    grad_base = head_of(grad, batch, head, grad_strides, UNIT)
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
    bias_rows, bias_stride, slope, place = row_features(
        x, batch, head, there, end, slopes, query_offset, bias_strides, slope_strides, offset_strides, HAS_BIAS,
        HAS_ALIBI, HAS_OFFSET,
    )  # fmt: skip
    drawn = 0
    if HAS_DROPOUT:
        drawn = tl.load(seed)
    tensors = (
        head_of(key, batch, key_head, key_strides, UNIT), head_of(value, batch, key_head, value_strides, UNIT),
        key_strides[2] * UNIT, value_strides[2] * UNIT, key_tiles, value_tiles, bias, bias_stride, bias_tiles,
        tile_of_bias(batch, head, x_first, bias_strides), grad_weights, drawn, operands, numbers,
    )  # fmt: skip
    scalars = (batch, key_head, q_length, k_length, head_dim, value_dim, key_class, scale, softcap, threshold, growth)
    rows = (x, head + x * 0, bias_rows, slope, place, lse_rows, delta_rows, statistics)
    query_tile = (query0, query1)
    grad_tile = (grad0, grad1)
    sum0 = tl.zeros([BLOCK_M, D0], tl.float32)
    sum1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 16], tl.float32)
    slope_sum = tl.zeros([BLOCK_M], tl.float32)

    FIRST: tl.constexpr = first_kind(INTERVALS, SOLID, GAPLESS, HAS_BIAS and not FLAGS)
    LAST: tl.constexpr = last_kind(INTERVALS, SOLID, GAPLESS, HAS_BIAS and not FLAGS)
    hull, tiles, first_span, stop_span = start_walk(
        CODE, lows, highs, x, x_first, x_last, operands, numbers, batch, q_length, k_length, key_class, 0, FAR, False,
        CLASSES, INTERVALS, MONOTONE, LAST != PARTIAL, BLOCK_N if HAS_DROPOUT else 8 if FLAGS else 1, BLOCK_N,
    )  # fmt: skip
    dirty = any_flag(flags, FLAGS)
    for span in tl.range(first_span, stop_span, num_stages=1):
        some, all = span_flags(
            CODE, span, lows, highs, x, x_first, x_last, batch, head, operands, numbers, q_length, k_length, BLOCK_M,
            BLOCK_N, False, INTERVALS,
        )  # fmt: skip
        for KIND in tl.static_range(FIRST, LAST + 1):
            count, words, cursor = tiles_of_kind(tiles, some, all, KIND, LAST, INTERVALS)
            for CLEAN in tl.static_range(0, 2 if FLAGS else 1):
                for step in tl.range(0, steps_of(count, dirty, CLEAN, FLAGS), num_stages=STAGES):
                    at, partial, cursor = next_tile(step, span, tiles, words, cursor, KIND, INTERVALS, BLOCK_N)
                    sum0, sum1, slope_sum = _query_tile(
                        at, partial, (sum0, sum1, slope_sum), query_tile, grad_tile, rows, lows, highs, hull, tensors,
                        scalars, CODE, CLASSES, GAPLESS, KIND, D0, D1, V0, V1, MASK_D, MASK_V, BLOCK_M, BLOCK_N,
                        HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_WEIGHTS, WANT_SLOPES, PRECISION, WIDE,
                        DESCRIPTORS, FLAGS > 0, BIAS_ROW, CLEAN == 1,
                    )  # fmt: skip

    if WANT_SLOPES:
        tl.store(grad_slopes + statistics, slope_sum, mask=there)
    base = head_of(grad_query, batch, head, query_grad_strides, UNIT)
    at = x.to(tl.int64) * (query_grad_strides[2] * UNIT)
    store_rows(base, at, there, 0, D0, head_dim, sum0 * gradient_scale)
    if D1 > 0:
        store_rows(base, at, there, D0, D1, head_dim, sum1 * gradient_scale)
