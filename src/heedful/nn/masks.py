"""The masks of torch.nn.MultiheadAttention, where True and -inf exclude, as a pattern and a bias of heedful's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.errors import wrong_type
from heedful.patterns import Mask, Pattern


class Allowed(NamedTuple):
    """Which pairs count, and what is added to their scores; None for all and for nothing. A mask alone stays a bool
    tensor: making a pattern of it takes as long as a tiny call."""

    pattern: Pattern | Tensor | None
    bias: Tensor | None


def both(a: Pattern | None, b: Pattern | None) -> Pattern | None:
    """The pairs that two patterns allow, where None allows all."""
    if a is None:
        return b
    return a if b is None else a & b


def add_attention_mask(
    allowed: Allowed, mask: Tensor, dtype: torch.dtype, batch: int, heads: int, q_length: int, k_length: int
) -> Allowed:
    """With an attn_mask of (q_length, k_length) or (batch · heads, q_length, k_length).

    Raises:
        AssertionError, RuntimeError: where torch.nn.MultiheadAttention raises them.
    """
    _check_dtype("attn_mask", mask, dtype)
    if mask.dim() == 2:
        if mask.shape != (q_length, k_length):
            raise RuntimeError(f"The shape of the 2D attn_mask is {mask.shape}, but should be {(q_length, k_length)}.")
        return _add(allowed, mask)
    if mask.shape != (batch * heads, q_length, k_length):
        raise RuntimeError(
            f"The shape of the 3D attn_mask is {mask.shape}, but should be {(batch * heads, q_length, k_length)}."
        )
    return _add(allowed, mask.reshape(batch, heads, q_length, k_length))


def add_padding_mask(allowed: Allowed, mask: Tensor, dtype: torch.dtype, batch: int, k_length: int) -> Allowed:
    """With a key_padding_mask of (batch, k_length).

    Raises:
        AssertionError: where torch.nn.MultiheadAttention raises it.
    """
    _check_dtype("key_padding_mask", mask, dtype)
    for axis, size in enumerate((batch, k_length)):
        if mask.shape[axis] != size:
            raise AssertionError(f"Expected key_padding_mask.shape[{axis}] to be {size}, but got {mask.shape[axis]}")
    return _add(allowed, mask[:, None, None])


def append_keys(
    allowed: Allowed, count: int, batch: int, heads: int, q_length: int, k_length: int, device: torch.device
) -> Allowed:
    """The same for `count` keys more at the end that every query sees."""
    pattern, bias = allowed
    if isinstance(pattern, Tensor):
        pattern = F.pad(pattern.expand(*pattern.shape[:-1], k_length), (0, count), value=True)
    elif pattern is not None:
        # Patterns count from the last key, which is another one then: only their pairs are still what was meant.
        pattern.validate(batch, heads, q_length, k_length)
        pattern = Mask(F.pad(pattern.dense(q_length, k_length, device), (0, count), value=True))
    return Allowed(pattern, None if bias is None else F.pad(bias, (0, count)))


def _add(allowed: Allowed, mask: Tensor) -> Allowed:
    pattern, bias = allowed
    if mask.dtype == torch.bool:
        allows = mask.logical_not()
        if pattern is None:
            return Allowed(allows, bias)
        return Allowed((Mask(pattern) if isinstance(pattern, Tensor) else pattern) & Mask(allows), bias)
    return Allowed(pattern, mask if bias is None else bias + mask)


def _check_dtype(name: str, mask: Tensor, dtype: torch.dtype) -> None:
    if mask.dtype in (torch.bool, torch.float32, dtype):
        return
    if not mask.is_floating_point():
        raise AssertionError(f"only bool and floating types of {name} are supported")
    raise wrong_type(name, f"dtype {mask.dtype}", f"bool, torch.float32 or the projected query's dtype, {dtype}")
