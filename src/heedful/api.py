"""The front door: `attention`, `explain`, `list_backends`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from heedful import cached
from heedful.arguments import (
    AllOptions,
    Options,
    autocast_dtype,
    of_rank_4,
    prepare,
    slopes_of_rank_4,
)
from heedful.backend.base import Backend, Shortcut
from heedful.choose import BACKENDS, UNAVAILABLE, choose, decide, fastest, reasons
from heedful.errors import UnsupportedError
from heedful.explanation import Explanation
from heedful.kv_cache import KVCache
from heedful.patterns import Pattern, moved
from heedful.problem import Attention, Call

# Bound to module globals because looking them up through torch costs a tenth of a microsecond each on every call.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_are_transforms_active = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled

# What to run for calls like one seen before; emptied when full, since a decoding loop never stops adding lengths.
_shortcuts: dict[Hashable, Callable[..., Tensor | Attention]] = {}
_MAX_SHORTCUTS = 4096
# What doors remember of earlier calls: functions that forget it.
forgetters: list[Callable[[], object]] = [moved.forget]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_weights: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_weights: bool | Literal["sparse"] = False,
    **options: Unpack[Options],
) -> Attention: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = False,
    return_weights: Literal[True, "sparse"],
    **options: Unpack[Options],
) -> Attention: ...
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[AllOptions]) -> Tensor | Attention: ...


def attention(
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
    dropout_p: float = 0.0,
    cache: KVCache | None = None,
    layout: str = "bhld",
    return_lse: bool = False,
    return_weights: bool | Literal["sparse"] = False,
    backend: str | None = None,
) -> Tensor | Attention:
    """Exact attention: softmax(scale · q kᵀ) v over the pairs of queries and keys that a pattern names.

    With s = scale · q kᵀ, in this order: softcap · tanh(s / softcap), then + bias, then ALiBi, then the pattern. A
    query with no key gets output 0 and log-sum-exp -inf. Statistics are float32 (float64 for float64 inputs), the
    output has q's dtype. Under autocast, q, k and v are cast as `torch.nn.functional.scaled_dot_product_attention`
    casts them.

    Args:
        q: (B, H, Lq, D) in float16, bfloat16, float32 or float64.
        k: (B, Hkv, Lk, D), where Hkv divides H: query head h reads key head h // (H / Hkv).
        v: (B, Hkv, Lk, Dv).
        pattern: which queries see which keys, a `heedful.Pattern`; a bool tensor that broadcasts to (B, H, Lq, Lk),
            True = attend, is `heedful.Mask` of it. None is `heedful.Full()`.
        causal: True is `heedful.Causal()`, with a pattern it is `pattern & heedful.Causal()`: the last query meets
            the last key, where SDPA's is_causal lets the first query meet the first key.
        bias: float tensor that broadcasts to (B, H, Lq, Lk), in q's dtype or float32; -inf excludes a pair.
        alibi_slopes: (H,) or (B, H) in q's dtype or float32; adds -slope · |i + Lk - Lq - j|.
        scale: what q kᵀ is multiplied by; None is 1/sqrt(D).
        softcap: bounds the scores smoothly to (-softcap, softcap).
        sinks: (H,) in q's dtype or float32: a score that joins each row's denominator and log-sum-exp, and brings
            no value.
        dropout_p: probability in [0, 1) with which each weight is zeroed, the others growing by 1 / (1 - dropout_p).
            The seed is drawn from torch's generator.
        cache: a `KVCache`: k and v are appended to it in place, and q attends to everything in it, its last query at
            the last position of each batch item; Lk above is the length of the longest item then.
        layout: "bhld" for the shapes above, "blhd" for q (B, Lq, H, D), k and v likewise, and the output. bias,
            log-sum-exp and weights keep (B, H, ...).
        return_lse: whether to return the log-sum-exp of each row, (B, H, Lq).
        return_weights: whether to return the weights, (B, H, Lq, Lk), after dropout, in q's dtype. "sparse" is for a
            coalesced sparse COO tensor of that shape that holds the attended pairs alone; a gradient that arrives
            through it is made dense.
        backend: name of a backend out of `heedful.list_backends()` that must run the call; None picks the best.

    Returns:
        The output, (B, H, Lq, Dv); with return_lse or return_weights an `Attention(out, lse, weights)`, None for what
        was not asked for.

    Raises:
        ValueError, TypeError: an argument is wrong; the message has its name, what it got and what it takes.
        UnsupportedError: no backend, or not the one asked for, can run the call; `.reasons` says why.
    """
    if cache is not None:
        return (cached.attend_outside_graphs if _is_dynamo_compiling() else cached.attend)(
            q,
            k,
            v,
            cache,
            pattern=pattern,
            causal=causal,
            bias=bias,
            alibi_slopes=alibi_slopes,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout_p=dropout_p,
            layout=layout,
            return_lse=return_lse,
            return_weights=return_weights,
            backend=backend,
        )
    key = shortcut = failure = None
    if (
        not _is_dynamo_compiling()
        and type(q) is Tensor
        and type(k) is Tensor
        and type(v) is Tensor
        and not _is_autocast_enabled()
        and not _are_transforms_active()
        and forward_ad._current_level < 0
    ):
        plain = bias is None and alibi_slopes is None and sinks is None
        try:
            if pattern is None:
                seen: Hashable = None
            elif type(pattern) is Tensor:
                seen = pattern.shape, pattern.dtype, pattern.is_cpu or pattern.device
            else:
                seen = pattern.key  # type: ignore[union-attr]
            key = (
                q.shape,
                k.shape,
                v.shape,
                q.dtype,
                (q.is_cpu and k.is_cpu and v.is_cpu) or (q.device, k.device, v.device),
                _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
                seen,
                causal,
                scale,
                softcap,
                dropout_p,
                layout,
                return_lse,
                return_weights,
                backend,
                plain
                or (
                    _kind(bias)  # type: ignore[arg-type]
                    if alibi_slopes is None and sinks is None
                    else (
                        bias is None or _kind(bias),
                        alibi_slopes is None or _kind(alibi_slopes),
                        sinks is None or _kind(sinks),
                    )
                ),
            )
            shortcut = _shortcuts.get(key)
        except (TypeError, AttributeError, RuntimeError):
            # An argument that the checks below refuse.
            key = None
        if shortcut is not None:
            try:
                if plain:
                    return shortcut(q, k, v, pattern)
                return shortcut(q, k, v, pattern, bias, alibi_slopes, sinks)
            except Exception as error:
                # Where an argument is at fault, such as a dtype of k other than q's, the checks below name it.
                failure = error
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
        cache=None,
        layout=layout,
        return_lse=return_lse,
        return_weights=return_weights,
    )
    if failure is not None:
        raise failure
    chosen = choose(call.problem, backend)
    # A mask from another device is moved by the long way alone.
    if key is not None and not (type(pattern) is Tensor and pattern.device != q.device):
        _remember(key, chosen, call, spelled_out=type(pattern) is Tensor)
    if autocast_dtype(call.problem.device_type) is None:
        result = chosen.run(call)
    else:
        with torch.autocast(call.problem.device_type, enabled=False):
            result = chosen.run(call)
    out = result.out.transpose(1, 2) if call.blhd else result.out
    # Not by _replace, which torch 2.11 cannot trace.
    return Attention(out, result.lse, result.weights) if return_lse or return_weights else out


def make_shortcut(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[AllOptions]) -> Shortcut | None:
    """What `attention` does with such arguments past its checks, for doors that look at further ones themselves: on q,
    k and v in index order (B, H, L, D), whatever the layout."""
    arguments = {**(attention.__kwdefaults__ or {}), **options}
    del arguments["backend"]
    call = prepare(q, k, v, **arguments)
    return choose(call.problem).shortcut(call)


def explain(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[AllOptions]) -> Explanation:
    """What `heedful.attention` would run for the same arguments, and why not the others; runs nothing.

    Returns:
        An `Explanation` with `.backend`, `.reasons` and `.notes`, which `print` shows as a table.

    Raises:
        ValueError, TypeError: as `heedful.attention`. What it would raise UnsupportedError for has `.backend` None.
    """
    defaults = attention.__kwdefaults__ or {}
    unknown = sorted(options.keys() - defaults.keys())
    if unknown:
        raise TypeError(f"explain() got an unexpected keyword argument {unknown[0]!r}")
    arguments = {**defaults, **options}
    requested = arguments.pop("backend")
    cache = arguments["cache"]
    state = cache.state() if isinstance(cache, KVCache) else None
    try:
        call = prepare(q, k, v, **arguments)
    finally:
        if state is not None:
            cache.restore(state)
    problem = call.problem
    deciding = problem if cache is None else cached.deciding(problem)
    found = reasons(deciding)
    try:
        backend = decide(deciding, requested, found)
    except UnsupportedError:
        backend = None
    notes = []
    cast_to = autocast_dtype(problem.device_type)
    if cast_to is not None and q.dtype != cast_to:
        notes.append(f"autocast casts q, k and v to {cast_to}")
    if problem.empty:
        notes.append("there is nothing to compute: the result is zero or has no elements")
    elif backend is not None:
        notes += backend.notes(problem)
        best = fastest(problem)
        if requested is None and backend.name != best and not found[best]:
            notes.append(f"{backend.name} is measured to be faster than {best} for such a call")
    if backend is not None and requested is not None:
        notes.append(f"backend={requested!r} was asked for")
    return Explanation(
        None if backend is None else backend.name,
        found,
        notes,
        problem,
        repr(call.pattern),
        call.pattern.density(problem.q_length, problem.k_length),
    )


class BackendStatus(NamedTuple):
    """One backend of this installation: whether it can run here at all, and if not, why."""

    name: str
    available: bool
    reason: str | None


def list_backends() -> tuple[BackendStatus, ...]:
    """Every backend, the fastest first: available here, or why not."""
    return tuple(BackendStatus(name, name not in UNAVAILABLE, UNAVAILABLE.get(name)) for name in BACKENDS)


def clear_caches() -> None:
    """Forget what was chosen for earlier calls, and free the memory that backends keep between calls."""
    _shortcuts.clear()
    cached.shortcuts.clear()
    for forget in forgetters:
        forget()
    for name, backend in BACKENDS.items():
        if name not in UNAVAILABLE:
            backend.forget()


def _remember(key: Hashable, chosen: Backend, call: Call, spelled_out: bool) -> None:
    shortcut = chosen.shortcut(call)
    if shortcut is None:
        return
    if len(_shortcuts) >= _MAX_SHORTCUTS:
        _shortcuts.clear()
    _shortcuts[key] = _from_arguments(shortcut, call, spelled_out)


def _kind(tensor: Tensor) -> Hashable:
    """What of a bias, slopes or sinks decides how a call runs."""
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        raise TypeError
    return (
        tensor.shape,
        tensor.dtype,
        tensor.is_cpu or tensor.device,
        tensor.requires_grad and _is_grad_enabled(),
    )


def _from_arguments(shortcut: Shortcut, call: Call, spelled_out: bool) -> Callable[..., Tensor | Attention]:
    """The shortcut for tensors and a pattern as the caller has them: any layout, operands not yet checked, or a mask of
    a shape that was, spelled_out.

    Nothing that outlives this holds the call, whose tensors it would keep alive.
    """
    problem, blhd = call.problem, call.blhd
    slots, device = problem.schedule.slots, "cpu" if problem.device_type == "cpu" else call.query.device
    sizes = problem.batch, problem.heads, problem.q_length, problem.k_length, device
    if not blhd and call.alibi_slopes is None and call.sinks is None:
        # Each kind has a function of its own: a general one costs a microsecond more.
        if call.bias is None:
            if spelled_out:
                return lambda q, k, v, mask: shortcut(q, k, v, (of_rank_4(mask),))
            if slots:
                return lambda q, k, v, pattern: shortcut(q, k, v, pattern.fitted(*sizes))
            return lambda q, k, v, pattern: shortcut(q, k, v, ())
        if spelled_out:
            return lambda q, k, v, mask, bias, *_: shortcut(q, k, v, (of_rank_4(mask),), of_rank_4(bias))
        if slots:
            return lambda q, k, v, pattern, bias, *_: shortcut(q, k, v, pattern.fitted(*sizes), of_rank_4(bias))
        return lambda q, k, v, pattern, bias, *_: shortcut(q, k, v, (), of_rank_4(bias))

    def run(q: Tensor, k: Tensor, v: Tensor, pattern: Any, *extras: Tensor | None) -> Tensor | Attention:
        # causal=True changes the atoms, not the operands.
        operands = (of_rank_4(pattern),) if spelled_out else pattern.fitted(*sizes) if slots else ()
        if extras:
            bias, alibi_slopes, sinks = extras
            extras = None if bias is None else of_rank_4(bias), slopes_of_rank_4(alibi_slopes), sinks
        if not blhd:
            return shortcut(q, k, v, operands, *extras)
        result = shortcut(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), operands, *extras)
        if isinstance(result, Tensor):
            return result.transpose(1, 2)
        return result._replace(out=result.out.transpose(1, 2))

    return run
