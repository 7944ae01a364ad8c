"""Attention on numpy arrays, without torch.

    from heedful.numpy import attention

    out = attention(q, k, v, causal=True)     # (S, D), (S, H, D) or (B, S, H, D)

Arrays are read and written where they lie, whatever their strides. What exports DLPack (a torch tensor on the CPU) or a
buffer is taken as well.
"""

from __future__ import annotations

from typing import Any, Unpack

from heedful.errors import wrong_type
from heedful.numpy.calls import Attention
from heedful.numpy.context import Context, LastCall
from heedful.numpy.defaults import (
    default_context,
    get_num_threads,
    get_version,
    is_metal_available,
    last_call,
    set_num_threads,
)
from heedful.numpy.errors import MFAError
from heedful.numpy.request import Features, Options

MFAContext = Context

__all__ = [
    "Attention",
    "Context",
    "LastCall",
    "MFAContext",
    "MFAError",
    "attention",
    "flash_attention_forward",
    "get_num_threads",
    "get_version",
    "is_metal_available",
    "last_call",
    "set_num_threads",
]


def attention(q: Any, k: Any, v: Any, context: Context | None = None, **options: Unpack[Options]) -> Any:
    """Exact attention: softmax(scale · q kᵀ) v over the pairs of queries and keys that count.

    With s = scale · q kᵀ, in this order: softcap · tanh(s / softcap), then + attn_mask where it is floats, then ALiBi,
    then what excludes pairs. A query with no key gets output 0 and log-sum-exp -inf. Sums are kept in float32 (float64
    for float64).

    q, k and v are numpy arrays, or anything on the CPU that exports DLPack or a buffer, of one number of dimensions and
    one dtype out of float16, bfloat16 (ml_dtypes), float32 and float64. Any strides serve, negative ones too.

    Args:
        q: (Sq, D), (Sq, H, D) or (B, Sq, H, D), D at most 512.
        k: (Sk, D), (Sk, Hkv, D) or (B, Sk, Hkv, D), where Hkv divides H: head h reads key head h // (H / Hkv).
        v: as k, with Dv in place of D.
        context: a `Context` whose threads run it; None is one that all calls without share.
        pattern: a `heedful.Pattern`, whose tensors may be numpy arrays, or a bool array, True = attend.
        causal: whether a query sees its own position and those before it only; the last query meets the last key.
        window: w for the keys from w positions before a query's own to w after it, or (left, right), None for no limit
            on a side; the last query meets the last key.
        attn_mask: broadcasts to (B, H, Sq, Sk): bools, True = attend, or floats that are added to the scores.
        softmax_scale: what q kᵀ is multiplied by; None is 1/sqrt(D).
        softcap: bounds the scores smoothly to (-softcap, softcap).
        alibi_slopes: (H,) or (B, H): adds -slope · |i + Sk - Sq - j|.
        sinks: (H,): a score that joins each row's denominator and log-sum-exp, and brings no value.
        input_precision: "fp16", "bf16", "fp32" or "fp64", or a dtype: q, k and v are rounded to it; None is their own.
        intermediate_precision: None or what sums are kept in, "fp32" ("fp64" for float64); others are refused.
        output_precision: of the result; None is out's, otherwise that of the input. Where it differs from the input's,
            the call is computed in the wider of both, from a copy.
        out: where to write the result, any strides; returned.
        return_lse: whether to return the log-sum-exp of each row too.
        return_weights: whether to return the weights too.

    pattern, causal, window and a bool attn_mask exclude pairs together. Floats of another precision than q's are cast
    to float32 where they are masks, slopes or sinks.

    Returns:
        An array (Sq, Dv), (Sq, H, Dv) or (B, Sq, H, Dv); with return_lse or return_weights an
        `Attention(out, lse, weights)`, None for what was not asked for. `last_call()`, or the context's `last_call`,
        says what was copied.

    Raises:
        ValueError, TypeError: an argument is wrong; the message has its name, what it got and what it takes.
        MFAError: the engine refuses or fails, or the context is closed.
    """
    return (default_context() if context is None else _checked(context)).attention(q, k, v, **options)


def flash_attention_forward(
    context: Context,
    q: Any,
    k: Any,
    v: Any,
    *,
    attn_mask: Any = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    input_precision: Any = None,
    intermediate_precision: Any = None,
    output_precision: Any = None,
    **options: Unpack[Features],
) -> Any:
    """`attention` on a context, with its options.

    Raises:
        TypeError, ValueError, MFAError: as `attention`.
    """
    return _checked(context).attention(
        q,
        k,
        v,
        attn_mask=attn_mask,
        causal=causal,
        softmax_scale=softmax_scale,
        input_precision=input_precision,
        intermediate_precision=intermediate_precision,
        output_precision=output_precision,
        **options,
    )


def _checked(context: object) -> Context:
    if not isinstance(context, Context):
        raise wrong_type("context", f"a {type(context).__name__}", "a heedful.numpy.Context")
    return context
