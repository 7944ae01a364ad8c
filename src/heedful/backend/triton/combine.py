"""Merges the runs of keys that a split forward left, in their order."""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors

import triton
import triton.language as tl

from heedful.backend.triton.schedule import shown_strides
from heedful.backend.triton.scores import LN2, LOG2E


@triton.jit(
    do_not_specialize=["out_strides", "rows", "heads", "q_length", "value_dim", "splits"],
    do_not_specialize_on_alignment=["sinks"],
)
def combine_splits(
    partial, partial_lse, out, lse, sinks, out_strides, rows, heads, q_length, value_dim, splits,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """partial is float32 (splits, B·H·Lq, Dv), partial_lse (splits, B·H·Lq) to base 2; a program is one row."""
    out_strides = shown_strides(out_strides)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    within = columns < value_dim
    head = row // q_length % heads
    peak = float("-inf") + row.to(tl.float32) * 0
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        there = split < splits
        found = tl.load(partial_lse + split.to(tl.int64) * rows + row, mask=there, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(found, 0))
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = row.to(tl.float32) * 0
    if HAS_SINKS:
        total = tl.exp2(sink - shift)
    result = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        there = split < splits
        at = split.to(tl.int64) * rows + row
        share = tl.exp2(tl.load(partial_lse + at, mask=there, other=float("-inf")) - shift)
        total += tl.sum(share, 0)
        values = tl.load(
            partial + at[:, None] * value_dim + columns[None, :], mask=there[:, None] & within[None, :], other=0.0
        )
        result += tl.sum(values * share[:, None], 0)
    empty = total == 0.0
    result = result / tl.where(empty, 1.0, total)
    i = row % q_length
    batch = row // q_length // heads
    at = batch.to(tl.int64) * out_strides[0] + head.to(tl.int64) * out_strides[1] + i.to(tl.int64) * out_strides[2]
    tl.store(out + at + columns, result.to(out.dtype.element_ty), mask=within)
    tl.store(lse + row, tl.where(empty, float("-inf"), (shift + tl.log2(total)) * LN2))
