"""Attention outputs and gradients held against fp64 within a bound that follows from rounding alone.

Large shapes are checked on a random subset of rows: a wrong kernel is wrong in more than one row, and a full fp64
reference at 8192 keys would cost more than everything that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .checks import Check

if TYPE_CHECKING:
    from torch import Tensor

    from heedful import Pattern

# Half a unit in the last place of the probabilities where they are rounded before they meet the values.
PROBABILITY_ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
MARGIN = 8.0
RMS_FACTOR = 1.3
FORWARD_RULE = (
    "8·[u_out·|ref| + u_P·Σp|v| + u·(8 + 4·max|s|)·Σp|v|] + smallest subnormal, per element; u = 2^-24 (fp64: 2^-53)"
)
RMS_RULE = "RMS error ≤ 1.3 × that of PyTorch's SDPA on the same rows"
GRADIENT_RULE = (
    "the forward's roundings carried through dV = Pᵀ·dO, dS = P∘(dP − δ), dQ = s·dS·K, dK = s·dSᵀ·Q, times 8"
)
ROWS_AT_ONCE = 1024


class Selection(NamedTuple):
    """Which outputs are looked at: (batch item, head) pairs and query rows."""

    heads: list[tuple[int, int]]
    rows: list[int]


def select(
    batch: int, heads: int, q_length: int, *, max_heads: int = 2, max_rows: int = 96, seed: int = 0
) -> Selection:
    """A reproducible random selection that always holds the first and the last head and row."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def pick(count: int, limit: int) -> list[int]:
        chosen = torch.randperm(count, generator=generator)[:limit].tolist()
        return sorted({0, count - 1, *chosen[: max(0, limit - 2)]}) if count else []

    pairs = [divmod(index, heads) for index in pick(batch * heads, max_heads)]
    return Selection(pairs, pick(q_length, max_rows))


def check_forward(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    pattern: Pattern | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    sdpa_out: Tensor | None = None,
    selection: Selection | None = None,
) -> list[Check]:
    """Checks of one call's output.

    Args:
        name: what the checks are called.
        query: (B, H, Lq, D).
        key: (B, Hkv, Lk, D).
        value: (B, Hkv, Lk, Dv).
        out: (B, H, Lq, Dv), what is on trial.
        pattern: which pairs count; None is every pair.
        scale: 1/√D if None.
        bias: broadcastable to (B, H, Lq, Lk), finite.
        sdpa_out: PyTorch's answer to the same call; with it, 16-bit outputs are also held to RMS ≤ 1.3 × its error.
        selection: rows and heads to look at, by default a random subset.

    Returns:
        One check of the elementwise bound (measured: largest error as a share of its bound) and, for 16-bit outputs
        with sdpa_out, one of the RMS error.
    """
    import torch

    batch, heads, q_length, head_dim = query.shape
    group = heads // key.shape[1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    picked = selection or select(batch, heads, q_length)
    rows = torch.tensor(picked.rows, device=query.device)
    dense = None if pattern is None else _visible(pattern, rows, q_length, key.shape[2])
    worst, square, sdpa_square = 0.0, 0.0, 0.0
    for b, h in picked.heads:
        q64, k64, v64 = query[b, h, rows].double(), key[b, h // group].double(), value[b, h // group].double()
        visible = None if dense is None else dense[min(b, len(dense) - 1), min(h, dense.shape[1] - 1)]
        added = _bias_rows(bias, b, h, rows)
        reference, bound = _forward_reference(q64, k64, v64, visible, scale, query.dtype, added)
        error = (out[b, h, rows].double() - reference).abs()
        worst = _worst(worst, error, bound)
        square += float(error.square().sum())
        if sdpa_out is not None:
            sdpa_square += float((sdpa_out[b, h, rows].double() - reference).square().sum())
    checks = [Check(f"{name}: error ÷ bound", worst, 1.0, FORWARD_RULE)]
    if sdpa_out is not None and str(query.dtype).removeprefix("torch.") in PROBABILITY_ROUNDOFF:
        count = len(picked.heads) * len(picked.rows) * value.shape[-1]
        limit = RMS_FACTOR * math.sqrt(sdpa_square / count)
        checks.append(Check(f"{name}: RMS error", math.sqrt(square / count), limit, RMS_RULE))
    return checks


def check_backward(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    gradients: Sequence[Tensor],
    *,
    pattern: Pattern | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    kv_head: tuple[int, int] = (0, 0),
) -> list[Check]:
    """Checks of (dQ, dK, dV) for one (batch item, key head) and all of the query heads that share it.

    Shapes and bias as in check_forward; grad_out is (B, H, Lq, Dv).
    """
    import torch

    b, g = kv_head
    group = query.shape[1] // key.shape[1]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    dense = None if pattern is None else pattern.dense(query.shape[2], key.shape[2], query.device)
    k64, v64 = key[b, g].double(), value[b, g].double()
    dk, dv = torch.zeros_like(k64), torch.zeros_like(v64)
    dk_spread, dv_spread = torch.zeros_like(k64), torch.zeros_like(v64)
    out_roundoff = torch.finfo(query.dtype).eps / 2
    worst = {"dQ": 0.0, "dK": 0.0, "dV": 0.0}
    for h in range(g * group, (g + 1) * group):
        for start in range(0, query.shape[2], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            q64, do64 = query[b, h, rows].double(), grad_out[b, h, rows].double()
            visible = None if dense is None else dense[min(b, len(dense) - 1), min(h, dense.shape[1] - 1), rows]
            p, p_error = _probabilities(q64, k64, visible, scale, query.dtype, _bias_rows(bias, b, h, rows))
            dp, out = do64 @ v64.T, p @ v64
            delta = (do64 * out).sum(-1, keepdim=True)
            ds = p * (dp - delta)
            ds_error = (
                p
                * (
                    p_error * (dp.abs() + delta.abs())
                    + 8 * _roundoff(query.dtype) * (do64.abs() @ v64.abs().T)
                    + out_roundoff * (do64.abs() * out.abs()).sum(-1, keepdim=True)
                )
                + PROBABILITY_ROUNDOFF.get(_name(query.dtype), 0.0) * ds.abs()
            )
            dq, dq_spread = scale * (ds @ k64), scale * (ds_error @ k64.abs())
            error = (gradients[0][b, h, rows].double() - dq).abs()
            worst["dQ"] = _worst(worst["dQ"], error, _bound(dq, dq_spread, query.dtype))
            dk += scale * (ds.T @ q64)
            dk_spread += scale * (ds_error.T @ q64.abs())
            dv += p.T @ do64
            dv_spread += (p * p_error).T @ do64.abs()
    for label, got, reference, spread in (
        ("dK", gradients[1][b, g], dk, dk_spread),
        ("dV", gradients[2][b, g], dv, dv_spread),
    ):
        worst[label] = _worst(0.0, (got.double() - reference).abs(), _bound(reference, spread, query.dtype))
    return [Check(f"{name} {label}: error ÷ bound", value, 1.0, GRADIENT_RULE) for label, value in worst.items()]


def _visible(pattern: Pattern, rows: Tensor, q_length: int, k_length: int) -> Tensor:
    """(B or 1, H or 1, rows, Lk): the pairs of some rows."""
    import torch

    if not pattern.by_position:
        return pattern.dense(q_length, k_length, rows.device)[:, :, rows]
    keys = torch.arange(k_length, device=rows.device).view(1, 1, 1, -1)
    pairs = pattern.pairs(rows.view(1, 1, -1, 1), keys, q_length, k_length)
    return pairs.expand(*pairs.shape[:2], len(rows), k_length)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _roundoff(dtype: object) -> float:
    """Unit roundoff of the arithmetic: fp32 for every input type but fp64."""
    return 2.0**-53 if _name(dtype) == "float64" else 2.0**-24


def _bias_rows(bias: Tensor | None, b: int, h: int, rows: Tensor | slice) -> Tensor | None:
    """The rows (rows or 1, Lk or 1) in fp64 of one batch item and head of a bias that broadcasts."""
    if bias is None:
        return None
    one = bias[min(b, len(bias) - 1), min(h, bias.shape[1] - 1)].double()
    return one if len(one) == 1 else one[rows]


def _probabilities(
    q: Tensor, k: Tensor, visible: Tensor | None, scale: float, dtype: object, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """p (rows, Lk) in fp64 and the relative error (rows, 1) that rounding may leave in it; 0 in a row with no key."""
    scores = scale * (q @ k.T)
    largest = scores.abs().amax(-1, keepdim=True)
    if bias is not None:
        # The sum is rounded where it is larger than either part.
        scores = scores + bias
        largest = largest.maximum(scores.abs().amax(-1, keepdim=True))
    if visible is None:
        p = scores.softmax(-1)
    else:
        p = scores.masked_fill(~visible, -math.inf).softmax(-1)
        p = p.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    rounded = PROBABILITY_ROUNDOFF.get(_name(dtype), 0.0)
    return p, rounded + _roundoff(dtype) * (8 + 4 * largest)


def _bound(reference: Tensor, spread: Tensor, dtype: Tensor | object) -> Tensor:
    import torch

    info = torch.finfo(getattr(torch, _name(dtype)))
    return MARGIN * (info.eps / 2 * reference.abs() + spread) + info.smallest_normal * info.eps


def _forward_reference(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, dtype: object, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    p, p_error = _probabilities(q, k, visible, scale, dtype, bias)
    reference = p @ v
    return reference, _bound(reference, p_error * (p @ v.abs()), dtype)


def _worst(so_far: float, error: Tensor, bound: Tensor) -> float:
    """Largest error ÷ bound; infinite where the error is no number, so that it cannot pass."""
    share = (error / bound).nan_to_num(nan=math.inf)
    return max(so_far, float(share.max())) if share.numel() else so_far
