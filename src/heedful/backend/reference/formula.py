"""The formula of attention, written for reading: everything else in heedful is compared with this function."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    query_offset: Tensor | None = None,
    sinks: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, Lq, Dv), log-sum-exp (B, H, Lq) and weights (B, H, Lq, Lk), all fp64.

    query is (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv); mask, bias and alibi_slopes broadcast to
    (B, H, Lq, Lk); query_offset is (B or 1,) or (B or 1, Lq), None for Lk - Lq; sinks is (H,); kept is what dropout
    multiplies the weights by.
    """
    heads, q_length = query.shape[1:3]
    kv_heads, k_length = key.shape[1:3]
    if bias is not None:
        mask = mask & (bias != -torch.inf)
    # What no pair needs may hold anything, NaN too, and must touch neither results nor gradients.
    query = query.double().where(mask.any(-1, keepdim=True), 0.0)
    used = mask.any(2).any(1)[:, None, :, None]
    key = key.double().where(used, 0.0).repeat_interleave(heads // kv_heads, 1)
    value = value.double().where(used, 0.0).repeat_interleave(heads // kv_heads, 1)

    scores = scale * query @ key.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if alibi_slopes is not None:
        offset = k_length - q_length if query_offset is None else query_offset.reshape(len(query_offset), 1, -1, 1)
        position = torch.arange(q_length, device=query.device)[:, None] + offset
        distance = (position - torch.arange(k_length, device=query.device)).abs()
        scores = scores - alibi_slopes.double() * distance
    scores = scores.where(mask, -torch.inf)

    sink = query.new_full((1, 1, 1, 1), -torch.inf) if sinks is None else sinks.double().view(1, -1, 1, 1)
    sink = sink.expand(*scores.shape[:3], 1)
    peak = torch.cat([scores, sink], -1).detach().amax(-1, keepdim=True)
    peak = peak.where(peak != -torch.inf, 0.0)
    exponentials = torch.exp(scores - peak)
    total = exponentials.sum(-1, keepdim=True) + torch.exp(sink - peak)
    present = total != 0
    total = total.where(present, 1.0)
    lse = (peak + total.log()).where(present, -torch.inf).squeeze(-1)
    weights = exponentials / total
    if kept is not None:
        weights = weights * kept
    return weights @ value, lse, weights
