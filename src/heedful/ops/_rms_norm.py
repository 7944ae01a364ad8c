"""`rms_norm` and `add_rms_norm`: root-mean-square norm, alone and of a residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heedful.checks import what
from heedful.errors import wrong_type, wrong_value
from heedful.ops._catalogue import Argument, Case, Cost, Inputs, Operation, tensor_bytes
from heedful.ops._columns import check_rows, checked_column, checked_eps, default_eps
from heedful.ops._dispatch import (
    applied,
    computed_dtype,
    fake,
    is_differentiated_again,
    needs_gradient,
    operator,
    runs_in_engine,
    through,
)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """x / √(mean(x²) + eps) · weight, the mean over the last dimension, as torch.nn.functional.rms_norm.

    The gradients, with r = 1/√(mean(x²) + eps) and g what arrives, are r·g·w - r³·x·mean(g·w·x) for x, and Σ g·r·x over
    all rows for weight.

    Args:
        x: (..., C), any strides, floating.
        weight: (C,), or of the shape of the last dimensions that the mean is over together; None for 1. It is used in
            float32 (float64 for float64 x), whatever its own dtype.
        eps: what is added to the mean; None for the machine epsilon of the type that is computed in, 2⁻²³ (2⁻⁵² for
            float64).

    Returns:
        As x, in its dtype, with the strides of torch.empty_like(x).

    Raises:
        TypeError: x is no floating tensor, weight neither None nor a floating tensor, or eps no number.
        ValueError: x has no dimension; weight has another shape or device; eps is negative.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    weight, eps = _checked(x, weight, eps)
    if weight is not None and weight.ndim > 1:
        return rms_norm(x.flatten(-weight.ndim), weight.flatten(), eps).view(x.shape)
    if not runs_in_engine("rms_norm", x, weight):
        return composed(x, weight, eps)
    found: Tensor = (_apply if needs_gradient(x, weight) else _forward)(x, weight, eps)
    return found


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """The step of a residual stream: sum = x + residual, and `rms_norm` of that.

    Both results have gradients, and what arrives at both is added up for x and residual, which have one and the same.

    Args:
        x: (..., C), any strides, floating.
        residual: of x's shape and dtype.
        weight: as in `rms_norm`.
        eps: as in `rms_norm`.

    Returns:
        (normed, sum), each as x. In 16-bit types sum is rounded first, and what is normed is the rounded sum.

    Raises:
        TypeError: as `rms_norm`; residual has another dtype than x.
        ValueError: as `rms_norm`; residual has another shape or device than x.
    """
    weight, eps = _checked(x, weight, eps)
    _check_residual(x, residual)
    if weight is not None and weight.ndim > 1:
        normed, total = add_rms_norm(x.flatten(-weight.ndim), residual.flatten(-weight.ndim), weight.flatten(), eps)
        return normed.view(x.shape), total.view(x.shape)
    if not runs_in_engine("add_rms_norm", x, residual, weight):
        return added_composed(x, residual, weight, eps)
    found: tuple[Tensor, Tensor] = (_apply_added if needs_gradient(x, residual, weight) else _added)(
        x, residual, weight, eps
    )
    return found


def reference(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """The same in plain PyTorch."""
    return composed(x, *_checked(x, weight, eps))


def added_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    weight, eps = _checked(x, weight, eps)
    _check_residual(x, residual)
    return added_composed(x, residual, weight, eps)


def composed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    shape = x.shape[-1:] if weight is None else weight.shape
    if weight is None or weight.dtype == x.dtype:
        return functional.rms_norm(x, shape, weight, eps)
    return functional.rms_norm(x.to(weight.dtype), shape, weight, eps).to(x.dtype)


def added_composed(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return composed(total, weight, eps), total


def _checked(x: Tensor, weight: Tensor | None, eps: float | None) -> tuple[Tensor | None, float]:
    check_rows(x)
    if weight is not None:
        weight = checked_column("weight", weight, x)
    return weight, default_eps(x.dtype) if eps is None else checked_eps(eps)


def _check_residual(x: Tensor, residual: Tensor) -> None:
    if not isinstance(residual, Tensor) or residual.dtype != x.dtype:
        got = f"a tensor of {residual.dtype}" if isinstance(residual, Tensor) else what(residual)
        raise wrong_type("residual", got, f"a tensor of x's dtype, {x.dtype}")
    if residual.shape != x.shape:
        raise wrong_value("residual", f"shape {tuple(residual.shape)}", f"x's shape, {tuple(x.shape)}")
    if residual.device != x.device:
        raise wrong_value("residual", f"a tensor on {residual.device}", f"one on x's device, {x.device}")


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out: Tensor = _forward(x, weight, eps)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        eps = ctx.eps
        if is_differentiated_again():
            return *through(lambda x, weight: composed(x, weight, eps), (x, weight), grad_out), None
        grad_x, grad_weight = _gradients(grad_out, None, x, weight, eps, ctx.needs_input_grad[1])
        return grad_x, grad_weight, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        normed, total = _added(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return normed, total

    @staticmethod
    def backward(ctx: Any, grad_normed: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        eps = ctx.eps
        if grad_normed is None:
            return grad_total, grad_total, None, None
        if is_differentiated_again():
            # total is an output: its own history leads on to x and residual.
            grad, grad_weight = through(
                lambda total, weight: composed(total, weight, eps), (total, weight), grad_normed
            )
            if grad is not None and grad_total is not None:
                grad = grad + grad_total
        else:
            grad, grad_weight = _gradients(grad_normed, grad_total, total, weight, eps, ctx.needs_input_grad[2])
        return grad, grad, grad_weight, None


def _gradients(
    grad_out: Tensor, added: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    grad_x, grad_weight = _backward(grad_out, added, x, weight, eps, wanted)
    if not wanted or weight is None:
        return grad_x, None
    return grad_x, grad_weight if grad_weight.dtype is weight.dtype else grad_weight.to(weight.dtype)


_apply = applied(_RmsNorm)
_apply_added = applied(_AddRmsNorm)
_forward = operator("rms_norm")
_added = operator("add_rms_norm")
_backward = operator("rms_norm_backward")


@fake("rms_norm")
def _fake_forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x)


@fake("add_rms_norm")
def _fake_added(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@fake("rms_norm_backward")
def _fake_backward(
    grad_out: Tensor, added: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1] if weight_gradient else 0
    return torch.empty_like(x), x.new_empty(columns, dtype=computed_dtype(x.dtype))


def _cost(inputs: Inputs, backward: bool) -> Cost:
    x = inputs["x"]
    return Cost(11 * x.numel(), 3 * tensor_bytes(x)) if backward else Cost(4 * x.numel(), 2 * tensor_bytes(x))


def _added_cost(inputs: Inputs, backward: bool) -> Cost:
    x = inputs["x"]
    return Cost(12 * x.numel(), 4 * tensor_bytes(x)) if backward else Cost(5 * x.numel(), 4 * tensor_bytes(x))


def _by_hand(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As models of transformers write it."""
    wide = x.to(computed_dtype(x.dtype))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _added_by_hand(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _by_hand(total, weight, eps), total


def _case(name: str, shape: tuple[int, ...], residual: bool) -> Case:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        call = {"x": torch.randn(shape).to(dtype), "weight": (torch.rand(shape[-1]) + 0.5).to(dtype), "eps": 1e-6}
        return call | {"residual": torch.randn(shape).to(dtype)} if residual else call

    return Case(name, inputs, {"by hand": _added_by_hand if residual else _by_hand})


_SHAPES = ((1, 4096), (16, 1024), (256, 1024), (1024, 4096), (4096, 4096), (16384, 128))
_PARAMETERS = (Argument("eps", "float, default the machine epsilon", "what is added to the mean of the squares"),)
_WEIGHT = Argument("weight", "(C) or None", "what the normed elements are multiplied by")

OPERATIONS = (
    Operation(
        name="rms_norm",
        summary="Root-mean-square norm over the last dimension",
        formula="x / sqrt(mean(x^2) + eps) * weight",
        source="Zhang and Sennrich, Root Mean Square Layer Normalization, 2019",
        inputs=(Argument("x", "(..., C)", "what is normed"), _WEIGHT),
        parameters=_PARAMETERS,
        outputs=(Argument("out", "as x", "the result"),),
        gradients=("x", "weight"),
        complexity="n elements: 4n FLOP and 2n numbers forward, 11n FLOP and 3n numbers backward",
        cost=_cost,
        function=rms_norm,
        reference=reference,
        operators=("rms_norm", "rms_norm_backward"),
        cases=tuple(_case(f"{shape}", shape, residual=False) for shape in _SHAPES),
        module="RMSNorm",
    ),
    Operation(
        name="add_rms_norm",
        summary="A residual stream's sum and its root-mean-square norm in one pass",
        formula="sum = x + residual; sum / sqrt(mean(sum^2) + eps) * weight",
        source="Zhang and Sennrich, Root Mean Square Layer Normalization, 2019",
        inputs=(
            Argument("x", "(..., C)", "what a layer adds to the stream"),
            Argument("residual", "as x", "the stream"),
            _WEIGHT,
        ),
        parameters=_PARAMETERS,
        outputs=(Argument("normed", "as x", "the norm of the sum"), Argument("sum", "as x", "the stream further on")),
        gradients=("x", "residual", "weight"),
        complexity="n elements: 5n FLOP and 4n numbers forward, 12n FLOP and 4n numbers backward",
        cost=_added_cost,
        function=add_rms_norm,
        reference=added_reference,
        operators=("add_rms_norm", "rms_norm_backward"),
        cases=tuple(_case(f"{shape}", shape, residual=True) for shape in _SHAPES),
        module="AddRMSNorm",
    ),
)
