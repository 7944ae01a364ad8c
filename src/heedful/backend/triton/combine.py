"""Merges the runs of keys that a split forward left, in their order."""

# Triton compiles these functions from their source, and takes no annotations of ours.
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from heedful.backend.triton.schedule import shown_strides
from heedful.backend.triton.scores import LN2, LOG2E


@triton.jit(
    do_not_specialize=["out_strides", "rows", "heads", "q_length", "value_dim", "splits"],
    do_not_specialize_on_alignment=["sinks"],
)
def combine_splits(
    partial, partial_lse, out, lse, sinks, out_strides, rows, heads, q_length, value_dim, splits,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, HAS_SINKS: tl.constexpr,
    ONE_BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """partial is float32 (splits, B·H·Lq, Dv), partial_lse (splits, B·H·Lq) to base 2; a program is one row.

    ONE_BLOCK: there are at most BLOCK_S splits. DEPENDENT: launched while the forward runs, which it waits for itself.
    """
    out_strides = shown_strides(out_strides)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    within = columns < value_dim
    head = row // q_length % heads
    shift = float("-inf") + row.to(tl.float32) * 0
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        shift = tl.maximum(shift, sink)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = row.to(tl.float32) * 0
    result = tl.zeros([BLOCK_V], tl.float32)
    if ONE_BLOCK:
        split = tl.arange(0, BLOCK_S)
        there = split < splits
        at = split.to(tl.int64) * rows + row
        found = tl.load(partial_lse + at, mask=there, other=float("-inf"))
        values = tl.load(
            partial + at[:, None] * value_dim + columns[None, :], mask=there[:, None] & within[None, :], other=0.0
        )
        shift = tl.maximum(shift, tl.max(found, 0))
        shift = tl.where(shift == float("-inf"), 0.0, shift)
        share = tl.exp2(found - shift)
        total = tl.sum(share, 0)
        result = tl.sum(values * share[:, None], 0)
    else:
        for start in range(0, splits, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            at = split.to(tl.int64) * rows + row
            found = tl.load(partial_lse + at, mask=split < splits, other=float("-inf"))
            shift = tl.maximum(shift, tl.max(found, 0))
        shift = tl.where(shift == float("-inf"), 0.0, shift)
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
    if HAS_SINKS:
        total += tl.exp2(sink - shift)
    empty = total == 0.0
    result = result / tl.where(empty, 1.0, total)
    i = row % q_length
    batch = row // q_length // heads
    at = batch.to(tl.int64) * out_strides[0] + head.to(tl.int64) * out_strides[1] + i.to(tl.int64) * out_strides[2]
    tl.store(out + at + columns, result.to(out.dtype.element_ty), mask=within)
    tl.store(lse + row, tl.where(empty, float("-inf"), (shift + tl.log2(total)) * LN2))
