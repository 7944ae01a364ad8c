"""Sequences of different lengths, packed one after the other: `flash_attn_varlen_func` and its packed forms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heedful.api import attention
from heedful.arguments import prepare
from heedful.choose import choose
from heedful.errors import wrong_type, wrong_value
from heedful.flash_attn import paging, probabilities
from heedful.flash_attn.arguments import UNLIMITED, Window, scale_or_none, softcap_or_none, window_pattern
from heedful.flash_attn.calls import check_slopes, run
from heedful.flash_attn.dense import unpacked
from heedful.flash_attn.packing import Packing, check_longest, packing_of
from heedful.patterns import Pattern
from heedful.patterns.arguments import describe
from heedful.problem import Attention


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention within each of the sequences that are packed into one, with flash-attn's arguments and meaning.

    Inside a sequence, queries and keys are aligned as in `flash_attn_func`: bottom-right. Sequences may be empty. What
    lies behind the last sequence takes no part, and its output is 0.

    Args:
        q: (total_q, H, D).
        k: (total_k, Hkv, D), or with block_table a pool of blocks (blocks, P, Hkv, D).
        v: (total_k, Hkv, Dv), or a pool (blocks, P, Hkv, Dv).
        cu_seqlens_q: int32 (sequences + 1,): 0, then where each sequence ends in the queries.
        cu_seqlens_k: the same for the keys; with block_table its differences are the sequences' lengths.
        max_seqlen_q: at least the longest sequence's queries; nothing else depends on it but S_dmask's shape.
        max_seqlen_k: not needed: cu_seqlens_k has the lengths. S_dmask's shape depends on it.
        alibi_slopes: (H,) or (sequences, H); distances are those inside a sequence.
        block_table: int32 (sequences, n), the block of each P keys of a sequence. P is any number. Such a call has no
            gradients, as in flash-attn: it runs, and a backward pass through it is refused.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs: as `flash_attn_func`.

    Returns:
        out (total_q, H, Dv); with return_attn_probs also softmax_lse (H, total_q) and S_dmask, as `flash_attn_func` has
        them; S_dmask is (sequences, H, max_seqlen_q, max_seqlen_k), both rounded up to a multiple of 128.

    Raises:
        ValueError, TypeError: an argument is wrong; the message has its name, what it got and what it takes.
    """
    within, scale, cap = window_pattern(window_size, causal), scale_or_none(softmax_scale), softcap_or_none(softcap)
    keys = 3 if block_table is None else 4
    for name, tensor, ndim in (("q", q, 3), ("k", k, keys), ("v", v, keys)):
        if not isinstance(tensor, Tensor) or tensor.ndim != ndim:
            raise _wrong_rank(name, tensor, ndim)
    if block_table is not None:
        if dropout_p:
            raise wrong_value("dropout_p", dropout_p, "0.0 with a block_table")
        attend_pages = paging.attend_outside_graphs if torch.compiler.is_compiling() else paging.attend_packed
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q
        out, lse = attend_pages(q, k, v, *ends, block_table, within, scale, cap, alibi_slopes)
        return (out, lse, q.new_empty(0)) if return_attn_probs else out
    packing = packing_of(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
    check_longest(packing, max_seqlen_q)
    attend: Callable[..., Any] = attention
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, q, packing.sequences, "sequences")
        # Where queries and keys lie alike, distances inside a sequence are those in the whole.
        if alibi_slopes.ndim == 2 or not packing.alike:
            attend = functools.partial(_attend_by_sequence, packing)
    q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    pattern = packing.documents(within)
    options: dict[str, Any] = {"pattern": pattern, "scale": scale, "softcap": cap, "alibi_slopes": alibi_slopes}
    if not return_attn_probs:
        return attend(q, k, v, layout="blhd", dropout_p=dropout_p, **options).squeeze(0)
    out, lse, weights = probabilities.attend(attend, q, k, v, dropout_p, **options)
    out, lse = out.squeeze(0), lse.squeeze(0)
    if weights is None:
        return out, lse, q.new_empty(0)
    if max_seqlen_k < packing.longest[1]:
        raise wrong_value("max_seqlen_k", max_seqlen_k, f"at least the longest sequence's keys, {packing.longest[1]}")
    _, head, query, key = weights.indices()
    sequence = packing.sequence_of_query[query]
    places = torch.stack([sequence, head, query - packing.cu_q[sequence], key - packing.cu_k[sequence]])
    shape = packing.sequences, q.shape[2], max_seqlen_q, max_seqlen_k
    return out, lse, probabilities.scattered(places, weights.values(), *shape)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` for keys and values in one tensor, kv (total_k, 2, Hkv, D), read where they lie."""
    k, v = unpacked("kv", kv, 2, "(total_k, 2, heads, headdim)", 4)
    ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash_attn_varlen_func(
        q, k, v, *ends, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` for one tensor, qkv (total, 3, H, D), read where it lies."""
    q, k, v = unpacked("qkv", qkv, 3, "(total, 3, heads, headdim)", 4)
    ends = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return flash_attn_varlen_func(
        q, k, v, *ends, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def _attend_by_sequence(
    packing: Packing,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor,
    dropout_p: float = 0.0,
    layout: str = "blhd",
    return_lse: bool = False,
    return_weights: bool | str = False,
) -> Tensor | Attention:
    """As `heedful.attention`, with ALiBi's slopes and distances those of each sequence."""
    call = prepare(
        q,
        k,
        v,
        pattern=pattern,
        causal=False,
        bias=None,
        alibi_slopes=None,
        scale=scale,
        softcap=softcap,
        sinks=None,
        dropout_p=dropout_p,
        cache=None,
        layout=layout,
        return_lse=return_lse,
        return_weights=return_weights,
    )
    slopes = alibi_slopes[packing.sequence_of_query].T if alibi_slopes.ndim == 2 else alibi_slopes[:, None]
    call.alibi_slopes, call.query_offset = slopes[None, :, :, None], packing.query_offset.to(q.device)
    features = call.problem.features | {"alibi"}
    if torch.is_grad_enabled() and alibi_slopes.requires_grad:
        features |= {"gradient"}
    call.problem = call.problem._replace(features=features)
    result = run(call, choose(call.problem))
    return result if return_lse or return_weights else result.out


def _wrong_rank(name: str, tensor: object, ndim: int) -> Exception:
    if not isinstance(tensor, Tensor):
        return wrong_type(name, describe(tensor), "a torch.Tensor")
    axes = "(tokens, heads, headdim)" if ndim == 3 else "(blocks, block size, heads, headdim)"
    return wrong_value(name, f"shape {tuple(tensor.shape)}", f"{ndim} dimensions, {axes}")
