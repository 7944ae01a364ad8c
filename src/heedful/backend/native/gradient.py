"""The engine's operators as one differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_Gradients = tuple[Tensor | None, ...]


class Settings(NamedTuple):
    """What the operators are told beside tensors."""

    schedule: tuple[int, ...]
    scale: float
    softcap: float
    dropout_p: float
    blhd: bool
    weights: str | None
    """None, "dense" or "sparse"."""
    lse: bool
    parts: tuple[tuple[int, ...], ...]
    """The schedule again, in one or more that share no pair: each is a call of its own."""
    operators: str = "heedful"
    """The namespace of the operators that run it."""


class EngineAttention(torch.autograd.Function):
    """Of query, key, value, bias, alibi_slopes, sinks, seed and query_offset as the operators take them, settings, and
    operands.

    Gives out alone, or out and lse, and behind them the weights that were asked for, as `compute_weights` gives them.
    First derivatives only, of the six tensors through all outputs. What is kept for them is O(L) beside inputs and
    output, and the weights where they are returned.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        found = _forward(*inputs)
        _keep(ctx, inputs, found)
        return found if inputs[8].lse or inputs[8].weights else found[0]

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> _Gradients:
        # The operators have no derivative: what comes out would be taken for a constant. A compiled backward is refused
        # by torch itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with torch.no_grad():
                gradients = _backward(ctx, *output_gradients)
            return _refuse_second_derivatives(gradients, *output_gradients, *ctx.saved_tensors)
        return _backward(ctx, *output_gradients)


class Plan(NamedTuple):
    """What `PlainAttention` and `BiasedAttention` do, made once for many calls."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    schedule: list[int]
    scale: float
    blhd: bool


class PlainAttention(torch.autograd.Function):
    """The same of query, key, value, a plan and operands alone, giving out: 10 of 65 µs less for a tiny call and its
    backward. Not for tracing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, *operands: Tensor) -> Tensor:
        forward, _, schedule, scale, blhd = plan
        out, lse = forward(query, key, value, operands, schedule, scale, blhd)
        ctx.save_for_backward(query, key, value, out, lse, *operands)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> _Gradients:
        if torch.is_grad_enabled():
            with torch.no_grad():
                gradients = PlainAttention.backward(ctx, grad_out)
            return _refuse_second_derivatives(gradients, grad_out, *ctx.saved_tensors)
        grad_out = _in_rows(grad_out)
        query, key, value, out, lse, *operands = ctx.saved_tensors
        _, backward, schedule, scale, _ = ctx.plan
        grad_query, grad_key, grad_value, _, _, _ = backward(
            grad_out, query, key, value, out, lse, operands, schedule, scale, None, None, 0.0, 0.0, None, None, None,
            False, False,
        )  # fmt: skip
        if operands:
            return grad_query, grad_key, grad_value, None, *(None,) * len(operands)
        return grad_query, grad_key, grad_value, None


class BiasedAttention(torch.autograd.Function):
    """The same of query, key, value, bias, a plan and operands."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, plan: Plan, *operands: Tensor
    ) -> Tensor:
        forward, _, schedule, scale, blhd = plan
        out, lse = forward(query, key, value, operands, schedule, scale, blhd, bias)
        ctx.save_for_backward(query, key, value, bias, out, lse, *operands)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> _Gradients:
        if torch.is_grad_enabled():
            with torch.no_grad():
                gradients = BiasedAttention.backward(ctx, grad_out)
            return _refuse_second_derivatives(gradients, grad_out, *ctx.saved_tensors)
        grad_out = _in_rows(grad_out)
        query, key, value, bias, out, lse, *operands = ctx.saved_tensors
        _, backward, schedule, scale, _ = ctx.plan
        needs_bias = ctx.needs_input_grad[3]
        grad_query, grad_key, grad_value, _, grad_bias, _ = backward(
            grad_out, query, key, value, out, lse, operands, schedule, scale, bias, None, 0.0, 0.0, None, None, None,
            needs_bias, False,
        )  # fmt: skip
        grad_bias = _bias_gradient(grad_bias, bias) if needs_bias else None
        return grad_query, grad_key, grad_value, grad_bias, None, *(None,) * len(operands)


class TransformedAttention(torch.autograd.Function):
    """The same for torch.func, always with all outputs. Second derivatives are refused before it begins."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> _Gradients:
        with torch.no_grad():
            return _backward(ctx, *output_gradients)


# Function.apply without its search for transforms: 2.5 of 10 µs.
apply_eagerly: Callable[..., Any] = super(torch.autograd.Function, EngineAttention).apply
apply_plain_eagerly: Callable[..., Tensor] = super(torch.autograd.Function, PlainAttention).apply
apply_biased_eagerly: Callable[..., Tensor] = super(torch.autograd.Function, BiasedAttention).apply


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    query_offset: Tensor | None,
    settings: Settings,
    *operands: Tensor,
) -> tuple[Tensor, ...]:
    out, lse = attend(settings, query, key, value, operands, bias, alibi_slopes, sinks, seed, None, query_offset)
    if settings.weights is None:
        return out, lse
    return out, lse, *compute_weights(settings, query, key, lse, operands, bias, alibi_slopes, seed, query_offset)


def attend(
    settings: Settings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: tuple[Tensor, ...],
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    pages: Tensor | None = None,
    query_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of all parts of the schedule; a sink belongs to the first."""
    operators = getattr(torch.ops, settings.operators)
    found = [
        operators.attention_forward.default(
            query, key, value, operands, part, settings.scale, settings.blhd, bias, alibi_slopes,
            sinks if part is settings.parts[0] else None, settings.softcap, settings.dropout_p, seed, pages,
            query_offset,
        )
        for part in settings.parts
    ]  # fmt: skip
    if len(found) == 1:
        out, lse = found[0]
        return out, lse
    lse = torch.stack([part for _, part in found]).logsumexp(0)
    # A row without a key in any part: -inf - -inf.
    shares = [(part - lse).where(lse != -torch.inf, -torch.inf).exp().unsqueeze(-1) for _, part in found]
    together = found[0][0].to(lse.dtype).mul_(shares[0])
    for (out, _), share in zip(found[1:], shares[1:], strict=True):
        together.addcmul_(out, share)
    return together.to(query.dtype), lse


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.settings = inputs[8]
    ctx.save_for_backward(*inputs[:8], *output, *inputs[9:])
    if inputs[8].weights == "sparse":
        ctx.mark_non_differentiable(output[3])


def compute_weights(
    settings: Settings,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    operands: tuple[Tensor, ...],
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    query_offset: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The weights (B, H, Lq, Lk), or for "sparse" those of the attended pairs (n,) and their indices (4, n)."""
    schedule, scale, softcap, dropout_p, _, kind, *_ = settings
    features = bias, alibi_slopes, softcap, dropout_p, seed, query_offset
    operators = getattr(torch.ops, settings.operators)
    if kind == "dense":
        return (operators.attention_weights.default(query, key, lse, operands, schedule, scale, *features),)
    indices, values = operators.attention_weights_sparse.default(query, key, lse, operands, schedule, scale, *features)
    return values, indices


def _backward(
    ctx: Any,
    grad_out: Tensor | None,
    grad_lse: Tensor | None = None,
    grad_weights: Tensor | None = None,
    _grad_indices: Tensor | None = None,
) -> _Gradients:
    query, key, value, bias, alibi_slopes, sinks, seed, query_offset, out, lse, *rest = ctx.saved_tensors
    _, scale, softcap, dropout_p, _, kind, _, parts, namespace = ctx.settings
    operators = getattr(torch.ops, namespace)
    operands = rest if kind is None else rest[1:] if kind == "dense" else rest[2:]
    none = (None,) * (1 + len(operands))
    if grad_weights is not None:
        if kind == "dense":
            row_sums = _row_sums(rest[0], grad_weights, lse.dtype)
        else:
            row_sums, grad_weights = _densify(rest[0], rest[1], grad_weights, lse, key.shape[2])
        grad_lse = -row_sums if grad_lse is None else grad_lse - row_sums
    elif grad_out is None and grad_lse is None:
        return (*(None,) * 8, *none)
    if grad_out is None:
        grad_out = out.new_zeros(()).expand_as(out)
    grad_out = _in_rows(grad_out)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    needs_bias, needs_slopes, needs_sinks = ctx.needs_input_grad[3:6]
    found = [
        operators.attention_backward.default(
            grad_out, query, key, value, out, lse, operands, part, scale, bias, alibi_slopes, softcap, dropout_p, seed,
            grad_lse, grad_weights, needs_bias, needs_slopes, query_offset,
        )
        for part in parts
    ]  # fmt: skip
    grad_query, grad_key, grad_value, delta, grad_bias, grad_slopes = found[0]
    for other in found[1:]:
        grad_query, grad_key, grad_value = grad_query + other[0], grad_key + other[1], grad_value + other[2]
        grad_bias, grad_slopes = grad_bias + other[4], grad_slopes + other[5]
    return (
        grad_query,
        grad_key,
        grad_value,
        _bias_gradient(grad_bias, bias) if needs_bias else None,
        _slopes_gradient(grad_slopes, alibi_slopes) if needs_slopes else None,
        _sinks_gradient(sinks, lse, delta) if needs_sinks else None,
        None,
        None,
        *none,
    )


def _row_sums(weights: Tensor, grad_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ weights · grad_weights (B, H, Lq) over the keys."""
    if weights.is_cpu and not torch._C._are_functorch_transforms_active():
        found: Tensor = torch.ops.heedful.row_products.default(weights, grad_weights)
        return found
    return (weights.to(dtype) * grad_weights).sum(-1)


def _in_rows(grad_out: Tensor) -> Tensor:
    # Such as that of out.sum(): the engine reads numbers side by side faster, and sums them in another order.
    return grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()


def _sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    # A row whose sink is -inf and that has no key: -inf - -inf.
    share = (sinks.to(lse.dtype)[:, None] - lse).where(lse != -torch.inf, -torch.inf).exp()
    return -_sum_last(share * delta).sum(0).to(sinks.dtype)


def _slopes_gradient(grad_slopes: Tensor, alibi_slopes: Tensor) -> Tensor:
    per_slope = _sum_last(grad_slopes) if alibi_slopes.ndim == 2 else grad_slopes
    return per_slope.sum_to_size(alibi_slopes.shape).to(alibi_slopes.dtype)


def _bias_gradient(grad_bias: Tensor, bias: Tensor) -> Tensor:
    if bias.shape[3] != grad_bias.shape[3]:
        grad_bias = _sum_last(grad_bias).unsqueeze(-1)
    return grad_bias.to(bias.dtype)


def _sum_last(tensor: Tensor) -> Tensor:
    """The sum over the last axis, by runs of fixed length: torch splits a long sum by the number of threads."""
    run = 1024
    while tensor.shape[-1] > run:
        tensor = torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % run)).unflatten(-1, (-1, run)).sum(-1)
    return tensor.sum(-1)


def _densify(values: Tensor, indices: Tensor, grad_values: Tensor, lse: Tensor, k_length: int) -> tuple[Tensor, Tensor]:
    """The row sums (B, H, Lq) of weights times their gradients, and the gradients (B, H, Lq, Lk)."""
    batch, heads, q_length = lse.shape
    row = (indices[0] * heads + indices[1]) * q_length + indices[2]
    row_sums = lse.new_zeros(batch * heads * q_length).index_add(0, row, values.to(lse.dtype) * grad_values)
    dense = grad_values.new_zeros(batch * heads * q_length * k_length)
    dense = dense.index_put((row * k_length + indices[3],), grad_values)
    return row_sums.view(lse.shape), dense.view(*lse.shape, k_length)


class _NoSecondDerivative(torch.autograd.Function):
    """The first `count` tensors, as functions of all of them that raise where they are differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> _Gradients:
        raise RuntimeError(
            'backend "native" has no second derivatives; backend="reference" has derivatives of any order'
        )


def _refuse_second_derivatives(gradients: _Gradients, *sources: Tensor | None) -> _Gradients:
    """The same gradients, which raise where somebody differentiates them with respect to what they come from."""
    given = [gradient for gradient in gradients if gradient is not None]
    leading = [source for source in sources if source is not None and source.requires_grad]
    marked = iter(_NoSecondDerivative.apply(len(given), *given, *leading))  # type: ignore[no-untyped-call]
    return tuple(None if gradient is None else next(marked) for gradient in gradients)
