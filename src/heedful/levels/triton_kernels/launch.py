"""The kernels as differentiable functions of tensors."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from heedful.errors import wrong_value
from heedful.levels.triton_kernels.activations import gelu_backward, gelu_forward, swiglu_backward, swiglu_forward
from heedful.levels.triton_kernels.normalisation import layer_norm_backward, layer_norm_forward
from heedful.levels.triton_kernels.rotation import rotate

# A row has to fit the registers of one program.
LONGEST_ROW = 16384
# Partial sums of weight and bias gradients: enough programs to fill a GPU, whatever its size, so that sums do not vary.
PARTIAL_SUMS = 256
BLOCK = 1024
POSITIONS = 16


def _exact(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _rows(x: Tensor) -> Tensor:
    """(rows, columns) whose columns are adjacent; a view where the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, activate: bool) -> Tensor:
        rows = _rows(x)
        count, columns = rows.shape
        if columns > LONGEST_ROW:
            raise wrong_value("x", f"a last dimension of {columns}", f"at most {LONGEST_ROW} at level 4")
        out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, inverse = torch.empty(2, count, dtype=statistics, device=x.device)
        weight, bias = weight.contiguous(), bias.contiguous()
        size = triton.next_power_of_2(columns)
        if rows.numel():
            layer_norm_forward[(count,)](
                rows, weight, bias, out, mean, inverse, rows.stride(0), columns, eps,
                ACTIVATE=activate, EXACT=_exact(x.dtype), BLOCK=size, num_warps=_warps(size),
            )  # fmt: skip
        ctx.save_for_backward(rows, weight, bias, mean, inverse)
        ctx.shape, ctx.activate = x.shape, activate
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, mean, inverse = ctx.saved_tensors
        count, columns = rows.shape
        grad_out = grad_out.reshape(rows.shape).contiguous()
        grad_x = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        programs = min(count, PARTIAL_SUMS)
        partial = torch.empty(2, programs, columns, dtype=mean.dtype, device=rows.device)
        size = triton.next_power_of_2(columns)
        if rows.numel():
            layer_norm_backward[(programs,)](
                rows, weight, bias, grad_out, grad_x, partial[0], partial[1], mean, inverse, rows.stride(0),
                count, columns, programs,
                ACTIVATE=ctx.activate, EXACT=_exact(rows.dtype), BLOCK=size, num_warps=_warps(size),
            )  # fmt: skip
        grad_weight, grad_bias = partial.sum(1)
        return grad_x.view(ctx.shape), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None


def _warps(size: int) -> int:
    return min(max(size // 256, 1), 8)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        if x.numel():
            gelu_forward[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), EXACT=_exact(x.dtype), BLOCK=BLOCK)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        if x.numel():
            gelu_backward[(triton.cdiv(x.numel(), BLOCK),)](
                x, grad_out.contiguous(), grad_x, x.numel(), EXACT=_exact(x.dtype), BLOCK=BLOCK
            )
        return grad_x


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = _rows(x)
        count, columns = rows.shape[0], rows.shape[1] // 2
        out = torch.empty(count, columns, dtype=x.dtype, device=x.device)
        if out.numel():
            swiglu_forward[(count, triton.cdiv(columns, BLOCK))](
                rows, out, rows.stride(0), columns, EXACT=_exact(x.dtype), BLOCK=BLOCK
            )
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return out.view(*x.shape[:-1], columns)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        count, columns = rows.shape[0], rows.shape[1] // 2
        grad_out = grad_out.reshape(count, columns).contiguous()
        grad_x = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        if grad_x.numel():
            swiglu_backward[(count, triton.cdiv(columns, BLOCK))](
                rows, grad_out, grad_x, rows.stride(0), columns, EXACT=_exact(rows.dtype), BLOCK=BLOCK
            )
        return grad_x.view(ctx.shape)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_out, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, length, dim = x.shape
    # Rows of all heads side by side, as projections read and write them.
    out = torch.empty(batch, length, heads, dim, dtype=x.dtype, device=x.device).transpose(1, 2)
    half = dim // 2
    if x.numel():
        rotate[(triton.cdiv(length, POSITIONS), batch * heads)](
            x, out, cos, sin, heads, length, half, *x.stride()[:3], *out.stride()[:3], cos.stride(0),
            SIGN=sign, EXACT=_exact(x.dtype), ROWS=POSITIONS, BLOCK=triton.next_power_of_2(half),
        )  # fmt: skip
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, activate: bool = False) -> Tensor:
    """Layer normalisation over the last dimension of x (..., columns), with GELU behind it where `activate`.

    Raises:
        ValueError: the last dimension is too long for a program.
    """
    result: Tensor = _LayerNorm.apply(x, weight, bias, eps, activate)
    return result


def gelu(x: Tensor) -> Tensor:
    """x Φ(x)."""
    result: Tensor = _GELU.apply(x)
    return result


def swiglu(x: Tensor) -> Tensor:
    """gate · sigmoid(gate) · up of x (..., 2 n), whose first half is the gate."""
    result: Tensor = _SwiGLU.apply(x)
    return result


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, L, D) turned by angles of cos and sin (L, D / 2), which share their strides."""
    result: Tensor = _RoPE.apply(x, cos, sin)
    return result
