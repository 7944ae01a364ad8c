"""How far from the fp64 reference a right result may be: bounds per element that follow from rounding alone.

With u the unit roundoff of the statistics (2^-24, for fp64 2^-53), u_out that of the result's dtype, u_P half a unit
in the last place of the probabilities where they are rounded before they meet the values, s the scores before
softcap and mask, with what bias, ALiBi and sinks add to their size, and c = u_P + u (8 + 4 max|s|):

    |out - ref| <= 8 [u_out |ref| + c Σ p|v| + tiny Σ|v| + n·least] + the smallest subnormal of out's dtype

where tiny is the smallest normal number of the statistics, under which a weight may be flushed to 0, and least their
smallest subnormal, by which each of a sum's n terms may be off. Both show only where a sink leaves no larger weight in
the row, or where inputs are denormal.

Gradients. P are the weights before dropout, D what dropout multiplies them by, R = |dO| |V|ᵀ + |dW| the size of what
arrives at a weight, δ = Σ P∘D∘(dO Vᵀ + dW) - dlse, and dS = P∘(D∘(dO Vᵀ + dW) - δ). P carries a relative error of c,
what it is multiplied by one of c of R, and dS is rounded and flushed like P before it meets K and Q, which c and tiny
cover too; δ is taken from outputs and weights that were rounded to u_out or the smallest subnormal. So

    |dS - ref| <= 8 [((2c + u_out) P + tiny)∘(D∘R + Σ P∘D∘R + |dlse|) + P subnormal (Σ|dO| + Σ|dW|) + tiny]

and the gradients have the errors of dQ = scale·dZ K, dK = scale·dZᵀ Q, dV = (P∘D)ᵀ dO, dbias = dS, dslope =
-dS·distance and dsink = -exp(sink - lse)·δ, beside 8 u_out of their own value; sums are in the statistics' type. dZ is
dS where there is no softcap, otherwise dS (1 - t²) with t = tanh(s / softcap): the factor is off by 4u, since t is
rounded, and by 2 (1 - t²) / softcap times the error of s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful import Pattern
from heedful.arguments import resolve_pattern
from heedful.backend.reference.formula import attend

MARGIN = 8.0
PROBABILITY_ROUNDOFF = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 0.0, torch.float64: 0.0}


@dataclass
class Bounded:
    """A result in fp64 and how far from it one in a lower precision may be, per element."""

    value: Tensor
    bound: Tensor

    def check(self, actual: Tensor, what: str = "result") -> None:
        """Raises AssertionError where a difference exceeds the bound, or an infinity or NaN is not matched."""
        assert actual.shape == self.value.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(self.value.shape)}"
        actual = actual.detach().double()
        same = (actual == self.value) | (actual.isnan() & self.value.isnan())
        excess = ((actual - self.value).abs() / self.bound).where(~same, 0.0)
        if excess.numel() and not bool((excess <= 1).all()):
            worst = int(excess.nan_to_num(torch.inf).flatten().argmax())
            where = tuple(int(x) for x in torch.unravel_index(torch.tensor(worst), excess.shape))
            raise AssertionError(
                f"{what}{list(where)} is {float(actual[where])!r}, the reference {float(self.value[where])!r}: "
                f"off by {float(excess[where]):.3g} times the bound; {int((excess <= 1).logical_not().sum())} of "
                f"{excess.numel()} elements are out of bounds"
            )


@dataclass
class Expected:
    """What one call should give; gradients are there where one of an output was given."""

    out: Bounded
    lse: Bounded
    weights: Bounded
    gradients: dict[str, Bounded]


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Tensor | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kept: Tensor | None = None,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    grad_weights: Tensor | None = None,
) -> Expected:
    """The reference and its bounds for `heedful.attention` of (B, H, L, D) tensors with these arguments.

    kept is what dropout multiplies the weights by. A grad_... of any output asks for the gradients of q, k, v and of
    those of bias, alibi_slopes and sinks that are given, by these names.
    """
    dtype, heads = q.dtype, q.shape[1]
    q_length, k_length = q.shape[2], k.shape[2]
    statistics = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    u, own = statistics.eps / 2, torch.finfo(dtype)
    roundoff, subnormal = own.eps / 2, own.smallest_normal * own.eps
    least = statistics.smallest_normal * statistics.eps
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = resolve_pattern(pattern, causal).dense(q_length, k_length, q.device)
    given = {"q": q, "k": k, "v": v, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    leaves = {name: t.detach().double().requires_grad_() for name, t in given.items() if t is not None}
    slopes = leaves["alibi_slopes"].reshape(-1, heads, 1, 1) if "alibi_slopes" in leaves else None
    features = {"softcap": softcap, "bias": leaves.get("bias"), "alibi_slopes": slopes, "sinks": leaves.get("sinks")}
    results = attend(*(leaves[n] for n in "qkv"), mask, scale=scale, kept=kept, **features)
    with torch.no_grad():
        out, lse, weights = (result.detach() for result in results)
        groups = heads // k.shape[1]
        queries, keys, values = (leaves[name].nan_to_num(0, 0, 0) for name in "qkv")
        keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
        scores = scale * queries @ keys.mT
        positions = torch.arange(max(q_length, k_length), device=q.device)
        distance = (positions[:q_length, None] + k_length - q_length - positions[:k_length]).abs().double()
        largest = _row_max(scores.abs())
        if bias is not None:
            largest = largest + _row_max(leaves["bias"].where(bias.isfinite(), 0.0).abs().expand_as(scores))
        if slopes is not None:
            largest = largest + slopes.abs() * _row_max(distance)
        if sinks is not None:
            largest = largest + leaves["sinks"].where(sinks.isfinite(), 0.0).abs().view(-1, 1, 1)
        score_error = u * (8 + 4 * largest)
        relative = PROBABILITY_ROUNDOFF[dtype] + score_error
        spread = weights @ values.abs()
        counted = mask if bias is None else mask & (bias != -torch.inf)
        tiny = (statistics.smallest_normal * counted.double()).expand_as(weights)
        found = Expected(
            Bounded(
                out,
                MARGIN * (roundoff * out.abs() + relative * spread + tiny @ values.abs() + least * k_length)
                + subnormal,
            ),
            Bounded(lse, MARGIN * (score_error.squeeze(-1) + u * lse.nan_to_num(0, 0, 0).abs())),
            Bounded(weights, MARGIN * ((roundoff + relative) * weights + tiny) + subnormal),
            {},
        )
    upstream = (grad_out, grad_lse, grad_weights)
    reached = [(y, dy.detach().double()) for y, dy in zip(results, upstream, strict=True) if dy is not None]
    if not reached:
        return found
    outputs, arriving = zip(*reached, strict=True)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), arriving, materialize_grads=True)

    with torch.no_grad():
        dropped = torch.ones(()) if kept is None else kept.double()
        probabilities = weights
        if kept is not None:
            probabilities = attend(*(leaves[n] for n in "qkv"), mask, scale=scale, **features)[2]
        size_out, size_lse, size_weights = (
            torch.zeros_like(y) if dy is None else dy.detach().double().abs()
            for y, dy in zip((out, lse, weights), upstream, strict=True)
        )
        reach = size_out @ values.abs().mT + size_weights
        row_reach = (weights * reach).sum(-1, keepdim=True) + size_lse.unsqueeze(-1)
        reach = dropped * reach + row_reach
        weight_error = (2 * relative + roundoff) * probabilities + tiny
        lost = subnormal * (size_out.sum(-1, keepdim=True) + size_weights.sum(-1, keepdim=True))
        ds_error = weight_error * reach + probabilities * lost + tiny
        dz_error = ds_error
        if softcap is not None:
            slope = 1 - torch.tanh(scores / softcap).square()
            dz_error = slope * ds_error + probabilities * reach * (4 * u + 2 * slope * score_error / softcap)
        errors = {
            "q": abs(scale) * dz_error @ keys.abs() + least * k_length,
            "k": _per_kv_head(abs(scale) * dz_error.mT @ queries.abs() + least * q_length, groups),
            "v": _per_kv_head((relative * weights + tiny).mT @ size_out + least * q_length, groups),
        }
        if bias is not None:
            errors["bias"] = ds_error.sum_to_size((1,) * (4 - bias.ndim) + tuple(bias.shape)).view(bias.shape)
        if alibi_slopes is not None:
            errors["alibi_slopes"] = (ds_error * distance).sum_to_size(slopes.shape).view(alibi_slopes.shape)
        if sinks is not None:
            share = torch.exp(leaves["sinks"].view(-1, 1) - lse.where(lse != -torch.inf, torch.inf))
            errors["sinks"] = (share.unsqueeze(-1) * ((2 * relative + roundoff) * row_reach + lost)).sum((0, 2, 3))
        for name, gradient in zip(leaves, gradients, strict=True):
            kind = torch.finfo(given[name].dtype)
            bound = MARGIN * (kind.eps / 2 * gradient.abs() + errors[name]) + kind.smallest_normal * kind.eps
            found.gradients[name] = Bounded(gradient, bound)
    return found


def _row_max(scores: Tensor) -> Tensor:
    return scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, keepdim=True)


def _per_kv_head(per_head: Tensor, groups: int) -> Tensor:
    return per_head.unflatten(1, (-1, groups)).sum(2)


def rms(tensor: Tensor) -> float:
    """Root mean square, 0 for no elements."""
    return math.sqrt(float(tensor.double().square().mean())) if tensor.numel() else 0.0
