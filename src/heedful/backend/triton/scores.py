"""From products of queries and keys to scores and weights inside a tile: softcap, bias, ALiBi, dropout."""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors

import triton
import triton.language as tl

from heedful.backend.triton.schedule import shown, shown_strides

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """To 1e-7, or with EXACT to a few units in the last place, also near 0, where 1 - 2 / (e^2x + 1) cancels.

    Triton has none of its own.
    """
    found = 1 - 2 / (tl.exp(2 * x) + 1)
    if EXACT:
        square = x * x
        series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        found = tl.where(tl.abs(x) < 0.25, series, found)
    return found


@triton.jit
def row_features(
    x, batch, head, there, end, slopes, query_offset, bias_strides, slope_strides, offset_strides,
    HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """Of queries x: offsets in the bias and its stride between keys, ALiBi's slopes, and places among the keys."""
    bias_rows = x.to(tl.int64)
    slope = x.to(tl.float32)
    place = x
    bias_stride = 0
    if HAS_BIAS:
        bias_stride = shown(bias_strides[3])
        strides = shown_strides(bias_strides)
        bias_rows = (
            batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]
        )  # fmt: skip
    if HAS_ALIBI:
        strides = shown_strides(slope_strides)
        at = batch * strides[0] + head * strides[1] + x * strides[2]
        slope = tl.load(slopes + at, mask=there, other=0.0).to(tl.float32)
        place = x + end
        if HAS_OFFSET:
            at = batch * shown(offset_strides[0]) + x * shown(offset_strides[1])
            place = x + tl.load(query_offset + at, mask=there, other=0)
    return bias_rows, bias_stride, slope, place


@triton.jit
def tile_of_bias(batch, head, x, bias_strides):
    """Where a tile of queries is in a bias that has one item or head for all of them where that stride is 0, and where
    their head begins."""
    strides = shown_strides(bias_strides)
    begin = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return tl.where(strides[0] == 0, 0, batch), tl.where(strides[1] == 0, 0, head), x, begin


@triton.jit
def load_bias(
    bias, rows, stride, y, k_length, keep, bias_tiles, at, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """The bias of a tile (queries, keys) as float32: by a descriptor what is there of it, by pointers where `keep`, or
    with ROW the same for all queries.

    at: the tile's batch item, head, first query and first key, and where the head begins. y: keys.
    """
    if ROW:
        place = bias + at[4] + y.to(tl.int64) * stride
        row = tl.load(place, mask=y < k_length, other=0).to(tl.float32)
        return tl.broadcast_to(row[None, :], [BLOCK_M, BLOCK_N])
    elif TILES:
        batch, head, x, first, _row = at
        return tl.reshape(bias_tiles.load([batch, head, x, first]), [BLOCK_M, BLOCK_N]).to(tl.float32)
    else:
        place = bias + rows[:, None] + (y.to(tl.int64) * stride)[None, :]
        return tl.load(place, mask=keep, other=0).to(tl.float32)


@triton.jit
def rounded(numbers, like, WIDE: tl.constexpr):
    """Numbers in the type of the other side of a product; in the interpreter that of bfloat16 is float32."""
    if WIDE:
        return numbers.to(tl.bfloat16).to(tl.float32)
    else:
        return numbers.to(like.dtype)


@triton.jit
def with_features(
    scores, softcap, bias, slope, distance, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Scaled products of a tile as scores, -inf where the bias is, and beside them tanh of the softcap.

    EXACT: inputs are float32. slope and distance broadcast to the tile, of queries and keys or of keys and queries.
    """
    bend = scores
    if HAS_SOFTCAP:
        bend = tanh(scores * (1 / softcap), EXACT)
        scores = softcap * bend
    if HAS_BIAS:
        # A product with a key that holds NaN does not count there.
        scores = tl.where(bias == float("-inf"), bias, scores + bias)
    if HAS_ALIBI:
        scores -= slope * distance
    return scores, bend


@triton.jit
def _kept(word, threshold):
    # Unsigned order by signed comparison: the caller subtracted 2^31 from the threshold.
    return (word ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _words(seed, column, i, head, batch):
    low = (column - column) + i * 0
    return tl.philox(seed, (column + low).to(tl.uint32), (i + low).to(tl.uint32), (head + low).to(tl.uint32),
                     (batch + low).to(tl.uint32))  # fmt: skip


@triton.jit
def dropout_keep(
    seed, threshold, i, head, batch, start, j, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr
):
    """Which weights of a tile (queries, keys) dropout keeps, as `heedful.dropout.keep_mask`.

    RUN: keys are start, start + 1, ... from a multiple of 64 on; one evaluation then serves four of them.
    """
    if RUN:
        quarter = tl.arange(0, COLUMNS // 4)
        word0, word1, word2, word3 = _words(seed, (start // 4 + quarter)[None, :], i[:, None], head[:, None], batch)
        kept = tl.join(
            tl.join(_kept(word0, threshold).to(tl.int8), _kept(word2, threshold).to(tl.int8)),
            tl.join(_kept(word1, threshold).to(tl.int8), _kept(word3, threshold).to(tl.int8)),
        )
        kept = tl.reshape(kept, [ROWS, COLUMNS // 64, 16, 2, 2])
        kept = tl.reshape(tl.permute(kept, [0, 1, 3, 4, 2]), [ROWS, COLUMNS])
        return kept != 0
    else:
        column = 16 * (j // 64) + j % 16
        word0, word1, word2, word3 = _words(seed, column[None, :], i[:, None], head[:, None], batch)
        which = (j // 16 % 4)[None, :]
        word = tl.where(which < 2, tl.where(which == 0, word0, word1), tl.where(which == 2, word2, word3))
        return _kept(word, threshold)
