"""`fused_attention`: attention that returns its weights too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.api import attention
from heedful.checks import check_scalars, check_shapes, shape_of, what
from heedful.errors import wrong_type, wrong_value
from heedful.ops._catalogue import Argument, Case, Cost, Inputs, Operation, Slower, tensor_bytes
from heedful.ops._dispatch import runs_in_engine

# As the engine's backend declares it.
MAX_HEAD_DIM = 512


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v and the softmax itself, both differentiable, also together in one backward.

    It is `heedful.attention(..., return_weights=True)` for tensors of three dimensions too. The weights are held once,
    as they are returned: no scores are kept, and the backward computes what it needs of both in tiles.

    Args:
        q: (B, S, D) or (B, H, S, D), floating, any strides.
        k: (B, L, D) or (B, Hkv, L, D), where Hkv divides H.
        v: (B, L, Dv) or (B, Hkv, L, Dv).
        scale: what q kᵀ is multiplied by; None is 1/sqrt(D). Some texts divide by a number of this name: give its
            inverse.
        backend: name of a backend out of `heedful.list_backends()` that must run the call; None takes the engine, or
            the plain composition where the engine does not run, which the log says once.

    Returns:
        The output, (B, S, Dv) or (B, H, S, Dv), and the weights, (B, S, L) or (B, H, S, L), both in q's dtype.

    Raises:
        TypeError, ValueError: an argument is wrong; the message has its name, what it got and what it takes.
        UnsupportedError: the backend that was asked for cannot run the call.
        RuntimeError: second derivatives are asked of the engine; backend="reference" has them.

    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """
    flat = _is_flat(q, k, v)
    if backend is None and not (
        runs_in_engine("fused_attention", q, k, v) and 0 < q.shape[-1] <= MAX_HEAD_DIM and v.shape[-1] <= MAX_HEAD_DIM
    ):
        return reference(q, k, v, scale)
    if flat:
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    out, _, weights = attention(q, k, v, scale=scale, return_weights=True, backend=backend)
    assert weights is not None
    return (out.squeeze(1), weights.squeeze(1)) if flat else (out, weights)


def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    if _is_flat(q, k, v):
        check_shapes(*(tensor.unsqueeze(1) for tensor in (q, k, v)))
    else:
        check_shapes(q, k, v)
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    check_scalars(False, scale, None, 0.0, False, False)
    weights = torch.softmax(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale), -1)
    return weights @ v, weights


def _is_flat(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether they are (B, S, D) and not (B, H, S, D)."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise wrong_type(name, what(tensor), "a tensor")
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            takes = "a floating tensor" if tensor is q else f"q's dtype, {q.dtype}"
            raise wrong_type(name, f"a tensor of {tensor.dtype}", takes)
        if tensor.ndim not in (3, 4) or tensor.ndim != q.ndim:
            takes = "(B, S, D) or (B, H, S, D)" if tensor is q else f"as many dimensions as q, {q.ndim}"
            raise wrong_value(name, f"shape {shape_of(tensor)}", takes)
    return q.ndim == 3


def _cost(inputs: Inputs, backward: bool) -> Cost:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    pairs = q.shape[:-1].numel() * k.shape[-2]
    out_bytes = q.shape[:-1].numel() * v.shape[-1] * q.element_size()
    weights_bytes = pairs * q.element_size()
    if backward:
        # Scores again and four products; the weights and what arrives at them are read.
        flops = 2 * pairs * (3 * q.shape[-1] + 2 * v.shape[-1])
        return Cost(flops, 2 * tensor_bytes(q, k, v) + 2 * out_bytes + 2 * weights_bytes)
    return Cost(2 * pairs * (q.shape[-1] + v.shape[-1]), tensor_bytes(q, k, v) + out_bytes + weights_bytes)


def _math(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_attention_math(q, k, v)
    return found


def _case(name: str, *shape: int) -> Case:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {tensor: torch.randn(shape).to(dtype) for tensor in "qkv"}

    return Case(name, inputs, {"SDPA math": _math})


_FEW_PAIRS = 4096


def _few_pairs(call: Inputs, gradient: bool) -> bool:
    q: Tensor = call["q"]
    k: Tensor = call["k"]
    return q.dtype == torch.float32 and q.shape[:-1].numel() * k.shape[-2] < _FEW_PAIRS


def _paired_backward(call: Inputs, gradient: bool) -> bool:
    k: Tensor = call["k"]
    return gradient and k.dtype == torch.bfloat16 and 128 <= k.shape[-2] <= 1024


OPERATIONS = (
    Operation(
        name="fused_attention",
        summary="Attention that returns its weights, both differentiable, with one copy of the weights",
        formula="softmax(scale * q k^T) v, softmax(scale * q k^T)",
        source="Vaswani et al., Attention Is All You Need, 2017",
        inputs=(
            Argument("q", "(B, S, D) or (B, H, S, D)", "queries"),
            Argument("k", "(B, L, D) or (B, Hkv, L, D)", "keys"),
            Argument("v", "(B, L, Dv) or (B, Hkv, L, Dv)", "values"),
        ),
        parameters=(
            Argument("scale", "float, default 1/sqrt(D)", "what the scores are multiplied by"),
            Argument("backend", "str or None", "the backend that must run it"),
        ),
        outputs=(
            Argument("out", "(B, S, Dv) or (B, H, S, Dv)", "the weighted sums of values"),
            Argument("weights", "(B, S, L) or (B, H, S, L)", "the softmax of the scores"),
        ),
        gradients=("q", "k", "v"),
        complexity="n = S L pairs for each head: 2n(D + Dv) FLOP and n numbers forward, 2n(3D + 2Dv) FLOP backward; "
        "n numbers of memory, the returned weights",
        cost=_cost,
        function=fused_attention,
        reference=reference,
        operators=("attention_forward", "attention_weights", "attention_backward"),
        cases=(
            _case("(2, 32, 64)", 2, 32, 64),
            _case("(2, 128, 64)", 2, 128, 64),
            _case("(2, 512, 64)", 2, 512, 64),
            _case("(1, 8, 128, 64)", 1, 8, 128, 64),
            _case("(1, 8, 512, 64)", 1, 8, 512, 64),
            _case("(1, 8, 2048, 64)", 1, 8, 2048, 64),
        ),
        module="FusedAttention",
        slower=(
            Slower(
                "two matrix products and torch.softmax", f"float32 and fewer than {_FEW_PAIRS} pairs in all", _few_pairs
            ),
            Slower(
                "two matrix products and torch.softmax, as fast, with several copies of the weights",
                "bfloat16 with gradients of 128 to 1024 keys",
                _paired_backward,
            ),
        ),
    ),
)
