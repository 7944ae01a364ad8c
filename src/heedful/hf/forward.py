"""The attention function: one layer's call, from transformers' conventions to heedful's."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from heedful.api import attention
from heedful.hf.masks import PatternMask
from heedful.patterns import Causal, Documents, Full, Mask, Pattern, SlidingWindow

# Arguments of a model's forward that reach its attention and do not change what attention computes: positions are in
# the rotary embedding and in the mask already, lengths in cu_seq_lens, the rest is for the model around it.
HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "image_sizes",
        "is_first_iteration",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "token_type_ids",
        "use_cache",
    }
)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PatternMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    output_attentions: bool | None = False,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered with transformers' `AttentionInterface`.

    Args:
        module: the layer; its `training` enables dropout, its `is_causal` serves where the argument is None.
        query: (B, H, Lq, D); key: (B, Hkv, Lk, D); value: (B, Hkv, Lk, Dv), as views of any memory layout.
        attention_mask: what `pattern_mask` made; a bool mask (True = attend) or a float mask (added to the scores)
            broadcastable to (B, H, Lq, Lk); or None.
        dropout: probability, applied while the module trains.
        scaling: 1/sqrt(D) if None.
        is_causal, sliding_window: used where there is no mask. Causal calls are aligned as transformers' sdpa aligns
            them: one query sees every key, several are the first positions. A window keeps `sliding_window` keys on
            each side that is seen, a query's own among them.
        softcap: s becomes softcap * tanh(s / softcap).
        s_aux, sinks: (H,), a logit for each head that joins the softmax's denominator.
        position_bias: broadcastable to (B, H, Lq, Lk), added to the scores.
        alibi_slopes: (H,), as `heedful.attention` takes them.
        output_attentions: whether to return the weights.
        cu_seq_lens_q, cu_seq_lens_k: boundaries of packed sequences, (n + 1,).

    Returns:
        The output (B, Lq, H, Dv), contiguous, and the weights (B, H, Lq, Lk) or None.

    Raises:
        TypeError: an argument that could change the result and is not known here, or a mask of another type.
        ValueError: a mask for other lengths.
    """
    if kwargs and not kwargs.keys() <= HARMLESS:
        _refuse_unknown(kwargs)
    pattern: Pattern | None
    bias = position_bias
    if isinstance(attention_mask, PatternMask):
        pattern = attention_mask.pattern
        if query.shape[2] != attention_mask.q_length or key.shape[2] != attention_mask.k_length:
            raise ValueError(
                f"attention_mask: got one for {attention_mask.q_length} queries and {attention_mask.k_length} keys; "
                f"takes one for {query.shape[2]} and {key.shape[2]}"
            )
        if cu_seq_lens_q is not None and not attention_mask.has_documents:
            pattern = attention_mask.packed(_self_attention_bounds(cu_seq_lens_q, cu_seq_lens_k))
    elif attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if cu_seq_lens_q is None:
            pattern = _pattern_without_mask(causal, sliding_window, query.shape[2], key.shape[2])
        else:
            cu_k = None if cu_seq_lens_k is None else cu_seq_lens_k.to(torch.int32)
            pattern = Documents(cu_seq_lens_q.to(torch.int32), cu_k, within=_pattern(causal, sliding_window, None))
    else:
        _check_dense(attention_mask, query, key)
        if attention_mask.dtype == torch.bool:
            pattern = Mask(attention_mask)
        else:
            pattern = None
            bias = attention_mask if bias is None else bias + attention_mask
    if query.shape[0] != key.shape[0] and query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    # (B, L, H, D) is the order to return, and one query is in both orders at once, which spares a call its transposes.
    one_query = query.shape[2] == 1
    if not one_query:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    result = attention(
        query,
        key,
        value,
        pattern=pattern,
        bias=bias,
        alibi_slopes=alibi_slopes,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux if s_aux is not None else sinks,
        dropout_p=dropout if module.training else 0.0,
        layout="bhld" if one_query else "blhd",
        return_weights=bool(output_attentions),
    )
    out, weights = (result, None) if isinstance(result, Tensor) else (result.out, result.weights)
    return (out.transpose(1, 2) if one_query else out).contiguous(), weights


def _pattern_without_mask(causal: bool, window: int | None, q_length: int, k_length: int) -> Pattern:
    offset = 0 if causal and q_length not in (1, k_length) else None
    # torch.compile traces through a cache and warns of it.
    return (_pattern if torch.compiler.is_compiling() else _kept_pattern)(causal, window, offset)


def _pattern(causal: bool, window: int | None, offset: int | None) -> Pattern:
    if window is not None:
        return SlidingWindow(window - 1, 0 if causal else window - 1, offset=offset)
    return Causal(offset=offset) if causal else Full()


_kept_pattern = lru_cache(maxsize=64)(_pattern)


def _check_dense(mask: Tensor, query: Tensor, key: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: got a {type(mask).__name__}; takes a tensor or None")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention_mask: got dtype {mask.dtype}; takes bool (True = attend) or a floating dtype")
    shape = (key.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask.ndim != 4 or any(size not in (1, full) for size, full in zip(mask.shape, shape, strict=True)):
        raise ValueError(f"attention_mask: got shape {tuple(mask.shape)}; takes one that broadcasts to {shape}")


def _self_attention_bounds(cu_q: Tensor, cu_k: Tensor | None) -> Tensor:
    readable = cu_q.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and cu_k is not None and cu_k is not cu_q and not torch.equal(cu_q, cu_k):
        raise ValueError("cu_seq_lens_k: got others than cu_seq_lens_q; takes the same where the model made a mask")
    return cu_q


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    unknown = sorted(name for name, value in kwargs.items() if name not in HARMLESS and value is not None)
    if unknown:
        raise TypeError(
            f"heedful.hf does not know the attention arguments {', '.join(unknown)} and does not ignore what could "
            "change the result; leave them out of the call to the model, or use another attn_implementation for it"
        )
