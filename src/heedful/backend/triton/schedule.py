"""Schedules inside a kernel: atoms expanded to intervals, tiles and masks, nothing of which leaves the chip.

Without its filters (maps of blocks, masks) an atom lets each query see an interval of keys, and by the same token each
key be seen by an interval of queries. So everything here works on `x`, the rows of a tile, and `y`, what they meet:
queries and keys in the forward and in the gradient of the queries, keys and queries (`TRANSPOSED`) in that of keys and
values. Documents, chunks, offsets and lengths of their own for each batch item all end in two vectors of a row's first
and last y. Outside their hull a tile is empty, inside their intersection it is full, in between it is masked.

Where the diagonals of all atoms share a step, x = XC + STEP·m and y = YC + STEP·n in one class of it, and everything
below speaks of n: strided sub-problems that are dense.
"""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108, SIM109

import triton
import triton.language as tl

from heedful.backend.triton import plan as constants
from heedful.patterns import schedule as terms

BOUND = tl.constexpr(terms.BOUND)
STEP = tl.constexpr(terms.STEP)
CHUNK = tl.constexpr(terms.CHUNK)
DOCUMENTS = tl.constexpr(terms.DOCUMENTS)
BLOCKS = tl.constexpr(terms.BLOCKS)
MASK = tl.constexpr(terms.MASK)
QUERY = tl.constexpr(terms.QUERY)
DIAGONAL = tl.constexpr(terms.DIAGONAL)
LOWER = tl.constexpr(terms.LOWER)
NONE = tl.constexpr(terms.NONE)
END = tl.constexpr(terms.END)
TERM_LENGTH = tl.constexpr(constants.TERM_LENGTH)
FAR = tl.constexpr(constants.FAR)


@triton.jit
def shown(number):
    """An integer that `launch.hidden` hid in a tuple."""
    return (number - 3) >> 1


@triton.jit
def shown_strides(strides):
    """Three of them."""
    return shown(strides[0]), shown(strides[1]), shown(strides[2])


@triton.jit
def floor_divide(a, b: tl.constexpr):
    quotient = tl.abs(a) // b
    return tl.where(a >= 0, quotient, -((b - 1 - a) // b))


@triton.jit
def wide_bound(CODE: tl.constexpr, AT: tl.constexpr, operands, numbers, item, end):
    """A bound's number as int64; `end` is k_length - q_length in its frame."""
    CONST: tl.constexpr = CODE[AT + 3]
    SYMBOL: tl.constexpr = CODE[AT + 4]
    SIGN: tl.constexpr = CODE[AT + 5]
    value = end.to(tl.int64) * 0 + CONST
    if SYMBOL == END:
        value += end.to(tl.int64) * SIGN
    elif SYMBOL != NONE:
        value += tl.load(operands[SYMBOL] + item * shown(numbers[SYMBOL][0])).to(tl.int64) * SIGN
    return value


@triton.jit
def near_bound(CODE: tl.constexpr, AT: tl.constexpr, operands, numbers, item, end):
    """The same as int32, at most FAR from 0."""
    value = wide_bound(CODE, AT, operands, numbers, item, end)
    return tl.minimum(tl.maximum(value, -FAR), FAR).to(tl.int32)


@triton.jit
def document(SLOT: tl.constexpr, x, operands, numbers, x_length, y_length, TRANSPOSED: tl.constexpr):
    """First x, last x, first y and last y (exclusive) of each row's document."""
    cu_x = operands[SLOT + TRANSPOSED]
    cu_y = operands[SLOT + 1 - TRANSPOSED]
    stride_x = shown(numbers[SLOT + TRANSPOSED][1])
    stride_y = shown(numbers[SLOT + 1 - TRANSPOSED][1])
    count = shown(numbers[SLOT][2])
    low = tl.zeros_like(x)
    high = low + tl.maximum(count - 1, 0)
    for _ in range(shown(numbers[SLOT][3])):
        middle = (low + high + 1) // 2
        beyond = tl.load(cu_x + middle * stride_x, mask=middle < high + 1, other=0) <= x
        open = low < high
        low = tl.where(beyond & open, middle, low)
        high = tl.where(beyond | (low == high), high, middle - 1)
        high = tl.where(open, high, low)
    there = (low < count) & (x >= 0)
    x_first = tl.load(cu_x + low * stride_x, mask=there, other=0)
    x_last = tl.load(cu_x + (low + 1) * stride_x, mask=there, other=0)
    y_first = tl.load(cu_y + low * stride_y, mask=there, other=0)
    y_last = tl.load(cu_y + (low + 1) * stride_y, mask=there, other=0)
    return (
        tl.minimum(tl.maximum(x_first, 0), x_length),
        tl.minimum(tl.maximum(x_last, 0), x_length),
        tl.minimum(tl.maximum(y_first, 0), y_length),
        tl.minimum(tl.maximum(y_last, 0), y_length),
    )


@triton.jit
def _narrowed(
    CODE: tl.constexpr, AT: tl.constexpr, low, high, inside, x, operands, numbers, item, x_length, y_length,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Rows' intervals, where the term at `AT` holds too."""
    KIND: tl.constexpr = CODE[AT]
    FRAME: tl.constexpr = CODE[AT + 6]
    if KIND == DOCUMENTS:
        x_first, x_last, y_first, y_last = document(CODE[AT + 1], x, operands, numbers, x_length, y_length, TRANSPOSED)
        inside = inside & (x >= x_first) & (x < x_last)
        low = tl.maximum(low, y_first)
        high = tl.minimum(high, y_last)
    elif KIND == BOUND or KIND == CHUNK:
        x_first = x * 0
        y_first = x * 0
        end = y_length - x_length
        if FRAME != NONE:
            x_first, x_last, y_first, y_last = document(FRAME, x, operands, numbers, x_length, y_length, TRANSPOSED)
            end = (y_last - y_first) - (x_last - x_first)
        if TRANSPOSED:
            end = -end
        value = near_bound(CODE, AT, operands, numbers, item, end)
        place = x - x_first
        if KIND == CHUNK:
            SIZE: tl.constexpr = CODE[AT + 1]
            if TRANSPOSED:
                first = floor_divide(place, SIZE) * SIZE - value + y_first
            else:
                first = floor_divide(place + value, SIZE) * SIZE + y_first
            low = tl.maximum(low, first)
            high = tl.minimum(high, first + SIZE)
        else:
            AXIS: tl.constexpr = CODE[AT + 1]
            SIDE: tl.constexpr = CODE[AT + 2]
            if AXIS == DIAGONAL:
                # j - i at least b: j at least i + b, and i at most j - b.
                if TRANSPOSED:
                    limit = place - value + y_first
                else:
                    limit = place + value + y_first
                if (SIDE == LOWER) == (not TRANSPOSED):
                    low = tl.maximum(low, limit)
                else:
                    high = tl.minimum(high, limit + 1)
            elif (AXIS == QUERY) == (not TRANSPOSED):
                if SIDE == LOWER:
                    inside = inside & (place >= value)
                else:
                    inside = inside & (place <= value)
            elif SIDE == LOWER:
                low = tl.maximum(low, value + y_first)
            else:
                high = tl.minimum(high, value + y_first + 1)
    return low, high, inside


@triton.jit
def _row_ends(
    CODE: tl.constexpr, ATOM: tl.constexpr, x, operands, numbers, item, x_length, y_length, y_class, first, last,
    TRANSPOSED: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The n that row x, or each row of it, may see by an atom, where `inside` holds: low <= n < high."""
    low = x * 0
    high = low + y_length
    inside = (x >= 0) & (x < x_length)
    BEGIN: tl.constexpr = CODE[1 + ATOM]
    STOP: tl.constexpr = CODE[2 + ATOM]
    for index in tl.static_range(BEGIN, STOP):
        low, high, inside = _narrowed(
            CODE, 2 + CODE[0] + index * TERM_LENGTH, low, high, inside, x, operands, numbers, item, x_length,
            y_length, TRANSPOSED,
        )  # fmt: skip
    if CLASSES > 1:
        low = (tl.maximum(low, 0) - y_class + CLASSES - 1) // CLASSES
        high = (tl.maximum(high, 0) - y_class + CLASSES - 1) // CLASSES
    return tl.maximum(low, first), tl.minimum(high, last), inside


@triton.jit
def row_interval(
    CODE: tl.constexpr, ATOM: tl.constexpr, x, operands, numbers, item, x_length, y_length, y_class, first, last,
    TRANSPOSED: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The n that each row x may see by an atom, filters and further steps aside: low <= n < high.

    Only n from `first` up to `last` (exclusive) count. Rows without any have low = high = 0.
    """
    low, high, inside = _row_ends(
        CODE, ATOM, x, operands, numbers, item, x_length, y_length, y_class, first, last, TRANSPOSED, CLASSES
    )
    inside = inside & (low < high)
    return tl.where(inside, low, 0), tl.where(inside, high, 0)


@triton.jit
def extent(
    CODE: tl.constexpr, low, high, x, x_first, x_last, operands, numbers, item, x_length, y_length, y_class, first,
    last, TRANSPOSED: tl.constexpr, CLASSES: tl.constexpr, MONOTONE: tl.constexpr,
):  # fmt: skip
    """The hull of a tile's rows, x_first to x_last, and their core, for a pattern of one atom.

    MONOTONE: from the first and the last row alone, without reductions over all rows.
    """
    if MONOTONE:
        x_last = tl.minimum(x_last, x_length - 1)
        hull_low, core_high, _inside = _row_ends(
            CODE, 0, x_first, operands, numbers, item, x_length, y_length, y_class, first, last, TRANSPOSED, CLASSES
        )
        core_low, hull_high, _inside = _row_ends(
            CODE, 0, x_last, operands, numbers, item, x_length, y_length, y_class, first, last, TRANSPOSED, CLASSES
        )
        hull_high = tl.where(x_first <= x_last, hull_high, 0)
        hull_low = tl.minimum(hull_low, tl.maximum(hull_high, 0))
        hull_high = tl.maximum(hull_low, hull_high)
        return hull_low, hull_high, core_low, core_high
    else:
        hull_low, hull_high = hull(low, high)
        core_low, core_high = core(low, high, x, x_length)
        return hull_low, hull_high, core_low, core_high


@triton.jit
def row_intervals(
    CODE: tl.constexpr, x, operands, numbers, item, x_length, y_length, y_class, first, last,
    TRANSPOSED: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """`row_interval` of every atom: two tuples of vectors."""
    lows = ()
    highs = ()
    COUNT: tl.constexpr = CODE[0]
    for atom in tl.static_range(COUNT):
        low, high = row_interval(
            CODE, atom, x, operands, numbers, item, x_length, y_length, y_class, first, last, TRANSPOSED, CLASSES
        )
        lows = lows + (low,)
        highs = highs + (high,)
    return lows, highs


@triton.jit
def hull(low, high):
    """The first and the last (exclusive) n that some row sees; 0, 0 where there is none."""
    some = low < high
    stop = tl.max(high, 0)
    return tl.minimum(tl.min(tl.where(some, low, FAR), 0), stop), stop


@triton.jit
def core(low, high, x, x_length):
    """The first and the last (exclusive) n that all rows see; rows beyond the length have no say."""
    there = x < x_length
    some = low < high
    first = tl.max(tl.where(there, tl.where(some, low, FAR), 0), 0)
    return first, tl.min(tl.where(there, high, FAR), 0)


@triton.jit
def _matches(
    CODE: tl.constexpr, AT: tl.constexpr, keep, x, y, batch, head, operands, numbers, x_length, y_length,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Pairs of `keep` (rows, columns) where the filter or step at `AT` holds too."""
    KIND: tl.constexpr = CODE[AT]
    if KIND == STEP:
        SIZE: tl.constexpr = CODE[AT + 1]
        FRAME: tl.constexpr = CODE[AT + 6]
        end = y_length - x_length
        distance = y[None, :] - x[:, None]
        if FRAME != NONE:
            x_first, x_last, y_first, y_last = document(FRAME, x, operands, numbers, x_length, y_length, TRANSPOSED)
            end = (y_last - y_first) - (x_last - x_first)
            distance += (x_first - y_first)[:, None]
        if TRANSPOSED:
            end = -end
            distance = -distance
        residue = wide_bound(CODE, AT, operands, numbers, batch, end) % SIZE
        residue = tl.where(residue < 0, residue + SIZE, residue)
        if FRAME != NONE:
            residue = residue[:, None]
        if SIZE > FAR:
            residue = tl.where(residue > SIZE // 2, residue - SIZE, residue)
            keep = keep & (distance.to(tl.int64) == residue)
        else:
            keep = keep & ((distance - residue.to(tl.int32)) % SIZE == 0)
    elif KIND == BLOCKS or KIND == MASK:
        if KIND == BLOCKS:
            SLOT: tl.constexpr = CODE[AT + 2]
            x = x // CODE[AT + 1]
            y = y // CODE[AT + 1]
        else:
            SLOT: tl.constexpr = CODE[AT + 1]
        strides = shown_strides(numbers[SLOT])
        last = shown(numbers[SLOT][3])
        if TRANSPOSED:
            rows = x.to(tl.int64) * last
            columns = y.to(tl.int64) * strides[2]
        else:
            rows = x.to(tl.int64) * strides[2]
            columns = y.to(tl.int64) * last
        if not TRANSPOSED:
            rows += head.to(tl.int64) * strides[1]
        else:
            columns += head.to(tl.int64) * strides[1]
        base = operands[SLOT] + batch.to(tl.int64) * strides[0]
        keep = keep & (tl.load(base + rows[:, None] + columns[None, :], mask=keep, other=0) != 0)
    return keep


@triton.jit
def _atom_mask(
    CODE: tl.constexpr, ATOM: tl.constexpr, low, high, x, y, n, batch, head, operands, numbers, x_length, y_length,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    keep = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
    BEGIN: tl.constexpr = CODE[1 + ATOM]
    STOP: tl.constexpr = CODE[2 + ATOM]
    for index in tl.static_range(BEGIN, STOP):
        keep = _matches(
            CODE, 2 + CODE[0] + index * TERM_LENGTH, keep, x, y, batch, head, operands, numbers, x_length, y_length,
            TRANSPOSED,
        )  # fmt: skip
    return keep


@triton.jit
def tile_mask(
    CODE: tl.constexpr, lows, highs, x, y, n, batch, head, operands, numbers, x_length, y_length,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile count: bool (rows, columns). `head` is that of each query, a vector or one for all."""
    keep = (n[None, :] < 0) & (x[:, None] < 0)
    COUNT: tl.constexpr = CODE[0]
    for atom in tl.static_range(COUNT):
        keep = keep | _atom_mask(
            CODE, atom, lows[atom], highs[atom], x, y, n, batch, head, operands, numbers, x_length, y_length,
            TRANSPOSED,
        )  # fmt: skip
    return keep


@triton.jit
def hulls(CODE: tl.constexpr, lows, highs):
    """The first and last n (exclusive) that some row sees by any atom."""
    first = FAR
    last = 0
    COUNT: tl.constexpr = CODE[0]
    for atom in tl.static_range(COUNT):
        low, high = hull(lows[atom], highs[atom])
        first = tl.minimum(first, tl.where(low < high, low, FAR))
        last = tl.maximum(last, high)
    return tl.minimum(first, last), last


@triton.jit
def seen(CODE: tl.constexpr, keep, lows, highs, span, n, GAPLESS: tl.constexpr):
    """Which columns of a tile a row attends to: bool (columns,). span: the hull of the one atom."""
    if GAPLESS and CODE[0] == 1:
        return (n >= span[0]) & (n < span[1])
    elif GAPLESS:
        found = n < 0
        COUNT: tl.constexpr = CODE[0]
        for atom in tl.static_range(COUNT):
            low, high = hull(lows[atom], highs[atom])
            found = found | ((n >= low) & (n < high))
        return found
    else:
        return tl.max(keep.to(tl.int32), 0) != 0


@triton.jit
def residue_class(
    CODE: tl.constexpr, x_class, operands, numbers, item, end, CLASSES: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """The class of y that meets a class of x."""
    at: tl.constexpr = 2 + CODE[0] + CODE[1 + CODE[0]] * TERM_LENGTH
    residue = wide_bound(CODE, at, operands, numbers, item, end)
    if TRANSPOSED:
        met = (x_class.to(tl.int64) - residue) % CLASSES
    else:
        met = (x_class.to(tl.int64) + residue) % CLASSES
    return tl.where(met < 0, met + CLASSES, met).to(tl.int32)
