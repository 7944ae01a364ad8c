"""Rows of matrices in and out of a kernel."""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors

import triton
import triton.language as tl


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
def load_tile(
    descriptor, batch, head, row, base, offsets, there, ROWS: tl.constexpr, COLUMNS: tl.constexpr, width,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of the rows from `row` on, by a descriptor, which has zeros beyond the last, or as load_rows."""
    if DESCRIPTORS:
        rows = tl.reshape(descriptor.load([batch, head, row, 0]), [ROWS, COLUMNS])
        if WIDE:
            rows = rows.to(tl.float32)
        return rows
    else:
        return load_rows(base, offsets, there, tl.arange(0, COLUMNS), width, MASK_ROWS, MASK_COLUMNS, WIDE)


@triton.jit
def head_of(tensor, batch, head, strides, UNIT: tl.constexpr):
    """Where the rows of one head begin."""
    return tensor + batch.to(tl.int64) * (strides[0] * UNIT) + head.to(tl.int64) * (strides[1] * UNIT)


@triton.jit
def store_rows(base, offsets, there, FIRST: tl.constexpr, COLUMNS: tl.constexpr, width, numbers):
    """Columns from FIRST on of rows at these offsets."""
    columns = FIRST + tl.arange(0, COLUMNS)
    tl.store(
        base + offsets[:, None] + columns[None, :], numbers.to(base.dtype.element_ty),
        mask=there[:, None] & (columns < width)[None, :],
    )  # fmt: skip
