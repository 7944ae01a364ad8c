"""`swiglu` and `geglu`: an activation of one half times the other half."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heedful.checks import what
from heedful.errors import wrong_type, wrong_value
from heedful.ops._catalogue import Argument, Case, Cost, Inputs, Operation, Slower, tensor_bytes
from heedful.ops._dispatch import (
    applied,
    fake,
    is_differentiated_again,
    needs_gradient,
    operator,
    runs_in_engine,
    through,
)

# heedful_activation of engine/include/heedful_ops/gated.h.
_SILU, _GELU, _GELU_TANH = 0, 1, 2
_GELUS = {"none": _GELU, "tanh": _GELU_TANH}


def swiglu(gate: Tensor, up: Tensor | None = None, *, gate_first: bool = True) -> Tensor:
    """silu(gate)·up, element by element, where silu(x) = x·sigmoid(x).

    Args:
        gate: any shape and strides, floating; without up both, packed: (..., 2 n).
        up: shape and dtype of gate.
        gate_first: of a packed input, whether the first half of the last dimension is the gate, so that swiglu(
            torch.cat((gate, up), -1)) is swiglu(gate, up). This is the order of Phi-3's gate_up_proj, xformers and
            vLLM. False for the order of torch.nn.functional.glu, flash-attn's GatedMlp and most code for PaLM.

    Returns:
        As gate; of a packed input (..., n). Strides are those of torch.empty_like.

    Raises:
        TypeError: an argument is no floating tensor.
        ValueError: up has another shape, dtype or device; a packed input has an odd last dimension;
            gate_first=False where nothing is packed.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    return _gated("swiglu", gate, up, _SILU, gate_first)


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none", gate_first: bool = True) -> Tensor:
    """gelu(gate)·up, element by element, where gelu(x) = x·(1 + erf(x / √2)) / 2.

    Args:
        gate: any shape and strides, floating; without up both, packed: (..., 2 n).
        up: shape and dtype of gate.
        approximate: "none", or "tanh" for x·(1 + tanh(√(2 / π)·(x + 0.044715 x³))) / 2, as in Gemma.
        gate_first: as in `swiglu`. First is vLLM's order; False is that of diffusers' GEGLU and x-transformers.

    Returns:
        As gate; of a packed input (..., n). Strides are those of torch.empty_like.

    Raises:
        TypeError: an argument is no floating tensor.
        ValueError: approximate is neither; otherwise as `swiglu`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error Linear Units
    (GELUs)", 2016.
    """
    activation = _GELUS.get(approximate) if isinstance(approximate, str) else None
    if activation is None:
        raise wrong_value("approximate", what(approximate), "'none' or 'tanh'")
    return _gated("geglu", gate, up, activation, gate_first)


def reference_swiglu(gate: Tensor, up: Tensor | None = None, *, gate_first: bool = True) -> Tensor:
    """swiglu in plain PyTorch."""
    return _composed(gate, up, _SILU, gate_first)


def reference_geglu(
    gate: Tensor, up: Tensor | None = None, *, approximate: str = "none", gate_first: bool = True
) -> Tensor:
    """geglu in plain PyTorch."""
    return _composed(gate, up, _GELUS[approximate], gate_first)


def _composed(gate: Tensor, up: Tensor | None, activation: int, gate_first: bool) -> Tensor:
    if up is None:
        first, second = gate.chunk(2, -1) if gate.shape[-1] else (gate, gate)
        gate, up = (first, second) if gate_first else (second, first)
    if activation == _SILU:
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="none" if activation == _GELU else "tanh") * up


def _gated(name: str, gate: Tensor, up: Tensor | None, activation: int, gate_first: bool) -> Tensor:
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise _no_floats("gate", gate)
    if up is None:
        if gate.ndim == 0 or gate.shape[-1] % 2:
            raise wrong_value("gate", f"shape {tuple(gate.shape)}", "(..., 2 n) without up")
    else:
        if not isinstance(up, Tensor) or not up.is_floating_point():
            raise _no_floats("up", up)
        if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
            raise wrong_value(
                "up",
                f"{tuple(up.shape)} of {up.dtype} on {up.device}",
                f"gate's shape, dtype and device, {tuple(gate.shape)} of {gate.dtype} on {gate.device}",
            )
        if not gate_first:
            raise wrong_value("gate_first", what(gate_first), "True where gate and up are two tensors")
    if not runs_in_engine(name, gate, up):
        return _composed(gate, up, activation, gate_first)
    found: Tensor
    if up is None:
        gate_first = bool(gate_first)
        if needs_gradient(gate):
            found = _apply_packed(gate, activation, gate_first)
        else:
            found = _packed(gate, activation, gate_first)
    elif needs_gradient(gate, up):
        found = _apply(gate, up, activation)
    else:
        found = _forward(gate, up, activation)
    return found


def _no_floats(name: str, got: object) -> TypeError:
    return wrong_type(name, f"a tensor of {got.dtype}" if isinstance(got, Tensor) else what(got), "a floating tensor")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out: Tensor = _forward(gate, up, activation)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        activation = ctx.activation
        if is_differentiated_again():
            return *through(lambda g, u: _composed(g, u, activation, True), (gate, up), grad_out), None
        return *_backward(grad_out, gate, up, activation), None


class _GatedPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: int, gate_first: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constants = activation, gate_first
        out: Tensor = _packed(x, activation, gate_first)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        activation, gate_first = ctx.constants
        if is_differentiated_again():
            return *through(lambda x: _composed(x, None, activation, gate_first), (x,), grad_out), None, None
        return _packed_backward(grad_out, x, activation, gate_first), None, None


_apply = applied(_Gated)
_apply_packed = applied(_GatedPacked)
_forward = operator("gated")
_backward = operator("gated_backward")
_packed = operator("gated_packed")
_packed_backward = operator("gated_packed_backward")


@fake("gated")
def _fake_forward(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    return torch.empty_like(gate)


@fake("gated_packed")
def _fake_packed(x: Tensor, activation: int, gate_first: bool) -> Tensor:
    return torch.empty_like(x.narrow(-1, 0, x.shape[-1] // 2))


@fake("gated_backward")
def _fake_backward(grad_out: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


@fake("gated_packed_backward")
def _fake_packed_backward(grad_out: Tensor, x: Tensor, activation: int, gate_first: bool) -> Tensor:
    return torch.empty_like(x)


def _cost(inputs: Inputs, backward: bool) -> Cost:
    gate, up = inputs["gate"], inputs.get("up")
    both = tensor_bytes(gate, up)
    elements = gate.numel() if up is not None else gate.numel() // 2
    # An exponential counts as one operation.
    return Cost(12 * elements, both + both // 2 + both) if backward else Cost(6 * elements, both + both // 2)


def _pair(name: str, shape: tuple[int, ...], **parameters: Any) -> Case:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {"gate": torch.randn(shape).to(dtype), "up": torch.randn(shape).to(dtype), **parameters}

    return Case(name, inputs)


def _pack(name: str, shape: tuple[int, ...], **parameters: Any) -> Case:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {"gate": torch.randn(shape).to(dtype), **parameters}

    return Case(name, inputs)


_INPUTS = (
    Argument("gate", "any, or packed (..., 2 n)", "what the activation is applied to; without up both"),
    Argument("up", "as gate, or None", "what the activation is multiplied by"),
)
_GATE_FIRST = Argument("gate_first", "bool, default True", "whether the first half of a packed input is the gate")
_OUTPUTS = (Argument("out", "as gate, or (..., n)", "the result"),)
_OPERATORS = ("gated", "gated_packed", "gated_backward", "gated_packed_backward")

_SMALL_ELEMENTS = 8192

OPERATIONS = (
    Operation(
        name="swiglu",
        summary="SiLU of one half times the other, the halves two tensors or packed in one",
        formula="silu(gate) * up",
        source="Shazeer, GLU Variants Improve Transformer, 2020",
        inputs=_INPUTS,
        parameters=(_GATE_FIRST,),
        outputs=_OUTPUTS,
        gradients=("gate", "up"),
        complexity="n elements: 6n FLOP and 3n numbers forward, 12n FLOP and 5n numbers backward",
        cost=_cost,
        function=swiglu,
        reference=reference_swiglu,
        operators=_OPERATORS,
        cases=(
            _pair("(1, 4096)", (1, 4096)),
            _pair("(128, 4096)", (128, 4096)),
            _pair("(1024, 4096)", (1024, 4096)),
            _pack("(128, 2 x 4096) packed", (128, 8192)),
            _pack("(1024, 2 x 4096) packed", (1024, 8192)),
        ),
        module="SwiGLU",
        slower=(
            Slower(
                "torch.nn.functional.silu and a product, as fast",
                f"two tensors of fewer than {_SMALL_ELEMENTS} elements",
                lambda call, _: call.get("up") is not None and call["gate"].numel() < _SMALL_ELEMENTS,
            ),
        ),
    ),
    Operation(
        name="geglu",
        summary="GELU of one half times the other, the halves two tensors or packed in one",
        formula="gelu(gate) * up",
        source="Shazeer, GLU Variants Improve Transformer, 2020",
        inputs=_INPUTS,
        parameters=(
            Argument("approximate", '"none" or "tanh"', "which GELU: exact, or its approximation by tanh"),
            _GATE_FIRST,
        ),
        outputs=_OUTPUTS,
        gradients=("gate", "up"),
        complexity="n elements: 6n FLOP and 3n numbers forward, 12n FLOP and 5n numbers backward",
        cost=_cost,
        function=geglu,
        reference=reference_geglu,
        operators=_OPERATORS,
        cases=(
            _pair("(1, 4096)", (1, 4096)),
            _pair("(128, 4096)", (128, 4096)),
            _pair("(128, 4096) tanh", (128, 4096), approximate="tanh"),
            _pair("(1024, 4096)", (1024, 4096)),
            _pair("(1024, 4096) tanh", (1024, 4096), approximate="tanh"),
            _pack("(128, 2 x 4096) packed, gate last", (128, 8192), gate_first=False),
        ),
        module="GEGLU",
    ),
)
