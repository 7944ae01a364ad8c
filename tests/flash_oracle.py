"""What flash-attn's documentation says its functions give, pair by pair and sequence by sequence, in fp64."""

from __future__ import annotations

import torch
from tolerance import Expected, expected
from torch import Tensor


def allowed(q_length: int, k_length: int, causal: bool = False, window: tuple[int, int] = (-1, -1)) -> Tensor:
    """Which keys a query sees: from i + Lk - Lq - left to i + Lk - Lq + right, a causal one none after i + Lk - Lq."""
    position = torch.arange(q_length)[:, None] + k_length - q_length
    key = torch.arange(k_length)
    left, right = window
    pairs = torch.ones(q_length, k_length, dtype=torch.bool)
    if causal:
        pairs &= key <= position
    if left >= 0:
        pairs &= key >= position - left
    if right >= 0:
        pairs &= key <= position + right
    return pairs


def alibi(slopes: Tensor, q_length: int, k_length: int) -> Tensor:
    """-slope · |i + Lk - Lq - j| of slopes (H,) or (B, H): (B or 1, H, Lq, Lk)."""
    position = torch.arange(q_length)[:, None] + k_length - q_length
    distance = (position - torch.arange(k_length)).abs()
    return -slopes.reshape(-1, slopes.shape[-1], 1, 1) * distance


def sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    kept: Tensor | None = None,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> Expected:
    """What (B, L, H, D) tensors give, in index order (B, H, L, D), with bounds."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    lengths = q.shape[2], k.shape[2]
    return expected(
        q,
        k,
        v,
        pattern=allowed(*lengths, causal, window),
        bias=None if slopes is None else alibi(slopes.float() if q.dtype != torch.float64 else slopes, *lengths),
        scale=scale,
        softcap=softcap or None,
        kept=kept,
        grad_out=None if grad_out is None else grad_out.transpose(1, 2),
        grad_lse=grad_lse,
    )


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (L, H, D), whose first columns are turned by the angles of cos and sin at the positions (L,): complex numbers
    times complex numbers."""
    half = cos.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = x[..., : 2 * half].to(wide)
    pairs = pairs.unflatten(-1, (half, 2)) if interleaved else pairs.unflatten(-1, (2, half)).mT
    angle = torch.complex(cos[positions].to(wide), sin[positions].to(wide))[:, None]
    result = torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * angle)
    flat = result.flatten(-2) if interleaved else result.mT.flatten(-2)
    return torch.cat([flat.to(x.dtype), x[..., 2 * half :]], -1)
