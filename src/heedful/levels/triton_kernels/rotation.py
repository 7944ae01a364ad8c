"""RoPE: pairs (x[i], x[i + D / 2]) of each position turned by its angles. The backward turns back: SIGN is -1.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, equation 34, pairs half-split.
"""

# Triton's functions have arguments without types; its packages bring none either.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def rotate(
    x, out, cos, sin, heads, length, half, x_batch, x_head, x_row, out_batch, out_head, out_row, angle_row,
    SIGN: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1).to(tl.int64) % heads
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < length) & (column < half)
    source = x + batch * x_batch + head * x_head + row * x_row + column
    target = out + batch * out_batch + head * out_head + row * out_row + column
    first = tl.load(source, mask=inside, other=0.0).to(EXACT)
    second = tl.load(source + half, mask=inside, other=0.0).to(EXACT)
    c = tl.load(cos + row * angle_row + column, mask=inside, other=0.0).to(EXACT)
    s = SIGN * tl.load(sin + row * angle_row + column, mask=inside, other=0.0).to(EXACT)
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)
