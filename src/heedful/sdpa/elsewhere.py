"""Calls of PyTorch's `scaled_dot_product_attention` on tensors that are not on the CPU.

A mask is not read here, which would wait for the device. heedful runs what one of its own backends for the device
supports and is measured to be faster at; the rest is PyTorch's, its flash and cuDNN kernels included.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor

from heedful.api import attention, forgetters
from heedful.arguments import DTYPES, prepare
from heedful.backend.base import Backend, Shortcut
from heedful.choose import BACKENDS, UNAVAILABLE, decide, reasons
from heedful.patterns import Causal, Pattern
from heedful.problem import Problem
from heedful.sdpa.shapes import REFUSED, batch_of, mask_of_rank_4, memory_order, of_rank_4

FASTER = "PyTorch's kernels are measured to be faster for such calls"
_FIRST_MEETS_FIRST = Causal(0)
# PyTorch's own, and the specification, which is for checking.
_NOT_OURS = ("sdpa", "reference")

_is_autocast_enabled = torch._C._is_any_autocast_enabled
_plans: dict[Hashable, Shortcut | str | None] = {}
_MAX_REMEMBERED = 4096
forgetters.append(_plans.clear)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | str:
    """The result by heedful, or why the call is PyTorch's; arguments are tensors of one device, numbers and bools."""
    compiling = torch.compiler.is_dynamo_compiling()
    kind: Hashable = None
    if not compiling:
        kind = (
            query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype, query.device, query.stride(),
            torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
            None if attn_mask is None else (attn_mask.shape, attn_mask.dtype, attn_mask.requires_grad),
            dropout_p, is_causal, scale, enable_gqa, _is_autocast_enabled(),
        )  # fmt: skip
        plan = _plans.get(kind)
        if isinstance(plan, str):
            return plan
        if plan is not None:
            return cast(Tensor, plan(query, key, value, ()))
    call = _arguments(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if isinstance(call, str):
        _remember(kind, call)
        return call
    q, k, v, batch, options = call
    options |= {"dropout_p": dropout_p, "scale": scale}
    blhd = memory_order(query) == "blhd" if query.ndim == 4 else False
    if blhd:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    options["layout"] = "blhd" if blhd else "bhld"
    if compiling or kind not in _plans:
        defaults = {**(attention.__kwdefaults__ or {}), **options}
        del defaults["backend"]
        prepared = prepare(q, k, v, **defaults)
        backend = ours(prepared.problem)
        if isinstance(backend, str):
            _remember(kind, backend)
            return backend
        plain = attn_mask is None and query.ndim == key.ndim == 4 and len(batch) == 2 and not _is_autocast_enabled()
        plain = plain and key.shape[0] == value.shape[0] == query.shape[0] and key.shape[1] == value.shape[1]
        _remember(kind, backend.shortcut(prepared) if plain and not compiling else None)
    out: Tensor = attention(q, k, v, **options)
    if blhd:
        out = out.transpose(1, 2)
    if len(batch) == 2:
        return out
    return out[0] if len(batch) == 1 else out[0, 0] if not batch else out.unflatten(0, batch[:-1])


def ours(problem: Problem) -> Backend | str:
    """The backend of heedful's own that is to run a problem, or why there is none."""
    found = reasons(problem)
    name = decide(problem, None, found).name
    if name not in _NOT_OURS:
        return BACKENDS[name]
    for_device = [
        backend.name
        for backend in BACKENDS.values()
        if backend.name not in _NOT_OURS and (backend.devices is None or problem.device_type in backend.devices)
    ]
    if not for_device:
        return f"heedful has no backend of its own for {problem.device_type} tensors"
    best = for_device[0]
    if best in UNAVAILABLE:
        return f"heedful's {best} backend cannot run here: {UNAVAILABLE[best]}"
    return f"heedful's {best} backend {'; '.join(found[best])}" if found[best] else FASTER


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], dict[str, Any]] | str:
    """q, k and v of rank 4, all sizes of the result in front of (L, Ev), and what they mean to `heedful.attention`."""
    dtype = query.dtype
    if dtype not in DTYPES or key.dtype != dtype or value.dtype != dtype:
        return REFUSED
    if attn_mask is not None and (is_causal or attn_mask.dtype not in (torch.bool, dtype, torch.float32)):
        return REFUSED
    if type(dropout_p) not in (float, int) or not 0 <= dropout_p < 1 or math.isnan(dropout_p):
        return REFUSED
    batch = batch_of(query, key, value, attn_mask, enable_gqa)
    if isinstance(batch, str):
        return batch
    pattern: Pattern | Tensor | None = _FIRST_MEETS_FIRST if is_causal else None
    bias: Tensor | None = None
    if attn_mask is not None:
        mask = mask_of_rank_4(attn_mask, batch)
        pattern, bias = (mask, None) if attn_mask.dtype == torch.bool else (None, mask)
    return *of_rank_4(query, key, value, batch), batch, {"pattern": pattern, "bias": bias}


def _remember(kind: Hashable, plan: Shortcut | str | None) -> None:
    if kind is None:
        return
    if len(_plans) >= _MAX_REMEMBERED:
        _plans.clear()
    _plans[kind] = plan
