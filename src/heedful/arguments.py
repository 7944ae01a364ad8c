"""The arguments of `heedful.attention`, checked and brought into one form.

Bad ones are refused before any work, by a ValueError or TypeError with the argument's name, what it got and what
it takes.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.autograd import forward_ad

from heedful.checks import check_scalars, check_shapes, shape_of, what
from heedful.errors import wrong_type, wrong_value
from heedful.kv_cache import KVCache, no_gradient
from heedful.patterns import Causal, Full, Mask, Pattern
from heedful.patterns.arguments import check_broadcast
from heedful.problem import Call, Problem

LAYOUTS = ("bhld", "blhd")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Whether torch gives this a type depends on what else mypy reads.
_unpack_dual: Any = forward_ad.unpack_dual
_DTYPE_NAMES = "float16, bfloat16, float32 or float64"


class Options(TypedDict, total=False):
    """What `heedful.attention` and `heedful.explain` take beside q, k, v; documented at the former."""

    pattern: Pattern | Tensor | None
    causal: bool
    bias: Tensor | None
    alibi_slopes: Tensor | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    dropout_p: float
    cache: KVCache | None
    layout: str
    backend: str | None


class AllOptions(Options, total=False):
    """The same with what decides the type that is returned."""

    return_lse: bool
    return_weights: bool | Literal["sparse"]


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Tensor | None,
    causal: bool,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    cache: KVCache | None,
    layout: str,
    return_lse: bool,
    return_weights: bool | str,
) -> Call:
    """The call that these arguments of `heedful.attention` mean. With a cache, k and v have been appended to it then.

    Raises:
        ValueError, TypeError: naming the argument that is wrong.
    """
    if layout not in LAYOUTS:
        raise wrong_value("layout", repr(layout), "'bhld' or 'blhd'")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, tensor)
        if tensor.ndim != 4:
            raise wrong_value(name, f"shape {shape_of(tensor)}", f"4 dimensions, {_axes(layout)}")
    query, key, value = _same_dtype_and_device(q, k, v)
    if layout == "blhd":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    check_shapes(query, key, value)
    check_scalars(causal, scale, softcap, dropout_p, return_lse, return_weights)
    if cache is not None and not isinstance(cache, KVCache):
        raise wrong_type("cache", what(cache), "a heedful.KVCache or None")
    batch, heads, q_length, head_dim = query.shape
    k_length, value_dim = key.shape[2] + (0 if cache is None else len(cache)), value.shape[3]
    pairs = (batch, heads, q_length, k_length)

    whole = resolve_pattern(pattern, causal)
    if isinstance(pattern, Tensor):
        check_broadcast("pattern", pattern, pairs)
    whole.validate(batch, heads, q_length, k_length)
    if bias is not None:
        _check_extra("bias", bias, query, "(B, H, Lq, Lk)", pairs)
        bias = of_rank_4(bias)
    if alibi_slopes is not None:
        per_item = isinstance(alibi_slopes, Tensor) and alibi_slopes.ndim == 2
        axes, shape = ("(B, H)", (batch, heads)) if per_item else ("(H,)", (heads,))
        _check_extra("alibi_slopes", alibi_slopes, query, axes, shape, broadcast=False)
        alibi_slopes = slopes_of_rank_4(alibi_slopes)
    if sinks is not None:
        _check_extra("sinks", sinks, query, "(H,)", (heads,), broadcast=False)

    tensors = [t for t in (query, key, value, bias, alibi_slopes, sinks) if t is not None]
    needed = {
        "bias": bias is not None,
        "alibi": alibi_slopes is not None,
        "softcap": softcap is not None,
        "sinks": sinks is not None,
        "dropout": dropout_p > 0,
        "lse": return_lse,
        "weights": return_weights is True,
        "sparse_weights": return_weights == "sparse",
        "gradient": torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        "second_order": _is_differentiated_twice(tensors),
        "forward_mode": _has_tangent(tensors),
        "vmap": _under("Vmap") > 0,
    }
    pages = query_offset = None
    if cache is not None:
        if needed["gradient"] or needed["forward_mode"] or needed["vmap"]:
            raise no_gradient()
        cache.append(key, value)
        key, value, whole, k_length, pages, query_offset = cache.hold(whole, q_length)
        needed["paged"] = pages is not None
        if bias is not None and bias.shape[3] not in (1, k_length):
            bias = torch.nn.functional.pad(bias, (0, k_length - bias.shape[3]))
    problem = Problem(
        batch,
        heads,
        key.shape[1],
        q_length,
        k_length,
        head_dim,
        value_dim,
        query.dtype,
        query.device.type,
        whole.schedule,
        frozenset([feature for feature, used in needed.items() if used]),
        whole if whole.schedule.slots and not torch.compiler.is_compiling() and whole.is_constant else None,
        None if bias is None else bias.dtype,
    )
    return Call(
        problem,
        query,
        key,
        value,
        whole,
        head_dim**-0.5 if scale is None else float(scale),
        bias,
        alibi_slopes,
        None if softcap is None else float(softcap),
        sinks,
        float(dropout_p),
        layout == "blhd",
        pages,
        query_offset,
    )


def resolve_pattern(pattern: Pattern | Tensor | None, causal: bool) -> Pattern:
    """The pattern that `pattern=` and `causal=` mean together."""
    if isinstance(pattern, Tensor):
        if pattern.dtype != torch.bool:
            raise wrong_type(
                "pattern",
                f"a tensor of {pattern.dtype}",
                "a heedful.Pattern or a bool tensor (True = attend); a float mask goes to bias=",
            )
        pattern = Mask(pattern)
    if pattern is None:
        return Causal() if causal else Full()
    if not isinstance(pattern, Pattern):
        raise wrong_type("pattern", what(pattern), "a heedful.Pattern (an instance), a bool tensor or None")
    return pattern & Causal() if causal else pattern


def of_rank_4(tensor: Tensor) -> Tensor:
    """A bias or a mask with dimensions of size 1 in front, as many as it lacks of (B, H, Lq, Lk)."""
    return tensor if tensor.ndim == 4 else tensor[(None,) * (4 - tensor.ndim)]


def slopes_of_rank_4(alibi_slopes: Tensor | None) -> Tensor | None:
    """ALiBi slopes (H,) or (B, H) as (1 or B, H, 1, 1)."""
    if alibi_slopes is None:
        return None
    return (alibi_slopes if alibi_slopes.ndim == 2 else alibi_slopes[None])[:, :, None, None]


# Asked here, because torch 2.11 cannot trace the question.
_WITH_AUTOCAST = frozenset(
    name
    for name in ("cpu", "cuda", "hpu", "mps", "mtia", "xpu", torch._C._get_privateuse1_backend_name())
    if torch.amp.is_autocast_available(name)
)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts attention to on this device, None where it is off."""
    if device_type in _WITH_AUTOCAST and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _same_dtype_and_device(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device != q.device:
            raise wrong_value(name, f"a tensor on {tensor.device}", f"q's device, {q.device}")
    cast = autocast_dtype(q.device.type)
    if cast is not None:
        q, k, v = (t if t.dtype == torch.float64 else t.to(cast) for t in (q, k, v))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise wrong_type(name, f"dtype {tensor.dtype}", f"q's dtype, {q.dtype}")
    return q, k, v


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise wrong_type(name, what(tensor), "a torch.Tensor")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise wrong_type(
            name,
            "a nested or sparse tensor",
            "a strided tensor; pack sequences of different lengths with heedful.Documents",
        )
    if tensor.dtype not in DTYPES:
        raise wrong_type(name, f"dtype {tensor.dtype}", _DTYPE_NAMES)


def _check_extra(
    name: str, tensor: Tensor, query: Tensor, axes: str, shape: tuple[int, ...], broadcast: bool = True
) -> None:
    if not isinstance(tensor, Tensor):
        raise wrong_type(name, what(tensor), "a float tensor")
    if tensor.dtype == torch.bool:
        raise wrong_type(name, "a bool tensor", "a float tensor; a bool mask is pattern=heedful.Mask(mask)")
    if tensor.dtype not in (query.dtype, torch.float32):
        raise wrong_type(name, f"dtype {tensor.dtype}", f"q's dtype, {query.dtype}, or torch.float32")
    if tensor.device != query.device:
        raise wrong_value(name, f"a tensor on {tensor.device}", f"q's device, {query.device}")
    missing = len(shape) - tensor.ndim
    sizes = (1,) * missing + tuple(tensor.shape)
    fits = missing == 0 or (broadcast and missing > 0)
    if not fits or any(size != n and not (broadcast and size == 1) for size, n in zip(sizes, shape, strict=True)):
        verb = "a shape that broadcasts to" if broadcast else "shape"
        raise wrong_value(name, f"shape {shape_of(tensor)}", f"{verb} {axes} = {tuple(shape)}")


def _has_tangent(tensors: list[Tensor]) -> bool:
    if forward_ad._current_level < 0:
        return _under("Jvp") > 0
    return any(_unpack_dual(tensor).tangent is not None for tensor in tensors)


def _is_differentiated_twice(tensors: list[Tensor]) -> bool:
    """Whether torch.func.grad is applied to itself, or autograd records what goes into it."""
    depth = _under("Grad")
    if depth == 0 or not torch.is_grad_enabled():
        return False
    functorch = torch._C._functorch
    wrapped = [t for t in tensors if functorch.is_gradtrackingtensor(t)]
    return depth > 1 or any(functorch.get_unwrapped(t).requires_grad for t in wrapped)


def _under(transform: str) -> int:
    """How many function transforms of this kind (torch.func) are active."""
    if not torch._C._are_functorch_transforms_active():
        return 0
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(interpreter.key().name == transform for interpreter in stack)


def _axes(layout: str) -> str:
    return "(B, H, L, D)" if layout == "bhld" else "(B, L, H, D)"
