"""`KVCache`: the keys and values of a sequence that grows call by call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import reduce
from operator import and_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.cache_kinds.contiguous import Contiguous
from heedful.cache_kinds.paged import Paged
from heedful.cache_kinds.pool import Pool
from heedful.cache_kinds.ring import Ring
from heedful.cache_kinds.store import Store, as_list, on_device
from heedful.errors import wrong_type, wrong_value
from heedful.patterns import Causal, Full, Padding, Pattern, SlidingWindow
from heedful.patterns.aligned import Aligned
from heedful.patterns.arguments import LARGEST, describe, integer, integers
from heedful.patterns.base import And

BLOCK_SIZE = 64

_is_grad_enabled = torch.is_grad_enabled


class Held(NamedTuple):
    """What a call attends to: tensors and pattern as `heedful.problem.Call` has them."""

    key: Tensor
    value: Tensor
    pattern: Pattern
    reach: int
    """The call's k_length: positions of the longest item, with pages of the blocks that hold them."""
    pages: Tensor | None = None
    query_offset: Tensor | None = None


class KVCache:
    """Keys and values of earlier calls, to be passed as `cache=` of `heedful.attention`.

    The k and v of such a call, (B, Hkv, Lnew, D) and (B, Hkv, Lnew, Dv), are new positions: they are written behind
    what each batch item holds, in place, and q then attends to everything in the cache, its last query at the last
    position. So calls with `causal=True` give, step by step, what one call over the whole sequences gives. The first
    call sets the batch, the heads, the dtype and the device.

    Patterns, bias and weights speak of positions in the cache, padding included: Lk is the length of the longest item,
    and what a pattern aligns with the end of the keys is aligned with the end of each item's. Masks, block maps and
    documents are the same for all items.

    There are three kinds:

    - contiguous: one buffer, which doubles where it is full. Where all items have the same length, a call costs what
      it costs without a cache and two copies of what is new.
    - ring (`window`): memory is bounded by the window, and every pattern is `& SlidingWindow(window, None)`.
    - paged (`block_size`): blocks of that many positions, taken out of a pool as items grow, given back by `free`,
      `crop` and `reset`, and shared by the items that `reorder` makes of one.

    Under torch.compile a call with a cache runs outside the graph, and `fullgraph=True` refuses it. Inputs that need a
    gradient are refused.

    Args:
        capacity: positions to make room for at first (contiguous); 0 or more.
        max_length: positions beyond which a call is refused, 1 or more; None is unlimited.
        window: positions before its own that a query sees, as `SlidingWindow`'s left; 0 or more. A causal window of n
            keys (Hugging Face's `sliding_window=n`) is n - 1.
        block_size: positions in a block, 1 or more; 64 for a ring if None.
        blocks: size of a paged cache's pool, 1 or more; a call that needs more is refused. None grows as needed.
        starts: int tensor (B,) or ints, the first real position of each item, which is left padding before.

    Raises:
        TypeError, ValueError: an argument is not as above, or not one of the kind's.
    """

    def __init__(
        self,
        *,
        capacity: int | None = None,
        max_length: int | None = None,
        window: int | None = None,
        block_size: int | None = None,
        blocks: int | None = None,
        starts: Tensor | Sequence[int] | None = None,
    ) -> None:
        self._capacity = None if capacity is None else integer("capacity", capacity, 0)
        self._max_length = None if max_length is None else integer("max_length", max_length, 1)
        self.window = None if window is None else integer("window", window, 0)
        self._block_size = None if block_size is None else integer("block_size", block_size, 1)
        self._blocks = None if blocks is None else integer("blocks", blocks, 1)
        if capacity is not None and self.kind != "contiguous":
            raise wrong_value("capacity", capacity, f"None for a {self.kind} cache")
        if capacity is not None and max_length is not None and capacity > max_length:
            raise wrong_value("capacity", capacity, f"at most max_length, {max_length}")
        if blocks is not None and self.kind != "paged":
            raise wrong_value("blocks", blocks, f"None for a {self.kind} cache; a paged one has a block_size")
        self._starts = None if starts is None else _starts(starts)
        self._padding: Padding | None = None
        self._band = Full() if self.window is None else SlidingWindow(self.window, None)
        self._store: Store | None = None
        # The length of all items, or a list where they differ.
        self._lengths: int | list[int] = 0
        self._fitting: tuple[object, ...] = ()

    @property
    def kind(self) -> str:
        """One of "contiguous", "ring" and "paged"."""
        if self.window is not None:
            return "ring"
        return "contiguous" if self._block_size is None else "paged"

    @property
    def batch(self) -> int | None:
        """Batch items; None before the first call."""
        if isinstance(self._store, Pool):
            return self._store.batch
        return None if self._store is None else self._store.key.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Positions held by each item, padding included: int32 (B,), a copy; (0,) before the first call."""
        lengths = as_list(self._lengths, self.batch or 0)
        return torch.tensor(lengths, dtype=torch.int32, device=None if self._store is None else self._store.key.device)

    @property
    def starts(self) -> Tensor | None:
        """First real position of each item, int32 (B,); None without left padding."""
        return self._starts

    def __len__(self) -> int:
        """Positions held by the longest item."""
        return self._lengths if isinstance(self._lengths, int) else max(self._lengths, default=0)

    @property
    def key(self) -> Tensor:
        """(B, Hkv, length of the longest item, D): a view of a contiguous cache, a copy of another kind. Positions
        that an item does not hold have any content.

        Raises:
            ValueError: before the first call.
        """
        return self._made.dense(len(self))[0]

    @property
    def value(self) -> Tensor:
        """(B, Hkv, length of the longest item, Dv), as `key`."""
        return self._made.dense(len(self))[1]

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take, room for later ones included."""
        return 0 if self._store is None else self._store.nbytes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Writes new positions behind what each item holds, without attending to them.

        Args:
            k: (B, Hkv, Lnew, D).
            v: (B, Hkv, Lnew, Dv).

        Raises:
            ValueError, TypeError: shapes, dtype or device are not the cache's, or there is no room; nothing has
                changed then.
        """
        fitting = (k.shape, v.shape, k.dtype, v.dtype, k.device, v.device)
        if fitting != self._fitting:
            self._check(k, v)
            self._fitting = fitting
        if k.is_cuda and torch.cuda.is_current_stream_capturing():
            raise wrong_value(
                "cache",
                "a call that becomes part of a CUDA graph",
                "calls outside of one, as it keeps lengths in Python, which replays would not change "
                "(heedful.flash_attn.flash_attn_with_kvcache takes them as a tensor)",
            )
        if _is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise no_gradient()
        store = self._store or self._make(k, v)
        lengths, count = self._lengths, k.shape[2]
        if self._max_length is not None and len(self) + count > self._max_length:
            raise wrong_value(
                "cache",
                f"{count} more on top of {len(self)}",
                f"at most {self._max_length} positions (its max_length)",
            )
        store.reserve(lengths, count)
        store.write(k, v, lengths)
        self._store = store
        self._lengths = lengths + count if isinstance(lengths, int) else [length + count for length in lengths]

    def crop(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Forgets the end of each item, as after a speculation that was not accepted.

        Args:
            lengths: positions to keep of each item, padding included; one number or one per item. 0 keeps none, a
                negative number is how many to take away.

        Raises:
            ValueError: an item holds less, or a ring has overwritten what a query behind that length would see.
        """
        held = as_list(self._lengths, self.batch or 0)
        if isinstance(lengths, Tensor | Sequence):
            wanted = _integers("lengths", lengths)
            if len(wanted) not in (1, len(held)):
                raise wrong_value("lengths", f"{len(wanted)} numbers", f"one, or one per batch item, {len(held)}")
            wanted = wanted * len(held) if len(wanted) == 1 else wanted
        else:
            wanted = [integer("lengths", lengths)] * len(held)
        kept = [want if want >= 0 else length + want for want, length in zip(wanted, held, strict=True)]
        for item, (keep, length, want) in enumerate(zip(kept, held, wanted, strict=True)):
            if not 0 <= keep <= length:
                raise wrong_value("lengths", want, f"{-length} to {length}, what item {item} holds")
        if self._store is not None:
            self._store.crop(kept)
        self._lengths = _compact(kept)

    def free(self, items: int | Sequence[int] | Tensor) -> None:
        """Empties batch items, whose next position is 0 then, without left padding. A paged cache gets back their
        blocks.

        Raises:
            ValueError: there is no such item.
        """
        chosen = self._items("items", [items] if isinstance(items, int) else items)
        lengths = as_list(self._lengths, self.batch or 0)
        kept = [0 if item in chosen else length for item, length in enumerate(lengths)]
        self._made.crop(kept)
        self._lengths = _compact(kept)
        if self._starts is not None:
            self._starts = self._starts.clone()
            self._starts[chosen] = 0
            self._padding = None

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Makes `index[n]` of the batch items item n, as a beam search does. The batch becomes as large as the index.

        A paged cache shares the blocks and copies one when an item writes into it; the other kinds copy.

        Raises:
            ValueError: there is no such item.
        """
        items = self._items("index", index)
        held = as_list(self._lengths, self.batch or 0)
        lengths = [held[item] for item in items]
        self._made.take(items, lengths)
        self._lengths = _compact(lengths)
        self._fitting = ()
        if self._starts is not None:
            self._starts = self._starts[items]
            self._padding = None

    def reset(self) -> None:
        """Empties all items and keeps the memory; left padding stays."""
        if self._store is not None:
            self._store.crop([0] * (self.batch or 0))
        self._lengths = 0

    def hold(self, pattern: Pattern, q_length: int) -> Held:
        """What `q_length` queries attend to, where they attend by `pattern`."""
        store, length = self._made, len(self)
        pattern = for_queries(pattern, q_length)
        if isinstance(self._lengths, int) and isinstance(store, Contiguous):
            if self._starts is not None:
                pattern = pattern & self._start_padding(self._starts)
            return Held(*store.dense(length), pattern, length)
        if self.window is not None:
            pattern = pattern & self._band
        lengths = [self._lengths] if isinstance(self._lengths, int) else self._lengths
        stop = on_device(lengths, torch.int32, store.key.device)
        offset = stop - q_length
        starts = None if self._starts is None else self._starts.to(store.key.device)
        pattern = Aligned(pattern, offset, stop, starts, length)
        if isinstance(store, Pool):
            pages = store.pages(length)
            return Held(store.key, store.value, pattern, pages.shape[1] * store.size, pages, offset)
        return Held(*store.dense(length), pattern, length, None, offset)

    def slices(self) -> tuple[Tensor, Tensor]:
        """Keys and values of a cache that `is_plain`."""
        return self._store.dense(self._lengths)  # type: ignore[union-attr, arg-type]

    @property
    def is_plain(self) -> bool:
        """Whether a call sees a plain slice of one buffer: contiguous, all items as long, no padding."""
        return isinstance(self._lengths, int) and self._starts is None and isinstance(self._store, Contiguous)

    @property
    def form(self) -> Hashable:
        """What of the cache, beside its lengths, decides how a call runs."""
        return self.is_plain or (isinstance(self._lengths, int), self._starts is None, self.kind, self.window)

    def state(self) -> Any:
        """What `restore` takes back to before a call that failed."""
        return self._store, self._lengths

    def restore(self, state: Any) -> None:
        # What was written lies behind the lengths, where nobody looks; a ring loses nothing that its window reaches.
        self._store, self._lengths = state
        self._fitting = ()

    def __repr__(self) -> str:
        if self._store is None:
            return f"KVCache({self.kind}, empty)"
        key, value = self._store.key, self._store.value
        lengths = as_list(self._lengths, self.batch or 0)
        shortest, longest = min(lengths, default=0), max(lengths, default=0)
        dims = f"{key.shape[3]}" if key.shape[3] == value.shape[3] else f"{key.shape[3]} and {value.shape[3]}"
        return (
            f"KVCache({self.kind}, batch {self.batch}, {key.shape[1]} heads of {dims}, "
            f"{shortest if shortest == longest else f'{shortest} to {longest}'} positions, room for "
            f"{self._store.room}, {str(key.dtype).removeprefix('torch.')} on {key.device}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    @property
    def _made(self) -> Store:
        if self._store is None:
            raise wrong_value("cache", "an empty one", "one that a call has filled")
        return self._store

    def _make(self, k: Tensor, v: Tensor) -> Store:
        if self.window is not None:
            return Ring(k, v, self.window, self._block_size or BLOCK_SIZE)
        if self._block_size is not None:
            return Paged(k, v, self._block_size, self._blocks)
        return Contiguous(k, v, self._capacity, self._max_length)

    def _check(self, k: Tensor, v: Tensor) -> None:
        for name, tensor in (("k", k), ("v", v)):
            if not isinstance(tensor, Tensor):
                raise wrong_type(name, describe(tensor), "a torch.Tensor")
            if tensor.ndim != 4:
                raise wrong_value(name, f"shape {tuple(tensor.shape)}", "4 dimensions")
        if v.shape[:3] != k.shape[:3]:
            raise wrong_value("v", f"shape {tuple(v.shape)}", f"batch, heads and length of k, {tuple(k.shape[:3])}")
        if v.dtype != k.dtype or v.device != k.device:
            raise wrong_value("v", f"{v.dtype} on {v.device}", f"k's dtype and device, {k.dtype} on {k.device}")
        if self._starts is not None and self._starts.numel() != k.shape[0]:
            raise wrong_value("k", f"batch {k.shape[0]}", f"as many items as the cache has starts, {len(self._starts)}")
        if self._store is None:
            return
        for name, tensor, held in (("k", k, self._store.key), ("v", v, self._store.value)):
            if tensor.shape[0] != self.batch:
                raise wrong_value(name, f"batch {tensor.shape[0]}", f"the cache's batch, {self.batch}")
            if tensor.shape[1] != held.shape[1]:
                raise wrong_value(name, f"{tensor.shape[1]} heads", f"as many heads as the cache, {held.shape[1]}")
            if tensor.shape[3] != held.shape[3]:
                raise wrong_value(name, f"head dim {tensor.shape[3]}", f"the cache's head dim, {held.shape[3]}")
            if tensor.dtype != held.dtype:
                raise wrong_type(name, f"dtype {tensor.dtype}", f"the cache's dtype, {held.dtype}")
            if tensor.device != held.device:
                raise wrong_value(name, f"a tensor on {tensor.device}", f"the cache's device, {held.device}")

    def _start_padding(self, starts: Tensor) -> Padding:
        if self._padding is None:
            self._padding = Padding(starts, LARGEST)
        return self._padding

    def _items(self, name: str, items: Sequence[int] | Tensor) -> list[int]:
        chosen = _integers(name, items)
        batch = self.batch or 0
        for item in chosen:
            if not 0 <= item < batch:
                raise wrong_value(name, item, f"batch items from 0 to {batch - 1}")
        return chosen


def no_gradient() -> ValueError:
    return wrong_value(
        "cache",
        "inputs that need a gradient or a derivative",
        "inputs that need none, as it keeps keys and values in place (see torch.no_grad)",
    )


def for_queries(pattern: Pattern, q_length: int) -> Pattern:
    """The pattern without what says nothing of so many queries: one query at the end is causal as it is."""
    if q_length != 1:
        return pattern
    parts = pattern.parts if isinstance(pattern, And) else (pattern,)
    left = [part for part in parts if not (isinstance(part, Causal) and part.offset is None)]
    if len(left) == len(parts):
        return pattern
    return reduce(and_, left) if left else Full()


def _integers(name: str, values: Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        numbers = integers(name, values)
        assert isinstance(numbers, Tensor)
        return [int(number) for number in numbers.reshape(-1).tolist()]
    return [integer(name, number) for number in values]


def _starts(starts: Tensor | Sequence[int]) -> Tensor:
    numbers = _integers("starts", starts)
    if any(number < 0 for number in numbers):
        raise wrong_value("starts", min(numbers), "positions of at least 0")
    return torch.tensor(numbers, dtype=torch.int32)


def _compact(lengths: list[int]) -> int | list[int]:
    return lengths[0] if lengths and lengths.count(lengths[0]) == len(lengths) else lengths
