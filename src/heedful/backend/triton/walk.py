"""The tiles that a tile of rows meets, one after another.

One loop goes over all of them, partial and full, with a branch around the mask alone: a loop begins with waiting for
its first loads. Partial tiles have a loop of their own only where nothing but the mask says what they may load.

Of a pattern that is one interval a row, tiles follow each other from the first key on. Unions and maps of blocks are
looked at 1024 tiles at a time: flags of all of them as vectors, folded into words of 32 bits, whose set bits are then
visited.
"""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors

import triton
import triton.language as tl

from heedful.backend.triton.schedule import (
    BLOCKS,
    MASK,
    STEP,
    TERM_LENGTH,
    core,
    extent,
    hull,
    hulls,
    shown,
    shown_strides,
)

# What is known of tiles where code for them is made: some of their pairs do not count, all do, or a flag says which.
PARTIAL = tl.constexpr(0)
WHOLE = tl.constexpr(1)
EITHER = tl.constexpr(2)

# Tiles of a union that are looked at together.
SPAN = tl.constexpr(1024)


@triton.jit
def in_turn(index, tiles, together):
    """The tile and the item of a program: item by item, but the last items, `together`, take turns tile by tile.

    Where the first tiles have the most to do, the last programs to begin are then short.
    """
    items = tl.num_programs(0) // tiles
    first = tl.maximum(items - together, 0)
    count = items - first
    late = index - first * tiles
    tile = tl.where(late >= 0, late // count, index % tiles)
    return tile, tl.where(late >= 0, first + late % count, index // tiles)


@triton.jit
def both_ends(tile, count):
    """Tiles in turn from the first and from the last: of unions, either may have by far the most to do."""
    return tl.where(tile % 2 == 0, tile // 2, count - 1 - tile // 2)


@triton.jit
def _block_tiles(
    CODE: tl.constexpr, AT: tl.constexpr, some, all, x_first, x_last, start, batch, head, operands, numbers,
    x_length, y_length, ROWS: tl.constexpr, TILE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Whether a map of blocks lets through any and every pair of tiles; without a look where blocks are tiny."""
    SIZE: tl.constexpr = CODE[AT + 1]
    HIGH: tl.constexpr = (ROWS - 2) // SIZE + 2
    WIDE: tl.constexpr = (TILE - 2) // SIZE + 2
    strides = shown_strides(numbers[CODE[AT + 2]])
    last = shown(numbers[CODE[AT + 2]][3])
    base = operands[CODE[AT + 2]] + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    if TRANSPOSED:
        stride_x = last
        stride_y = strides[2]
    else:
        stride_x = strides[2]
        stride_y = last
    if HIGH * WIDE > 64:
        all = all & (start < 0)
    else:
        found = start < 0
        every = start >= 0
        for down in tl.static_range(HIGH):
            row = x_first // SIZE + down
            row_there = row <= x_last // SIZE
            for along in tl.static_range(WIDE):
                column = start // SIZE + along
                there = row_there & (column <= (tl.minimum(start + TILE, y_length) - 1) // SIZE)
                place = base + row.to(tl.int64) * stride_x + column.to(tl.int64) * stride_y
                bit = tl.load(place, mask=there & some, other=0) != 0
                found = found | bit
                every = every & (bit | (there == 0))
        some = some & found
        all = all & every
    return some, all


@triton.jit
def _atom_tiles(
    CODE: tl.constexpr, ATOM: tl.constexpr, low, high, x, x_first, x_last, start, batch, head, operands, numbers,
    x_length, y_length, ROWS: tl.constexpr, TILE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    hull_low, hull_high = hull(low, high)
    core_low, core_high = core(low, high, x, x_length)
    some = (start < hull_high) & (start + TILE > hull_low)
    all = (start >= core_low) & (start + TILE <= core_high)
    BEGIN: tl.constexpr = CODE[1 + ATOM]
    STOP: tl.constexpr = CODE[2 + ATOM]
    for index in tl.static_range(BEGIN, STOP):
        if CODE[2 + CODE[0] + index * TERM_LENGTH] == BLOCKS:
            some, all = _block_tiles(
                CODE, 2 + CODE[0] + index * TERM_LENGTH, some, all, x_first, x_last, start, batch, head, operands,
                numbers, x_length, y_length, ROWS, TILE, TRANSPOSED,
            )  # fmt: skip
        elif CODE[2 + CODE[0] + index * TERM_LENGTH] == MASK or CODE[2 + CODE[0] + index * TERM_LENGTH] == STEP:
            all = all & (start < 0)
    return some, all


@triton.jit
def tile_flags(
    CODE: tl.constexpr, lows, highs, x, x_first, x_last, start, batch, head, operands, numbers, x_length, y_length,
    ROWS: tl.constexpr, TILE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which of the tiles that begin at `start` have a pair that counts, and which have no other.

    Only classes of one (no common step) have maps of blocks: there n is y.
    """
    some = start < 0
    all = start < 0
    COUNT: tl.constexpr = CODE[0]
    for atom in tl.static_range(COUNT):
        atom_some, atom_all = _atom_tiles(
            CODE, atom, lows[atom], highs[atom], x, x_first, x_last, start, batch, head, operands, numbers, x_length,
            y_length, ROWS, TILE, TRANSPOSED,
        )  # fmt: skip
        some = some | atom_some
        all = all | (atom_some & atom_all)
    return some, all


@triton.jit
def lowest_bit(word):
    """The place of the lowest bit of a word that has one, from the exponent of its value as a float."""
    bit = word & -word
    return ((bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127, word ^ bit


@triton.jit
def flag_words(flags):
    """1024 flags as 32 words."""
    return tl.sum(tl.reshape(flags.to(tl.int32), [32, 32]) << tl.arange(0, 32)[None, :], 1)


@triton.jit
def tile_words(flags):
    """1024 flags as 32 words, how many are set, and the word of which words are not 0."""
    words = flag_words(flags)
    return words, tl.sum(flags.to(tl.int32), 0), tl.sum((words != 0).to(tl.int32) << tl.arange(0, 32), 0)


@triton.jit
def next_flag(words, whole_words, cursor):
    """The next set flag's place and whether `whole_words` lack it.

    The cursor: the words to come, the word at hand, what is left of it, and that word of `whole_words`. One loop over
    all set flags, however few a word has, keeps loads under way from each tile to the next.
    """
    pending, which, rest, whole = cursor
    fresh = rest == 0
    following, remaining = lowest_bit(pending)
    here = tl.arange(0, 32) == following
    word = tl.sum(tl.where(here, words, 0), 0)
    whole = tl.where(fresh, tl.sum(tl.where(here, whole_words, 0), 0), whole)
    which = tl.where(fresh, following, which)
    pending = tl.where(fresh, remaining, pending)
    place, rest = lowest_bit(tl.where(fresh, word, rest))
    return which * 32 + place, ((whole >> place) & 1) == 0, (pending, which, rest, whole)


@triton.constexpr_function
def first_kind(intervals, solid, gapless, has_bias):
    """The kinds of tiles that have a loop of their own begin here and end with `last_kind`."""
    return EITHER.value if gapless and not has_bias and (solid or not intervals) else PARTIAL.value


@triton.constexpr_function
def last_kind(intervals, solid, gapless, has_bias):
    if has_bias or (intervals and not solid):
        return PARTIAL.value
    return EITHER.value if gapless else WHOLE.value


@triton.jit
def start_walk(
    CODE: tl.constexpr, lows, highs, x, x_first, x_last, operands, numbers, item, x_length, y_length, y_class, first,
    last, TRANSPOSED: tl.constexpr, CLASSES: tl.constexpr, INTERVALS: tl.constexpr, MONOTONE: tl.constexpr,
    SORTED: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The hull of what the rows x_first to x_last see, the tiles in it, and the spans of a union.

    The tiles of an interval: where the first begins, how many there are, how many of them before the first full one,
    and how many are full (none unless SORTED). Tiles begin at multiples of ALIGN.
    """
    if INTERVALS:
        low, high, core_low, core_high = extent(
            CODE, lows[0], highs[0], x, x_first, x_last, operands, numbers, item, x_length, y_length, y_class, first,
            last, TRANSPOSED, CLASSES, MONOTONE,
        )  # fmt: skip
        begin = low // ALIGN * ALIGN
        tiles = (high - begin + TILE - 1) // TILE
        left = tiles
        full = tiles * 0
        if SORTED:
            left = tl.minimum((tl.maximum(core_low - begin, 0) + TILE - 1) // TILE, tiles)
            full = tl.maximum(tl.minimum((core_high - begin) // TILE, tiles) - left, 0)
        return (low, high), (begin, tiles, left, full), 0, 1
    else:
        low, high = hulls(CODE, lows, highs)
        LENGTH: tl.constexpr = SPAN * TILE
        return (low, high), (low, low, low, low), low // LENGTH, (high + LENGTH - 1) // LENGTH


@triton.jit
def span_flags(
    CODE: tl.constexpr, span, lows, highs, x, x_first, x_last, batch, head, operands, numbers, x_length, y_length,
    ROWS: tl.constexpr, TILE: tl.constexpr, TRANSPOSED: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """Which tiles of a span of a union have a pair that counts, and which have no other."""
    if INTERVALS:
        return span, span
    else:
        start = (span * SPAN + tl.arange(0, SPAN)) * TILE
        return tile_flags(
            CODE, lows, highs, x, x_first, tl.minimum(x_last, x_length - 1), start, batch, head, operands, numbers,
            x_length, y_length, ROWS, TILE, TRANSPOSED,
        )  # fmt: skip


@triton.jit
def tiles_of_kind(tiles, some, all, KIND: tl.constexpr, LAST: tl.constexpr, INTERVALS: tl.constexpr):
    """How many tiles of a kind there are, the words of their flags, and where among them `next_tile` begins.

    LAST: the last of the kinds; where it is PARTIAL all tiles count as such.
    """
    if INTERVALS:
        _begin, count, _left, full = tiles
        if KIND == WHOLE:
            count = full
        elif KIND == PARTIAL:
            count = count - full
        return count, (count, count), (count, count, count, count)
    else:
        flags = some
        if KIND == WHOLE:
            flags = some & all
        elif LAST == WHOLE:
            flags = some & (all == 0)
        words, count, pending = tile_words(flags)
        zero = count * 0
        return count, (words, flag_words(all)), (pending, zero, zero, zero)


@triton.jit
def steps_of(count, dirty, CLEAN: tl.constexpr, FLAGS: tl.constexpr):
    """Of two loops over the same tiles, the one that takes out rows and the one that need not, one has none."""
    if FLAGS:
        return tl.where(dirty == (CLEAN == 1), count, 0)
    else:
        return count


@triton.jit
def next_tile(step, span, tiles, words, cursor, KIND: tl.constexpr, INTERVALS: tl.constexpr, TILE: tl.constexpr):
    """Where the next tile begins, whether it is partial, and the cursor after it."""
    if INTERVALS:
        begin, _count, left, full = tiles
        at = step
        if KIND == WHOLE:
            at = left + step
        elif KIND == PARTIAL:
            at = tl.where(step < left, step, step + full)
        return begin + at * TILE, (at < left) | (at >= left + full), cursor
    else:
        place, partial, cursor = next_flag(words[0], words[1], cursor)
        return (span * SPAN + place) * TILE, partial, cursor
