"""What stands behind `torch.nn.functional.scaled_dot_product_attention` while heedful is activated.

Always the same function, so that graphs compiled during one activation serve the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function

from heedful.arguments import DTYPES
from heedful.backend.native.prefer import engine_pays
from heedful.sdpa import record
from heedful.sdpa.call import (
    attend,
    call_torch,
    few_pairs_behind,
    find_obstacle,
    is_torchs_at_a_glance,
    remember_small,
    torch_sdpa,
)
from heedful.sdpa.shapes import MAX_HEAD_DIM, would_reach_flash

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_flash_enabled = torch._C._get_flash_sdp_enabled
_has_torch_function: Any = torch._C._has_torch_function_variadic
_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

original: Callable[..., Tensor] = torch_sdpa
"""What stood behind the public name before."""
active = False
_left_behind = False
"""Whether somebody's own function, put in front of this one, still stands there after the last removal."""


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's function with heedful behind it; heedful.scaled_dot_product_attention has the arguments."""
    if _has_torch_function(query, key, value, attn_mask):
        return handle_torch_function(
            scaled_dot_product_attention, (query, key, value, attn_mask), query, key, value, attn_mask, dropout_p,
            is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    if active and not is_torchs_at_a_glance(query, key, value, attn_mask, dropout_p) and isinstance(query, Tensor):
        found = _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if found is not None:
            return found
    return call_torch(original, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """The result, or None where PyTorch's function is to run, which may well end in heedful's kernel."""
    if not (isinstance(key, Tensor) and isinstance(value, Tensor)):
        return None
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        return None
    if query.is_cpu and would_reach_flash(query, key, value, attn_mask, dropout_p, enable_gqa):
        if _is_dynamo_compiling() or query.dtype not in DTYPES:
            return None
        batch, heads, q_length, head_dim = query.shape
        pairs = batch * heads * q_length * key.shape[2]
        if pairs < few_pairs_behind(query.dtype) or not engine_pays(
            query.dtype, batch, heads, key.shape[1], q_length, key.shape[2], head_dim
        ):
            remember_small(query, key, value, None)
            return None
        if attn_mask is None or attn_mask.dtype is not torch.bool:
            return None
        if not _is_autocast_enabled():
            return _attend_to_bools(query, key, value, attn_mask, is_causal, scale)
    if record.recorder is None:
        found = attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    elif _is_dynamo_compiling():
        found = attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        record.add_traced(found if isinstance(found, str) else None)
    else:
        began = perf_counter()
        found = attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        what = found if isinstance(found, str) else record.WRITTEN_OUT
        record.recorder.add(what is not found, what, query, key, perf_counter() - began)
    return None if isinstance(found, str) else found


def _attend_to_bools(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, is_causal: bool, scale: float | None
) -> Tensor | None:
    """Past the float mask that PyTorch would make, a quarter of the memory and more: its kernel's place takes both."""
    dtype = query.dtype
    if (
        key.dtype is not dtype
        or value.dtype is not dtype
        or query.shape[3] > MAX_HEAD_DIM
        or type(is_causal) is not bool
        or not (scale is None or (type(scale) in (float, int) and -math.inf < scale < math.inf))
        or not _flash_enabled()
        or find_obstacle(query, key, value, mask) is not None
    ):
        return None
    try:
        out: Tensor = _flash(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
    except RuntimeError:
        # PyTorch's kernel, to which another thread may just have given its place back, takes no bools.
        return None
    return out


def put_in_place() -> None:
    """Put the function behind PyTorch's public name."""
    global active, original
    standing: Callable[..., Tensor] = functional.scaled_dot_product_attention
    # Somebody's function that has stood in front of this one is taken to call it still: put in front of that one, this
    # one would call itself.
    if standing is not scaled_dot_product_attention and (standing is torch_sdpa or not _left_behind):
        original = standing
        _set_public(scaled_dot_product_attention)
    active = True


def take_away() -> None:
    """Give the public name back; where somebody's own function stands in front, calls pass through from now on."""
    global active, _left_behind
    active = False
    if functional.scaled_dot_product_attention is scaled_dot_product_attention:
        _set_public(original)
        _left_behind = False
    else:
        _left_behind = True


def _set_public(function: Callable[..., Tensor]) -> None:
    functional.__dict__["scaled_dot_product_attention"] = function


def _let_torchscript_know() -> None:
    # A scripted module calls PyTorch's operator then, as it does without heedful.
    from torch.jit import _builtins

    _builtins._register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")


_let_torchscript_know()
