"""PyTorch's own `scaled_dot_product_attention` as a backend."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.backend.base import Backend, Shortcut
from heedful.patterns import Causal, Full, Pattern
from heedful.patterns.schedule import Schedule
from heedful.problem import Attention, Call, Problem, known

# PyTorch's function itself, whatever stands behind its public name by the time of a call.
_sdpa = torch._C._nn.scaled_dot_product_attention

_FULL = Full().schedule
_CAUSAL = Causal().schedule
_TOP_LEFT = Causal(0).schedule


class Lowering(NamedTuple):
    """How a problem's pattern is told to SDPA."""

    dense: bool
    """As a mask of Lq x Lk."""
    is_causal: bool = False
    k_length: int | None = None
    """Keys from here on are attended by no query, and are cut off; None keeps all."""
    mask: Tensor | None = None
    """(1, 1, Lq, Lk), 0 or -inf, of few pairs that never change."""


class SdpaBackend(Backend):
    """Full and square causal attention as they are; every other pattern, bias and ALiBi through a dense mask."""

    name = "sdpa"
    devices = None
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
    max_head_dim = None
    features = frozenset({"bias", "alibi", "vmap"})
    gradient = True

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = super().not_supported_reasons(problem)
        if _takes_own_dtype(problem):
            if problem.bias_dtype not in (None, problem.dtype):
                reasons.append(f"takes a bias of {problem.dtype} with such inputs on CUDA, not {problem.bias_dtype}")
            if "alibi" in problem.features:
                reasons.append("takes no ALiBi slopes with 16-bit inputs on CUDA")
        return reasons

    def notes(self, problem: Problem) -> list[str]:
        lowering = lower(problem)
        if not lowering.dense and lowering.mask is None:
            return []
        kept = "a kept float mask" if lowering.mask is not None else None
        what = kept or ("a float mask" if problem.features & {"bias", "alibi"} else "a bool mask")
        return [
            f"the pattern runs dense: SDPA gets {what} of {problem.q_length} x {problem.k_length} and skips nothing"
        ]

    def run(self, call: Call) -> Attention:
        lowering = lower(call.problem)
        if lowering.dense:
            return Attention(_masked(call), None, None)
        key, value = call.key, call.value
        if lowering.k_length is not None:
            key, value = key[:, :, : lowering.k_length], value[:, :, : lowering.k_length]
        out = _sdpa(call.query, key, value, lowering.mask, is_causal=lowering.is_causal, **_options(call))
        return Attention(out, None, None)

    def shortcut(self, call: Call) -> Shortcut | None:
        lowering, options = lower(call.problem), _options(call)
        if lowering.dense or lowering.k_length is not None:
            return None
        if lowering.is_causal:
            options["is_causal"] = True
        mask = lowering.mask
        if mask is not None:
            return lambda q, k, v, operands: _sdpa(q, k, v, mask, **options)
        if not options:
            return _plain
        return lambda q, k, v, operands: _sdpa(q, k, v, **options)

    def forget(self) -> None:
        kept_masks.cache_clear()


def lower(problem: Problem) -> Lowering:
    """The cheapest way to say a problem's pattern to SDPA, whose own causal mask is aligned top-left."""
    if problem.features & {"bias", "alibi"}:
        return Lowering(dense=True)
    if problem.schedule == _FULL:
        return Lowering(dense=False)
    if problem.schedule == _CAUSAL:
        if known(problem.q_length == 1):
            return Lowering(dense=False)
        if known(problem.q_length == problem.k_length):
            return Lowering(dense=False, is_causal=True)
    if problem.schedule == _TOP_LEFT:
        enough = known(problem.k_length <= problem.q_length)
        return Lowering(dense=False, is_causal=True, k_length=None if enough else problem.q_length)
    if _is_small(problem):
        return _small(problem.schedule, problem.constant, problem.q_length, problem.k_length, problem.dtype)
    return Lowering(dense=True)


# Pairs of a mask that a shortcut may hold for the length of its life.
SMALL_PAIRS = 64 * 64


def _is_small(problem: Problem) -> bool:
    if torch.compiler.is_compiling() or problem.features - {"gradient"}:
        return False
    if problem.schedule.slots and problem.constant is None:
        return False
    # SDPA's fused kernel takes no values of another width than keys, and its other way has no use for a mask.
    small = problem.device_type == "cpu" and problem.head_dim == problem.value_dim
    return small and 0 < problem.q_length * problem.k_length <= SMALL_PAIRS


@lru_cache(maxsize=1024)
def _small(schedule: Schedule, constant: Pattern | None, q_length: int, k_length: int, dtype: torch.dtype) -> Lowering:
    operands = () if constant is None else constant.operands(q_length, k_length)
    pairs = schedule.rows(0, q_length, q_length, k_length, operands)
    if pairs.all():
        return Lowering(dense=False)
    # Whatever keys without a pair hold must not touch the result. Rows without one are 0 in SDPA too.
    if not pairs.any(-2).all():
        return Lowering(dense=True)
    mask = torch.zeros(pairs.shape, dtype=dtype).masked_fill_(~pairs, -torch.inf)
    return Lowering(dense=False, mask=mask)


def _plain(q: Tensor, k: Tensor, v: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
    return _sdpa(q, k, v)


def _takes_own_dtype(problem: Problem) -> bool:
    """Whether SDPA takes a float mask in its inputs' dtype alone: with torch 2.11 on an H200, cuDNN's kernel reads a
    float32 mask of 16-bit inputs as if it were 16 bit, and the others raise."""
    return problem.device_type == "cuda" and problem.dtype.itemsize == 2


def _options(call: Call) -> dict[str, Any]:
    # Left out where they are SDPA's defaults, because parsing them costs a tenth of a tiny call.
    options: dict[str, Any] = {}
    if call.scale != call.problem.head_dim**-0.5:
        options["scale"] = call.scale
    if call.problem.heads != call.problem.kv_heads:
        options["enable_gqa"] = True
    return options


class _Dense(NamedTuple):
    """A pattern as SDPA's mask, in which rows without a key attend to everything and are blanked at the end: within
    SDPA they would meet inf - inf."""

    mask: Tensor
    rows: Tensor | None
    """(B or 1, H or 1, Lq, 1), rows that have a key; None where all have."""
    keys: Tensor | None
    """(B or 1, 1, Lk, 1), keys that a row attends to; None where all are."""


def _dense(pattern: Pattern, q_length: int, k_length: int, device: torch.device) -> _Dense:
    mask = pattern.dense(q_length, k_length, device)
    rows = mask.any(-1, keepdim=True)
    return _Dense(mask | ~rows, rows, mask.any(2).any(1)[:, None, :, None])


# Every layer and every step of a model asks for the same masks, and making one of 8192 x 8192 takes half a second.
KEPT_PAIRS = 128 << 20


@lru_cache(maxsize=2)
def kept_masks(pattern: Pattern, q_length: int, k_length: int, device: torch.device) -> _Dense:
    """The masks of the last patterns that have no tensors."""
    mask, rows, keys = _dense(pattern, q_length, k_length, device)
    return _Dense(mask, *(None if used is None or bool(used.all()) else used for used in (rows, keys)))


def _masked(call: Call) -> Tensor:
    """SDPA under a mask, with heedful's meaning of empty rows and of keys that no row attends to."""
    problem, device = call.problem, call.query.device
    lengths = problem.q_length, problem.k_length
    bias = _bias(call)
    rows: Tensor | None
    keys: Tensor | None
    if bias is not None:
        pairs = call.pattern.dense(*lengths, device) & (bias != -torch.inf)
        rows, keys = pairs.any(-1, keepdim=True), pairs.any(2).any(1)[:, None, :, None]
        mask = bias.where(pairs, torch.zeros_like(rows, dtype=bias.dtype).where(~rows, -torch.inf))
    elif _keepable(call):
        mask, rows, keys = kept_masks(call.pattern, *lengths, device)
    else:
        mask, rows, keys = _dense(call.pattern, *lengths, device)
    query, key, value = _blank(call.query, rows), _blank(call.key, keys), _blank(call.value, keys)
    return _blank(_sdpa(query, key, value, mask, **_options(call)), rows)


def _keepable(call: Call) -> bool:
    problem = call.problem
    if torch.compiler.is_compiling() or "vmap" in problem.features or problem.schedule.slots:
        return False
    return call.query.device.type == "cpu" and problem.q_length * problem.k_length <= KEPT_PAIRS


def _bias(call: Call) -> Tensor | None:
    """The bias and ALiBi as one float tensor that broadcasts to (B, H, Lq, Lk)."""
    # Elsewhere SDPA takes a float32 mask with every input but float64.
    dtype = torch.float32
    if call.query.dtype == torch.float64 or _takes_own_dtype(call.problem):
        dtype = call.query.dtype
    bias = None if call.bias is None else call.bias.to(dtype)
    if call.alibi_slopes is not None:
        q_length, k_length, given = call.problem.q_length, call.problem.k_length, call.query_offset
        offset = k_length - q_length if given is None else given.reshape(len(given), 1, -1, 1)
        position = torch.arange(q_length, device=call.query.device)[:, None] + offset
        distance = (position - torch.arange(k_length, device=call.query.device)).abs()
        alibi = -call.alibi_slopes.to(dtype) * distance
        bias = alibi if bias is None else bias + alibi
    return bias


def _blank(tensor: Tensor, used: Tensor | None) -> Tensor:
    """The tensor with zeros where it is not used."""
    return tensor if used is None else tensor.where(used, 0.0)
