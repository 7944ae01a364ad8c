"""The forward kernel: one tile of queries against the keys that its schedule lets it see.

A program has BLOCK_M rows, each a query of one head (with PACK heads to a key head, all of them are rows of one tile).
It first expands the schedule to the interval of keys that each row sees (schedule.py). Where those are all there is, it
walks the masked tiles at both ends and then, in a second loop without masks, the full tiles between them. Unions and
maps of blocks are looked at 1024 tiles at a time: flags of all of them as vectors, folded into words of 32 bits, whose
set bits are then visited, masked tiles first. Either way no tile without a pair is loaded, and nothing is looked up
that was computed outside.

With SPLIT the second axis of the grid is runs of keys at fixed places, whose results combine.py merges.
"""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors
# ruff: noqa: SIM108

import triton
import triton.language as tl

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
from heedful.backend.triton.scores import LN2, LOG2E, dropout_keep, with_features


@triton.jit
def load_rows(
    base, offsets, there, columns, width, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """Rows at these offsets, some columns of them; zeros where there is nothing. WIDE: as float32."""
    place = base + offsets[:, None] + columns[None, :]
    if MASK_ROWS:
        if MASK_COLUMNS:
            rows = tl.load(place, mask=there[:, None] & (columns < width)[None, :], other=0.0)
        else:
            rows = tl.load(place, mask=there[:, None], other=0.0)
    elif MASK_COLUMNS:
        rows = tl.load(place, mask=(columns < width)[None, :], other=0.0)
    else:
        rows = tl.load(place)
    if WIDE:
        rows = rows.to(tl.float32)
    return rows


@triton.jit
def paged_rows(pages, y, there, stride, PAGE: tl.constexpr):
    """Offsets of keys in a pool of pages, `stride` being (block, row)."""
    block = tl.load(pages + y // PAGE, mask=there, other=0)
    return block.to(tl.int64) * stride[0] + (y % PAGE).to(tl.int64) * stride[1]


@triton.jit
def attend_tile(
    tile, state, query, rows, lows, highs, span, tensors, scalars,
    CODE: tl.constexpr, CLASSES: tl.constexpr, GAPLESS: tl.constexpr, MASKED: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, FOLD_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The running output, sums and maxima of a tile's rows, with the keys from n = `tile` on."""
    out0, out1, total, peak = state
    query0, query1 = query
    x, head, bias_rows, slope, place = rows
    (
        key, value, key_stride, value_stride, key_tiles, value_tiles, pages, page_stride, bias, bias_stride, seed,
        operands, numbers,
    ) = tensors  # fmt: skip
    batch, key_head, q_length, k_length, head_dim, value_dim, key_class, scale, softcap, threshold = scalars
    n = tile + tl.arange(0, BLOCK_N)
    y = n
    if CLASSES > 1:
        y = key_class + CLASSES * n
    keep = n < 0
    there = n < 0
    if MASKED:
        keep = tile_mask(CODE, lows, highs, x, y, n, batch, head, operands, numbers, q_length, k_length, False)
        there = seen(CODE, keep, lows, highs, span, n, GAPLESS)
    first = key_class + CLASSES * tile
    if PAGE:
        if not MASKED:
            there = n >= 0
        key_base = key
        value_base = value
        key_rows = paged_rows(pages, y, there, (page_stride[0], key_stride), PAGE)
        value_rows = paged_rows(pages, y, there, (page_stride[1], value_stride), PAGE)
    else:
        key_base = key + first.to(tl.int64) * key_stride
        value_base = value + first.to(tl.int64) * value_stride
        key_rows = tl.arange(0, BLOCK_N) * (CLASSES * key_stride)
        value_rows = tl.arange(0, BLOCK_N) * (CLASSES * value_stride)

    columns0 = tl.arange(0, D0)
    if DESCRIPTORS:
        keys = tl.reshape(key_tiles.load([batch, key_head, tile, 0]), [BLOCK_N, D0])
        if WIDE:
            keys = keys.to(tl.float32)
    else:
        keys = load_rows(key_base, key_rows, there, columns0, head_dim, MASKED, MASK_D and D1 == 0, WIDE)
    products = tl.dot(query0, tl.trans(keys), input_precision=PRECISION)
    if D1 > 0:
        columns1 = D0 + tl.arange(0, D1)
        keys = load_rows(key_base, key_rows, there, columns1, head_dim, MASKED, MASK_D, WIDE)
        products = tl.dot(query1, tl.trans(keys), products, input_precision=PRECISION)

    if HAS_SOFTCAP or HAS_BIAS or HAS_ALIBI:
        biases = products
        if HAS_BIAS:
            biases = bias + bias_rows[:, None] + (y.to(tl.int64) * bias_stride)[None, :]
        distance = tl.abs(place[:, None] - y[None, :]).to(tl.float32)
        scores, _bend, keep = with_features(
            products * scale, softcap, biases, slope[:, None], distance, keep, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI
        )
        if HAS_BIAS:
            there = tl.max(keep.to(tl.int32), 0) != 0
        scores *= LOG2E
    elif FOLD_SCALE:
        scores = products
    else:
        scores = products * scale
    if MASKED:
        scores = tl.where(keep, scores, float("-inf"))
    highest = tl.max(scores, 1)
    if FOLD_SCALE:
        # One multiply-add for each score on its way to the exponential.
        peak_now = tl.maximum(peak, highest * scale)
    else:
        peak_now = tl.maximum(peak, highest)
    shift = peak_now
    if MASKED:
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
    columns0 = tl.arange(0, V0)
    if DESCRIPTORS and not MASKED:
        values = tl.reshape(value_tiles.load([batch, key_head, tile, 0]), [BLOCK_N, V0])
        if WIDE:
            values = values.to(tl.float32)
    else:
        # Keys that nobody attends to may hold anything, NaN too.
        values = load_rows(value_base, value_rows, there, columns0, value_dim, MASKED, MASK_V and V1 == 0, WIDE)
    if WIDE:
        weights = weights.to(value.dtype.element_ty).to(tl.float32)
    else:
        weights = weights.to(values.dtype)
    out0 = tl.dot(weights, values, out0, input_precision=PRECISION)
    if V1 > 0:
        out1 = out1 * shrink[:, None]
        columns1 = V0 + tl.arange(0, V1)
        values = load_rows(value_base, value_rows, there, columns1, value_dim, MASKED, MASK_V, WIDE)
        out1 = tl.dot(weights, values, out1, input_precision=PRECISION)
    return out0, out1, total, peak_now


@triton.jit(
    do_not_specialize=[
        "operands", "query_strides", "key_strides", "value_strides", "out_strides", "bias_strides", "slope_strides",
        "offset_strides", "pages_stride", "numbers", "grid_heads", "group", "q_length", "k_length", "head_dim",
        "value_dim", "row_tiles", "chunk", "threshold",
    ],
    do_not_specialize_on_alignment=["operands", "slopes", "sinks", "seed", "pages", "query_offset"],
)  # fmt: skip
def attention_forward(
    query, key, value, out, lse, key_tiles, value_tiles, bias, slopes, sinks, seed, pages, query_offset, operands,
    query_strides, key_strides, value_strides, out_strides, bias_strides, slope_strides, offset_strides, pages_stride,
    numbers, grid_heads, group, q_length, k_length, head_dim, value_dim, row_tiles, chunk, scale, softcap, threshold,
    growth,
    CODE: tl.constexpr, CLASSES: tl.constexpr, INTERVALS: tl.constexpr, SOLID: tl.constexpr, MONOTONE: tl.constexpr,
    GAPLESS: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, MASK_D: tl.constexpr, MASK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, FOLD_SCALE: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Strides of query, key, value and out are in UNIT elements, so that their divisibility is known.

    scale is times log2(e) where FOLD_SCALE (scale > 0 and no features) or there are no features. growth is
    1 / (1 - dropout_p). With SPLIT, out is float32 and lse to base 2.
    """
    query_strides = shown_strides(query_strides)
    key_strides = shown_strides(key_strides)
    value_strides = shown_strides(value_strides)
    out_strides = shown_strides(out_strides)
    index = tl.program_id(0)
    split = tl.program_id(1)
    if INTERVALS:
        tile = index % (row_tiles * CLASSES)
        item = index // (row_tiles * CLASSES)
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
        last = first + chunk
    lows, highs = row_intervals(
        CODE, x, operands, numbers, batch, q_length, k_length, key_class, first, last, False, CLASSES
    )

    query_rows = (
        batch.to(tl.int64) * (query_strides[0] * UNIT)
        + head.to(tl.int64) * (query_strides[1] * UNIT)
        + x.to(tl.int64) * (query_strides[2] * UNIT)
    )
    query0 = load_rows(query, query_rows, there, tl.arange(0, D0), head_dim, True, MASK_D and D1 == 0, WIDE)
    query1 = query0
    if D1 > 0:
        query1 = load_rows(query, query_rows, there, D0 + tl.arange(0, D1), head_dim, True, MASK_D, WIDE)

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

    key_base = key + key_head.to(tl.int64) * (key_strides[1] * UNIT)
    value_base = value + key_head.to(tl.int64) * (value_strides[1] * UNIT)
    if PAGE:
        pages += batch * pages_stride
    else:
        key_base += batch.to(tl.int64) * (key_strides[0] * UNIT)
        value_base += batch.to(tl.int64) * (value_strides[0] * UNIT)
    tensors = (
        key_base, value_base, key_strides[2] * UNIT, value_strides[2] * UNIT, key_tiles, value_tiles, pages,
        (key_strides[0] * UNIT, value_strides[0] * UNIT), bias, bias_stride, drawn, operands, numbers,
    )  # fmt: skip
    scalars = (batch, key_head, q_length, k_length, head_dim, value_dim, key_class, scale, softcap, threshold)
    query_tile = (query0, query1)
    rows = (x, head, bias_rows, slope, place)

    out0 = tl.zeros([BLOCK_M, V0], tl.float32)
    out1 = tl.zeros([BLOCK_M, V1 if V1 > 0 else 16], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)

    if INTERVALS:
        low, high, core_low, core_high = extent(
            CODE, lows[0], highs[0], x, x_first, x_last, operands, numbers, batch, q_length, k_length, key_class,
            first, last, False, CLASSES, MONOTONE,
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
            out0, out1, total, peak = attend_tile(
                at, (out0, out1, total, peak), query_tile, rows, lows, highs, (low, high), tensors, scalars, CODE,
                CLASSES, GAPLESS,
                True, D0, D1, V0, V1, MASK_D, MASK_V, BLOCK_M, BLOCK_N, PAGE, HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI,
                HAS_DROPOUT, FOLD_SCALE, PRECISION, WIDE, DESCRIPTORS,
            )  # fmt: skip
        if SOLID and not HAS_BIAS:
            for step in tl.range(left, left + full, num_stages=STAGES):
                at = begin + step * BLOCK_N
                out0, out1, total, peak = attend_tile(
                    at, (out0, out1, total, peak), query_tile, rows, lows, highs, (low, high), tensors, scalars, CODE,
                    CLASSES,
                    GAPLESS, False, D0, D1, V0, V1, MASK_D, MASK_V, BLOCK_M, BLOCK_N, PAGE, HAS_SOFTCAP, HAS_BIAS,
                    HAS_ALIBI, HAS_DROPOUT, FOLD_SCALE, PRECISION, WIDE, DESCRIPTORS,
                )  # fmt: skip
    else:
        low, high = hulls(CODE, lows, highs)
        x_last = tl.minimum(x_last, q_length - 1)
        SPAN: tl.constexpr = 1024 * BLOCK_N
        for span in tl.range(low // SPAN, (high + SPAN - 1) // SPAN, num_stages=1):
            start = span * SPAN + tl.arange(0, 1024) * BLOCK_N
            some, all = tile_flags(
                CODE, lows, highs, x, x_first, x_last, start, batch, grid_head, operands, numbers, q_length, k_length,
                BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            if HAS_BIAS:
                all = all & (start < 0)
            words, count, pending = tile_words(some & (all == 0))
            which = 0
            rest = 0
            for _ in tl.range(0, count, num_stages=STAGES):
                at, pending, which, rest = next_tile(words, pending, which, rest)
                out0, out1, total, peak = attend_tile(
                    (span * 1024 + at) * BLOCK_N, (out0, out1, total, peak), query_tile, rows, lows, highs, (low, high),
                    tensors, scalars, CODE, CLASSES, GAPLESS, True, D0, D1, V0, V1, MASK_D, MASK_V, BLOCK_M, BLOCK_N,
                    PAGE,
                    HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, FOLD_SCALE, PRECISION, WIDE, DESCRIPTORS,
                )  # fmt: skip
            words, count, pending = tile_words(some & all)
            which = 0
            rest = 0
            for _ in tl.range(0, count, num_stages=STAGES):
                at, pending, which, rest = next_tile(words, pending, which, rest)
                out0, out1, total, peak = attend_tile(
                    (span * 1024 + at) * BLOCK_N, (out0, out1, total, peak), query_tile, rows, lows, highs, (low, high),
                    tensors, scalars, CODE, CLASSES, GAPLESS, False, D0, D1, V0, V1, MASK_D, MASK_V, BLOCK_M, BLOCK_N,
                    PAGE,
                    HAS_SOFTCAP, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, FOLD_SCALE, PRECISION, WIDE, DESCRIPTORS,
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
    out_rows = (
        batch.to(tl.int64) * (out_strides[0] * UNIT)
        + head.to(tl.int64) * (out_strides[1] * UNIT)
        + x.to(tl.int64) * (out_strides[2] * UNIT)
    )
    if SPLIT:
        split_items = split.to(tl.int64) * (tl.num_programs(0) // (row_tiles * CLASSES)) * PACK
        lse_at += split_items * q_length
        out_rows += split_items * q_length * value_dim
    tl.store(lse + lse_at, lse_rows, mask=there)
    columns = tl.arange(0, V0)
    result = (out0 * share[:, None]).to(out.dtype.element_ty)
    tl.store(out + out_rows[:, None] + columns[None, :], result, mask=there[:, None] & (columns < value_dim)[None, :])
    if V1 > 0:
        columns = V0 + tl.arange(0, V1)
        result = (out1 * share[:, None]).to(out.dtype.element_ty)
        tl.store(
            out + out_rows[:, None] + columns[None, :], result, mask=there[:, None] & (columns < value_dim)[None, :]
        )
