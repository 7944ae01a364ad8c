"""GELU and SwiGLU with their gradients: one pass each, which a chain of operators makes of four to seven.

GELU: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016: x Φ(x), by erf. SwiGLU: Shazeer, "GLU Variants
Improve Transformer", 2020: gate · σ(gate) · up.
"""

# Triton's functions have arguments without types; its packages bring none either.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def gelu_forward(x, out, count, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    values = tl.load(x + place, mask=inside, other=0.0).to(EXACT)
    result = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(x, grad_out, grad_x, count, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    values = tl.load(x + place, mask=inside, other=0.0).to(EXACT)
    upstream = tl.load(grad_out + place, mask=inside, other=0.0).to(EXACT)
    density = 0.3989422804014327 * tl.exp(-0.5 * values * values)
    slope = 0.5 * (1.0 + tl.erf(values * 0.7071067811865476)) + values * density
    tl.store(grad_x + place, (upstream * slope).to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_forward(x, out, x_stride, columns, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(EXACT)
    up = tl.load(x + row * x_stride + columns + column, mask=inside, other=0.0).to(EXACT)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * columns + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(x, grad_out, grad_x, x_stride, columns, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(EXACT)
    up = tl.load(x + row * x_stride + columns + column, mask=inside, other=0.0).to(EXACT)
    upstream = tl.load(grad_out + row * columns + column, mask=inside, other=0.0).to(EXACT)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    into_gate = upstream * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    into_up = upstream * gate * sigmoid
    target = grad_x + 2 * row * columns + column
    tl.store(target, into_gate.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(target + columns, into_up.to(grad_x.dtype.element_ty), mask=inside)
