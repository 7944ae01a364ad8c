"""Several documents packed into one sequence."""

from __future__ import annotations

import functools
import logging
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from heedful.patterns.arguments import LARGEST, describe, readable
from heedful.patterns.arrays import as_tensor, count, dtype_name, is_array
from heedful.patterns.banded import Full
from heedful.patterns.base import Pattern
from heedful.patterns.schedule import Schedule, in_mask

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from heedful.patterns.arrays import Array


class Documents(Pattern):
    """A query may attend to the keys of its own document where `within` allows it, aligned inside the document:
    `within` sees positions counted from the document's first query and first key, and the document's lengths.

    `Documents(cu, within=Causal())` is the causal attention of flash-attn's varlen functions.

    Where `within` has documents, blocks or a mask itself, the whole pattern is spelled out as a bool mask of
    q_length * k_length at each call, and the log says so.

    Args:
        cu_q: int32 or int64 tensor (n + 1,): 0, then where each of the n documents ends in the queries, the last
            at their length. Documents may be empty.
        cu_k: the same for the keys; as `cu_q` if None.
        within: the pattern inside each document; None is `Full()`.

    Raises:
        TypeError, ValueError: `cu_q` or `cu_k` is not such a tensor, their sizes differ, or `within` is not a
            pattern; contents are looked at on the CPU only. At the call, they do not end at the lengths.
    """

    def __init__(self, cu_q: Array, cu_k: Array | None = None, within: Pattern | None = None) -> None:
        self.cu_q = _cumulative("cu_q", cu_q)
        self.cu_k = None if cu_k is None else _cumulative("cu_k", cu_k)
        if self.cu_k is not None and count(self.cu_k) != count(self.cu_q):
            raise ValueError(f"cu_k takes as many elements as cu_q, {count(self.cu_q)}, got {count(self.cu_k)}")
        # Not as the default itself, which torch 2.11 cannot trace.
        within = Full() if within is None else within
        if not isinstance(within, Pattern):
            raise TypeError(f"within takes a Pattern, got {describe(within)}")
        self.within = within

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.cu_q, self.cu_k, None if self.within == Full() else self.within

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        self._check_ends(q_length, k_length)
        if not self.within.by_position:
            return self._document_by_document(q_length, k_length, i.device)
        import torch

        cu_q, cu_k = (torch.cat([cu, cu[-1:]]) for cu in (as_tensor(cu, i.device) for cu in (self.cu_q, self._cu_k)))
        # Past the last end t is one more than there are documents, which the repeated end makes an empty one.
        t = torch.searchsorted(cu_q[1:-1].contiguous(), i.contiguous().to(cu_q.dtype), right=True)
        queries, keys = cu_q[t + 1] - cu_q[t], cu_k[t + 1] - cu_k[t]
        same = (cu_k[t] <= j) & (j < cu_k[t + 1])
        return same & self.within.pairs(i - cu_q[t], j - cu_k[t], cast(int, queries), cast(int, keys))

    def _document_by_document(self, q_length: int, k_length: int, device: torch.device) -> Tensor:
        import torch

        ends_q, ends_k = self.cu_q.tolist(), self._cu_k.tolist()
        documents = [
            (slice(q0, q1), slice(k0, k1), self.within.dense(q1 - q0, k1 - k0, device))
            for (q0, q1), (k0, k1) in zip(pairwise(ends_q), pairwise(ends_k), strict=True)
        ]
        shapes = [inside.shape[:2] for _, _, inside in documents]
        lead = torch.broadcast_shapes((1, 1), *shapes)
        pairs = torch.zeros((*lead, q_length, k_length), dtype=torch.bool, device=device)
        for queries, keys, inside in documents:
            pairs[:, :, queries, keys] = inside
        return pairs

    def lower(self) -> Schedule:
        return self.within.schedule.in_documents() if self.within.by_position else Schedule.of([[in_mask(0)]], 1)

    def arrays(self, q_length: int, k_length: int) -> tuple[Array, ...]:
        if self.within.by_position:
            return (self.cu_q, self._cu_k, *self.within.arrays(q_length, k_length))
        _log_spelled_out()
        device = "cpu" if isinstance(self.cu_q, np.ndarray) else self.cu_q.device
        try:
            return (self.dense(q_length, k_length, device),)
        except ImportError as error:
            raise ImportError("Documents needs torch where its `within` has documents, blocks or a mask") from error

    def validate(self, batch: int, heads: int, q_length: int, k_length: int) -> None:
        self._check_ends(q_length, k_length)
        if self.within.by_position:
            self.within.validate(batch, heads, q_length, k_length)
        elif readable(self.cu_q) and readable(self._cu_k):
            ends = (pairwise(cu.tolist()) for cu in (self.cu_q, self._cu_k))
            for (q0, q1), (k0, k1) in zip(*ends, strict=True):
                self.within.validate(batch, heads, q1 - q0, k1 - k0)

    @property
    def by_position(self) -> bool:
        return False

    @property
    def _cu_k(self) -> Array:
        return self.cu_q if self.cu_k is None else self.cu_k

    def _check_ends(self, q_length: int, k_length: int) -> None:
        keys = "cu_q (which is cu_k too)" if self.cu_k is None else "cu_k"
        for name, cu, length in (("cu_q", self.cu_q, q_length), (keys, self._cu_k, k_length)):
            if readable(cu) and int(cu[-1]) != length:
                what = "q_length" if cu is self.cu_q and name == "cu_q" else "k_length"
                raise ValueError(f"{name} takes a last element equal to {what}, {length} here, got {int(cu[-1])}")


@functools.cache
def _log_spelled_out() -> None:
    logging.getLogger("heedful").warning(
        "Documents spells out a mask of q_length * k_length, because its `within` has documents, blocks or a mask"
    )


def _cumulative(name: str, cu: object) -> Array:
    if not is_array(cu) or dtype_name(cu) not in ("int32", "int64"):
        raise TypeError(f"{name} takes an int32 or int64 tensor, got {describe(cu)}")
    if cu.ndim != 1 or not count(cu):
        raise ValueError(f"{name} takes a tensor (documents + 1,), got {describe(cu)}")
    if readable(cu):
        if int(cu[0]) != 0:
            raise ValueError(f"{name} takes 0 as its first element, got {int(cu[0])}")
        if bool((cu[1:] < cu[:-1]).any()):
            raise ValueError(f"{name} takes elements that never decrease, got {cu.tolist()}")
        if int(cu[-1]) > LARGEST:
            raise ValueError(f"{name} takes elements up to {LARGEST}, got {int(cu[-1])}")
    return cu
