"""The arguments of one call, checked and brought into one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

import numpy as np

from heedful.checks import check_scalars, check_shapes, what
from heedful.errors import wrong_type, wrong_value
from heedful.numpy.arrays import Array, Given, cast, dtype_of, given, imported, precision_of, unreadable, wider
from heedful.patterns import Causal, Full, Mask, Pattern, SlidingWindow
from heedful.patterns.arrays import is_array

Window: TypeAlias = int | tuple[int | None, int | None]

_LAYOUTS = {2: "(S, D)", 3: "(S, H, D)", 4: "(B, S, H, D)"}
# To (B, H, S, D) from each number of dimensions.
_AXES = {3: (1, 0, 2), 4: (0, 2, 1, 3)}


class Features(TypedDict, total=False):
    """What `heedful.numpy.flash_attention_forward` takes beside what it names."""

    pattern: Pattern | Array | None
    window: Window | None
    softcap: float | None
    alibi_slopes: Any
    sinks: Any
    out: Any
    return_lse: bool
    return_weights: bool


class Options(Features, total=False):
    """What `heedful.numpy.attention` takes beside q, k and v; documented there."""

    attn_mask: Any
    causal: bool
    softmax_scale: float | None
    input_precision: Any
    intermediate_precision: Any
    output_precision: Any


@dataclass(slots=True)
class Request:
    """A checked call. Arrays as in `Given`, q, k and v in index order (B, H, S, D)."""

    query: Array
    key: Array
    value: Array
    pattern: Pattern
    scale: float
    softcap: float
    bias: Array | None
    """(B, H, Sq, Sk), each size may be 1; this and the two below of the inputs' precision or float32."""
    alibi_slopes: Array | None
    """(1 or B, H)"""
    sinks: Array | None
    precision: str
    """What it is computed in, and what the engine writes."""
    output_precision: str
    out: Array | None
    """The caller's memory for the result, in its shape."""
    ndim: int
    copied: dict[str, str]
    """By argument, why it is a copy; "out" where the engine writes elsewhere, and the result is copied from there."""

    def shape(self, batch: int, heads: int, *rest: int) -> tuple[int, ...]:
        """The shape that a caller sees of (batch, heads, ...): without what an array of 2 or 3 dimensions lacks."""
        return (batch, heads, *rest)[4 - self.ndim :]

    def out_shape(self) -> tuple[int, ...]:
        batch, heads, length, _ = self.query.shape
        shape = (batch, length, heads, self.value.shape[3])
        return shape if self.ndim == 4 else shape[1:] if self.ndim == 3 else (length, shape[3])


def in_index_order(array: Array) -> Array:
    """(S, D), (S, H, D) or (B, S, H, D) as (B, H, S, D)."""
    if array.ndim == 2:
        return array[None, None]
    turned = array.transpose(_AXES[array.ndim])
    return turned if array.ndim == 4 else turned[None]


def make(
    q: object,
    k: object,
    v: object,
    *,
    pattern: object,
    causal: bool,
    window: object,
    attn_mask: object,
    softmax_scale: float | None,
    softcap: float | None,
    alibi_slopes: object,
    sinks: object,
    input_precision: object,
    intermediate_precision: object,
    output_precision: object,
    out: object,
    return_lse: bool,
    return_weights: bool,
) -> Request:
    """The call that these arguments of `heedful.numpy.attention` mean.

    Raises:
        ValueError, TypeError: naming the argument that is wrong.
    """
    causal, return_lse, return_weights = (
        bool(flag) if isinstance(flag, np.bool_) else flag for flag in (causal, return_lse, return_weights)
    )
    check_scalars(causal, softmax_scale, softcap, 0.0, return_lse, return_weights, "softmax_scale")
    if return_weights not in (True, False):
        raise wrong_value("return_weights", repr(return_weights), "True or False")
    inputs = {name: given(name, value) for name, value in (("q", q), ("k", k), ("v", v))}
    ndim = inputs["q"].array.ndim
    for name, array in inputs.items():
        if array.array.ndim not in _LAYOUTS:
            raise wrong_value(name, f"shape {array.array.shape}", " or ".join(_LAYOUTS.values()))
        if array.array.ndim != ndim:
            raise wrong_value(name, f"shape {array.array.shape}", f"as many dimensions as q, {_LAYOUTS[ndim]}")

    to_input = precision_of("input_precision", input_precision)
    for name in ("k", "v"):
        if to_input is None and inputs[name].precision != inputs["q"].precision:
            takes = f"q's dtype, {inputs['q'].precision}; input_precision= casts all three"
            raise wrong_type(name, f"dtype {inputs[name].precision}", takes)
    read_as = to_input or inputs["q"].precision
    to_output = precision_of("output_precision", output_precision)
    target = None if out is None else _target(out)
    if target is not None and to_output not in (None, target.precision):
        raise wrong_type("out", f"dtype {target.precision}", f"output_precision, {to_output}")
    write_as = to_output or (target.precision if target is not None else read_as)
    precision = wider(read_as, write_as)
    _check_intermediate(intermediate_precision, precision)

    # Rounded to what was asked for first, then to what it is computed in, which holds that exactly.
    copied = {}
    for name, array in inputs.items():
        rounded = cast(array, read_as)
        inputs[name] = cast(rounded, precision)
        why = rounded.copied or inputs[name].copied
        if why is not None:
            copied[name] = why
    query, key, value = (in_index_order(array.array) for array in inputs.values())
    check_shapes(query, key, value)
    if value.shape[3] == 0:
        raise wrong_value("v", "head dim 0", "1 or more")
    batch, heads, q_length, _ = query.shape
    pairs = (batch, heads, q_length, key.shape[2])

    mask, bias = _mask_or_bias(attn_mask, pairs, precision)
    slopes = _vector("alibi_slopes", alibi_slopes, [(heads,), (batch, heads)], precision)
    sink = _vector("sinks", sinks, [(heads,)], precision)
    extras = {"attn_mask": bias, "alibi_slopes": slopes, "sinks": sink}
    copied |= {name: extra.copied for name, extra in extras.items() if extra is not None and extra.copied is not None}
    whole = resolve(pattern, causal, window, mask)
    whole.validate(*pairs)

    if target is None or return_weights:
        dtype_of(write_as)
    request = Request(
        query,
        key,
        value,
        whole,
        query.shape[3] ** -0.5 if softmax_scale is None else float(softmax_scale),
        0.0 if softcap is None else float(softcap),
        None if bias is None else bias.array,
        None if slopes is None else slopes.array.reshape(-1, heads),
        None if sink is None else sink.array,
        precision,
        write_as,
        None if target is None else target.array,
        ndim,
        copied,
    )
    if write_as != precision:
        copied["out"] = f"cast from {precision} to {write_as}"
    if target is not None:
        if target.array.shape != request.out_shape():
            raise wrong_value("out", f"shape {target.array.shape}", f"shape {request.out_shape()}")
        if target.copied is not None:
            copied["out"] = target.copied
        elif overlaps(target.array, [query, key, value, mask, request.bias, request.alibi_slopes, request.sinks]):
            copied["out"] = "shares memory with what is read"
    return request


def resolve(pattern: object, causal: bool, window: object, mask: Array | None) -> Pattern:
    """All that says which keys a query sees, as one pattern."""
    parts: list[Pattern] = []
    if isinstance(pattern, Pattern):
        parts.append(pattern)
    elif is_array(pattern):
        parts.append(Mask(pattern))
    elif pattern is not None:
        raise wrong_type("pattern", what(pattern), "a heedful.Pattern (an instance), a bool array or None")
    if causal:
        parts.append(Causal())
    if window is not None:
        parts.append(_window(window))
    if mask is not None:
        parts.append(Mask(mask))
    if not parts:
        return Full()
    whole = parts[0]
    for part in parts[1:]:
        whole = whole & part
    return whole


def overlaps(target: Array, read: list[Array | None]) -> bool:
    """Whether writing may change what is still to be read."""
    return any(array is not None and np.may_share_memory(target, array) for array in read)


def _window(window: object) -> Pattern:
    if isinstance(window, (tuple, list)):
        if len(window) != 2:
            raise wrong_value("window", repr(window), "a radius or a pair (left, right)")
        return SlidingWindow(window[0], window[1])
    if not hasattr(window, "__index__") or isinstance(window, bool):
        raise wrong_type("window", what(window), "an int, the radius, or a pair (left, right) of ints or None")
    return SlidingWindow(window)  # type: ignore[arg-type]


def _check_intermediate(value: object, precision: str) -> None:
    exact = "float64" if precision == "float64" else "float32"
    if precision_of("intermediate_precision", value) not in (None, exact):
        short = "fp64" if exact == "float64" else "fp32"
        raise wrong_value(
            "intermediate_precision",
            repr(value),
            f"{short!r} or None here: sums and softmax of {precision} are kept in {exact}",
        )


def _target(out: object) -> Given:
    """`out` as memory to write into; `copied` says why the engine cannot."""
    array, is_bfloat16 = imported("out", out)
    if not array.flags.writeable:
        raise wrong_value("out", "memory that cannot be written", "an array that can")
    if any(stride == 0 and size > 1 for size, stride in zip(array.shape, array.strides, strict=True)):
        raise wrong_value("out", "an array whose elements share memory", "an element of its own for each result")
    precision = precision_of("out", array.dtype) if not is_bfloat16 else "bfloat16"
    assert precision is not None
    why = unreadable(array)
    return Given(array.view(np.uint16) if precision == "bfloat16" else array, precision, why)


def _mask_or_bias(
    attn_mask: object, pairs: tuple[int, int, int, int], precision: str
) -> tuple[Array | None, Given | None]:
    if attn_mask is None:
        return None, None
    array, is_bfloat16 = imported("attn_mask", attn_mask)
    missing = 4 - array.ndim
    sizes = (1,) * missing + array.shape
    if missing < 0 or any(size not in (1, n) for size, n in zip(sizes, pairs, strict=True)):
        raise wrong_value("attn_mask", f"shape {array.shape}", f"a shape that broadcasts to (B, H, Sq, Sk) = {pairs}")
    if array.dtype == np.bool_:
        return array, None
    if array.dtype.kind in "iu" and not is_bfloat16:
        raise wrong_type("attn_mask", f"dtype {array.dtype}", "bool (True = attend) or floats that are added")
    bias = _extra(given("attn_mask", attn_mask), precision)
    return None, bias._replace(array=bias.array.reshape(sizes))


def _vector(name: str, value: object, shapes: list[tuple[int, ...]], precision: str) -> Given | None:
    if value is None:
        return None
    found = given(name, value)
    if found.array.ndim == 0 or found.array.shape not in shapes:
        raise wrong_value(name, f"shape {found.array.shape}", " or ".join(f"shape {shape}" for shape in shapes))
    return _extra(found, precision)


def _extra(found: Given, precision: str) -> Given:
    """A bias, slopes or sinks: the engine takes the inputs' own precision and float32."""
    return found if found.precision in (precision, "float32") else cast(found, wider(precision, "float32"))
