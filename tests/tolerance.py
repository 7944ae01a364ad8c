"""How far from the fp64 reference a right result may be: bounds per element that follow from rounding alone.

With u the unit roundoff of the statistics (2^-24, for fp64 2^-53), u_out that of the result's dtype, u_P half a unit
in the last place of the probabilities where they are rounded before they meet the values, and s the scores before
softcap and mask:

    |out - ref| <= 8 [u_out |ref| + u_P Σ p|v| + u (8 + 4 max|s|) Σ p|v|] + the smallest subnormal of out's dtype

The gradients' bounds carry the same errors of p, c = u_P + u (8 + 4 max|s|), through dV = Pᵀ dO, dS = P ∘ (dP - δ),
dQ = scale · dS K and dK = scale · dSᵀ Q, where δ is taken from the rounded output.
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
    """What one call should give; gradients are there where an output gradient was given."""

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
) -> Expected:
    """The reference and its bounds for `heedful.attention` of (B, H, L, D) tensors with these arguments.

    kept is what dropout multiplies the weights by. grad_out (B, H, Lq, Dv) asks for gradients of q, k, v and of those
    of bias and sinks that are given.
    """
    dtype = q.dtype
    statistics = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    roundoff = torch.finfo(dtype).eps / 2
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = resolve_pattern(pattern, causal).dense(q.shape[2], k.shape[2], q.device)
    slopes = None
    if alibi_slopes is not None:
        slopes = alibi_slopes.detach().double().reshape(-1 if alibi_slopes.ndim == 2 else 1, q.shape[1], 1, 1)
    given = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    given = {name: t for name, t in given.items() if t is not None}
    leaves = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    wide = {"softcap": softcap, "alibi_slopes": slopes, "scale": scale, "kept": kept}
    extras = {name: leaves.get(name) for name in ("bias", "sinks")}
    out, lse, weights = attend(leaves["q"], leaves["k"], leaves["v"], mask, **extras, **wide)

    with torch.no_grad():
        groups = q.shape[1] // k.shape[1]
        keys, values = (leaves[n].nan_to_num(0, 0, 0).repeat_interleave(groups, 1) for n in "kv")
        queries = leaves["q"].nan_to_num(0, 0, 0)
        largest = _row_max((scale * queries @ keys.mT).abs())
        for extra in (bias, slopes):
            if extra is not None:
                finite = extra.double().where(extra.isfinite(), 0.0).abs()
                reach = finite.reshape((1,) * (4 - extra.ndim) + extra.shape).amax((-2, -1), keepdim=True)
                largest = largest + reach * (max(q.shape[2], k.shape[2]) if extra is slopes else 1)
        relative = PROBABILITY_ROUNDOFF[dtype] + statistics * (8 + 4 * largest)
        spread = weights @ values.abs()
        bounded_out = Bounded(out, MARGIN * (roundoff * out.abs() + relative * spread) + subnormal)
        lse_error = MARGIN * statistics * (8 + 4 * largest.squeeze(-1) + lse.nan_to_num(0, 0, 0).abs())
        bounded_lse = Bounded(lse, lse_error.expand_as(lse))
        bounded_weights = Bounded(weights, MARGIN * (roundoff + relative) * weights + subnormal)
    gradients: dict[str, Bounded] = {}
    if grad_out is not None:
        grad_out = grad_out.detach().double()
        found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad_out), strict=True))
        with torch.no_grad():
            reach = grad_out.abs() @ values.abs().mT + (grad_out.abs() * spread).sum(-1, keepdim=True)
            score_error = weights * reach * (2 * relative + roundoff)
            errors = {
                "q": scale * score_error @ keys.abs(),
                "k": _per_kv_head(scale * score_error.mT @ queries.abs(), groups),
                "v": _per_kv_head((relative * weights).mT @ grad_out.abs(), groups),
            }
            if bias is not None:
                errors["bias"] = score_error.sum_to_size(torch.broadcast_shapes(bias.shape, (1, 1, 1, 1))).view_as(bias)
            if sinks is not None:
                share = torch.exp(sinks.double().view(1, -1, 1) - lse).unsqueeze(-1)
                errors["sinks"] = (share * (grad_out.abs() * spread).sum(-1, keepdim=True) * 2 * relative).sum(
                    (0, 2, 3)
                )
            for name, gradient in found.items():
                own = torch.finfo(given[name].dtype).eps / 2
                gradients[name] = Bounded(gradient, MARGIN * (own * gradient.abs() + errors[name]) + subnormal)
    return Expected(
        Bounded(out.detach(), bounded_out.bound),
        Bounded(lse.detach(), bounded_lse.bound),
        Bounded(weights.detach(), bounded_weights.bound),
        gradients,
    )


def _row_max(scores: Tensor) -> Tensor:
    return scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, keepdim=True)


def _per_kv_head(per_head: Tensor, groups: int) -> Tensor:
    return per_head.unflatten(1, (-1, groups)).sum(2)


def rms(tensor: Tensor) -> float:
    """Root mean square, 0 for no elements."""
    return math.sqrt(float(tensor.double().square().mean())) if tensor.numel() else 0.0
