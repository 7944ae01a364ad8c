"""transformers' mask functions, read back as patterns.

transformers describes a mask as a function of (batch, head, query position, key position), composed from a few known
closures. A closure is recognised by its code object, and its parameters are read from its cells. Every entry of the
table is compared with its pattern on a small grid before it is trusted: after a change in transformers an entry that
no longer agrees is dropped, and that mask goes densely.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from inspect import CO_VARARGS, CO_VARKEYWORDS
from operator import and_, or_
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor
from transformers import masking_utils

from heedful.cache_kinds.store import on_device
from heedful.hf.grid import Grid
from heedful.hf.rectangles import MOST_RECTANGLES, Rectangles, come_back, runs
from heedful.patterns import Causal, Chunked, Documents, Full, Padding, Pattern, Prefix, SlidingWindow
from heedful.patterns.base import And, Or

logger = logging.getLogger("heedful")

MaskFunction = Callable[..., Any]
Cells = dict[str, Any]
Reader = Callable[[Cells, Grid], Pattern | None]

_READERS: dict[CodeType, Reader] = {}


def recognise(function: MaskFunction, grid: Grid) -> Pattern | None:
    """The pattern that says what `function` says on `grid`, or None where that is not known for certain.

    torch.compile cannot look into closures, so that while it traces only functions without cells are recognised.
    """
    if torch.compiler.is_compiling():
        if function is masking_utils.causal_mask_function:
            return _causal({}, grid)
        return Full() if function is masking_utils.bidirectional_mask_function else None
    code = getattr(function, "__code__", None)
    reader = _READERS.get(code) or _model_reader(function) if isinstance(code, CodeType) else None
    return None if reader is None else reader(_cells(function), grid)


def conjuncts(function: MaskFunction) -> Iterator[MaskFunction]:
    """The functions whose intersection `function` is; itself where it is no intersection."""
    if not _is(function, "and_masks") or _is_packed(function):
        yield function
        return
    for part in _cells(function)["mask_functions"]:
        yield from conjuncts(part)


def is_causal(function: MaskFunction) -> bool:
    """Whether `function` is plain causality."""
    return _is(function, "causal")


def has_documents(function: MaskFunction) -> bool:
    """Whether `function` keeps packed sequences apart."""
    return _is(function, "packed_sequence_mask_function") or _is_packed(function)


def _is_packed(function: MaskFunction) -> bool:
    """Whether `function` is packed sequences, and inside them a function of positions that restart."""
    return _is(function, "and_masks") and _remapped(_cells(function)["mask_functions"])


def _remapped(functions: Sequence[MaskFunction]) -> bool:
    pair = [_CODES.get("packed_sequence_mask_function"), _CODES.get("remap_positions_for_packed_sequence")]
    return None not in pair and [getattr(function, "__code__", None) for function in functions] == pair


def _is(function: MaskFunction, name: str) -> bool:
    """Whether `function` is what that function of masking_utils makes, and means what it is read as."""
    if torch.compiler.is_compiling():
        return False
    code = getattr(function, "__code__", None)
    return code is not None and code is _CODES.get(name) and code in _READERS


def _cells(function: MaskFunction) -> Cells:
    closure = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in closure), strict=True))


def _causal(cells: Cells, grid: Grid) -> Pattern:
    return Causal(offset=grid.offset)


def _everything(cells: Cells, grid: Grid) -> Pattern:
    return Full()


def _left_window(cells: Cells, grid: Grid) -> Pattern | None:
    width = cells["sliding_window"]
    return SlidingWindow(width - 1, None, offset=grid.offset) if width >= 1 else None


def _symmetric_window(cells: Cells, grid: Grid) -> Pattern | None:
    radius = cells["sliding_window"]
    return SlidingWindow(radius, radius, offset=grid.offset) if radius >= 0 else None


def _exclusive_window(cells: Cells, grid: Grid) -> Pattern | None:
    width = cells["sliding_window"]
    return SlidingWindow(width - 1, width - 1, offset=grid.offset) if width >= 1 else None


def _two_sided_window(cells: Cells, grid: Grid) -> Pattern | None:
    if cells.keys() != {"sliding_window"} or not isinstance(cells["sliding_window"], tuple):
        return None
    left, right = cells["sliding_window"]
    return SlidingWindow(left - 1, max(right - 1, 0), offset=grid.offset) if left >= 1 else None


def _intersection(cells: Cells, grid: Grid) -> Pattern | None:
    functions = cells["mask_functions"]
    if _remapped(functions):
        return _packed(functions, grid)
    return _combined(and_, functions, grid)


def _union(cells: Cells, grid: Grid) -> Pattern | None:
    return _combined(or_, cells["mask_functions"], grid)


def _combined(operator: Any, functions: Sequence[MaskFunction], grid: Grid) -> Pattern | None:
    patterns = [recognise(function, grid) for function in functions]
    return None if None in patterns or not patterns else reduce(operator, patterns)


def _chunked(cells: Cells, grid: Grid) -> Pattern | None:
    """Chunks of `chunk_size` positions, counted from each sequence's first real token."""
    size, padding = cells["chunk_size"], cells["left_padding"]
    if grid.q_start is None or not grid.readable:
        return None
    starts = padding.tolist()
    if len(set(starts)) > 1:
        return _one_query_chunk(size, padding, grid) if grid.q_length == 1 else _chunks_by_item(size, padding, grid)
    first = starts[0] if starts else 0
    if (grid.k_offset - first) % size == 0:
        return Chunked(size, offset=grid.offset)
    # Chunked speaks of chunks that begin at key 0; where they begin elsewhere, each chunk is a document.
    q_bounds, k_bounds = [0], [0]
    begin = min(grid.q_start, grid.k_offset)
    end = max(grid.q_start + grid.q_length, grid.k_offset + grid.k_length)
    for bound in range(first + ((begin - first) // size + 1) * size, end, size):
        q_bounds.append(min(max(bound - grid.q_start, 0), grid.q_length))
        k_bounds.append(min(max(bound - grid.k_offset, 0), grid.k_length))
    return _documents([*q_bounds, grid.q_length], [*k_bounds, grid.k_length], grid)


def _one_query_chunk(size: int, padding: Tensor, grid: Grid) -> Pattern:
    """With one query, each batch item's chunk is a range of keys."""
    start = padding + (grid.q_start - padding).div(size, rounding_mode="floor") * size - grid.k_offset  # type: ignore[operator]
    stop = start + size
    return Padding(*(bound.clamp(0, grid.k_length).to(torch.int32) for bound in (start, stop)))


def _chunks_by_item(size: int, padding: Tensor, grid: Grid) -> Pattern | None:
    """Chunks that begin elsewhere in each batch item."""
    assert grid.q_start is not None
    begin = min(grid.q_start, grid.k_offset)
    end = max(grid.q_start + grid.q_length, grid.k_offset + grid.k_length)
    first, last = ((place - padding).div(size, rounding_mode="floor") for place in (begin, end - 1))
    count = int((last - first).max()) + 1
    if count > MOST_RECTANGLES:
        return None
    start = padding[:, None] + (first[:, None] + torch.arange(count, device=padding.device)) * size
    return _squares(start, start + size, grid)


def _runs_as_squares(ids: Tensor, grid: Grid) -> Rectangles | None:
    """Runs of equal ids (B, L) that see all of themselves, negative ids left out; None if an id has several runs."""
    start, stop = runs(ids)
    if start.shape[1] > MOST_RECTANGLES or come_back(ids, start, stop):
        return None
    return _squares(start, stop, grid)


def _squares(start: Tensor, stop: Tensor, grid: Grid) -> Rectangles:
    """Positions from start to stop, (B, N), that see all of themselves."""
    assert grid.q_start is not None
    queries = [(end - grid.q_start).clamp(0, grid.q_length) for end in (start, stop)]
    keys = [(end - grid.k_offset).clamp(0, grid.k_length) for end in (start, stop)]
    return Rectangles(*queries, *keys)


def is_first_chunk(function: MaskFunction, grid: Grid, attention_mask: Tensor) -> bool:
    """Whether `function` is chunks that take nothing more away once causality and padding have.

    So it is where each sequence, left padding not counted, fits into its first chunk: a pair that is left then has
    its key behind the padding, its query behind its key, and both in that chunk.
    """
    if not _is(function, "chunked_overlay") or not grid.readable or grid.q_start is None:
        return False
    size, padding = (_cells(function)[name] for name in ("chunk_size", "left_padding"))
    end = max(grid.q_start + grid.q_length, grid.k_offset + grid.k_length)
    before = torch.arange(attention_mask.shape[-1], device=attention_mask.device) < padding[:, None]
    return bool((end - padding <= size).all()) and not bool((attention_mask & before).any())


def _padding(cells: Cells, grid: Grid) -> Pattern | None:
    mask = cells["padding_mask"][:, grid.k_offset : grid.k_offset + grid.k_length]
    return key_ranges(mask) if grid.readable else None


def key_ranges(mask: Tensor) -> Pattern | None:
    """The keys kept by `mask` (B, Lk) bool as one range per batch item, or None where some item has holes."""
    start = mask.to(torch.uint8).argmax(-1)
    stop = start + mask.sum(-1)
    position = torch.arange(mask.shape[-1], device=mask.device)
    if not torch.equal(mask, (position >= start[:, None]) & (position < stop[:, None])):
        return None
    return Padding(start.to(torch.int32), stop.to(torch.int32))


def _packed(functions: Sequence[MaskFunction], grid: Grid) -> Pattern | None:
    """Sequences packed one after the other, each with positions of its own."""
    ids = _cells(functions[0])["packed_sequence_mask"]
    inner, positions = (_cells(functions[1])[name] for name in ("mask_function", "position_ids"))
    new_sequence = _new_sequences(ids, grid)
    if new_sequence is None:
        return None
    place = torch.arange(grid.k_length, device=ids.device)
    if bool((positions != place - torch.where(new_sequence, place, 0).cummax(1).values).any()):
        return None
    within = recognise(inner, grid)
    if within is None or not _counts_positions(within):
        return None
    return _documents_by_item(ids, new_sequence, grid, within)


def _counts_positions(pattern: Pattern) -> bool:
    """Whether a pattern says the same in positions counted from any first query and key, once these are both 0."""
    if isinstance(pattern, And | Or):
        return all(map(_counts_positions, pattern.parts))
    return isinstance(pattern, Full | Causal | SlidingWindow | Chunked)


def _counts_distances(pattern: Pattern) -> bool:
    """Whether a pattern says the same in positions counted from any first query and key alike."""
    if isinstance(pattern, And | Or):
        return all(map(_counts_distances, pattern.parts))
    return isinstance(pattern, Full | Causal | SlidingWindow)


def _same_sequence(cells: Cells, grid: Grid) -> Pattern | None:
    ids = cells["packed_sequence_mask"]
    new_sequence = _new_sequences(ids, grid)
    return None if new_sequence is None else _documents_by_item(ids, new_sequence, grid, Full())


def _new_sequences(ids: Tensor, grid: Grid) -> Tensor | None:
    """True where a sequence begins, (B, L), if each is one run."""
    if not grid.readable or grid.q_start != 0 or grid.k_offset != 0 or grid.q_length != grid.k_length:
        return None
    if ids.shape[-1] != grid.k_length:
        return None
    step = ids.diff(dim=-1)
    return None if bool((step < 0).any()) else torch.cat([torch.ones_like(ids[:, :1]), step], 1) != 0


def _documents_by_item(ids: Tensor, new_sequence: Tensor, grid: Grid, within: Pattern) -> Pattern | None:
    """Sequences as documents if all batch items are packed alike, otherwise as squares."""
    if bool((new_sequence == new_sequence[:1]).all()):
        return _documents([*new_sequence[0].nonzero().flatten().tolist(), grid.k_length], None, grid, within)
    squares = _runs_as_squares(ids, grid) if _counts_distances(within) else None
    return None if squares is None else squares & within


def _blocks(cells: Cells, grid: Grid) -> Pattern | None:
    """Blocks (an image's tokens, say) that see all of themselves; -1 marks tokens in no block."""
    ids = cells["block_sequence_ids"]
    if grid.q_start is None or not grid.readable:
        return None
    queries = ids[:, grid.q_start : grid.q_start + grid.q_length]
    if not bool((queries >= 0).any()):
        return Prefix(0)
    if not torch.equal(ids, ids[:1].expand_as(ids)):
        return _runs_as_squares(ids, grid)
    values, counts = ids[0].unique_consecutive(return_counts=True)
    blocks = values[values >= 0]
    if blocks.unique().numel() != blocks.numel():
        return None
    q_bounds, k_bounds, end = [0], [0], 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        start, end = end, end + count
        q_start, q_stop = (min(max(end_ - grid.q_start, 0), grid.q_length) for end_ in (start, end))
        k_start, k_stop = (min(max(end_ - grid.k_offset, 0), grid.k_length) for end_ in (start, end))
        if value >= 0 and q_start < q_stop and k_start < k_stop:
            # What lies between two blocks becomes one document without queries and one without keys.
            q_bounds += [q_bounds[-1], q_start, q_stop]
            k_bounds += [k_start, k_start, k_stop]
    q_bounds += [q_bounds[-1], grid.q_length]
    k_bounds += [grid.k_length, grid.k_length]
    return _documents(q_bounds, k_bounds, grid)


def _documents(q_bounds: list[int], k_bounds: list[int] | None, grid: Grid, within: Pattern | None = None) -> Pattern:
    cu_q = on_device(q_bounds, torch.int32, grid.device)
    cu_k = None if k_bounds is None else on_device(k_bounds, torch.int32, grid.device)
    return Documents(cu_q, cu_k, within=Full() if within is None else within)


def _examples() -> Iterator[tuple[str, MaskFunction, Reader]]:
    """One small instance of every function of the table that this transformers has, compositions after their parts."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]])
    sequences = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2]])
    causal, window = masking_utils.causal_mask_function, masking_utils.sliding_window_overlay(3)
    yield "causal", causal, _causal
    yield "bidirectional", masking_utils.bidirectional_mask_function, _everything
    factories: list[tuple[str, tuple[Any, ...], Reader]] = [
        ("sliding_window_overlay", (3,), _left_window),
        ("sliding_window_bidirectional_overlay", (2,), _symmetric_window),
        ("chunked_overlay", (3, torch.tensor([1])), _chunked),
        ("padding_mask_function", (torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]]).bool(),), _padding),
        ("blockwise_overlay", (torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1]]),), _blocks),
        ("packed_sequence_mask_function", (sequences,), _same_sequence),
        ("and_masks", (window, causal), _intersection),
        ("or_masks", (window, causal), _union),
        ("packed_sequence_compatibility_function", (causal, positions, sequences), _intersection),
    ]
    for name, arguments, reader in factories:
        factory = getattr(masking_utils, name, None)
        if factory is not None:
            yield name, factory(*arguments), reader


_CODES: dict[str, CodeType] = {name: example.__code__ for name, example, _ in _examples()}
if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
    _remap = masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, torch.zeros(1, 1))
    _CODES["remap_positions_for_packed_sequence"] = _remap.__code__


# Functions that model files define for themselves: name of the factory, arguments of a small instance, reader.
_MODEL_FACTORIES: dict[str, tuple[tuple[Any, ...], Reader]] = {
    "_bidirectional_window_overlay": ((3,), _exclusive_window),
    "sliding_window_mask_function": (((3, 2),), _two_sided_window),
}


def _model_reader(function: MaskFunction) -> Reader | None:
    """The reader of a function that a model file of transformers defines, checked when it is first met."""
    if _same_code(function, _always):
        return _everything
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__qualname__", "").partition(".<locals>.")[0]
    factory = getattr(sys.modules.get(module), name, None)
    if not module.startswith("transformers.") or name not in _MODEL_FACTORIES or factory is None:
        return None
    arguments, reader = _MODEL_FACTORIES[name]
    try:
        example = factory(*arguments)
    except TypeError:
        return None
    if example.__code__ is not function.__code__:
        return None
    _trust(example, reader)
    return _READERS.get(function.__code__)


_always: MaskFunction = lambda *args: torch.tensor(True, dtype=torch.bool)  # noqa: E731 (compared as a lambda)


def _same_code(one: MaskFunction, other: MaskFunction) -> bool:
    """Whether two functions without cells run the same instructions on the same names."""
    a, b = one.__code__, other.__code__
    variadic = CO_VARARGS | CO_VARKEYWORDS
    return (a.co_code, a.co_names, a.co_consts, a.co_freevars, a.co_argcount, a.co_flags & variadic) == (
        b.co_code,
        b.co_names,
        b.co_consts,
        b.co_freevars,
        b.co_argcount,
        b.co_flags & variadic,
    ) and all(one.__globals__.get(name) is other.__globals__.get(name) for name in a.co_names)


def _trust(example: MaskFunction, reader: Reader) -> None:
    """Enter a function into the table if its pattern is what the function itself says."""
    code = example.__code__
    _READERS[code] = reader
    for lengths_and_offsets in ((8, 8, 0, 0), (3, 6, 5, 2), (3, 8, 2, 0), (4, 8, 0, 0)):
        grid = Grid(1, *lengths_and_offsets, torch.device("cpu"))
        pattern = recognise(example, grid)
        if pattern is None:
            continue
        expected = evaluate(example, grid)
        if not torch.equal(pattern.dense(grid.q_length, grid.k_length).expand_as(expected), expected):
            del _READERS[code]
            logger.warning(
                "heedful.hf: %s.%s does not mean what it meant in the transformers this was written for; "
                "masks made of it are passed densely",
                example.__module__,
                example.__qualname__,
            )
            return


def evaluate(function: MaskFunction, grid: Grid, use_vmap: bool = False) -> Tensor:
    """`function` at every pair of `grid`, as a bool tensor (B, 1, Lq, Lk)."""
    mask = masking_utils.sdpa_mask(
        batch_size=grid.batch,
        q_length=grid.q_length,
        kv_length=grid.k_length,
        q_offset=cast(int, grid.q_offset),
        kv_offset=grid.k_offset,
        mask_function=function,
        attention_mask=None,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=grid.device,
    )
    return cast(Tensor, mask)


for _name, _example, _reader in _examples():
    _trust(_example, _reader)
