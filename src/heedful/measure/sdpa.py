"""The call of PyTorch's SDPA that a user would write for a pattern, found by trying the few that there are."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from .rows import Call

if TYPE_CHECKING:
    from torch import Tensor

    from heedful import Pattern

TRIES = 3
# A candidate so much slower than the best so far is not tried again.
HOPELESS = 2.0


class Peer(NamedTuple):
    """One way to say a pattern to SDPA; name has the arguments that a user would write."""

    name: str
    call: Call


def sdpa_calls(pattern: Pattern | None, query: Tensor, key: Tensor, bias: Tensor | None = None) -> list[Peer]:
    """Every way to say this call to SDPA, the masks built here, outside of what is timed.

    Without a mask where none is needed, with is_causal where that is the pattern, else with a bool and with a float
    mask; grouped heads by enable_gqa and by repeating keys and values in the call.
    """
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    q_length, k_length = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    options = _options(pattern, q_length, k_length, query, bias)
    peers = []
    for name, keywords in options:

        def plain(q: Tensor, k: Tensor, v: Tensor, keywords: dict[str, Any] = keywords) -> Tensor:
            return sdpa(q, k, v, **keywords)

        def grouped(q: Tensor, k: Tensor, v: Tensor, keywords: dict[str, Any] = keywords) -> Tensor:
            return sdpa(q, k, v, enable_gqa=True, **keywords)

        def repeated(q: Tensor, k: Tensor, v: Tensor, keywords: dict[str, Any] = keywords) -> Tensor:
            return sdpa(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), **keywords)

        if group == 1:
            peers.append(Peer(name or "plain", plain))
        else:
            lead = f"{name}, " if name else ""
            peers += [Peer(f"{lead}enable_gqa", grouped), Peer(f"{lead}keys repeated", repeated)]
    return peers


def best_sdpa(
    pattern: Pattern | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    grad_out: Tensor | None = None,
) -> Peer:
    """The fastest of `sdpa_calls` on this machine for these tensors, with its gradients where grad_out is given."""
    import torch

    best, found = float("inf"), None
    for peer in sdpa_calls(pattern, query, key, bias):

        def once(call: Call = peer.call) -> float:
            start = time.perf_counter()
            out = call(query, key, value)
            if grad_out is not None:
                torch.autograd.grad(out, (query, key, value), grad_out)
            return time.perf_counter() - start

        seconds = once()
        for _ in range(TRIES):
            if seconds > HOPELESS * best:
                break
            seconds = min(seconds, once())
        if seconds < best or found is None:
            best, found = seconds, peer
    assert found is not None
    return found


def _options(
    pattern: Pattern | None, q_length: int, k_length: int, query: Tensor, bias: Tensor | None
) -> list[tuple[str, dict[str, Any]]]:
    import torch

    from heedful import Causal, Full

    mask = None
    if pattern is not None and not isinstance(pattern, Full):
        if bias is None and pattern == Causal() and q_length == 1:
            return [("", {})]
        if bias is None and (pattern == Causal(0) or (pattern == Causal() and q_length == k_length)):
            return [("is_causal", {"is_causal": True})]
        mask = _narrow(pattern.dense(q_length, k_length))
    if bias is not None:
        added = bias.to(query.dtype)
        return [("float mask", {"attn_mask": added if mask is None else added.masked_fill(~mask, -torch.inf)})]
    if mask is None:
        return [("", {})]
    additive = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    return [("bool mask", {"attn_mask": mask}), ("float mask", {"attn_mask": additive})]


def _narrow(mask: Tensor) -> Tensor:
    """One row that broadcasts where all rows are equal, as a user writes a padding mask."""
    first = mask[:, :, :1]
    return first.contiguous() if bool((mask == first).all()) else mask
