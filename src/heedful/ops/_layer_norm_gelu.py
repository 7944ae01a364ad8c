"""`layer_norm_gelu`: layer norm, then GELU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heedful.errors import wrong_value
from heedful.ops._catalogue import Argument, Case, Cost, Inputs, Operation, tensor_bytes
from heedful.ops._columns import check_rows, checked_column, checked_eps
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


def layer_norm_gelu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    approximate: str = "none",
) -> Tensor:
    """gelu(z) with z = (x - mean(x)) / √(var(x) + eps) · weight + bias, both over the last dimension.

    As torch.nn.functional.gelu after layer_norm, with nothing in between in memory. The gradients, with y the normed x,
    r = 1/√(var(x) + eps) and d = g·gelu'(z), g being what arrives, are r·(d·w - mean(d·w) - y·mean(d·w·y)) for x, and
    the sums over all rows of d·y for weight and of d for bias.

    Args:
        x: (..., C), any strides, floating.
        weight: (C,), or of the shape of the last dimensions that are normed together; None for 1. It is used in float32
            (float64 for float64 x), whatever its own dtype.
        bias: as weight; None for 0.
        eps: what is added to the variance.
        approximate: "none" for z·Φ(z), Φ being the normal distribution, or "tanh" for its approximation
            z·(1 + tanh(√(2/π)·(z + 0.044715 z³)))/2.

    Returns:
        As x, in its dtype, with the strides of torch.empty_like(x).

    Raises:
        TypeError: x is no floating tensor, weight or bias neither None nor a floating tensor, or eps no number.
        ValueError: x has no dimension; weight or bias have another shape or device; eps is negative; approximate is
            neither "none" nor "tanh".

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016; Hendrycks and Gimpel, "Gaussian Error Linear Units
    (GELUs)", 2016.
    """
    weight, bias, eps = _checked(x, weight, bias, eps, approximate)
    column = bias if weight is None else weight
    if column is not None and column.ndim > 1:
        weight, bias = (None if t is None else t.flatten() for t in (weight, bias))
        return layer_norm_gelu(x.flatten(-column.ndim), weight, bias, eps, approximate).view(x.shape)
    if not runs_in_engine("layer_norm_gelu", x, weight, bias):
        return composed(x, weight, bias, eps, approximate)
    run = _apply if needs_gradient(x, weight, bias) else _forward
    found: Tensor = run(x, weight, bias, eps, approximate == "tanh")
    return found


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    approximate: str = "none",
) -> Tensor:
    """The same in plain PyTorch."""
    return composed(x, *_checked(x, weight, bias, eps, approximate), approximate)


def composed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, approximate: str) -> Tensor:
    column, dtype = bias if weight is None else weight, x.dtype
    shape = x.shape[-1:] if column is None else column.shape
    if any(t is not None and t.dtype != dtype for t in (weight, bias)):
        wide = computed_dtype(dtype)
        x, weight, bias = x.to(wide), *(None if t is None else t.to(wide) for t in (weight, bias))
    if weight is None and bias is not None:
        # PyTorch's layer norm with a bias alone has second derivatives of 0.
        z = functional.layer_norm(x, shape, None, None, eps) + bias
    else:
        z = functional.layer_norm(x, shape, weight, bias, eps)
    return functional.gelu(z, approximate=approximate).to(dtype)


def _checked(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, approximate: str
) -> tuple[Tensor | None, Tensor | None, float]:
    check_rows(x)
    if weight is not None:
        weight = checked_column("weight", weight, x)
    if bias is not None:
        bias = checked_column("bias", bias, x)
        if weight is not None and weight.ndim != bias.ndim:
            raise wrong_value("bias", f"shape {tuple(bias.shape)}", f"weight's shape, {tuple(weight.shape)}")
    if approximate not in ("none", "tanh"):
        raise wrong_value("approximate", repr(approximate), "'none' or 'tanh'")
    return weight, bias, checked_eps(eps)


class _LayerNormGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, tanh: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.constants = eps, tanh
        out: Tensor = _forward(x, weight, bias, eps, tanh)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        eps, tanh = ctx.constants
        if is_differentiated_again():

            def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return composed(x, weight, bias, eps, "tanh" if tanh else "none")

            return *through(function, (x, weight, bias), grad_out), None, None
        _, of_weight, of_bias, *_ = ctx.needs_input_grad
        grad_x, grad_weight, grad_bias = _backward(grad_out, x, weight, bias, eps, tanh, of_weight or of_bias)
        return (
            grad_x,
            grad_weight.to(weight.dtype) if of_weight else None,
            grad_bias.to(bias.dtype) if of_bias else None,
            None,
            None,
        )


_apply = applied(_LayerNormGelu)
_forward = operator("layer_norm_gelu")
_backward = operator("layer_norm_gelu_backward")


@fake("layer_norm_gelu")
def _fake_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, tanh: bool) -> Tensor:
    return torch.empty_like(x)


@fake("layer_norm_gelu_backward")
def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tanh: bool,
    columns_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    columns, dtype = x.shape[-1] if columns_gradients else 0, computed_dtype(x.dtype)
    return torch.empty_like(x), x.new_empty(columns, dtype=dtype), x.new_empty(columns, dtype=dtype)


def _cost(inputs: Inputs, backward: bool) -> Cost:
    x = inputs["x"]
    # The normal distribution counts as one operation, and so does its density.
    return Cost(25 * x.numel(), 3 * tensor_bytes(x)) if backward else Cost(10 * x.numel(), 2 * tensor_bytes(x))


def _case(name: str, shape: tuple[int, ...], approximate: str) -> Case:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "x": torch.randn(shape).to(dtype),
            "weight": (torch.rand(shape[-1]) + 0.5).to(dtype),
            "bias": torch.randn(shape[-1]).to(dtype),
            "approximate": approximate,
        }

    return Case(name, inputs)


_SHAPES = ((1, 4096), (16, 1024), (256, 1024), (1024, 4096), (4096, 4096), (16384, 128))

OPERATIONS = (
    Operation(
        name="layer_norm_gelu",
        summary="Layer norm over the last dimension and GELU in one pass",
        formula="gelu((x - mean(x)) / sqrt(var(x) + eps) * weight + bias)",
        source=(
            "Ba, Kiros and Hinton, Layer Normalization, 2016; "
            "Hendrycks and Gimpel, Gaussian Error Linear Units (GELUs), 2016"
        ),
        inputs=(
            Argument("x", "(..., C)", "what is normed"),
            Argument("weight", "(C) or None", "what the normed elements are multiplied by"),
            Argument("bias", "(C) or None", "what is added to them"),
        ),
        parameters=(
            Argument("eps", "float, default 1e-5", "what is added to the variance"),
            Argument("approximate", '"none" or "tanh", default "none"', "whether GELU is taken by its approximation"),
        ),
        outputs=(Argument("out", "as x", "the result"),),
        gradients=("x", "weight", "bias"),
        complexity="n elements: 10n FLOP and 2n numbers forward, 25n FLOP and 3n numbers backward",
        cost=_cost,
        function=layer_norm_gelu,
        reference=reference,
        operators=("layer_norm_gelu", "layer_norm_gelu_backward"),
        cases=(
            *(_case(f"{shape}", shape, "none") for shape in _SHAPES),
            _case("(1024, 4096) tanh", (1024, 4096), "tanh"),
        ),
        module="LayerNormGELU",
    ),
)
