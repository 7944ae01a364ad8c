"""The forward kernel: one tile of queries against the keys that its schedule lets it see.

A program has BLOCK_M rows, each a query of one head (with PACK heads to a key head, all of them are rows of one tile).
It first expands the schedule to the interval of keys that each row sees (schedule.py) and then walks the tiles in it
(walk.py). No tile without a pair is loaded, and nothing is looked up that was computed outside.

With SPLIT the second axis of the grid is runs of keys, whose results combine.py merges.
"""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors
# ruff: noqa: SIM102, SIM108

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from heedful.backend.triton.loads import head_of, load_rows, load_tile, paged_rows, store_rows
from heedful.backend.triton.nonfinite import any_flag
from heedful.backend.triton.schedule import FAR, residue_class, row_intervals, seen, shown_strides, tile_mask
from heedful.backend.triton.scores import (
    LN2,
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
def attend_tile(
    tile, partial, state, query, rows, lows, highs, hull, tensors, scalars,
    CODE: tl.constexpr, CLASSES: tl.constexpr, GAPLESS: tl.constexpr, KIND: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, FOLD_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr, BIAS_TILES: tl.constexpr,
    BIAS_ROW: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """The running output, sums and maxima of a tile's rows, with the keys from n = `tile` on.

    partial: whether some of its pairs do not count, where KIND is EITHER. BIAS_TILES: the bias comes as a tile, or with
    BIAS_ROW as a row of one. CLEAN: values that no row attends to are taken out, since there are NaNs or infinities.
    """
    out0, out1, total, peak = state
    query0, query1 = query
    x, head, bias_rows, slope, place = rows
    (
        key, value, key_stride, value_stride, key_tiles, value_tiles, pages, page_stride, bias, bias_stride, bias_tiles,
        bias_at, seed, operands, numbers,
    ) = tensors  # fmt: skip
    batch, key_head, q_length, k_length, head_dim, value_dim, key_class, scale, softcap, threshold = scalars
    n = tile + tl.arange(0, BLOCK_N)
    y = n
    if CLASSES > 1:
        y = key_class + CLASSES * n
    keep = n < 0
    if KIND == PARTIAL:
        keep = tile_mask(CODE, lows, highs, x, y, n, batch, head, operands, numbers, q_length, k_length, False)
    there = n >= 0
    if KIND != WHOLE:
        there = seen(CODE, keep, lows, highs, hull, n, GAPLESS)
    first = key_class + CLASSES * tile
    if PAGE:
        key_base = key
        value_base = value
        key_rows = paged_rows(pages, y, there, (page_stride[0], key_stride), PAGE)
        value_rows = paged_rows(pages, y, there, (page_stride[1], value_stride), PAGE)
    else:
        key_base = key + first.to(tl.int64) * key_stride
        value_base = value + first.to(tl.int64) * value_stride
        key_rows = tl.arange(0, BLOCK_N) * (CLASSES * key_stride)
        value_rows = tl.arange(0, BLOCK_N) * (CLASSES * value_stride)

    keys = load_tile(
        key_tiles, batch, key_head, tile, key_base, key_rows, there, BLOCK_N, D0, head_dim, KIND != WHOLE,
        MASK_D and D1 == 0, WIDE, DESCRIPTORS,
    )  # fmt: skip
    products = tl.dot(query0, tl.trans(keys), input_precision=PRECISION)
    if D1 > 0:
        columns1 = D0 + tl.arange(0, D1)
        keys = load_rows(key_base, key_rows, there, columns1, head_dim, KIND != WHOLE, MASK_D, WIDE)
        products = tl.dot(query1, tl.trans(keys), products, input_precision=PRECISION)

    if HAS_SOFTCAP or HAS_BIAS or HAS_ALIBI:
        biases = products
        if HAS_BIAS:
            biases = load_bias(
                bias, bias_rows, bias_stride, y, k_length, keep, bias_tiles,
                (bias_at[0], bias_at[1], bias_at[2], tile, bias_at[3]), BLOCK_M, BLOCK_N, BIAS_TILES, BIAS_ROW,
            )  # fmt: skip
            if CLEAN:
                # Rows beyond the last query have a bias of 0.
                biases = tl.where((x < q_length)[:, None], biases, float("-inf"))
            if not BIAS_TILES:
                keep = keep & (biases != float("-inf"))
                there = tl.max(keep.to(tl.int32), 0) != 0
        distance = tl.abs(place[:, None] - y[None, :]).to(tl.float32)
        scores, _bend = with_features(
            products * scale, softcap, biases, slope[:, None], distance, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI,
            key.dtype.element_ty == tl.float32,
        )  # fmt: skip
        scores *= LOG2E
    elif FOLD_SCALE:
        scores = products
    else:
        scores = products * scale
    if KIND == PARTIAL:
        scores = tl.where(keep, scores, float("-inf"))
    elif KIND == EITHER:
        if partial:
            mask = tile_mask(CODE, lows, highs, x, y, n, batch, head, operands, numbers, q_length, k_length, False)
            scores = tl.where(mask, scores, float("-inf"))
    if CLEAN:
        there = tl.max(scores, 0) != float("-inf")
    highest = tl.max(scores, 1)
    if FOLD_SCALE:
        # One multiply-add for each score on its way to the exponential.
        peak_now = tl.maximum(peak, highest * scale)
    else:
        peak_now = tl.maximum(peak, highest)
    shift = tl.where(peak_now == float("-inf"), 0.0, peak_now)
    if FOLD_SCALE:
        weights = tl.exp2(scores * scale - shift[:, None])
    else:
        weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(peak - shift)
    total = total * shrink + tl.sum(weights, 1)
    if HAS_DROPOUT:
        kept = dropout_keep(seed, threshold, x, head, batch, first, y, BLOCK_M, BLOCK_N, CLASSES == 1)
        weights = tl.where(kept, weights, 0.0)
    out0 = out0 * shrink[:, None]
    # Keys that nobody attends to may hold anything, NaN too.
    values = load_tile(
        value_tiles, batch, key_head, tile, value_base, value_rows, there, BLOCK_N, V0, value_dim, KIND != WHOLE,
        MASK_V and V1 == 0, WIDE, DESCRIPTORS,
    )  # fmt: skip
    if CLEAN:
        values = tl.where(there[:, None], values, 0.0)
    weights = rounded(weights, values, WIDE)
    out0 = tl.dot(weights, values, out0, input_precision=PRECISION)
    if V1 > 0:
        out1 = out1 * shrink[:, None]
        columns1 = V0 + tl.arange(0, V1)
        values = load_rows(value_base, value_rows, there, columns1, value_dim, KIND != WHOLE, MASK_V, WIDE)
        out1 = tl.dot(weights, values, out1, input_precision=PRECISION)
    return out0, out1, total, peak_now


@triton.jit(
    do_not_specialize=[
        "operands", "query_strides", "key_strides", "value_strides", "out_strides", "bias_strides", "slope_strides",
        "offset_strides", "pages_stride", "numbers", "grid_heads", "group", "q_length", "k_length", "head_dim",
        "value_dim", "row_tiles", "together", "chunk", "threshold",
    ],
    do_not_specialize_on_alignment=["operands", "slopes", "sinks", "seed", "pages", "query_offset"],
)  # fmt: skip
def attention_forward(
    query, key, value, out, lse, query_tiles, key_tiles, value_tiles, out_tiles, bias_tiles, flags, bias, slopes, sinks,
    seed, pages, query_offset, operands,
    query_strides, key_strides, value_strides, out_strides, bias_strides, slope_strides, offset_strides, pages_stride,
    numbers, grid_heads, group, q_length, k_length, head_dim, value_dim, row_tiles, together, chunk, scale, softcap,
    threshold, growth,
    CODE: tl.constexpr, CLASSES: tl.constexpr, INTERVALS: tl.constexpr, SOLID: tl.constexpr, MONOTONE: tl.constexpr,
    GAPLESS: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    NARROW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, FOLD_SCALE: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROW_DESCRIPTORS: tl.constexpr, FLAGS: tl.constexpr, BIAS_ROW: tl.constexpr, DEPENDENT: tl.constexpr,
    RELOAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Strides of query, key, value and out are in UNIT elements, so that their divisibility is known.

    SPLIT: a program has a run of `chunk` keys only, from the first key on or, NARROW, from the first that some of its
    queries sees. Then out is float32 and lse to base 2. scale is times log2(e) where FOLD_SCALE (scale > 0
    and no features) or there are no features. growth is 1 / (1 - dropout_p). DEPENDENT: launched while kernels before
    it run. RELOAD: queries come with each tile of keys. FLAGS: a bias comes by descriptors, and so many flags say
    whether a key or value is no finite number.
    """
    query_strides = shown_strides(query_strides)
    key_strides = shown_strides(key_strides)
    value_strides = shown_strides(value_strides)
    out_strides = shown_strides(out_strides)
    index = tl.program_id(0)
    split = tl.program_id(1)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    if INTERVALS:
        if SPLIT:
            tile = index % (row_tiles * CLASSES)
            item = index // (row_tiles * CLASSES)
        else:
            tile, item = in_turn(index, row_tiles * CLASSES, together)
        # Causal rows with the most keys begin first.
        row_tile = row_tiles - 1 - tile // CLASSES
    else:
        items = tl.num_programs(0) // (row_tiles * CLASSES)
        tile = index // items
        item = index % items
        row_tile = both_ends(tile // CLASSES, row_tiles)
    batch = item // grid_heads
    grid_head = item % grid_heads
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    x_first = row_tile * BLOCK_M
    end = k_length - q_length
    key_class = 0
    x = row
    if CLASSES > 1:
        x_class = tile % CLASSES
        x = x_class + CLASSES * row
        x_first = x_class + CLASSES * x_first
        key_class = residue_class(CODE, x_class, operands, numbers, batch, end, CLASSES, False)
    if PACK > 1:
        x = row // PACK
        x_first = x_first // PACK
        head = grid_head * PACK + row % PACK
        key_head = grid_head
    else:
        head = grid_head + row * 0
        key_head = grid_head // group
    x_last = x_first + (BLOCK_M - 1) * CLASSES
    if PACK > 1:
        x_last = (row_tile * BLOCK_M + BLOCK_M - 1) // PACK
    there = x < q_length

    first = 0
    last = FAR
    if SPLIT:
        first = split * chunk
        if NARROW:
            lows, highs = row_intervals(
                CODE, x, operands, numbers, batch, q_length, k_length, key_class, 0, FAR, False, CLASSES
            )
            first += tl.min(tl.where(lows[0] < highs[0], lows[0], FAR), 0)
        last = first + chunk
    lows, highs = row_intervals(
        CODE, x, operands, numbers, batch, q_length, k_length, key_class, first, last, False, CLASSES
    )

    if PAGE:
        pages += batch * pages_stride
        key_base = key + key_head.to(tl.int64) * (key_strides[1] * UNIT)
        value_base = value + key_head.to(tl.int64) * (value_strides[1] * UNIT)
    else:
        key_base = head_of(key, batch, key_head, key_strides, UNIT)
        value_base = head_of(value, batch, key_head, value_strides, UNIT)
    FIRST: tl.constexpr = first_kind(INTERVALS, SOLID, GAPLESS, HAS_BIAS and not FLAGS)
    LAST: tl.constexpr = last_kind(INTERVALS, SOLID, GAPLESS, HAS_BIAS and not FLAGS)
    hull, tiles, first_span, stop_span = start_walk(
        CODE, lows, highs, x, x_first, x_last, operands, numbers, batch, q_length, k_length, key_class, first, last,
        False, CLASSES, INTERVALS, MONOTONE, LAST != PARTIAL,
        BLOCK_N if HAS_DROPOUT else 8 if FLAGS else 1, BLOCK_N,
    )  # fmt: skip
    query_rows = head_of(0, batch, head, query_strides, UNIT) + x.to(tl.int64) * (query_strides[2] * UNIT)
    query0 = load_tile(
        query_tiles, batch, grid_head, x_first, query, query_rows, there, BLOCK_M, D0, head_dim, True,
        MASK_D and D1 == 0, WIDE, ROW_DESCRIPTORS,
    )  # fmt: skip
    query1 = query0
    if D1 > 0:
        query1 = load_rows(query, query_rows, there, D0 + tl.arange(0, D1), head_dim, True, MASK_D, WIDE)

    bias_rows, bias_stride, slope, place = row_features(
        x, batch, head, there, end, slopes, query_offset, bias_strides, slope_strides, offset_strides, HAS_BIAS,
        HAS_ALIBI, HAS_OFFSET,
    )  # fmt: skip
    drawn = 0
    if HAS_DROPOUT:
        drawn = tl.load(seed)

    tensors = (
        key_base, value_base, key_strides[2] * UNIT, value_strides[2] * UNIT, key_tiles, value_tiles, pages,
        (key_strides[0] * UNIT, value_strides[0] * UNIT), bias, bias_stride, bias_tiles,
        tile_of_bias(batch, grid_head, x_first, bias_strides), drawn, operands, numbers,
    )  # fmt: skip
    scalars = (batch, key_head, q_length, k_length, head_dim, value_dim, key_class, scale, softcap, threshold)
    query_tile = (query0, query1)
    rows = (x, head, bias_rows, slope, place)

    out0 = tl.zeros([BLOCK_M, V0], tl.float32)
    out1 = tl.zeros([BLOCK_M, V1 if V1 > 0 else 16], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)

    dirty = any_flag(flags, FLAGS)
    for span in tl.range(first_span, stop_span, num_stages=1):
        some, all = span_flags(
            CODE, span, lows, highs, x, x_first, x_last, batch, grid_head, operands, numbers, q_length, k_length,
            BLOCK_M, BLOCK_N, False, INTERVALS,
        )  # fmt: skip
        for KIND in tl.static_range(FIRST, LAST + 1):
            count, words, cursor = tiles_of_kind(tiles, some, all, KIND, LAST, INTERVALS)
            for CLEAN in tl.static_range(0, 2 if FLAGS else 1):
                for step in tl.range(0, steps_of(count, dirty, CLEAN, FLAGS), num_stages=STAGES):
                    at, partial, cursor = next_tile(step, span, tiles, words, cursor, KIND, INTERVALS, BLOCK_N)
                    if RELOAD:
                        # An address that is the same each time, which the compiler must not see: before the loop, the
                        # first keys would be asked for only when the queries have come.
                        same = query + tl.minimum(at, 0) * 64
                        again = load_rows(same, query_rows, there, tl.arange(0, D0), head_dim, True, MASK_D, WIDE)
                        query_tile = (again, again)
                    out0, out1, total, peak = attend_tile(
                        at, partial, (out0, out1, total, peak), query_tile, rows, lows, highs, hull, tensors, scalars,
                        CODE, CLASSES, GAPLESS, KIND, D0, D1, V0, V1, MASK_D, MASK_V, BLOCK_M, BLOCK_N, PAGE,
                        HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, FOLD_SCALE, PRECISION, WIDE, DESCRIPTORS,
                        FLAGS > 0, BIAS_ROW, CLEAN == 1,
                    )  # fmt: skip

    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        joined = tl.maximum(peak, sink)
        joined = tl.where(joined == float("-inf"), 0.0, joined)
        shrink = tl.exp2(peak - joined)
        total = total * shrink + tl.exp2(sink - joined)
        out0 = out0 * shrink[:, None]
        out1 = out1 * shrink[:, None]
        peak = joined
    empty = total == 0.0
    share = growth / tl.where(empty, 1.0, total)
    lse_rows = peak + tl.log2(total)
    lse_rows = tl.where(empty, float("-inf"), lse_rows)
    if not SPLIT:
        lse_rows *= LN2
    lse_at = (batch.to(tl.int64) * (grid_heads * PACK) + head) * q_length + x
    out_rows = head_of(0, batch, head, out_strides, UNIT) + x.to(tl.int64) * (out_strides[2] * UNIT)
    if SPLIT:
        split_items = split.to(tl.int64) * (tl.num_programs(0) // (row_tiles * CLASSES)) * PACK
        lse_at += split_items * q_length
        out_rows += split_items * q_length * value_dim
    tl.store(lse + lse_at, lse_rows, mask=there)
    if ROW_DESCRIPTORS:
        result = (out0 * share[:, None]).to(out.dtype.element_ty)
        out_tiles.store([batch, grid_head, x_first, 0], tl.reshape(result, [1, 1, BLOCK_M, V0]))
    else:
        store_rows(out, out_rows, there, 0, V0, value_dim, out0 * share[:, None])
    if V1 > 0:
        store_rows(out, out_rows, there, V0, V1, value_dim, out1 * share[:, None])
