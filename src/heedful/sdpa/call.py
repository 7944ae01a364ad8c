"""`scaled_dot_product_attention` with PyTorch's signature and semantics, run by heedful wherever it can."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter, functional
from torch.overrides import handle_torch_function

from heedful.api import attention, forgetters, make_shortcut
from heedful.arguments import DTYPES, autocast_dtype
from heedful.backend.base import Shortcut
from heedful.backend.native.prefer import engine_pays, load_table
from heedful.choose import UNAVAILABLE
from heedful.patterns import Causal, Mask, Pattern
from heedful.sdpa import elsewhere
from heedful.sdpa.masks import read_mask
from heedful.sdpa.shapes import (
    REFUSED,
    batch_of,
    mask_of_rank_4,
    memory_order,
    of_rank_4,
    would_reach_flash,
)

# PyTorch's function itself, whatever stands behind its public name by the time of a call.
torch_sdpa = torch._C._nn.scaled_dot_product_attention

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_are_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_flash_enabled = torch._C._get_flash_sdp_enabled
_has_torch_function: Any = torch._C._has_torch_function_variadic

_FIRST_MEETS_FIRST = Causal(0)
_NUMBERS = (float, int)
SMALL = "too small for the engine to pay off"
SLOW = "the engine has no fast kernels for this processor"


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
    """`torch.nn.functional.scaled_dot_product_attention` to the letter, on heedful's engine where that is faster.

    A mask is read at every call: one that is a band (causal, a window, with padding of keys or without) is never
    looked at again, and of any other the tiles that exclude every pair cost nothing. On a GPU masks are not read, and
    calls run on heedful's kernels where these were measured to be faster, otherwise on PyTorch's. A call that heedful
    does not run, such as one under a function transform or one with wrong arguments, is PyTorch's, with PyTorch's
    result or error.

    Args:
        query: (N, ..., Hq, L, E) in float16, bfloat16, float32 or float64; two dimensions or more.
        key: (N, ..., H, S, E).
        value: (N, ..., H, S, Ev).
        attn_mask: broadcasts to (N, ..., Hq, L, S): bool, True = attend, or a float tensor in the query's dtype or
            float32 that is added to the scores. A row without a key gives 0.
        dropout_p: the probability with which a weight is zeroed; drawn from torch's generator, as other numbers than
            PyTorch draws.
        is_causal: whether query i sees the keys up to i, the first query meeting the first key.
        scale: what the scores are multiplied by; None is 1/sqrt(E).
        enable_gqa: whether Hq may be a multiple of H.

    Returns:
        (N, ..., Hq, L, Ev), with the memory layout that PyTorch gives it.

    Raises:
        RuntimeError, TypeError, ValueError: as PyTorch, which is asked wherever an argument is not as above.
    """
    if _has_torch_function(query, key, value, attn_mask):
        if any(isinstance(t, Tensor) and not _is_plain(t) for t in (query, key, value, attn_mask)):
            # Such as torch.nn.attention.bias.CausalBias, which knows PyTorch's function by its public name.
            function = functional.scaled_dot_product_attention
            return function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return handle_torch_function(
            scaled_dot_product_attention, (query, key, value, attn_mask), query, key, value, attn_mask, dropout_p,
            is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    if not is_torchs_at_a_glance(query, key, value, attn_mask, dropout_p):
        found = attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if isinstance(found, Tensor):
            return found
    return call_torch(torch_sdpa, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def call_torch(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    # Reading arguments by name costs a tenth of a tiny call.
    if dropout_p == 0 and scale is None and enable_gqa is False and is_causal is False:
        return function(query, key, value) if attn_mask is None else function(query, key, value, attn_mask)
    return function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def is_torchs_at_a_glance(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> bool:
    """Whether calls of these sizes were seen to be PyTorch's because they are small."""
    if _is_dynamo_compiling():
        return False
    if _tracing_state() is not None:
        # torch.jit.trace warns of every size that is looked at.
        return True
    try:
        sizes = query.shape, key.shape, value.shape, query.dtype, attn_mask is None
        return sizes in _small and dropout_p == 0 and query.is_cpu
    except AttributeError:
        return False


def remember_small(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    """Calls of these sizes for which PyTorch has a kernel are PyTorch's from now on; what is small without a mask is
    small under one."""
    if len(_small) >= _MAX_REMEMBERED:
        _small.clear()
    for unmasked in (True, False) if attn_mask is None else (False,):
        _small.add((query.shape, key.shape, value.shape, query.dtype, unmasked))


# The engine makes good what stands in front of PyTorch's function here from so many pairs on: for 16-bit types, for
# wide ones, for 16-bit types under a mask (benchmarks/sdpa_door.py). Wide types need so many pairs in each head too.
FEW_PAIRS, FEW_PAIRS_WIDE, _FEW_PAIRS_UNDER_A_MASK = 512, 4096, 2048
_FEW_PAIRS_OF_A_HEAD = 1024


def few_pairs_behind(dtype: torch.dtype) -> int:
    """The same behind PyTorch's own function, where there is less to make good for wide types."""
    return FEW_PAIRS_WIDE // 2 if dtype.itemsize > 2 else FEW_PAIRS


# Below so many reading a mask costs more than it saves.
_FEWEST_READ = 1 << 15
# Up to so many pairs PyTorch writes a masked call out in less time than it takes to read the mask.
_FEW_MASKED_PAIRS = 4096


class Plan(NamedTuple):
    """What of a call its sizes, strides and flags decide."""

    batch: tuple[int, ...]
    """All sizes of the result in front of (L, Ev), the last of them its heads."""
    layout: str
    """The memory order of the result: "bhld", "blhd" or "other", where a copy is made."""
    four_dimensional: bool
    """Whether q, k and v are (B, H or a divisor, L, D) as they come."""
    tiny: bool
    """Whether PyTorch, although it has no kernel, is faster as long as no gradient is needed."""
    shortcut: Shortcut | None = None
    """`heedful.attention` past its checks, with the mask as it comes."""


_plans: dict[Hashable, Plan | str] = {}
_small: set[Hashable] = set()
_MAX_REMEMBERED = 4096
forgetters += [_plans.clear, _small.clear]


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
    """The result by heedful, or why the call is PyTorch's."""
    compiling = _is_dynamo_compiling()
    if not _flash_enabled():
        return "torch.nn.attention.sdpa_kernel leaves out the flash kernel, in whose place heedful stands"
    if not compiling:
        obstacle = find_obstacle(query, key, value, attn_mask)
        if obstacle is not None:
            return obstacle
    on_cpu = query.is_cpu
    if on_cpu and "native" in UNAVAILABLE:
        return f"heedful's engine cannot run here: {UNAVAILABLE['native']}"
    if not (
        type(is_causal) is bool
        and type(enable_gqa) is bool
        and type(dropout_p) in _NUMBERS
        and 0 <= dropout_p < 1
        and (scale is None or (type(scale) in _NUMBERS and -math.inf < scale < math.inf))
    ):
        return REFUSED
    if _is_autocast_enabled():
        cast_to = autocast_dtype(query.device.type)
        if cast_to is not None:
            query, key, value = (_cast(t, cast_to) for t in (query, key, value))
            if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32):
                attn_mask = _cast(attn_mask, cast_to)
    if not on_cpu:
        return elsewhere.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    arguments = query, key, value, attn_mask, dropout_p, is_causal, enable_gqa
    plan = _plan(*arguments) if compiling else _remembered_plan(*arguments, scale)
    if isinstance(plan, str):
        return plan
    batch, layout, four_dimensional, tiny, shortcut = plan
    if shortcut is not None and type(query) is Tensor and type(key) is Tensor and type(value) is Tensor:
        if attn_mask is None:
            return cast(Tensor, shortcut(query, key, value, ()))
        mask = mask_of_rank_4(attn_mask, batch)
        if attn_mask.dtype == torch.bool:
            return cast(Tensor, shortcut(query, key, value, (mask,)))
        return cast(Tensor, shortcut(query, key, value, (), mask, None, None))
    if tiny and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)):
        return SMALL
    q, k, v = (query, key, value) if four_dimensional else of_rank_4(query, key, value, batch)
    if is_causal and attn_mask is None:
        pattern: Pattern | None = _FIRST_MEETS_FIRST
    else:
        pattern = None
    bias: Tensor | None = None
    if attn_mask is not None:
        mask = attn_mask if attn_mask.ndim == 4 and len(batch) == 2 else mask_of_rank_4(attn_mask, batch)
        if attn_mask.dtype == torch.bool and compiling:
            pattern = Mask(mask)
        elif compiling or (attn_mask.requires_grad and torch.is_grad_enabled()):
            bias = mask
        else:
            pattern, bias = read_mask(mask, query.shape[-2], key.shape[-2])
        if is_causal:
            pattern = _FIRST_MEETS_FIRST if pattern is None else pattern & _FIRST_MEETS_FIRST
    if layout == "blhd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return attention(
            q, k, v, pattern=pattern, bias=bias, dropout_p=dropout_p, scale=scale, layout="blhd"
        ).transpose(1, 2)
    out = attention(q, k, v, pattern=pattern, bias=bias, dropout_p=dropout_p, scale=scale)
    if layout == "other":
        return torch.empty_like(query).copy_(out)
    if len(batch) == 2:
        return out
    return out[0] if len(batch) == 1 else out[0, 0] if not batch else out.unflatten(0, batch[:-1])


def _remembered_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    scale: float | None,
) -> Plan | str:
    gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    kind = (
        gradient,
        scale,
        _is_autocast_enabled(),
        query.shape,
        key.shape,
        value.shape,
        query.dtype,
        key.dtype,
        value.dtype,
        query.stride(),
        key.stride(-1) if key.ndim else 0,
        value.stride(-1) if value.ndim else 0,
        None if attn_mask is None else (attn_mask.shape, attn_mask.dtype, attn_mask.requires_grad),
        dropout_p == 0,
        is_causal,
        enable_gqa,
    )
    plan = _plans.get(kind)
    if plan is None:
        plan = _plan(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, gradient)
        if isinstance(plan, Plan) and not _is_autocast_enabled():
            plan = plan._replace(shortcut=_shortcut(plan, query, key, value, attn_mask, is_causal, scale))
        if len(_plans) >= _MAX_REMEMBERED:
            _plans.clear()
        _plans[kind] = plan
        # What is small without gradients is small with them, and not the other way round.
        if plan is SLOW or (plan is SMALL and not gradient):
            remember_small(query, key, value, attn_mask)
    return plan


def _shortcut(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Shortcut | None:
    if not plan.four_dimensional or plan.layout == "other":
        return None
    pattern: Pattern | Tensor | None = _FIRST_MEETS_FIRST if is_causal else None
    bias = None
    if mask is not None:
        pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        if pairs >= _FEWEST_READ or is_causal or mask.requires_grad:
            return None
        mask = mask_of_rank_4(mask, plan.batch)
        pattern, bias = (mask, None) if mask.dtype == torch.bool else (None, mask)
    q, k, v = (t.transpose(1, 2) if plan.layout == "blhd" else t for t in (query, key, value))
    return make_shortcut(q, k, v, pattern=pattern, bias=bias, scale=scale, layout=plan.layout)


def why_not_paying() -> str:
    """Of a call for which `engine_pays` said no."""
    return SLOW if load_table() is None else SMALL


def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    gradient: bool = False,
) -> Plan | str:
    dtype = query.dtype
    if dtype not in DTYPES or key.dtype != dtype or value.dtype != dtype:
        return REFUSED
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, dtype, torch.float32):
        return REFUSED
    reaches_flash = would_reach_flash(query, key, value, attn_mask, dropout_p, enable_gqa)
    if is_causal and attn_mask is not None and not reaches_flash:
        return REFUSED
    batch = batch_of(query, key, value, attn_mask, enable_gqa)
    if isinstance(batch, str):
        return batch
    if not reaches_flash:
        compiling = _is_dynamo_compiling()
        tiny = not compiling and attn_mask is not None and not attn_mask.requires_grad and dropout_p == 0
        pairs = math.prod(batch) * query.shape[-2] * key.shape[-2]
        return Plan(batch, "bhld", False, tiny and pairs < _FEW_MASKED_PAIRS)
    # In a graph heedful.attention chooses, which knows what to do with sizes that are not known yet.
    if not _is_dynamo_compiling():
        (items, heads, q_length, head_dim), (_, kv_heads, k_length, _) = query.shape, key.shape
        pairs, masked, wide = q_length * k_length, attn_mask is not None, dtype.itemsize > 2
        few = FEW_PAIRS_WIDE if wide else _FEW_PAIRS_UNDER_A_MASK if masked else FEW_PAIRS
        few_of_a_head = _FEW_PAIRS_OF_A_HEAD if masked and wide else 0
        if (
            items * heads * pairs < few
            or pairs < few_of_a_head
            or not engine_pays(dtype, items, heads, kv_heads, q_length, k_length, head_dim, gradient=gradient)
        ):
            return why_not_paying()
    return Plan(batch, memory_order(query), True, False)


def find_obstacle(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why a call outside of a compiled graph must be PyTorch's, by where it is made and by what kind of tensors."""
    for tensor in (query, key, value) if attn_mask is None else (query, key, value, attn_mask):
        if not _is_plain(tensor):
            return "an argument is no plain tensor"
        if not tensor.is_cpu if query.is_cpu else tensor.device != query.device:
            return "tensors are on different devices"
        if tensor.layout is not torch.strided or tensor.is_nested:
            return "a tensor is nested or sparse"
    if _are_transforms_active():
        return "a function transform (torch.func) is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if _dispatch_modes() > 0:
        return "operators are traced or counted"
    return None


def _is_plain(tensor: object) -> bool:
    return type(tensor) is Tensor or type(tensor) is Parameter


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
