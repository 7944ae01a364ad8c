"""Packed queries against keys in the blocks of a table, which are read where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from heedful.cached import deciding
from heedful.choose import choose
from heedful.errors import wrong_value
from heedful.flash_attn.calls import (
    cache_call,
    check_blocks,
    check_cache,
    check_slopes,
    check_table,
    run,
    without_backward,
)
from heedful.flash_attn.packing import Packing, check_longest, packing_of
from heedful.kv_cache import for_queries
from heedful.patterns import Pattern
from heedful.patterns.aligned import Aligned
from heedful.patterns.arguments import LARGEST


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    block_table: Tensor,
    within: Pattern,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q (total_q, H, D) over pools k (blocks, P, Hkv, D) and v (blocks, P, Hkv, Dv): out (total_q, H, Dv) and lse
    (H, total_q)."""
    # There is no last key, as the blocks have room for more.
    if not q.is_cpu:
        cu_seqlens_q, cu_seqlens_k, block_table = (
            t.to(q.device) if isinstance(t, Tensor) else t for t in (cu_seqlens_q, cu_seqlens_k, block_table)
        )
    packing = packing_of(cu_seqlens_q, cu_seqlens_k, q.shape[0], LARGEST)
    check_longest(packing, max_seqlen_q)
    check_cache(("k", "v"), q, k, v)
    blocks, block_size = k.shape[:2]
    lengths = packing.cu_k.diff()
    check_table(block_table, packing.sequences)
    if packing.known:
        check_blocks(block_table, lengths.tolist(), block_size, blocks)
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, q, packing.sequences, "sequences")
    if packing.known and packing.longest[1] > block_table.shape[1] * block_size:
        room = f"at most {block_table.shape[1]} blocks of {block_size} keys to a sequence"
        raise wrong_value("cu_seqlens_k", f"{packing.longest[1]} keys", room)
    with torch.no_grad():
        tensors = q, k.transpose(1, 2), v.transpose(1, 2), lengths, block_table.to(torch.int32)
        alike = packing.known and (
            int(packing.cu_q[-1]) == packing.total_q == packing.sequences * packing.longest[0] > 0
        )
        attend = _by_item if alike else _in_one
        found = attend(*tensors, packing, within, scale, softcap, alibi_slopes)
    if not torch.is_grad_enabled():
        return found
    name = "flash_attn_varlen_func with a block_table"
    return cast(tuple[Tensor, Tensor], without_backward(name, found, q, k, v, alibi_slopes))


# A graph would hold lengths as constants.
attend_outside_graphs: Callable[..., Any] = torch.compiler.disable(
    attend_packed, reason="flash_attn_varlen_func with a block_table runs outside graphs: it looks at lengths"
)


def _by_item(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    table: Tensor,
    packing: Packing,
    within: Pattern,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sequences of as many queries each are the items of a batch."""
    count, longest = packing.longest
    pages = table[:, : -(-longest // key.shape[2])]
    offset = lengths - count
    pattern = Aligned(for_queries(within, count), offset, lengths, None, longest)
    call = cache_call(
        q.unflatten(0, (-1, count)), key, value, pattern, pages.shape[1] * key.shape[2], scale, softcap, alibi_slopes,
        True, pages, offset,
    )  # fmt: skip
    found = run(call, choose(deciding(call.problem)))
    assert found.lse is not None
    return found.out.flatten(0, 1), found.lse.transpose(0, 1).flatten(1)


def _in_one(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    table: Tensor,
    packing: Packing,
    within: Pattern,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All sequences in one batch item, whose pages are all of theirs one after the other: what the last block of each
    has left are the keys of a sequence without queries."""
    size = key.shape[2]
    if packing.known:
        counts = (lengths + size - 1) // size
        pages = table[torch.arange(table.shape[1]) < counts[:, None]][None]
    else:
        # How many blocks have keys is not looked at: the others are left too.
        counts, pages = torch.full_like(lengths, table.shape[1]), table.reshape(1, -1)
    first = size * (counts.cumsum(0) - counts)
    k_length = pages.shape[1] * size
    cu_q, cu_k = packing.cu_q, torch.stack([first, first + lengths], 1).flatten()
    cu_q = torch.cat([torch.stack([cu_q[:-1], cu_q[1:]], 1).flatten(), cu_q[-1:], cu_q.new_tensor([packing.total_q])])
    cu_k = torch.cat([cu_k, cu_k.new_tensor([k_length, k_length])]).to(torch.int32)
    whole = Packing(cu_q, cu_k, packing.total_q, k_length, False)
    call = cache_call(q[None], key, value, whole.documents(within), k_length, scale, softcap, None, True, pages, None)
    if alibi_slopes is not None:
        by_query = alibi_slopes.view(-1, q.shape[1]).expand(packing.sequences, -1)[packing.sequence_of_query]
        call.alibi_slopes, call.query_offset = by_query.T[None, :, :, None], whole.query_offset
        call.problem = call.problem._replace(features=call.problem.features | {"alibi"})
    found = run(call, choose(deciding(call.problem)))
    assert found.lse is not None
    return found.out[0], found.lse[0]
