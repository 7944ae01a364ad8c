"""Where the sequences of a packed batch begin and end: checked once, and remembered for the next layers' calls."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.errors import wrong_type, wrong_value
from heedful.patterns import Documents, Pattern
from heedful.patterns.arguments import describe, readable


class Packing:
    """Packed sequences whose queries and keys end at cu_q and cu_k, int32 (sequences + 1,).

    What lies behind the last sequence are an empty sequence's queries, and another's keys. `alike` says that queries
    and keys are known to lie alike, `known` that contents may be looked at.
    """

    def __init__(self, cu_q: Tensor, cu_k: Tensor, total_q: int, total_k: int, alike: bool) -> None:
        self.cu_q, self.cu_k, self.total_q, self.total_k, self.alike = cu_q, cu_k, total_q, total_k, alike
        self.sequences, self.known = cu_q.numel() - 1, readable(cu_q)
        # No functools.cached_property, which torch.compile does not trace.
        self._documents: dict[Pattern, Documents] = {}
        self._longest: tuple[int, int] | None = None
        self._sequence_of_query: Tensor | None = None
        self._query_offset: Tensor | None = None

    def documents(self, within: Pattern) -> Documents:
        """The pairs of each sequence that `within` holds."""
        if not self.known:
            return Documents(self.cu_q, self.cu_k, within)
        found = self._documents.get(within)
        if found is None:
            found = self._documents[within] = Documents(*self._ends(), within)
        return found

    @property
    def longest(self) -> tuple[int, int]:
        """Queries and keys of the longest sequences."""
        if self._longest is None:
            self._longest = int(self.cu_q.diff().max()), int(self.cu_k.diff().max())
        return self._longest

    @property
    def sequence_of_query(self) -> Tensor:
        """int64 (total_q,); the last sequence's number for what lies behind it."""
        if self._sequence_of_query is None:
            queries = torch.arange(self.total_q, dtype=torch.int32, device=self.cu_q.device)
            found = torch.searchsorted(self.cu_q[1:], queries, right=True)
            self._sequence_of_query = found.clamp(max=self.sequences - 1)
        return self._sequence_of_query

    @property
    def query_offset(self) -> Tensor:
        """int32 (1, total_q): what brings a query's number to the number of the key that it meets."""
        if self._query_offset is None:
            self._query_offset = (self.cu_k[1:] - self.cu_q[1:])[self.sequence_of_query][None]
        return self._query_offset

    def _ends(self) -> tuple[Tensor, Tensor]:
        # Where contents are not looked at, the engine takes what lies behind the last sequence for empty ones.
        if not self.known or (self.cu_q[-1] == self.total_q and self.cu_k[-1] == self.total_k):
            return self.cu_q, self.cu_k
        more_q = self.cu_q.new_tensor([self.total_q, self.total_q])
        more_k = torch.stack([self.cu_k[-1], self.cu_k.new_tensor(self.total_k)])
        return torch.cat([self.cu_q, more_q]), torch.cat([self.cu_k, more_k])


_last: Packing | None = None


def packing_of(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int) -> Packing:
    """The sequences of a call.

    Raises:
        TypeError, ValueError: cu_seqlens_q or cu_seqlens_k is no int32 or int64 tensor (sequences + 1,) that begins
            with 0, never decreases and ends at the total or before; contents are looked at on the CPU only.
    """
    global _last
    one = cu_seqlens_k is cu_seqlens_q and total_k == total_q
    if torch.compiler.is_compiling() or not (isinstance(cu_seqlens_q, Tensor) and cu_seqlens_q.is_cpu):
        ends = (_checked("cu_seqlens_q", cu_seqlens_q, total_q), _checked("cu_seqlens_k", cu_seqlens_k, total_k))
        return Packing(*ends, total_q, total_k, one)
    # All layers of a model get the same: comparing contents takes 2 µs, checking them 50.
    last = _last
    if (
        last is not None
        and last.total_q == total_q
        and last.total_k == total_k
        and _same(cu_seqlens_q, last.cu_q)
        and ((one and last.alike) or _same(cu_seqlens_k, last.cu_k))
    ):
        return last
    # Copies, since the caller may write other lengths into his.
    with torch.inference_mode(False):
        cu_q = _checked("cu_seqlens_q", cu_seqlens_q, total_q).clone()
        cu_k = cu_q if one else _checked("cu_seqlens_k", cu_seqlens_k, total_k).clone()
    if cu_q.numel() != cu_k.numel():
        raise wrong_value("cu_seqlens_k", f"{cu_k.numel()} elements", f"as many as cu_seqlens_q, {cu_q.numel()}")
    alike = total_k == total_q and torch.equal(cu_q, cu_k)
    last = _last = Packing(cu_q, cu_k, total_q, total_k, alike)
    return last


def check_longest(packing: Packing, max_seqlen_q: int) -> None:
    if packing.known and max_seqlen_q < packing.longest[0]:
        takes = f"at least the longest sequence's queries, {packing.longest[0]}"
        raise wrong_value("max_seqlen_q", max_seqlen_q, takes)


def _same(given: Tensor, kept: Tensor) -> bool:
    return type(given) is Tensor and given.dtype == torch.int32 and given.is_cpu and torch.equal(given, kept)


def _checked(name: str, given: Tensor, total: int) -> Tensor:
    if not isinstance(given, Tensor) or given.dtype not in (torch.int32, torch.int64):
        raise wrong_type(name, describe(given), "an int32 tensor (sequences + 1,)")
    if given.ndim != 1 or given.numel() < 2:
        raise wrong_value(name, describe(given), "a tensor (sequences + 1,) of one sequence or more")
    if readable(given):
        if int(given[0]) != 0:
            raise wrong_value(name, f"{int(given[0])} as its first element", "0 there")
        if bool((given.diff() < 0).any()):
            raise wrong_value(name, given.tolist(), "elements that never decrease")
        if int(given[-1]) > total:
            raise wrong_value(name, f"{int(given[-1])} as its last element", f"at most the number of tokens, {total}")
    return given.to(torch.int32)
