"""Decoding against a cache that the caller owns: `flash_attn_with_kvcache`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from heedful.arguments import slopes_of_rank_4
from heedful.backend.base import Backend, Shortcut
from heedful.cache_kinds.store import columns
from heedful.cached import deciding
from heedful.choose import choose
from heedful.errors import wrong_type, wrong_value
from heedful.flash_attn import on_device
from heedful.flash_attn.arguments import UNLIMITED, Window, scale_or_none, softcap_or_none, window_pattern
from heedful.flash_attn.calls import cache_call, check_cache, check_slopes, run, without_backward
from heedful.flash_attn.held import Held
from heedful.flash_attn.rotation import check_tables, rotated
from heedful.kv_cache import for_queries
from heedful.patterns import Full, Pattern
from heedful.patterns.aligned import Aligned
from heedful.patterns.arguments import describe, integer

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch._C._is_any_autocast_enabled


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNLIMITED,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Writes new keys and values into a cache, in place, and attends to what each sequence holds then.

    The cache is read where it lies, as a whole, in pages or for a part of its sequences: nothing of it is copied. A
    sequence's last query is at the last of its keys (bottom-right). There are no gradients, as in flash-attn: a call
    with inputs that need one runs, and a backward pass through its result is refused.

    Args:
        q: (B, Lq, H, D) in float16, bfloat16, float32 or float64.
        k_cache: (caches, L, Hkv, D), or with block_table a pool of blocks (blocks, P, Hkv, D), P any number.
        v_cache: (caches, L, Hkv, Dv), or a pool (blocks, P, Hkv, Dv).
        k: (B, Lnew, Hkv, D), written behind the keys that each sequence holds; takes v and cache_seqlens.
        v: (B, Lnew, Hkv, Dv).
        rotary_cos, rotary_sin: (positions, rotary_dim / 2) in q's dtype or float32. The first rotary_dim columns of k
            and q are turned by their positions in the cache: cache_seqlens, cache_seqlens + 1, …. Where the call is
            neither causal nor has a window, all queries of a sequence are turned by position cache_seqlens. They take
            a k.
        cache_seqlens: how many keys each sequence holds before the call: int32 (B,), or one int for all; None is all
            that there is room for.
        cache_batch_idx: int32 (B,), the place of each sequence in the cache; None is 0 to B - 1. Not with block_table.
        cache_leftpad: int32 (B,), where each sequence begins in its cache; None is 0.
        block_table: int32 (B, n), the block of each P keys of a sequence. Entries behind its length may be anything.
        softmax_scale, causal, window_size, softcap: as `flash_attn_func`.
        rotary_interleaved: whether columns 2 r and 2 r + 1 are turned together, otherwise r and rotary_dim / 2 + r.
        alibi_slopes: (H,) or (B, H) in float32 or q's dtype.
        num_splits: 0 or more; the engine splits keys by its own rule, so that results do not depend on it.
        return_softmax_lse: whether to return (out, softmax_lse).

    On a GPU the contents of cache_seqlens, cache_batch_idx, cache_leftpad and block_table are not looked at: the call
    does not wait for the device, and as part of a CUDA graph follows what is written into them.

    Returns:
        out (B, Lq, H, Dv); with return_softmax_lse also softmax_lse (B, H, Lq) as `flash_attn_func` has it.

    Raises:
        ValueError, TypeError: an argument is wrong; the message has its name, what it got and what it takes. The cache
            has not changed then.
    """
    settings = (
        scale_or_none(softmax_scale),
        window_pattern(window_size, causal),
        softcap_or_none(softcap),
        bool(return_softmax_lse),
    )
    news, rotary = (k, v), (rotary_cos, rotary_sin, bool(rotary_interleaved))
    where = cache_seqlens, cache_batch_idx, cache_leftpad, block_table
    if num_splits != 0:
        integer("num_splits", num_splits, 0)
    if _is_dynamo_compiling():
        return _attend_outside_graphs(q, k_cache, v_cache, news, rotary, where, alibi_slopes, *settings)
    if not _is_grad_enabled():
        return _attend(q, k_cache, v_cache, news, rotary, where, alibi_slopes, *settings)
    with torch.no_grad():
        found = _attend(q, k_cache, v_cache, news, rotary, where, alibi_slopes, *settings)
    return without_backward("flash_attn_with_kvcache", found, q, k_cache, v_cache, k, v, alibi_slopes)


class _Plan:
    """What calls of one kind share, whose tensors' shapes and dtypes have been checked."""

    __slots__ = ("backends", "count", "pattern", "return_lse", "scale", "shortcuts", "softcap", "turns_each")

    def __init__(
        self, q: Tensor, k: Tensor | None, scale: float | None, within: Pattern, softcap: float | None, return_lse: bool
    ) -> None:
        self.scale, self.softcap, self.return_lse = scale, softcap, return_lse
        self.count = 0 if k is None else k.shape[1]
        self.pattern = for_queries(within, q.shape[1])
        # Whether each query is turned by a position of its own.
        self.turns_each = not isinstance(within, Full)
        # For slices of a length with so many bits: see `heedful.cached.deciding`.
        self.shortcuts: dict[int, Shortcut] = {}
        # The same for sequences with ends of their own, by whether they begin at places of their own and have pages.
        self.backends: dict[tuple[int, bool, bool], Backend] = {}


# Emptied when full.
_plans: dict[Hashable, _Plan] = {}
_MAX_PLANS = 1024


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    news: tuple[Tensor | None, Tensor | None],
    rotary: tuple[Tensor | None, Tensor | None, bool],
    where: tuple[int | Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    alibi_slopes: Tensor | None,
    scale: float | None,
    within: Pattern,
    softcap: float | None,
    return_lse: bool,
) -> Any:
    (k, v), (cos, sin, interleaved) = news, rotary
    tensors = q, k_cache, v_cache, k, v, cos, sin, alibi_slopes
    try:
        key: Hashable = (
            tuple([None if t is None else (t.shape, t.dtype, t.is_cpu or t.device) for t in tensors]),
            (scale, within.key, softcap, return_lse, where[0] is None),
        )
        plan = _plans.get(key)
    except AttributeError:
        # No tensor, which the checks name.
        plan = None
    if plan is None:
        _check(*tensors, where[0] is None)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        plan = _plans[key] = _Plan(q, k, scale, within, softcap, return_lse)
    if not (q.is_cpu or (not isinstance(where[0], Tensor) and all(given is None for given in where[1:]))):
        return on_device.attend(
            q, k_cache, v_cache, k, v, cos, sin, interleaved, plan.turns_each, where, alibi_slopes, plan.pattern,
            scale, softcap, return_lse,
        )  # fmt: skip
    held = Held(q.shape[0], k_cache, plan.count, *where)
    if k is not None and v is not None:
        if cos is not None and sin is not None:
            q, k = _turned(q, k, cos, sin, held, plan.turns_each, interleaved)
        held.write((k_cache, v_cache), (k, v))
    if held.plain:
        return _attend_to_slice(plan, held, q, k_cache, v_cache, alibi_slopes)
    return _attend_to_ends(plan, held, q, k_cache, v_cache, alibi_slopes)


# A graph would hold lengths as constants.
_attend_outside_graphs: Callable[..., Any] = torch.compiler.disable(
    _attend, reason="flash_attn_with_kvcache runs outside graphs: it looks at cache_seqlens"
)


def _attend_to_slice(
    plan: _Plan, held: Held, q: Tensor, k_cache: Tensor, v_cache: Tensor, alibi_slopes: Tensor | None
) -> Any:
    start, length = held.starts, held.longest + plan.count
    assert isinstance(start, int)
    length -= start
    keys = held.sequences(k_cache).narrow(1, start, length).transpose(1, 2)
    values = held.sequences(v_cache).narrow(1, start, length).transpose(1, 2)
    shortcut = plan.shortcuts.get(length.bit_length())
    if shortcut is None or _is_autocast_enabled():
        call = cache_call(
            q, keys, values, plan.pattern, length, plan.scale, plan.softcap, alibi_slopes, plan.return_lse
        )
        backend = choose(deciding(call.problem))
        shortcut = backend.shortcut(call)
        if shortcut is not None:
            plan.shortcuts[length.bit_length()] = shortcut
        found = run(call, backend)
        return (found.out, found.lse) if plan.return_lse else found.out
    if alibi_slopes is None:
        result = shortcut(q.transpose(1, 2), keys, values, ())
    else:
        result = shortcut(q.transpose(1, 2), keys, values, (), None, slopes_of_rank_4(alibi_slopes), None)
    if isinstance(result, Tensor):
        return result.transpose(1, 2)
    return (result.out.transpose(1, 2), result.lse) if plan.return_lse else result.out.transpose(1, 2)


def _attend_to_ends(
    plan: _Plan, held: Held, q: Tensor, k_cache: Tensor, v_cache: Tensor, alibi_slopes: Tensor | None
) -> Any:
    """Where sequences end, begin or lie at places of their own."""
    reach = held.longest + plan.count
    lengths = [held.lengths] if isinstance(held.lengths, int) else held.lengths
    stop = torch.tensor([length + plan.count for length in lengths], dtype=torch.int32)
    offset = torch.tensor([length + plan.count - q.shape[1] for length in lengths], dtype=torch.int32)
    start = None if held.starts == 0 else _int32(held.starts)
    if held.table is not None:
        keys, values, pages = k_cache, v_cache, held.table[:, : -(-reach // k_cache.shape[1])]
        k_length = pages.shape[1] * k_cache.shape[1]
    elif isinstance(held.places, int):
        keys, values, pages = held.sequences(k_cache), held.sequences(v_cache), None
    else:
        # A cache is a pool of blocks as long as its sequences, of which each item has one.
        keys, values, pages = k_cache, v_cache, _int32(held.places)[:, None]
    if held.table is None:
        keys, values, k_length = keys.narrow(1, 0, reach), values.narrow(1, 0, reach), reach
    pattern = Aligned(plan.pattern, offset, stop, start, reach)
    call = cache_call(
        q, keys.transpose(1, 2), values.transpose(1, 2), pattern, k_length, plan.scale, plan.softcap, alibi_slopes,
        plan.return_lse, pages, offset,
    )  # fmt: skip
    kind = k_length.bit_length(), start is None, pages is None
    backend = plan.backends.get(kind)
    if backend is None:
        backend = plan.backends[kind] = choose(deciding(call.problem))
    found = run(call, backend)
    return (found.out, found.lse) if plan.return_lse else found.out


def _turned(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, held: Held, turns_each: bool, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Queries and new keys, turned by their positions."""
    counts = q.shape[1] if turns_each else 1, k.shape[1]
    most = held.longest + max(counts)
    if most > len(cos):
        raise wrong_value("rotary_cos", f"{len(cos)} positions", f"{most}, as many as cache_seqlens, q and k come to")
    if q.shape[1] == counts[0] == counts[1] <= 16:
        # One turn of all heads, which for a decoding step takes 60 % of the time of two; for long ones they win.
        heads = q.shape[2], k.shape[2]
        both = rotated(torch.cat((q, k), 2), *_rows(cos, sin, held, counts[0]), interleaved)
        return both.narrow(2, 0, heads[0]), both.narrow(2, *heads)
    turned_q = rotated(q, *_rows(cos, sin, held, counts[0]), interleaved)
    return turned_q, rotated(k, *_rows(cos, sin, held, counts[1]), interleaved)


def _rows(cos: Tensor, sin: Tensor, held: Held, count: int) -> tuple[Tensor, Tensor]:
    """cos and sin at the next `count` positions of each item: (count, R) or (B, count, R)."""
    if isinstance(held.lengths, int):
        return cos.narrow(0, held.lengths, count), sin.narrow(0, held.lengths, count)
    positions = columns(held.lengths, count, cos.device)
    return cos[positions], sin[positions]


def _int32(numbers: int | list[int]) -> Tensor:
    return torch.tensor([numbers] if isinstance(numbers, int) else numbers, dtype=torch.int32)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    alibi_slopes: Tensor | None,
    no_lengths: bool,
) -> None:
    if not isinstance(q, Tensor):
        raise wrong_type("q", describe(q), "a torch.Tensor")
    if q.ndim != 4:
        raise wrong_value("q", f"shape {tuple(q.shape)}", "4 dimensions, (batch, seqlen, heads, headdim)")
    batch = q.shape[0]
    check_cache(("k_cache", "v_cache"), q, k_cache, v_cache)
    if (k is None) != (v is None):
        raise wrong_value("v" if v is None else "k", None, "a tensor, as the other of k and v is one")
    if k is not None and v is not None:
        if no_lengths:
            raise wrong_value("cache_seqlens", None, "the sequences' lengths, behind which k is written")
        check_cache(("k", "v"), q, k, v)
        for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
            wanted = (batch, k.shape[1], *cache.shape[2:])
            if new.shape != wanted:
                takes = f"({batch}, new keys, {', '.join(map(str, wanted[2:]))})"
                raise wrong_value(name, f"shape {tuple(new.shape)}", takes)
    if (cos is None) != (sin is None):
        raise wrong_value("rotary_sin" if sin is None else "rotary_cos", None, "a tensor, as the other of both is one")
    if cos is not None and sin is not None:
        if k is None:
            raise wrong_value("rotary_cos", "a tensor without k", "None where no new keys are written")
        check_tables(("rotary_cos", "rotary_sin"), cos, sin, q.shape[3])
        for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
            if table.dtype not in (q.dtype, torch.float32):
                raise wrong_type(name, f"dtype {table.dtype}", f"q's dtype, {q.dtype}, or torch.float32")
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, q, batch, "batch")
