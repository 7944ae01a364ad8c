"""Sizes, strides and broadcasting as PyTorch's scaled_dot_product_attention allows them."""

from __future__ import annotations

from torch import Tensor

from heedful.backend.native.backend import NativeBackend

MAX_HEAD_DIM = NativeBackend.max_head_dim
REFUSED = "PyTorch refuses the arguments or treats them in a way of its own"


def would_reach_flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, enable_gqa: bool
) -> bool:
    """Whether PyTorch has a kernel for such a CPU call, and does not write the attention out ("math").

    Says no rather than yes where a shape is wrong.
    """
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4 or dropout_p != 0:
        return False
    batch, heads, q_length, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim or value.shape != key.shape:
        return False
    kv_heads = key.shape[1]
    if kv_heads != heads and not (enable_gqa and kv_heads and heads % kv_heads == 0):
        return False
    if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        return False
    if attn_mask is not None:
        if attn_mask.requires_grad or attn_mask.ndim not in (2, 4):
            return False
        if attn_mask.shape[-2] not in (1, q_length) or attn_mask.shape[-1] not in (1, key.shape[2]):
            return False
        if attn_mask.ndim == 4 and (attn_mask.shape[0] not in (1, batch) or attn_mask.shape[1] not in (1, heads)):
            return False
    return q_length > 0 and key.shape[2] > 0


def batch_of(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[int, ...] | str:
    """All sizes of the result in front of (L, Ev), the last of them its heads; or why it is PyTorch's."""
    apart = 3 if enable_gqa else 2
    if min(query.ndim, key.ndim, value.ndim) < apart:
        return REFUSED
    if key.shape[-1] != query.shape[-1] or value.shape[-2] != key.shape[-2]:
        return REFUSED
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        return "a size is 0"
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return f"a head dim is above {MAX_HEAD_DIM}"
    heads: tuple[int, ...] = ()
    if enable_gqa:
        heads = (query.shape[-3],)
        if heads[0] % key.shape[-3] or heads[0] % value.shape[-3]:
            return REFUSED
        if key.shape[-3] != value.shape[-3] and 1 not in (key.shape[-3], value.shape[-3]):
            return "key and value have different numbers of heads"
    pairs = _broadcast(query.shape[:-apart], key.shape[:-apart])
    if pairs is None:
        return REFUSED
    if attn_mask is not None:
        if attn_mask.ndim < 2 and query.ndim == 4:
            return REFUSED
        whole = (*pairs, *heads, query.shape[-2], key.shape[-2])
        missing = len(whole) - attn_mask.ndim
        if missing < 0 or any(n not in (1, w) for n, w in zip(attn_mask.shape, whole[missing:], strict=True)):
            return REFUSED
    batch = _broadcast(pairs, value.shape[:-apart])
    return REFUSED if batch is None else (*batch, *heads)


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    if a == b:
        return tuple(a)
    length = max(len(a), len(b))
    a, b = (1,) * (length - len(a)) + tuple(a), (1,) * (length - len(b)) + tuple(b)
    if any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
        return None
    return tuple([y if x == 1 else x for x, y in zip(a, b, strict=True)])


def of_rank_4(query: Tensor, key: Tensor, value: Tensor, batch: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The three as (B, H, L, E), (B, Hkv, S, E) and (B, Hkv, S, Ev); what one of them repeats is not copied."""
    q, k, v = (_with_items(tensor, batch) for tensor in (query, key, value))
    if batch and q.shape[1] != batch[-1]:
        q = q.expand(-1, batch[-1], -1, -1)
    if k.shape[1] != v.shape[1]:
        heads = max(k.shape[1], v.shape[1])
        k, v = k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
    return q, k, v


def _with_items(tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    if len(batch) < 2:
        return tensor[(None,) * (4 - tensor.ndim)]
    missing = len(batch) + 2 - tensor.ndim
    if missing:
        tensor = tensor[(None,) * missing]
    if tensor.shape[: len(batch) - 1] != batch[:-1]:
        tensor = tensor.expand(*batch[:-1], *tensor.shape[-3:])
    return tensor if len(batch) == 2 else tensor.flatten(0, len(batch) - 2)


def mask_of_rank_4(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    """(B or 1, H or 1, L or 1, S or 1)."""
    missing = max(len(batch), 2) + 2 - mask.ndim
    if missing:
        mask = mask[(None,) * missing]
    if len(batch) <= 2:
        return mask
    items = mask.shape[:-3]
    if any(n != 1 for n in items):
        mask = mask.expand(*batch[:-1], *mask.shape[-3:])
    return mask.flatten(0, len(batch) - 2)


def memory_order(query: Tensor) -> str:
    """The memory order of what `torch.empty_like` makes of a query: "bhld", "blhd" or "other"."""
    batch, heads, length, _ = query.shape
    item, head, row, last = query.stride()
    if 0 in (item, head, row):
        return "other"
    if (batch == 1 or item >= max(head, row)) and (length == 1 or row >= last) and (heads == 1 or head >= last):
        return "blhd" if heads > 1 and length > 1 and head < row else "bhld"
    return "other"
