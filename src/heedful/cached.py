"""A call of `heedful.attention` with a cache: what is new is written, then q attends to all that is there."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from heedful.arguments import autocast_dtype, prepare, resolve_pattern
from heedful.backend.base import Backend
from heedful.choose import choose
from heedful.kv_cache import KVCache
from heedful.patterns import Pattern
from heedful.problem import Attention, Call, Problem

_is_autocast_enabled = torch._C._is_any_autocast_enabled
_are_transforms_active = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled

# What to run on q, k, v, a pattern and a cache for calls like one seen before; emptied when full.
shortcuts: dict[Hashable, Callable[[Tensor, Tensor, Tensor, Pattern, KVCache], Tensor | Attention]] = {}
_MAX_SHORTCUTS = 4096


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    *,
    pattern: Pattern | Tensor | None,
    causal: bool,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    layout: str,
    return_lse: bool,
    return_weights: bool | Literal["sparse"],
    backend: str | None,
) -> Tensor | Attention:
    """`heedful.attention` with `cache=`; a call that fails leaves the cache as it was."""
    key = failure = None
    if (
        type(cache) is KVCache
        and type(q) is Tensor
        and type(k) is Tensor
        and type(v) is Tensor
        and bias is None
        and alibi_slopes is None
        and sinks is None
        and not _is_autocast_enabled()
        and not _are_transforms_active()
        and not (_is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and forward_ad._current_level < 0
    ):
        blhd = layout == "blhd"
        try:
            key = (
                q.shape,
                k.shape,
                v.shape,
                q.dtype,
                q.is_cpu or q.device,
                cache.form,
                # A choice for all lengths between two powers of 2: see `deciding`.
                (len(cache) + k.shape[1 if blhd else 2]).bit_length(),
                pattern if pattern is None else pattern.key,  # type: ignore[union-attr]
                causal,
                scale,
                softcap,
                dropout_p,
                layout,
                return_lse,
                return_weights,
                backend,
            )
            shortcut = shortcuts.get(key)
        except (TypeError, AttributeError, RuntimeError, IndexError):
            # A tensor as pattern, or an argument that the checks below refuse.
            key = shortcut = None
        if shortcut is not None:
            state = cache.state()
            try:
                if not blhd:
                    return shortcut(q, k, v, pattern, cache)  # type: ignore[arg-type]
                result = shortcut(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), pattern, cache)  # type: ignore[arg-type]
                if isinstance(result, Tensor):
                    return result.transpose(1, 2)
                return result._replace(out=result.out.transpose(1, 2))
            except Exception as error:
                # Where an argument is at fault, the checks below name it.
                cache.restore(state)
                failure = error
    state = cache.state() if isinstance(cache, KVCache) else None
    try:
        call = prepare(
            q,
            k,
            v,
            pattern=pattern,
            causal=causal,
            bias=bias,
            alibi_slopes=alibi_slopes,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout_p=dropout_p,
            cache=cache,
            layout=layout,
            return_lse=return_lse,
            return_weights=return_weights,
        )
        if failure is not None:
            raise failure
        problem = call.problem
        chosen = choose(deciding(problem), backend)
        if key is not None and call.pattern.by_position and deciding(problem).k_length > problem.q_length:
            if len(shortcuts) >= _MAX_SHORTCUTS:
                shortcuts.clear()
            shortcuts[key] = _shortcut(chosen, call, causal, cache)
        if autocast_dtype(problem.device_type) is None:
            result = chosen.run(call)
        else:
            with torch.autocast(problem.device_type, enabled=False):
                result = chosen.run(call)
    except BaseException:
        if state is not None:
            cache.restore(state)
        raise
    result = _narrowed(result, call, cache)
    out = result.out.transpose(1, 2) if call.blhd else result.out
    return result._replace(out=out) if return_lse or return_weights else out


# A graph would hold the lengths as constants, and write where the cache was when it was traced.
attend_outside_graphs: Callable[..., Any] = torch.compiler.disable(
    attend, reason="heedful.attention with a cache= runs outside graphs: a KVCache keeps its lengths in Python"
)


def deciding(problem: Problem) -> Problem:
    """The problem that a backend is chosen by: its keys rounded down to a power of 2, so that the choice, and with it
    the bits of results, follow from sizes and not from which step came first."""
    if problem.k_length == 0:
        return problem
    return problem._replace(k_length=1 << (problem.k_length.bit_length() - 1))


def _narrowed(result: Attention, call: Call, cache: KVCache) -> Attention:
    """The result without the weights' columns of what the last page has room for."""
    weights, length = result.weights, len(cache)
    if weights is None or call.problem.k_length == length:
        return result
    if weights.is_sparse:
        size = (*weights.shape[:3], length)
        weights = torch.sparse_coo_tensor(
            weights.indices(), weights.values(), size, is_coalesced=True, check_invariants=False
        )
    else:
        weights = weights[..., :length]
    return result._replace(weights=weights)


def _shortcut(
    chosen: Backend, call: Call, causal: bool, cache: KVCache
) -> Callable[[Tensor, Tensor, Tensor, Pattern, KVCache], Tensor | Attention]:
    """For further calls that differ from this one in tensors and in the cache's lengths. It does not hold the call,
    whose tensors it would keep alive."""
    problem, q_length = call.problem, call.problem.q_length
    scale, softcap, dropout_p, blhd = call.scale, call.softcap, call.dropout_p, call.blhd
    on_slices = chosen.shortcut(call) if cache.is_plain else None
    more_than_out = bool(problem.features & {"lse", "weights", "sparse_weights"})

    def run_static(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, cache: KVCache) -> Tensor | Attention:
        cache.append(k, v)
        return on_slices(q, *cache.slices(), ())  # type: ignore[misc]

    def run(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, cache: KVCache) -> Tensor | Attention:
        cache.append(k, v)
        held = cache.hold(resolve_pattern(pattern, causal), q_length)
        now = Call(
            problem._replace(k_length=held.reach),
            q,
            held.key,
            held.value,
            held.pattern,
            scale,
            softcap=softcap,
            dropout_p=dropout_p,
            blhd=blhd,
            pages=held.pages,
            query_offset=held.query_offset,
        )
        result = _narrowed(chosen.run(now), now, cache)
        return result if more_than_out else result.out

    return run if on_slices is None or problem.schedule.slots else run_static
