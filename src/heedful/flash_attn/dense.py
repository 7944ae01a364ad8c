"""Sequences of one length to a batch: `flash_attn_func` and its packed forms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from heedful.api import attention
from heedful.errors import wrong_type, wrong_value
from heedful.flash_attn import probabilities
from heedful.flash_attn.arguments import UNLIMITED, Window, scale_or_none, softcap_or_none, window_pattern
from heedful.patterns.arguments import describe


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention over (batch, length, heads, head dim) tensors, with flash-attn's arguments and meaning.

    Query i sits at key position i + seqlen_k - seqlen_q (bottom-right). A query that sees no key gets output 0.

    Args:
        q: (B, Lq, H, D) in float16, bfloat16, float32 or float64.
        k: (B, Lk, Hkv, D), where Hkv divides H: query head h reads key head h // (H / Hkv).
        v: (B, Lk, Hkv, Dv).
        dropout_p: probability with which each weight is dropped; the seed is drawn from torch's generator.
        softmax_scale: what q kᵀ is multiplied by; None is 1/sqrt(D).
        causal: whether a query sees no key after its own position.
        window_size: (left, right), the keys that a query sees before and after its own position, both inclusive; -1
            has no limit.
        softcap: bounds the scores smoothly to (-softcap, softcap) where it is above 0.
        alibi_slopes: (H,) or (B, H) in float32 or q's dtype; adds -slope · |i + Lk - Lq - j|.
        deterministic: True and False are the same: heedful's gradients always are.
        return_attn_probs: whether to return (out, softmax_lse, S_dmask).

    Returns:
        out (B, Lq, H, Dv); with return_attn_probs also softmax_lse (B, H, Lq), float32 (float64 for float64), -inf for
        a query that sees no key, through which gradients flow too; and S_dmask, an empty tensor without dropout, and
        with it (B, H, Lq, Lk), both lengths rounded up to a multiple of 128, in q's dtype: the softmax before dropout,
        negative where it was dropped, 0 where no pair is. S_dmask takes a second pass and has no gradient.

    Raises:
        ValueError, TypeError: an argument is wrong; the message has its name, what it got and what it takes.
    """
    pattern, scale, cap = window_pattern(window_size, causal), scale_or_none(softmax_scale), softcap_or_none(softcap)
    if return_attn_probs:
        out, lse, weights = probabilities.attend(
            attention, q, k, v, dropout_p, pattern=pattern, scale=scale, softcap=cap, alibi_slopes=alibi_slopes
        )
        return out, lse, probabilities.padded(weights, q, q.shape[1], k.shape[1])
    return attention(
        q,
        k,
        v,
        pattern=pattern,
        scale=scale,
        softcap=cap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        layout="blhd",
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` for keys and values in one tensor, kv (B, Lk, 2, Hkv, D), read where they lie."""
    k, v = unpacked("kv", kv, 2, "(batch, seqlen, 2, heads, headdim)", 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` for queries, keys and values in one tensor, qkv (B, L, 3, H, D), read where they lie."""
    q, k, v = unpacked("qkv", qkv, 3, "(batch, seqlen, 3, heads, headdim)", 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def unpacked(name: str, packed: Tensor, count: int, axes: str, ndim: int) -> tuple[Tensor, ...]:
    """The views of a packed tensor, whose axis -3 counts them.

    Raises:
        TypeError, ValueError: it is no tensor, or has another shape.
    """
    if not isinstance(packed, Tensor):
        raise wrong_type(name, describe(packed), "a torch.Tensor")
    if packed.ndim != ndim or packed.shape[-3] != count:
        raise wrong_value(name, f"shape {tuple(packed.shape)}", f"a shape {axes}")
    return packed.unbind(-3)
