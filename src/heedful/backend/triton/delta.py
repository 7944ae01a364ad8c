"""What the softmax's gradient takes away from each row."""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors

import triton
import triton.language as tl

from heedful.backend.triton.loads import head_of, load_rows
from heedful.backend.triton.schedule import shown_strides


@triton.jit(
    do_not_specialize=["out_strides", "grad_strides", "row_tiles", "heads", "q_length", "value_dim"],
    do_not_specialize_on_alignment=["grad_lse"],
)
def row_delta(
    out, grad, lse, grad_lse, delta, spaced_lse, spaced_delta, out_strides, grad_strides, row_tiles, heads, q_length,
    value_dim,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, HAS_LSE: tl.constexpr, SPACED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """delta = Σ out·grad - grad_lse of each row, (B, H, Lq). Strides are in UNIT elements.

    SPACED: delta and the log-sum-exp are written once more, with heads a multiple of 4 numbers apart.
    """
    out_strides = shown_strides(out_strides)
    grad_strides = shown_strides(grad_strides)
    index = tl.program_id(0)
    item = index // row_tiles
    batch = item // heads
    head = item % heads
    i = index % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    there = i < q_length
    columns = tl.arange(0, BLOCK_V)
    at = i.to(tl.int64)
    outs = load_rows(
        head_of(out, batch, head, out_strides, UNIT), at * (out_strides[2] * UNIT), there, columns, value_dim, True,
        True, True,
    )  # fmt: skip
    grads = load_rows(
        head_of(grad, batch, head, grad_strides, UNIT), at * (grad_strides[2] * UNIT), there, columns, value_dim, True,
        True, True,
    )  # fmt: skip
    found = tl.sum(outs * grads, 1)
    at += item.to(tl.int64) * q_length
    if HAS_LSE:
        found -= tl.load(grad_lse + at, mask=there, other=0.0)
    tl.store(delta + at, found, mask=there)
    if SPACED:
        spaced = i + item.to(tl.int64) * ((q_length + 3) // 4 * 4)
        tl.store(spaced_delta + spaced, found, mask=there)
        tl.store(spaced_lse + spaced, tl.load(lse + at, mask=there, other=0.0), mask=there)
