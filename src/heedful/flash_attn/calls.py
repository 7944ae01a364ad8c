"""Calls that `heedful.attention` has no arguments for: ALiBi by sequence, keys in pages or up to an item's own end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heedful.arguments import DTYPES, autocast_dtype, slopes_of_rank_4
from heedful.backend.base import Backend
from heedful.errors import wrong_type, wrong_value
from heedful.patterns import Pattern
from heedful.patterns.arguments import describe
from heedful.problem import Attention, Call, Problem


def cache_call(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    k_length: int,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    return_lse: bool,
    pages: Tensor | None = None,
    query_offset: Tensor | None = None,
) -> Call:
    """The call of q (B, Lq, H, D) over key and value (B, Hkv, k_length, D or Dv), or with pages (B, k_length / P) over
    pools (blocks, Hkv, P, D or Dv). Without gradients; all arguments have been checked."""
    batch, q_length, heads, head_dim = q.shape
    needed = {
        "lse": return_lse,
        "softcap": softcap is not None,
        "alibi": alibi_slopes is not None,
        "paged": pages is not None,
    }
    problem = Problem(
        batch,
        heads,
        key.shape[1],
        q_length,
        k_length,
        head_dim,
        value.shape[3],
        q.dtype,
        q.device.type,
        pattern.schedule,
        frozenset([feature for feature, used in needed.items() if used]),
    )
    return Call(
        problem,
        q.transpose(1, 2),
        key,
        value,
        pattern,
        head_dim**-0.5 if scale is None else float(scale),
        alibi_slopes=slopes_of_rank_4(alibi_slopes),
        softcap=softcap,
        blhd=True,
        pages=pages,
        query_offset=query_offset,
    )


def run(call: Call, backend: Backend) -> Attention:
    """The call's results; out as (B, L, H, Dv)."""
    if autocast_dtype(call.problem.device_type) is None:
        result = backend.run(call)
    else:
        with torch.autocast(call.problem.device_type, enabled=False):
            result = backend.run(call)
    return result._replace(out=result.out.transpose(1, 2))


def check_cache(names: tuple[str, str], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless k and v (…, …, Hkv, D or Dv), which go by these names, fit q (…, H, D)."""
    if q.dtype not in DTYPES:
        raise wrong_type("q", f"dtype {q.dtype}", "float16, bfloat16, float32 or float64")
    heads, head_dim = q.shape[-2:]
    for name, tensor in zip(names, (k, v), strict=True):
        if not isinstance(tensor, Tensor):
            raise wrong_type(name, describe(tensor), "a torch.Tensor")
        if tensor.ndim != 4:
            raise wrong_value(name, f"shape {tuple(tensor.shape)}", "4 dimensions")
        if tensor.dtype != q.dtype:
            raise wrong_type(name, f"dtype {tensor.dtype}", f"q's dtype, {q.dtype}")
        if tensor.device != q.device:
            raise wrong_value(name, f"a tensor on {tensor.device}", f"q's device, {q.device}")
        if tensor.shape[:3] != k.shape[:3]:
            raise wrong_value(name, f"shape {tuple(tensor.shape)}", f"{names[0]}'s up to the last, {tuple(k.shape)}")
    if head_dim == 0 or k.shape[3] != head_dim:
        raise wrong_value(names[0], f"head dim {k.shape[3]}", f"q's head dim, 1 or more, here {head_dim}")
    if heads == 0 or k.shape[2] == 0 or heads % k.shape[2]:
        raise wrong_value(names[0], f"{k.shape[2]} heads", f"a number of heads that divides q's, {heads}")


def check_slopes(slopes: Tensor, q: Tensor, items: int, what: str) -> None:
    """Raises unless ALiBi's slopes are (H,) or (items, H), which are `what`, for q (…, H, D)."""
    heads = q.shape[-2]
    if not isinstance(slopes, Tensor) or slopes.dtype not in (q.dtype, torch.float32):
        raise wrong_type("alibi_slopes", describe(slopes), f"a float32 tensor, or one of q's dtype, {q.dtype}")
    if slopes.shape not in ((heads,), (items, heads)):
        takes = f"shape (heads,) or ({what}, heads), here ({heads},) or ({items}, {heads})"
        raise wrong_value("alibi_slopes", f"shape {tuple(slopes.shape)}", takes)
    if slopes.device != q.device:
        raise wrong_value("alibi_slopes", f"a tensor on {slopes.device}", f"q's device, {q.device}")


def check_table(table: Tensor, items: int) -> None:
    """Raises unless a block table is int32 (items, n)."""
    if not isinstance(table, Tensor) or table.dtype not in (torch.int32, torch.int64):
        raise wrong_type("block_table", describe(table), "an int32 tensor (batch, blocks of a sequence)")
    if table.ndim != 2 or table.shape[0] != items:
        raise wrong_value("block_table", f"shape {tuple(table.shape)}", f"({items}, blocks of a sequence)")


def check_blocks(table: Tensor, lengths: Sequence[int], block_size: int, blocks: int) -> None:
    """Raises unless a block table has blocks that there are for as many keys of each item as it has."""
    if table.device.type != "cpu" or not table.numel():
        return
    least, most = (int(end) for end in table.aminmax())
    if least >= 0 and most < blocks:
        return
    used = torch.arange(table.shape[1]) * block_size < torch.tensor(lengths)[:, None]
    wrong = used & ((table < 0) | (table >= blocks))
    if bool(wrong.any()):
        raise wrong_value("block_table", f"{int(table[wrong][0])} as a block", f"blocks from 0 to {blocks - 1}")


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, result: Tensor, *sources: Tensor) -> Tensor:
        ctx.name = name
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(f"{ctx.name} has no backward pass, as in flash-attn")


def without_backward(name: str, results: Any, *sources: Tensor | None) -> Any:
    """The tensor, or the tuple of them, that a call without a part in autograd gave: a backward pass through it to any
    of what it was made from is refused."""
    given = [source for source in sources if source is not None and source.requires_grad]
    if not given or results is None:
        return results
    if isinstance(results, Tensor):
        return _NoBackward.apply(name, results, *given)  # type: ignore[no-untyped-call]
    return tuple(_NoBackward.apply(name, result, *given) for result in results)  # type: ignore[no-untyped-call]
