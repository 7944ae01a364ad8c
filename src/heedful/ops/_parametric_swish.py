"""`parametric_swish`: x·sigmoid(βx)."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heedful.checks import what
from heedful.errors import wrong_type, wrong_value
from heedful.ops._catalogue import Argument, Case, Cost, Inputs, Operation, Slower, tensor_bytes
from heedful.ops._dispatch import (
    applied,
    computed_dtype,
    fake,
    is_differentiated_again,
    needs_gradient,
    operator,
    runs_in_engine,
    through,
    written_in_place,
)


def parametric_swish(x: Tensor, beta: float | Tensor = 1.0, *, dim: int = -1, inplace: bool = False) -> Tensor:
    """x·sigmoid(βx), element by element: SiLU at β = 1, towards ReLU as β grows, x / 2 at β = 0.

    The gradients, with s = sigmoid(βx), are s + βx·s(1 - s) for x and Σ x²·s(1 - s) for β.

    Args:
        x: any shape and strides, floating.
        beta: a number; or a tensor of one element, or of one for each index of x's dimension `dim`, which may need a
            gradient. It is used in float32 (float64 for float64 x), whatever its own dtype.
        dim: the dimension of x that a beta of several elements belongs to.
        inplace: whether x itself takes the result, and is returned. Only where no gradient is needed: those of x and of
            beta both need x as it was.

    Returns:
        As x, in its dtype, with the strides of torch.empty_like(x).

    Raises:
        TypeError: x is no floating tensor, or beta neither a number nor a floating tensor.
        ValueError: beta has another shape; dim is none of x's; inplace=True where a gradient needs x, or where elements
            of x share memory.

    Source: Ramachandran, Zoph and Le, "Searching for Activation Functions", 2017.
    """
    if type(beta) is float and dim == -1:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise _wrong_x(x)
        betas, slope, axis = None, beta, x.ndim - 1 if x.ndim else 0
    else:
        betas, slope, axis = _checked(x, beta, dim)
    if not runs_in_engine("parametric_swish", x, betas):
        out = composed(x, betas, slope, axis)
        if not inplace:
            return out
        written_in_place("x", x, needs=needs_gradient(x, betas))
        return x.copy_(out)
    if needs_gradient(x, betas):
        if inplace:
            written_in_place("x", x, needs=True)
        found: Tensor = _apply(x, betas, slope, axis)
        return found
    if inplace:
        written_in_place("x", x, needs=False)
        _in_place(x, betas, slope, axis)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(x)
        return x
    result: Tensor = _forward(x, betas, slope, axis)
    return result


def reference(x: Tensor, beta: float | Tensor = 1.0, *, dim: int = -1, inplace: bool = False) -> Tensor:
    """The same in plain PyTorch."""
    betas, slope, axis = _checked(x, beta, dim)
    return composed(x, betas, slope, axis)


# Below, what a call costs beside its loop decides: 1.6 us more than torch.nn.functional.silu, and 7 with a gradient,
# where autograd runs a function in Python.
_SILU_ELEMENTS, _SILU_ELEMENTS_WITH_GRADIENT = 16384, 131072


def silu_is_faster(x: Tensor, beta: float | Tensor, gradient: bool) -> bool:
    """Whether a call is one for torch.nn.functional.silu, which computes the same."""
    if type(beta) is not float or beta != 1.0:
        return False
    return x.numel() < (_SILU_ELEMENTS_WITH_GRADIENT if gradient else _SILU_ELEMENTS)


def composed(x: Tensor, betas: Tensor | None, slope: float, axis: int) -> Tensor:
    if betas is None:
        return x * torch.sigmoid(slope * x)
    betas = betas.to(x.dtype)
    if betas.numel() != 1:
        betas = betas.view(-1, *(1,) * (x.ndim - 1 - axis))
    return x * torch.sigmoid(betas.view(()) * x if betas.numel() == 1 else betas * x)


def _checked(x: Tensor, beta: float | Tensor, dim: int) -> tuple[Tensor | None, float, int]:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise _wrong_x(x)
    ndim = max(x.ndim, 1)
    if not isinstance(dim, int) or not -ndim <= dim < ndim:
        raise wrong_value("dim", what(dim), f"an int from {-ndim} to {ndim - 1}, a dimension of x")
    axis = dim % ndim
    if not isinstance(beta, Tensor):
        # torch.compile traces a float that changes as a SymFloat.
        if not isinstance(beta, (float, int, Real, torch.SymFloat)) or isinstance(beta, bool):
            raise wrong_type("beta", what(beta), "a number or a tensor")
        return None, float(beta), axis
    if not beta.is_floating_point():
        raise wrong_type("beta", f"a tensor of {beta.dtype}", "a number or a floating tensor")
    channels = x.shape[axis] if x.ndim else 1
    if beta.ndim > 1 or beta.numel() not in (1, channels):
        raise wrong_value(
            "beta",
            f"shape {tuple(beta.shape)}",
            f"one element, or ({channels},) for dimension {axis} of x {tuple(x.shape)}",
        )
    if beta.device != x.device:
        raise wrong_value("beta", f"a tensor on {beta.device}", f"one on x's device, {x.device}")
    if beta.dtype != x.dtype and beta.dtype != computed_dtype(x.dtype):
        beta = beta.to(computed_dtype(x.dtype))
    return beta, 1.0, axis


def _wrong_x(x: object) -> TypeError:
    return wrong_type("x", f"a tensor of {x.dtype}" if isinstance(x, Tensor) else what(x), "a floating tensor")


class _ParametricSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, betas: Tensor | None, slope: float, axis: int) -> Tensor:
        ctx.save_for_backward(x, betas)
        ctx.constants = slope, axis
        out: Tensor = _forward(x, betas, slope, axis)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, betas = ctx.saved_tensors
        slope, axis = ctx.constants
        if is_differentiated_again():
            return *through(lambda x, betas: composed(x, betas, slope, axis), (x, betas), grad_out), None, None
        wanted = betas is not None and ctx.needs_input_grad[1]
        grad_x, grad_betas = _backward(grad_out, x, betas, slope, axis, wanted)
        return grad_x, grad_betas.to(betas.dtype).view(betas.shape) if wanted else None, None, None


_apply = applied(_ParametricSwish)
_forward = operator("parametric_swish")
_in_place = operator("parametric_swish_")
_backward = operator("parametric_swish_backward")


@fake("parametric_swish")
def _fake_forward(x: Tensor, betas: Tensor | None, beta: float, dim: int) -> Tensor:
    return torch.empty_like(x)


@fake("parametric_swish_")
def _fake_in_place(x: Tensor, betas: Tensor | None, beta: float, dim: int) -> None:
    return None


@fake("parametric_swish_backward")
def _fake_backward(
    grad_out: Tensor, x: Tensor, betas: Tensor | None, beta: float, dim: int, betas_gradient: bool
) -> tuple[Tensor, Tensor]:
    count = (1 if betas is None else betas.numel()) if betas_gradient else 0
    return torch.empty_like(x), x.new_empty(count, dtype=computed_dtype(x.dtype))


def _cost(inputs: Inputs, backward: bool) -> Cost:
    x = inputs["x"]
    # An exponential counts as one operation.
    return Cost(10 * x.numel(), 3 * tensor_bytes(x)) if backward else Cost(5 * x.numel(), 2 * tensor_bytes(x))


def _case(name: str, shape: tuple[int, ...], beta: float | None, **peers: Any) -> Case:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {"x": torch.randn(shape).to(dtype), "beta": torch.rand(shape[-1]) + 0.5 if beta is None else beta}

    return Case(name, inputs, peers)


def _silu(x: Tensor, beta: float) -> Tensor:
    return functional.silu(x)


OPERATIONS = (
    Operation(
        name="parametric_swish",
        summary="Swish with a steepness that may be learned, for all elements or per channel",
        formula="x * sigmoid(beta * x)",
        source="Ramachandran, Zoph and Le, Searching for Activation Functions, 2017",
        inputs=(
            Argument("x", "any", "what it is applied to"),
            Argument("beta", "number, one element, or (size of dim)", "the steepness"),
        ),
        parameters=(
            Argument("dim", "int, default -1", "the dimension that several betas belong to"),
            Argument("inplace", "bool, default False", "write into x, where no gradient needs it"),
        ),
        outputs=(Argument("out", "as x", "the result"),),
        gradients=("x", "beta"),
        complexity="n elements: 5n FLOP and 2n numbers forward, 10n FLOP and 3n numbers backward",
        cost=_cost,
        function=parametric_swish,
        reference=reference,
        operators=("parametric_swish", "parametric_swish_", "parametric_swish_backward"),
        cases=(
            _case("(1000,) beta 1", (1000,), 1.0, silu=_silu),
            _case("(1000, 100) beta 1", (1000, 100), 1.0, silu=_silu),
            _case("(100, 100, 10) beta 1", (100, 100, 10), 1.0, silu=_silu),
            _case("(1024, 4096) beta 1", (1024, 4096), 1.0, silu=_silu),
            _case("(1024, 4096) beta 1.5", (1024, 4096), 1.5),
            _case("(1024, 4096) beta per channel", (1024, 4096), None),
            _case("(8192, 4096) beta 1", (8192, 4096), 1.0, silu=_silu),
        ),
        module="ParametricSwish",
        slower=(
            Slower(
                "torch.nn.functional.silu",
                f"beta 1 and fewer than {_SILU_ELEMENTS} elements, with a gradient {_SILU_ELEMENTS_WITH_GRADIENT}",
                lambda call, gradient: silu_is_faster(call["x"], call.get("beta", 1.0), gradient),
                ("heedful.nn.ParametricSwish",),
            ),
        ),
    ),
)
