"""Layer normalisation, with GELU behind it where ACTIVATE says so: a program holds a whole row in registers.

The forward reads a row once and writes it once. The backward normalises the row again from its mean and its inverse
deviation instead of reading what the forward could have kept. Gradients of weight and bias are sums over rows: each
program adds up every `programs`-th row and writes one partial sum, in an order that does not vary.

Formulas: Ba et al., "Layer Normalization", 2016, section 3; with h = (x - mean) / deviation and g = dy · weight,
dx = (g - mean(g) - h · mean(g · h)) / deviation. GELU is x Φ(x), its derivative Φ(x) + x φ(x).
"""

# Triton's functions have arguments without types; its packages bring none either.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def layer_norm_forward(
    x, weight, bias, out, mean, inverse, x_stride, columns, eps,
    ACTIVATE: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(EXACT)
    centre = tl.sum(values, 0) / columns
    centred = tl.where(inside, values - centre, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / columns + eps)
    scaled = centred / deviation
    scaled = scaled * tl.load(weight + column, mask=inside, other=0.0).to(EXACT)
    scaled += tl.load(bias + column, mask=inside, other=0.0).to(EXACT)
    if ACTIVATE:
        scaled = 0.5 * scaled * (1.0 + tl.erf(scaled * 0.7071067811865476))
    tl.store(out + row * columns + column, scaled.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + row, centre)
    tl.store(inverse + row, 1.0 / deviation)


@triton.jit
def layer_norm_backward(
    x, weight, bias, grad_out, grad_x, partial_weight, partial_bias, mean, inverse, x_stride, rows, columns, programs,
    ACTIVATE: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    scale = tl.load(weight + column, mask=inside, other=0.0).to(EXACT)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(EXACT)
    sum_weight = tl.zeros([BLOCK], EXACT)
    sum_bias = tl.zeros([BLOCK], EXACT)
    for index in range(program, rows, programs):
        row = tl.full([], 0, tl.int64) + index
        values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(EXACT)
        upstream = tl.load(grad_out + row * columns + column, mask=inside, other=0.0).to(EXACT)
        factor = tl.load(inverse + row)
        normal = tl.where(inside, (values - tl.load(mean + row)) * factor, 0.0)
        if ACTIVATE:
            before = normal * scale + shift
            density = 0.3989422804014327 * tl.exp(-0.5 * before * before)
            upstream *= 0.5 * (1.0 + tl.erf(before * 0.7071067811865476)) + before * density
        sum_weight += upstream * normal
        sum_bias += upstream
        arriving = upstream * scale
        along = tl.sum(arriving * normal, 0) / columns
        level = tl.sum(arriving, 0) / columns
        gradient = (arriving - level - normal * along) * factor
        tl.store(grad_x + row * columns + column, gradient.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial_weight + program * columns + column, sum_weight, mask=inside)
    tl.store(partial_bias + program * columns + column, sum_bias, mask=inside)
