"""Multi-head attention of nested tensors: sequences of different lengths, computed as documents packed into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.api import attention
from heedful.errors import wrong_type, wrong_value
from heedful.patterns import Documents, Full, Pattern

if TYPE_CHECKING:
    from heedful.nn.multihead_attention import MultiheadAttention


class Packed(NamedTuple):
    """The sequences of a nested tensor one after the other."""

    values: Tensor
    """(1, total, E)"""
    offsets: Tensor
    """int32 (n + 1,): 0, then where each of the n sequences ends."""


def attend(
    module: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | None,
    masks: tuple[Tensor | None, Tensor | None],
    need_weights: bool,
    average_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output, nested as query (N, L*, E), and the weights, (N, L, S) or (N, H, L, S) for the longest sequences,
    0 behind the others' ends; `pattern` holds within each sequence.

    Raises:
        ValueError, TypeError: an argument does not go with nested tensors.
    """
    for name, mask in zip(("key_padding_mask", "attn_mask"), masks, strict=True):
        if mask is not None:
            raise wrong_value(name, "a mask", "None beside nested tensors, whose lengths leave nothing to mask")
    for name, used in (("add_bias_kv", module.bias_k is not None), ("add_zero_attn", module.add_zero_attn)):
        if used:
            raise wrong_value(name, "True", "False for nested tensors")
    if pattern is not None and not pattern.by_position:
        takes = "a pattern of positions, for sequences of any length, with nested tensors"
        raise wrong_value(
            "pattern",
            pattern,
            f"{takes} (which torch.nn.TransformerEncoder makes of a padding mask "
            "unless its enable_nested_tensor is False)",
        )
    if not module.batch_first:
        raise wrong_value("batch_first", "False", "True for nested tensors, which are (N, L*, E)")
    packed_query = _pack("query", query)
    packed_key = packed_query if key is query else _pack("key", key)
    packed_value = packed_key if value is key else _pack("value", value)
    sequences = packed_query.offsets.numel()
    for name, packed in (("key", packed_key), ("value", packed_value)):
        if packed.offsets.numel() != sequences:
            raise wrong_value(name, f"{packed.offsets.numel() - 1} sequences", f"as many as query, {sequences - 1}")
    if packed_value is not packed_key and not torch.equal(packed_key.offsets, packed_value.offsets):
        raise wrong_value("value", "sequences of other lengths", "sequences as long as those of key")
    tensors = packed_query.values, packed_key.values, packed_value.values
    module.check_sizes(*tensors)
    q, k, v = module.project(*tensors, False)
    cu_k = None if packed_key is packed_query else packed_key.offsets
    documents = Documents(packed_query.offsets, cu_k, Full() if pattern is None else pattern)
    dropout_p = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        out, _, found = attention(
            q, k, v, pattern=documents, dropout_p=dropout_p, layout="blhd", return_weights="sparse"
        )  # fmt: skip
        assert found is not None
        weights = _by_sequence(found, packed_query.offsets.long(), packed_key.offsets.long())
        if average_weights:
            weights = weights.mean(1)
    else:
        out = attention(q, k, v, pattern=documents, dropout_p=dropout_p, layout="blhd")
    out = F.linear(out.reshape(out.shape[1], -1), module.out_proj.weight, module.out_proj.bias)
    return _nest(out, query), weights


def _pack(name: str, nested: Tensor) -> Packed:
    if not nested.is_nested:
        raise wrong_type(name, "a plain tensor", "a nested tensor where another input is nested")
    if nested.dim() != 3:
        raise wrong_value(name, f"a nested tensor of {nested.dim()} dimensions", "3 dimensions, (N, L*, E)")
    if nested.layout == torch.jagged:
        if nested._ragged_idx != 1 or nested._lengths is not None:  # type: ignore[attr-defined]
            raise wrong_value(name, "a jagged tensor with holes or another ragged dimension", "(N, L*, E), contiguous")
        return Packed(nested.values().unsqueeze(0), _offsets(nested).to(torch.int32))
    sizes = nested._nested_tensor_size()
    if bool((sizes[:, 1] != sizes[0, 1]).any()):
        raise wrong_value(name, "sequences of different features", "(N, L*, E), ragged in L alone")
    offsets = F.pad(sizes[:, 0].cumsum(0), (1, 0)).to(nested.device, torch.int32)
    return Packed(nested.contiguous().values().view(1, -1, int(sizes[0, 1])), offsets)


def _nest(values: Tensor, like: Tensor) -> Tensor:
    """Values (total, E) as a nested tensor of the lengths and the layout of another one."""
    if like.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(values, offsets=_offsets(like))
    like = like.contiguous()
    sizes, strides, starts = (
        like._nested_tensor_size(),
        like._nested_tensor_strides(),
        like._nested_tensor_storage_offsets(),
    )
    return torch._nested_view_from_buffer(values.reshape(-1), sizes, strides, starts)


def _offsets(jagged: Tensor) -> Tensor:
    offsets: Tensor = jagged.offsets()  # type: ignore[attr-defined]
    return offsets


def _by_sequence(weights: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    """Sparse weights (1, H, total, total) of packed sequences as a dense tensor (N, H, L, S)."""
    _, head, i, j = weights.indices()
    sequence = torch.bucketize(i, cu_q[1:], right=True)
    sizes = cu_q.numel() - 1, weights.shape[1], int(cu_q.diff().max()), int(cu_k.diff().max())
    where = sequence, head, i - cu_q[sequence], j - cu_k[sequence]
    return weights.values().new_zeros(sizes).index_put(where, weights.values())
