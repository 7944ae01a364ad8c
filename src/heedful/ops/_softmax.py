"""`softmax`: with the scale, the cap and the mask of attention's scores."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

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
)


def softmax(x: Tensor, scale: float = 1.0, mask: Tensor | None = None, softcap: float | None = None) -> Tensor:
    """exp(s) / Σ exp(s) over the last dimension, where s is x after what attention does to its scores.

    In `heedful.attention`'s order: s = scale·x; then softcap·tanh(s / softcap); then the mask. A row whose s are all
    -inf, because nothing is left of it, gives zeros, and no gradient. Sums are in float32 (float64 for float64 x). The
    gradients, with p the result and g what arrives, are d = p·(g - Σ p·g) for s, and so for a mask that was added, and
    d·scale·(1 - tanh²(scale·x / softcap)) for x.

    Args:
        x: (..., C), any strides, floating.
        scale: what x is multiplied by.
        mask: of a shape that broadcasts to x's. Boolean, True where an element counts; or floating, which is added, and
            may need a gradient.
        softcap: a positive number, or None for none.

    Returns:
        As x, in its dtype, with the strides of torch.empty_like(x).

    Raises:
        TypeError: x is no floating tensor; mask neither None nor a boolean or floating tensor; scale or softcap no
            number.
        ValueError: mask has a shape that does not broadcast to x's, or another device; scale is not finite; softcap is
            not positive and finite.
    """
    mask, scale, cap = _checked(x, scale, mask, softcap)
    if not runs_in_engine("softmax", x, mask if mask is None or mask.dtype is not torch.bool else None):
        return composed(x, mask, scale, cap)
    found: Tensor = (_apply if needs_gradient(x, mask) else _forward)(x, mask, scale, cap)
    return found


def reference(x: Tensor, scale: float = 1.0, mask: Tensor | None = None, softcap: float | None = None) -> Tensor:
    """The same in plain PyTorch."""
    return composed(x, *_checked(x, scale, mask, softcap))


def composed(x: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    scores = x * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.where(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0).to(x.dtype)


def _checked(x: Tensor, scale: float, mask: Tensor | None, softcap: float | None) -> tuple[Tensor | None, float, float]:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise wrong_type("x", f"a tensor of {x.dtype}" if isinstance(x, Tensor) else what(x), "a floating tensor")
    if type(scale) is not float or not -math.inf < scale < math.inf:
        scale = _number("scale", scale)
        if not -math.inf < scale < math.inf:
            raise wrong_value("scale", scale, "a finite number")
    if softcap is None:
        cap = 0.0
    else:
        cap = _number("softcap", softcap)
        if not 0 < cap < math.inf:
            raise wrong_value("softcap", softcap, "a positive finite number, or None for none")
    return None if mask is None else _checked_mask(x, mask), scale, cap


def _number(name: str, number: float) -> float:
    # torch.compile traces a float that changes as a SymFloat.
    if not isinstance(number, (float, int, Real, torch.SymFloat)) or isinstance(number, bool):
        raise wrong_type(name, what(number), "a number")
    return float(number)


def _checked_mask(x: Tensor, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or not (mask.dtype is torch.bool or mask.is_floating_point()):
        got = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else what(mask)
        raise wrong_type("mask", got, "a boolean or floating tensor, or None")
    missing = x.ndim - mask.ndim
    if missing < 0 or any(size not in (1, x.shape[missing + dim]) for dim, size in enumerate(mask.shape)):
        raise wrong_value("mask", f"shape {tuple(mask.shape)}", f"one that broadcasts to x's, {tuple(x.shape)}")
    if mask.device != x.device:
        raise wrong_value("mask", f"a tensor on {mask.device}", f"one on x's device, {x.device}")
    if mask.dtype in (torch.bool, x.dtype, computed_dtype(x.dtype)):
        return mask
    return mask.to(computed_dtype(x.dtype))


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
        out: Tensor = _forward(x, mask, scale, softcap)
        ctx.save_for_backward(out, x if softcap else None)
        ctx.constants = scale, softcap
        ctx.mask = None if mask is None else (mask.shape, mask.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        out, x = ctx.saved_tensors
        scale, softcap = ctx.constants
        of_mask = ctx.needs_input_grad[1]
        if is_differentiated_again():
            grad_scores = out * (grad_out - (out * grad_out).sum(-1, keepdim=True))
            grad_x = grad_scores * scale
            if softcap:
                grad_x = grad_x * (1 - torch.tanh(scale * x / softcap).square())
        else:
            grad_x, grad_scores = _backward(grad_out, out, x, scale, softcap, of_mask)
        if not of_mask:
            return grad_x, None, None, None
        shape, dtype = ctx.mask
        return grad_x, grad_scores.sum_to_size(shape).to(dtype), None, None


_apply = applied(_Softmax)
_forward = operator("softmax")
_backward = operator("softmax_backward")


@fake("softmax")
def _fake_forward(x: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    return torch.empty_like(x)


@fake("softmax_backward")
def _fake_backward(
    grad_out: Tensor, out: Tensor, x: Tensor | None, scale: float, softcap: float, scores_gradient: bool
) -> tuple[Tensor, Tensor]:
    wide = computed_dtype(out.dtype)
    grad_scores = torch.empty_like(out, dtype=wide) if scores_gradient else out.new_empty(0, dtype=wide)
    return torch.empty_like(out), grad_scores


def _cost(inputs: Inputs, backward: bool) -> Cost:
    x, mask = inputs["x"], inputs.get("mask")
    # An exponential and a hyperbolic tangent count as one operation each.
    capped = 3 * x.numel() if inputs.get("softcap") else 0
    masked = x.numel() if mask is not None else 0
    if backward:
        return Cost(6 * x.numel() + capped, (4 if capped else 3) * tensor_bytes(x))
    return Cost(6 * x.numel() + capped + masked, 2 * tensor_bytes(x) + tensor_bytes(mask))


def _case(name: str, shape: tuple[int, ...], mask: str = "", peers: dict[str, Any] | None = None, **rest: Any) -> Case:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        call = {"x": torch.randn(shape).to(dtype), **rest}
        if not mask:
            return call
        causal = torch.ones(shape[-2:], dtype=torch.bool).tril()
        return call | {
            "mask": causal if mask == "bool" else torch.zeros(shape[-2:]).masked_fill(~causal, -torch.inf).to(dtype)
        }

    return Case(name, inputs, peers or {})


def _torch(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return torch.softmax(x * scale, -1)


def _filled(x: Tensor, scale: float, mask: Tensor) -> Tensor:
    return torch.softmax((x * scale).masked_fill(~mask, -torch.inf), -1)


def _added(x: Tensor, scale: float, mask: Tensor) -> Tensor:
    return torch.softmax(x * scale + mask, -1)


def _capped(x: Tensor, scale: float, mask: Tensor, softcap: float) -> Tensor:
    return torch.softmax((softcap * torch.tanh(x * scale / softcap)).masked_fill(~mask, -torch.inf), -1)


_SMALL_ELEMENTS = 131072


def _torch_is_faster(call: Inputs, gradient: bool) -> bool:
    bare = call.get("scale", 1.0) == 1.0 and call.get("mask") is None and call.get("softcap") is None
    return gradient and bare and call["x"].numel() < _SMALL_ELEMENTS


OPERATIONS = (
    Operation(
        name="softmax",
        summary="Softmax over the last dimension with scale, cap and mask of attention's scores",
        formula="exp(s) / sum(exp(s)), s = softcap * tanh(scale * x / softcap) + mask",
        source="Bridle, Probabilistic interpretation of feedforward network outputs, 1990; Gemma 2, 2024, for the cap",
        inputs=(
            Argument("x", "(..., C)", "the scores"),
            Argument("mask", "broadcasts to x, or None", "bool, True where an element counts, or floating, added"),
        ),
        parameters=(
            Argument("scale", "float, default 1", "what x is multiplied by"),
            Argument("softcap", "float or None", "the bound that scores approach"),
        ),
        outputs=(Argument("out", "as x", "the weights; zeros where nothing of a row is left"),),
        gradients=("x", "mask"),
        complexity="n elements: 6n FLOP and 2n numbers forward, 6n FLOP and 3n numbers backward; a cap adds 3n each",
        cost=_cost,
        function=softmax,
        reference=reference,
        operators=("softmax", "softmax_backward"),
        cases=(
            _case("(16, 1024)", (16, 1024), peers={"torch": _torch}),
            _case("(1024, 1024)", (1024, 1024), peers={"torch": _torch}),
            _case("(16384, 128)", (16384, 128), peers={"torch": _torch}),
            _case("(64, 32000)", (64, 32000), peers={"torch": _torch}),
            _case("(8, 1024, 1024) scale", (8, 1024, 1024), peers={"torch": _scaled}, scale=0.125),
            _case("(8, 512, 512) scale, bool mask", (8, 512, 512), "bool", {"torch": _filled}, scale=0.125),
            _case("(8, 512, 512) scale, float mask", (8, 512, 512), "float", {"torch": _added}, scale=0.125),
            _case(
                "(8, 512, 512) scale, cap, bool mask",
                (8, 512, 512),
                "bool",
                {"torch": _capped},
                scale=0.125,
                softcap=50.0,
            ),
        ),
        module="Softmax",
        slower=(
            Slower(
                "torch.softmax, which gives NaN where nothing of a row is left",
                f"a gradient of fewer than {_SMALL_ELEMENTS} elements, and no scale, mask or cap",
                _torch_is_faster,
            ),
        ),
    ),
)
