"""In front of the kernel of nn.MultiheadAttention's and nn.TransformerEncoder's fast path, which calls no other one.

It runs in evaluation without gradients, on a batch or on a nested tensor, into which nn.TransformerEncoder turns padded
batches. Packed as they are, its sequences are `heedful.Documents`.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from heedful.api import attention
from heedful.arguments import DTYPES
from heedful.backend.native.prefer import engine_pays
from heedful.patterns import Documents, Pattern
from heedful.sdpa import record
from heedful.sdpa.call import why_not_paying
from heedful.sdpa.masks import read_mask
from heedful.sdpa.shapes import MAX_HEAD_DIM

OPERATOR = "_native_multi_head_attention"
KEYS = ("CPU", "NestedTensorCPU")


def install(library: torch.library.Library) -> None:
    """Register with `library`, which takes everything away again when it is destroyed."""
    for key in KEYS:
        library.impl(OPERATOR, _in_front_of(key), key, with_keyset=True)


def _in_front_of(key: str) -> Any:
    pytorch = torch.library.get_kernel(f"aten::{OPERATOR}", key)

    def run(keyset: Any, *arguments: Any) -> Any:
        began = perf_counter()
        found = _attend(*arguments)
        taken = not isinstance(found, str)
        result = found if taken else pytorch.call_boxed(keyset, *arguments)
        if record.recorder is not None:
            what = "the fast path of nn.MultiheadAttention" if taken else f"its fast path: {found}"
            record.recorder.add(taken, what, arguments[0], arguments[1], perf_counter() - began)
        return result

    return run


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    projection_weight: Tensor,
    projection_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None] | str:
    """What PyTorch's kernel returns, or why it is to run."""
    if query is not key or key is not value:
        return "query, key and value are not one tensor"
    wrong = query.dtype not in DTYPES or qkv_weight.dtype != query.dtype or embed_dim % heads or query.dim() != 3
    if wrong or qkv_weight.shape != (3 * embed_dim, embed_dim) or embed_dim // heads > MAX_HEAD_DIM:
        return "not what the engine computes, or wrong arguments"
    if query.is_nested:
        if mask is not None or need_weights or not query.is_contiguous():
            return "a nested tensor with a mask or with weights"
        return _attend_nested(query, heads, qkv_weight, qkv_bias, projection_weight, projection_bias), None
    batch, length, width = query.shape
    if width != embed_dim or 0 in query.shape:
        return "not what the engine computes, or wrong arguments"
    if not engine_pays(query.dtype, batch, heads, heads, length, length, embed_dim // heads):
        return why_not_paying()
    pattern: Pattern | None = None
    if mask is not None:
        allowed = _allowed(mask, mask_type, (batch, heads, length))
        if isinstance(allowed, str):
            return allowed
        pattern, _ = read_mask(allowed, length, length)
    q, k, v = linear(query, qkv_weight, qkv_bias).view(batch, length, 3, heads, -1).unbind(2)
    weights: Tensor | None = None
    if need_weights:
        out, _, weights = attention(q, k, v, pattern=pattern, layout="blhd", return_weights=True)
        if average_weights and weights is not None:
            weights = weights.mean(1)
    else:
        out = attention(q, k, v, pattern=pattern, layout="blhd")
    return linear(out.flatten(2), projection_weight, projection_bias), weights


def _attend_nested(
    query: Tensor, heads: int, qkv_weight: Tensor, qkv_bias: Tensor, projection_weight: Tensor, projection_bias: Tensor
) -> Tensor:
    sizes = query._nested_tensor_size()
    packed = query.values().view(-1, qkv_weight.shape[1])
    starts = torch.zeros(sizes.shape[0] + 1, dtype=torch.int32)
    starts[1:] = sizes[:, 0].cumsum(0)
    q, k, v = linear(packed, qkv_weight, qkv_bias).view(1, packed.shape[0], 3, heads, -1).unbind(2)
    out = attention(q, k, v, pattern=Documents(starts), layout="blhd")
    projected = linear(out.flatten(2), projection_weight, projection_bias)
    strides, offsets = query._nested_tensor_strides(), query._nested_tensor_storage_offsets()
    return torch._nested_view_from_buffer(projected.view(-1), sizes, strides, offsets)


def _allowed(mask: Tensor, mask_type: int | None, sizes: tuple[int, int, int]) -> Tensor | str:
    """The pairs that count, bool (B or 1, H or 1, L or 1, L): here a mask says what is excluded, by True or not 0."""
    batch, heads, length = sizes
    shapes = {0: (length, length), 1: (batch, length), 2: (batch, heads, length, length)}
    if mask_type not in shapes or tuple(mask.shape) != shapes[mask_type]:
        return "wrong arguments"
    mask = mask[:, None, None] if mask_type == 1 else mask[(None,) * (4 - mask.dim())]
    # What a mask repeats is not to be made and read for each repetition.
    for axis in (0, 1):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask.logical_not()
