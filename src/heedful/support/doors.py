"""What each door has words for: by row of the matrix, how a caller writes it there.

Declared beside one another and not read out of signatures, because an argument's name does not say what it is for. A
test compares every declaration with the door's parameters, and makes the calls of those of Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Door:
    """One way to call attention."""

    name: str
    column: str
    """Its name where there is little room."""
    page: str
    """Its page of the documentation."""
    target: str
    """Where its arguments are, as "module:name"; a C header for structures."""
    says: Mapping[str, str]
    """By name of a row, how it is written; `name=` is a parameter of the target."""
    silent: frozenset[str]
    """Parameters that are about no row."""
    gradients: bool = True
    backends: tuple[str, ...] | None = None
    """Names of the backends that it can reach; None is all."""


_TENSORS = "tensors of that shape"
_ANY = "`pattern=`"
_PATTERNS = dict.fromkeys(
    ("top_left", "window", "dilated", "chunked", "prefix", "global", "longformer", "big_bird", "block_sparse"), _ANY
) | {"documents": _ANY, "padding": _ANY, "mask": _ANY}
_SHAPES = {"full": "nothing", "value_dim": _TENSORS, "grouped_heads": _TENSORS}
_GRADIENT = {"gradient": "tensors that require it"}

ATTENTION = Door(
    "heedful.attention",
    "attention",
    "doors/attention.md",
    "heedful.api:attention",
    {
        **_SHAPES,
        **_PATTERNS,
        "causal": "`causal=True`",
        "bias": "`bias=`",
        "alibi": "`alibi_slopes=`",
        "softcap": "`softcap=`",
        "sinks": "`sinks=`",
        "dropout": "`dropout_p=`",
        "lse": "`return_lse=True`",
        "weights": "`return_weights=True`",
        "sparse_weights": '`return_weights="sparse"`',
        "paged": "`cache=KVCache(block_size=…)`, without gradients",
        **_GRADIENT,
        "second_order": "`torch.func.grad` of itself",
        "forward_mode": "`torch.func.jvp`",
        "vmap": "`torch.vmap`",
    },
    frozenset({"q", "k", "v", "scale", "layout", "backend"}),
)

SDPA = Door(
    "scaled_dot_product_attention, activate, heedful run",
    "SDPA",
    "doors/sdpa.md",
    "heedful.sdpa.call:scaled_dot_product_attention",
    {
        "full": "nothing",
        "value_dim": _TENSORS,
        "grouped_heads": "`enable_gqa=True`",
        "top_left": "`is_causal=True`",
        "causal": "`attn_mask=`, recognised",
        "window": "`attn_mask=`, recognised",
        "padding": "`attn_mask=`, recognised",
        "mask": "`attn_mask=` of bools",
        "bias": "`attn_mask=` of floats",
        "dropout": "`dropout_p=`",
        **_GRADIENT,
    },
    frozenset({"query", "key", "value", "scale"}),
)

HUGGING_FACE = Door(
    'attn_implementation="heedful"',
    "Hugging Face",
    "doors/hugging_face.md",
    "heedful.hf.forward:attention_forward",
    {
        **_SHAPES,
        "causal": "`is_causal=`, or the model's mask",
        "window": "`sliding_window=`, or the model's mask",
        "chunked": "the model's `attention_mask=`",
        "documents": "`cu_seq_lens_q=`, `cu_seq_lens_k=`, or position ids",
        "padding": "the model's `attention_mask=`",
        "mask": "`attention_mask=` of bools",
        "bias": "`position_bias=`, or `attention_mask=` of floats",
        "alibi": "`alibi_slopes=`",
        "softcap": "`softcap=`",
        "sinks": "`s_aux=`, `sinks=`",
        "dropout": "`dropout=` in training",
        "weights": "`output_attentions=True`",
        **_GRADIENT,
    },
    frozenset({"module", "query", "key", "value", "scaling", "kwargs"}),
)

_FLASH = {
    **_SHAPES,
    "causal": "`causal=True`",
    "window": "`window_size=`",
    "softcap": "`softcap=`",
    "alibi": "`alibi_slopes=`",
}

FLASH_ATTN = Door(
    "flash_attn_func",
    "flash_attn",
    "doors/flash_attn.md",
    "heedful.flash_attn:flash_attn_func",
    {
        **_FLASH,
        "dropout": "`dropout_p=`",
        "lse": "`return_attn_probs=True`",
        "sparse_weights": "`return_attn_probs=True` with `dropout_p=`, as S_dmask",
        **_GRADIENT,
    },
    frozenset({"q", "k", "v", "softmax_scale", "deterministic"}),
)

FLASH_ATTN_VARLEN = Door(
    "flash_attn_varlen_func",
    "varlen",
    "doors/flash_attn.md",
    "heedful.flash_attn:flash_attn_varlen_func",
    {
        **{row: text for row, text in _FLASH.items() if row != "full"},
        "documents": "`cu_seqlens_q=`, `cu_seqlens_k=`",
        "dropout": "`dropout_p=`",
        "lse": "`return_attn_probs=True`",
        "sparse_weights": "`return_attn_probs=True` with `dropout_p=`, as S_dmask",
        "paged": "`block_table=`, without gradients",
        **_GRADIENT,
    },
    frozenset({"q", "k", "v", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "deterministic"}),
)

FLASH_ATTN_KVCACHE = Door(
    "flash_attn_with_kvcache",
    "with_kvcache",
    "doors/flash_attn.md",
    "heedful.flash_attn:flash_attn_with_kvcache",
    {
        **_FLASH,
        "padding": "`cache_seqlens=`, `cache_leftpad=`",
        "lse": "`return_softmax_lse=True`",
        "paged": "`block_table=` or `cache_batch_idx=`",
    },
    frozenset(
        {"q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "rotary_interleaved", "softmax_scale"}
        | {"num_splits"}
    ),
    gradients=False,
)

MODULES = Door(
    "heedful.nn.MultiheadAttention",
    "nn",
    "doors/nn.md",
    "heedful.nn:MultiheadAttention.forward",
    {
        **_PATTERNS,
        "full": "nothing",
        "top_left": "`is_causal=True` with `attn_mask=`",
        "causal": _ANY,
        "padding": "`key_padding_mask=`",
        "mask": "`attn_mask=` of bools, True excludes",
        "bias": "`attn_mask=` or `key_padding_mask=` of floats",
        "dropout": "the constructor's dropout",
        "weights": "`need_weights=True`",
        **_GRADIENT,
    },
    frozenset({"self", "query", "key", "value", "average_attn_weights"}),
)

NUMPY = Door(
    "heedful.numpy.attention",
    "numpy",
    "doors/numpy.md",
    "heedful.numpy:attention",
    {
        **_SHAPES,
        **_PATTERNS,
        "causal": "`causal=True`",
        "window": "`window=`",
        "mask": "`attn_mask=` of bools",
        "bias": "`attn_mask=` of floats",
        "alibi": "`alibi_slopes=`",
        "softcap": "`softcap=`",
        "sinks": "`sinks=`",
        "lse": "`return_lse=True`",
        "weights": "`return_weights=True`",
    },
    frozenset({"q", "k", "v", "context", "softmax_scale", "out"})
    | {"input_precision", "intermediate_precision", "output_precision"},
    gradients=False,
    backends=("native",),
)

C = Door(
    "heedful.h",
    "C",
    "doors/c.md",
    "heedful.h:heedful_forward,heedful_features,heedful_backward,heedful_weights",
    {
        **_SHAPES,
        **dict.fromkeys(_PATTERNS, "`schedule=`, its code and operands"),
        "causal": "`schedule=`, HEEDFUL_CAUSAL",
        "window": "`schedule=`, HEEDFUL_WINDOW",
        "documents": "`schedule=`, HEEDFUL_DOCUMENTS",
        "padding": "`schedule=`, HEEDFUL_LENGTHS",
        "bias": "`bias=`",
        "alibi": "`alibi_slopes=`, `query_offset=`",
        "softcap": "`softcap=`",
        "sinks": "`sinks=`",
        "dropout": "`dropout_p=`, `seed=`",
        "lse": "`lse=`",
        "weights": "`weights=` of heedful_attention_weights",
        "sparse_weights": "`values=`, `indices=`, `row_begin=`, `counts=` of heedful_attention_weights",
        "paged": "`pages=`",
        "gradient": "heedful_attention_backward",
    },
    frozenset({"query", "key", "value", "out", "scale", "features", "delta", "grad_out", "grad_lse", "grad_weights"})
    | {"grad_query", "grad_key", "grad_value", "grad_bias", "grad_slopes"},
    backends=("native",),
)

DOORS = (ATTENTION, SDPA, HUGGING_FACE, FLASH_ATTN, FLASH_ATTN_VARLEN, FLASH_ATTN_KVCACHE, MODULES, NUMPY, C)
