"""The gradients of keys and values: tiles of keys over the transposed schedule.

The query heads that share a key head are added up in float32, in their order.
"""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors
# ruff: noqa: SIM102

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

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
def _key_tile(
    tile, partial, state, key, value, x, lows, highs, hull, tensors, scalars,
    CODE: tl.constexpr, CLASSES: tl.constexpr, GAPLESS: tl.constexpr, KIND: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr, BIAS_TILES: tl.constexpr,
    BIAS_ROW: tl.constexpr, STATISTICS: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Adds what the queries from n = `tile` on give to the gradients of a tile of keys (its rows) and values.

    Arguments as of `attend_tile`; CLEAN is about queries and their gradients.
    """
    key_sum0, key_sum1, value_sum0, value_sum1 = state
    key0, key1 = key
    value0, value1 = value
    (
        query, grad, lse, delta, query_stride, grad_stride, query_tiles, grad_tiles, lse_tiles, delta_tiles, bias,
        bias_strides, bias_tiles, bias_at, slopes, slope_strides, query_offset, offset_strides, grad_weights, seed,
        operands, numbers,
    ) = tensors  # fmt: skip
    (
        batch, head, row, statistics, key_first, q_length, k_length, head_dim, value_dim, query_class, scale, softcap,
        threshold, growth,
    ) = scalars  # fmt: skip
    n = tile + tl.arange(0, BLOCK_M)
    y = n
    if CLASSES > 1:
        y = query_class + CLASSES * n
    heads = head + y * 0
    within = y < q_length
    keep = n < 0
    if KIND == PARTIAL:
        keep = tile_mask(CODE, lows, highs, x, y, n, batch, heads, operands, numbers, k_length, q_length, True)
    bias_columns, bias_stride, slope, place = row_features(
        y, batch, head, within, k_length - q_length, slopes, query_offset, bias_strides, slope_strides, offset_strides,
        HAS_BIAS, HAS_ALIBI, HAS_OFFSET,
    )  # fmt: skip
    biases = keep
    if HAS_BIAS:
        biases = tl.trans(load_bias(
            bias, bias_columns, bias_stride, x, k_length, tl.trans(keep) if KIND == PARTIAL else keep, bias_tiles,
            (bias_at[0], bias_at[1], tile, bias_at[2], bias_at[3]), BLOCK_M, BLOCK_N, BIAS_TILES, BIAS_ROW,
        ))  # fmt: skip
        if KIND == PARTIAL:
            keep = keep & (biases != float("-inf"))
        elif CLEAN:
            keep = (biases != float("-inf")) & (x < k_length)[:, None]
            if partial:
                keep = keep & tile_mask(
                    CODE, lows, highs, x, y, n, batch, heads, operands, numbers, k_length, q_length, True
                )
    there = n >= 0
    if CLEAN:
        there = tl.max(keep.to(tl.int32), 0) != 0
    elif KIND != WHOLE and not BIAS_TILES:
        there = seen(CODE, keep, lows, highs, hull, n, GAPLESS)
    first = query_class + CLASSES * tile
    query_base = query + first.to(tl.int64) * query_stride
    grad_base = grad + first.to(tl.int64) * grad_stride
    query_rows = tl.arange(0, BLOCK_M) * (CLASSES * query_stride)
    grad_rows = tl.arange(0, BLOCK_M) * (CLASSES * grad_stride)
    query0 = load_tile(
        query_tiles, batch, head, tile, query_base, query_rows, there, BLOCK_M, D0, head_dim, KIND != WHOLE,
        MASK_D and D1 == 0, WIDE, DESCRIPTORS,
    )  # fmt: skip
    if CLEAN:
        query0 = tl.where(there[:, None], query0, 0.0)
    products = tl.dot(key0, tl.trans(query0), input_precision=PRECISION)
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        query1 = load_rows(query_base, query_rows, there, columns, head_dim, KIND != WHOLE, MASK_D, WIDE)
        products = tl.dot(key1, tl.trans(query1), products, input_precision=PRECISION)
    grad0 = load_tile(
        grad_tiles, batch, head, tile, grad_base, grad_rows, there, BLOCK_M, V0, value_dim, KIND != WHOLE,
        MASK_V and V1 == 0, WIDE, DESCRIPTORS,
    )  # fmt: skip
    if CLEAN:
        grad0 = tl.where(there[:, None], grad0, 0.0)
    arriving = tl.dot(value0, tl.trans(grad0), input_precision=PRECISION)
    if V1 > 0:
        columns = V0 + tl.arange(0, V1)
        grad1 = load_rows(grad_base, grad_rows, there, columns, value_dim, KIND != WHOLE, MASK_V, WIDE)
        arriving = tl.dot(value1, tl.trans(grad1), arriving, input_precision=PRECISION)
    if HAS_WEIGHTS:
        at = ((row * q_length + y) * k_length)[None, :] + x[:, None]
        bounds = within[None, :] & (x < k_length)[:, None]
        arriving += tl.load(grad_weights + at, mask=bounds, other=0.0).to(tl.float32)
    if STATISTICS:
        # By pointers each thread would keep an address for every column that it has a score of. What lies beyond the
        # last query is masked with its scores.
        lse_columns = lse_tiles.load([(statistics + tile).to(tl.int32)])
        delta_columns = delta_tiles.load([(statistics + tile).to(tl.int32)])
    else:
        # One address and constant distances from it.
        at = CLASSES * tl.arange(0, BLOCK_M)
        lse_columns = tl.load(lse + (statistics + first) + at, mask=within, other=float("inf"))
        delta_columns = tl.load(delta + (statistics + first) + at, mask=within, other=0.0)
    lse_columns = tl.where(lse_columns == float("-inf"), float("inf"), lse_columns * LOG2E)
    scores = products * scale
    bend = scores
    if HAS_SOFTCAP or HAS_BIAS or HAS_ALIBI:
        distance = tl.abs(place[None, :] - x[:, None]).to(tl.float32)
        scores, bend = with_features(
            scores, softcap, biases, slope[None, :], distance, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI,
            query.dtype.element_ty == tl.float32,
        )  # fmt: skip
        scores *= LOG2E
    weights = tl.exp2(scores - lse_columns[None, :])
    dropped = weights
    if HAS_DROPOUT:
        kept = dropout_keep(
            seed, threshold, y, heads, batch, key_first, x, BLOCK_M, BLOCK_N, CLASSES == 1 and BLOCK_N % 64 == 0
        )
        kept = tl.trans(kept.to(tl.int8)) != 0
        dropped = tl.where(kept, weights * growth, 0.0)
        arriving = tl.where(kept, arriving * growth, 0.0)
    change = weights * (arriving - delta_columns[None, :])
    if KIND == PARTIAL or CLEAN:
        dropped = tl.where(keep, dropped, 0.0)
        change = tl.where(keep, change, 0.0)
    elif KIND == EITHER:
        if partial:
            mask = tile_mask(CODE, lows, highs, x, y, n, batch, heads, operands, numbers, k_length, q_length, True)
            dropped = tl.where(mask, dropped, 0.0)
            change = tl.where(mask, change, 0.0)
    dropped = rounded(dropped, key0, WIDE)
    value_sum0 = tl.dot(dropped, grad0, value_sum0, input_precision=PRECISION)
    if V1 > 0:
        value_sum1 = tl.dot(dropped, grad1, value_sum1, input_precision=PRECISION)
    if HAS_SOFTCAP:
        change *= 1 - bend * bend
    change = rounded(change, key0, WIDE)
    key_sum0 = tl.dot(change, query0, key_sum0, input_precision=PRECISION)
    if D1 > 0:
        key_sum1 = tl.dot(change, query1, key_sum1, input_precision=PRECISION)
    return key_sum0, key_sum1, value_sum0, value_sum1


@triton.jit(
    do_not_specialize=[
        "operands", "query_strides", "key_strides", "value_strides", "grad_strides", "key_grad_strides",
        "value_grad_strides", "bias_strides", "slope_strides", "offset_strides", "numbers", "heads", "group",
        "q_length", "k_length", "head_dim", "value_dim", "row_tiles", "together", "spacing", "threshold",
    ],
    do_not_specialize_on_alignment=["operands", "slopes", "seed", "query_offset"],
)  # fmt: skip
def key_value_gradients(
    query, key, value, grad, grad_weights, lse, delta, grad_key, grad_value, bias, slopes, seed, query_offset, operands,
    query_tiles, grad_tiles, bias_tiles, lse_tiles, delta_tiles, flags,
    query_strides, key_strides, value_strides, grad_strides, key_grad_strides, value_grad_strides, bias_strides,
    slope_strides, offset_strides, numbers, heads, group, q_length, k_length, head_dim, value_dim, row_tiles, together,
    spacing, scale, gradient_scale, softcap, threshold, growth,
    CODE: tl.constexpr, CLASSES: tl.constexpr, INTERVALS: tl.constexpr, SOLID: tl.constexpr, MONOTONE: tl.constexpr,
    GAPLESS: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    FLAGS: tl.constexpr, BIAS_ROW: tl.constexpr, STATISTICS: tl.constexpr, DEPENDENT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_N keys of one key head; row_tiles counts their tiles.

    STATISTICS: log-sum-exps and deltas come by descriptors, in which heads are a multiple of 4 numbers apart, the
    spacing. DEPENDENT: launched while the gradient of queries is computed, which is no input; but what comes after this
    kernel has to find both.
    """
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
        tile, item = in_turn(index, row_tiles * CLASSES, together)
        x_first = tile // CLASSES * BLOCK_N
    else:
        items = tl.num_programs(0) // (row_tiles * CLASSES)
        tile = index // items
        item = index % items
        x_first = both_ends(tile // CLASSES, row_tiles) * BLOCK_N
    batch = item // kv_heads
    key_head = item % kv_heads
    key_first = x_first
    x = x_first + tl.arange(0, BLOCK_N)
    query_class = 0
    if CLASSES > 1:
        x_class = tile % CLASSES
        x = x_class + CLASSES * x
        x_first = x_class + CLASSES * x_first
        query_class = residue_class(CODE, x_class, operands, numbers, batch, k_length - q_length, CLASSES, True)
    x_last = x_first + (BLOCK_N - 1) * CLASSES
    there = x < k_length
    lows, highs = row_intervals(
        CODE, x, operands, numbers, batch, k_length, q_length, query_class, 0, FAR, True, CLASSES
    )
    key_base = head_of(key, batch, key_head, key_strides, UNIT)
    value_base = head_of(value, batch, key_head, value_strides, UNIT)
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

    FIRST: tl.constexpr = first_kind(INTERVALS, SOLID, GAPLESS, HAS_BIAS and not FLAGS)
    LAST: tl.constexpr = last_kind(INTERVALS, SOLID, GAPLESS, HAS_BIAS and not FLAGS)
    hull, tiles, first_span, stop_span = start_walk(
        CODE, lows, highs, x, x_first, x_last, operands, numbers, batch, k_length, q_length, query_class, 0, FAR, True,
        CLASSES, INTERVALS, MONOTONE, LAST != PARTIAL, 4 if STATISTICS else 1, BLOCK_M,
    )  # fmt: skip
    dirty = any_flag(flags, FLAGS)
    for member in tl.range(0, group, num_stages=1):
        head = key_head * group + member
        row = batch.to(tl.int64) * heads + head
        tensors = (
            head_of(query, batch, head, query_strides, UNIT), head_of(grad, batch, head, grad_strides, UNIT), lse,
            delta, query_strides[2] * UNIT, grad_strides[2] * UNIT, query_tiles, grad_tiles, lse_tiles, delta_tiles,
            bias, bias_strides, bias_tiles, tile_of_bias(batch, head, x_first, bias_strides), slopes, slope_strides,
            query_offset, offset_strides, grad_weights, drawn, operands, numbers,
        )  # fmt: skip
        statistics = row * spacing
        scalars = (
            batch, head, row, statistics, key_first, q_length, k_length, head_dim, value_dim, query_class,
            scale, softcap, threshold, growth,
        )  # fmt: skip
        for span in tl.range(first_span, stop_span, num_stages=1):
            some, all = span_flags(
                CODE, span, lows, highs, x, x_first, x_last, batch, head, operands, numbers, k_length, q_length,
                BLOCK_N, BLOCK_M, True, INTERVALS,
            )  # fmt: skip
            for KIND in tl.static_range(FIRST, LAST + 1):
                count, words, cursor = tiles_of_kind(tiles, some, all, KIND, LAST, INTERVALS)
                for CLEAN in tl.static_range(0, 2 if FLAGS else 1):
                    for step in tl.range(0, steps_of(count, dirty, CLEAN, FLAGS), num_stages=STAGES):
                        at, partial, cursor = next_tile(step, span, tiles, words, cursor, KIND, INTERVALS, BLOCK_M)
                        key_sum0, key_sum1, value_sum0, value_sum1 = _key_tile(
                            at, partial, (key_sum0, key_sum1, value_sum0, value_sum1), key_tile, value_tile, x, lows,
                            highs, hull, tensors, scalars, CODE, CLASSES, GAPLESS, KIND, D0, D1, V0, V1, MASK_D, MASK_V,
                            BLOCK_M, BLOCK_N, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_OFFSET, HAS_WEIGHTS,
                            PRECISION, WIDE, DESCRIPTORS, FLAGS > 0, BIAS_ROW, STATISTICS, CLEAN == 1,
                        )  # fmt: skip

    base = head_of(grad_key, batch, key_head, key_grad_strides, UNIT)
    at = x.to(tl.int64) * (key_grad_strides[2] * UNIT)
    store_rows(base, at, there, 0, D0, head_dim, key_sum0 * gradient_scale)
    if D1 > 0:
        store_rows(base, at, there, D0, D1, head_dim, key_sum1 * gradient_scale)
    base = head_of(grad_value, batch, key_head, value_grad_strides, UNIT)
    at = x.to(tl.int64) * (value_grad_strides[2] * UNIT)
    store_rows(base, at, there, 0, V0, value_dim, value_sum0)
    if V1 > 0:
        store_rows(base, at, there, V0, V1, value_dim, value_sum1)
    if DEPENDENT:
        gdc_wait()
