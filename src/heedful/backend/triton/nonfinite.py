"""Whether there is a NaN or an infinity among the rows of tensors.

Rows that a bias excludes may hold them, and 0 times them is no 0. Taking such rows out of every tile makes the backward
twice as slow, the forward 1.5 times (H200, D 64 and 128), and reading all tensors once takes a fiftieth of that.
"""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors

import triton
import triton.language as tl

from heedful.backend.triton.loads import head_of, load_rows
from heedful.backend.triton.schedule import shown_strides


@triton.jit
def _look(
    tensor, strides, program, programs, heads, length, width, tiles, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """1 where this program's rows have one, otherwise 0."""
    strides = shown_strides(strides)
    columns = tl.arange(0, COLUMNS)
    found = tl.zeros([ROWS, COLUMNS], tl.int32)
    for tile in range(program, count, programs):
        item = tile // tiles
        row = tile % tiles * ROWS + tl.arange(0, ROWS)
        base = head_of(tensor, item // heads, item % heads, strides, UNIT)
        rows = load_rows(base, row.to(tl.int64) * (strides[2] * UNIT), row < length, columns, width, True, True, True)
        found = tl.where(tl.abs(rows) < float("inf"), found, 1)
    return tl.max(tl.max(found, 1), 0)


@triton.jit(
    do_not_specialize=[
        "first_strides", "second_strides", "heads", "length", "first_width", "second_width", "tiles", "count", "place",
    ],
    do_not_specialize_on_alignment=["flags"],
)  # fmt: skip
def find_nonfinite(
    first, second, flags, first_strides, second_strides, heads, length, first_width, second_width, tiles, count, place,
    ROWS: tl.constexpr, FIRST_COLUMNS: tl.constexpr, SECOND_COLUMNS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Two tensors (B, H, L, D or Dv): a flag of each program, int32, from `place` on. `count` tiles of ROWS rows, a
    head has `tiles` of them. Strides are in UNIT elements."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    found = _look(
        first, first_strides, program, programs, heads, length, first_width, tiles, count, ROWS, FIRST_COLUMNS, UNIT
    )
    found |= _look(
        second, second_strides, program, programs, heads, length, second_width, tiles, count, ROWS, SECOND_COLUMNS, UNIT
    )
    tl.store(flags + place + program, found)


@triton.jit
def any_flag(flags, FLAGS: tl.constexpr):
    """Whether one of the flags of `find_nonfinite` is set; there are FLAGS, or none."""
    if FLAGS:
        return tl.max(tl.load(flags + tl.arange(0, FLAGS)), 0) != 0
    else:
        return False
