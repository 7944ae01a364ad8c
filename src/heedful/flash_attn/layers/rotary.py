"""Rotary position embeddings, as `flash_attn.layers.rotary` has them.

Everywhere cos and sin are (positions, rotary_dim / 2), and the first rotary_dim columns of a head are turned:
neighbours with each other where `interleaved` (GPT-J), otherwise column r with rotary_dim / 2 + r (GPT-NeoX).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.errors import wrong_value
from heedful.flash_attn.rotation import check_tables, rotated
from heedful.ops import rope
from heedful.ops._dispatch import needs_gradient

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
]

Offsets = int | Tensor


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Offsets = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x with each token turned by its position.

    Args:
        x: (B, L, H, D), or with cu_seqlens packed sequences (total, H, D).
        inplace: whether x itself is turned, and returned.
        seqlen_offsets: position of a sequence's first token: an int, or an int tensor (B,).
        cu_seqlens: int (B + 1,), where each packed sequence begins, and where the last ends.
        max_seqlen: not needed; cu_seqlens has the lengths.

    Returns:
        x's shape and dtype.

    Raises:
        ValueError, TypeError: shapes do not fit, or cos and sin have too few positions.
    """
    check_tables(("cos", "sin"), cos, sin, x.shape[-1])
    if cu_seqlens is None:
        rows = _rows(cos, sin, x.shape[1], seqlen_offsets)
    else:
        rows = _packed_rows(cos, sin, x.shape[0], cu_seqlens, seqlen_offsets)
    if not inplace:
        return rotated(x, *rows, interleaved)
    if needs_gradient(x, cos, sin):
        turned = x[..., : 2 * cos.shape[1]]
        turned.copy_(rotated(turned, *rows, interleaved))
    else:
        rope(x, *rows, interleaved=interleaved, layout="blhd", inplace=True)
    return x


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turns queries and keys of qkv (B, L, 3, H, D), or of (B, L, num_heads_q + 2 Hkv, D), in place; keys by cos_k and
    sin_k where these are given. Returns qkv."""
    if qkv.ndim == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif qkv.ndim == 4 and num_heads_q is not None:
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : (num_heads_q + qkv.shape[2]) // 2]
    else:
        raise wrong_value("qkv", f"shape {tuple(qkv.shape)}", "5 dimensions, or 4 with num_heads_q")
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    apply_rotary_emb(k, cos_k, sin_k, interleaved, True, seqlen_offsets)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: Offsets = 0
) -> Tensor:
    """Turns the keys of kv (B, L, 2, H, D) in place. Returns kv."""
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(torch.nn.Module):
    """Turns queries and keys in place by angles that it makes as positions come up.

    Args:
        dim: columns of a head that are turned.
        base: the slowest pair turns by about 1 / base a position.
        interleaved: see the module.
        scale_base: not None also scales queries and keys with their distance (XPos).
        device: where the frequencies are made.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        columns = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (columns + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: Offsets = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """qkv as `apply_rotary_emb_qkv_` takes it, or q (B, L, H, D) beside kv (B, L, 2, Hkv, D); what was given is
        turned in place and returned. With a tensor as seqlen_offset, max_seqlen says how many positions come up."""
        length = max_seqlen
        if length is None and isinstance(seqlen_offset, int):
            length = qkv.shape[1] + seqlen_offset
        if length is not None:
            self._update_cos_sin_cache(length, qkv.device, qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise wrong_value("max_seqlen", None, "the number of positions, as seqlen_offset is a tensor")
        cos_k = cos if self._cos_k_cached is None else self._cos_k_cached
        sin_k = sin if self._sin_k_cached is None else self._sin_k_cached
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)

    # By the names of flash-attn's own, because models call or override them.
    def _compute_inv_freq(self, device: Any = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return self.base**-exponents

    def _update_cos_sin_cache(self, seqlen: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        have = self._cos_cached
        stale = have is None or have.device != device or have.dtype != dtype
        if not stale and seqlen <= self._seq_len_cached and not (self.training and have.is_inference()):  # type: ignore[union-attr]
            return
        self._seq_len_cached = seqlen
        # A model in bfloat16 has rounded its buffer, and products of large positions would show it.
        rounded = self.inv_freq.dtype != torch.float32
        inv_freq = self._compute_inv_freq(device) if rounded else self.inv_freq
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = positions[:, None] * inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        assert self.scale_base is not None
        scale = self.scale.to(angles.device) ** ((positions - seqlen // 2) / self.scale_base)[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)


def _rows(cos: Tensor, sin: Tensor, length: int, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """cos and sin of `length` tokens: (length, R), or (B, length, R) for an offset each."""
    if isinstance(offsets, Tensor):
        return _at(cos, sin, offsets[:, None] + torch.arange(length, device=offsets.device))
    if offsets < 0 or offsets + length > len(cos):
        raise wrong_value("cos", f"{len(cos)} positions", f"{offsets + length}, as many as come up")
    return cos.narrow(0, offsets, length), sin.narrow(0, offsets, length)


def _packed_rows(cos: Tensor, sin: Tensor, total: int, cu_seqlens: Tensor, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """cos and sin of the tokens of packed sequences: (total, R)."""
    firsts = cu_seqlens[:-1] if not isinstance(offsets, Tensor) else cu_seqlens[:-1] - offsets
    firsts = firsts.repeat_interleave(cu_seqlens.diff(), output_size=total)
    positions = torch.arange(total, device=firsts.device) - firsts
    return _at(cos, sin, positions if isinstance(offsets, Tensor) else positions + offsets)


def _at(cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    if positions.numel() and positions.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = (int(end) for end in positions.aminmax())
        if least < 0 or most >= len(cos):
            raise wrong_value("cos", f"{len(cos)} positions", f"the positions that come up, {least} to {most}")
    return cos[positions], sin[positions]
