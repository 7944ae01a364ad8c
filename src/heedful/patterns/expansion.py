"""Schedules expanded to masks, and how many pairs they hold: what the engine's kernels do, in plain PyTorch."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from heedful.patterns.schedule import (
    BLOCKS,
    CHUNK,
    DIAGONAL,
    DOCUMENTS,
    END,
    LOWER,
    MASK,
    NONE,
    QUERY,
    STEP,
    Atom,
    Bound,
    Term,
    conjunction,
)

# Elements that counting pairs may hold in memory at once, and atoms up to which it counts progressions by
# inclusion and exclusion.
_COUNTED_AT_ONCE = 1 << 22
_PROGRESSIONS = 6


def density(all_atoms: Sequence[Atom], q_length: int, k_length: int, operands: Sequence[Tensor]) -> float:
    """As `Schedule.density`."""
    shapes = [torch.Size((1, 1))]
    for term in itertools.chain(*all_atoms):
        if term.kind in (BLOCKS, MASK):
            shapes.append(operands[term.slot].shape[:2])
        elif term.bound is not None and term.bound.symbol >= 0:
            shapes.append(torch.Size((operands[term.bound.symbol].numel(), 1)))
    batch, heads = torch.broadcast_shapes(*shapes)
    unions = _countable(all_atoms)
    width = k_length if unions is None else len(all_atoms)
    step = max(1, _COUNTED_AT_ONCE // max(1, batch * heads * width))
    counted = 0
    for start in range(0, q_length, step):
        rows = Rows(start, min(start + step, q_length), q_length, k_length, operands)
        if unions is None:
            counted += int(rows.mask(all_atoms).expand(batch, heads, -1, -1).sum())
        else:
            counted += heads * sum(sign * int(rows.counts(atoms, batch).sum()) for sign, atoms in unions)
    pairs = batch * heads * q_length * k_length
    return counted / pairs if pairs else 0.0


def _countable(all_atoms: Sequence[Atom]) -> list[tuple[int, tuple[Atom, ...]]] | None:
    """Unions of atoms whose counts, with these signs, add up to that of all; None if rows do not count them."""
    kinds = {term.kind for term in itertools.chain(*all_atoms)}
    if kinds & {BLOCKS, MASK} or (STEP in kinds and len(all_atoms) > _PROGRESSIONS):
        return None
    if STEP not in kinds:
        return [(1, tuple(all_atoms))] if all_atoms else []
    unions: list[tuple[int, tuple[Atom, ...]]] = []
    for size in range(1, len(all_atoms) + 1):
        for atoms in itertools.combinations(all_atoms, size):
            atom = conjunction(itertools.chain(*atoms))
            if atom is not None:
                if sum(term.kind == STEP for term in atom) > 1:
                    return None
                unions.append((1 if size % 2 else -1, (atom,)))
    return unions


class Rows:
    """Rows start to stop of a call: i is (1, 1, rows, 1), j is (1, 1, 1, k_length)."""

    def __init__(self, start: int, stop: int, q_length: int, k_length: int, operands: Sequence[Tensor]) -> None:
        self.device = operands[0].device if operands else torch.device("cpu")
        self.start, self.stop, self.q_length, self.k_length, self.operands = start, stop, q_length, k_length, operands
        self.i = torch.arange(start, stop, device=self.device).view(1, 1, -1, 1)
        self.j = torch.arange(k_length, device=self.device).view(1, 1, 1, -1)

    def document(self, frame: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First query, first key, queries and keys of each row's document; past the last one it has neither."""
        cu_q, cu_k = (torch.cat([cu, cu[-1:]]).long() for cu in self.operands[frame : frame + 2])
        t = torch.searchsorted(cu_q[1:-1].contiguous(), self.i, right=True)
        return cu_q[t], cu_k[t], cu_q[t + 1] - cu_q[t], cu_k[t + 1] - cu_k[t]

    def place(self, bound: Bound) -> tuple[Tensor, Tensor, Tensor]:
        """The query and the first key of the bound's frame, and the bound's value there."""
        first_query, first_key, queries, keys = (
            torch.full((1, 1, 1, 1), length, device=self.device) for length in (0, 0, self.q_length, self.k_length)
        )
        if bound.frame != NONE:
            first_query, first_key, queries, keys = self.document(bound.frame)
        symbol = torch.zeros_like(keys)
        if bound.symbol == END:
            symbol = keys - queries
        elif bound.symbol != NONE:
            symbol = self.operands[bound.symbol].long().view(-1, 1, 1, 1)
        return self.i - first_query, first_key, bound.const + bound.sign * symbol

    def mask(self, atoms: Iterable[Atom]) -> Tensor:
        """The pairs of a union of atoms: bool (B or 1, H or 1, rows, k_length)."""
        nothing = torch.zeros((1, 1, self.stop - self.start, self.k_length), dtype=torch.bool, device=self.device)
        pairs = nothing
        for atom in atoms:
            pairs = pairs | functools.reduce(operator.and_, map(self.holds, atom), ~nothing)
        return pairs

    def holds(self, term: Term) -> Tensor:
        """Where a term holds: bool, broadcastable to (B, H, rows, k_length)."""
        if term.kind == DOCUMENTS:
            _, first_key, _, keys = self.document(term.slot)
            return (self.j >= first_key) & (self.j < first_key + keys)
        if term.kind == BLOCKS:
            size = term.numbers[0]
            return self.operands[term.slot][:, :, self.i.flatten() // size][..., self.j.flatten() // size]
        if term.kind == MASK:
            mask = self.operands[term.slot]
            return mask if mask.shape[2] == 1 else mask[:, :, self.start : self.stop]
        assert term.bound is not None
        i, first_key, value = self.place(term.bound)
        j = self.j - first_key
        if term.kind == STEP:
            return (j - i - value) % term.numbers[0] == 0
        if term.kind == CHUNK:
            return (i + value) // term.numbers[0] == j // term.numbers[0]
        axis, side = term.numbers
        position = (i, j, j - i)[axis]
        return position >= value if side == LOWER else position <= value

    def counts(self, atoms: Sequence[Atom], batch: int) -> Tensor:
        """How many keys of each row a union of atoms holds: (batch, rows). An atom with a step is alone in it."""
        rows = (batch, 1, self.stop - self.start, 1)
        lows, highs, steps, residues = zip(*map(self.progression, atoms), strict=True)
        low = torch.cat([low.expand(rows) for low in lows], dim=-1)
        high = torch.cat([high.expand(rows) for high in highs], dim=-1)
        if steps[0] > 1:
            count: Tensor = (high - residues[0]) // steps[0] - (low - 1 - residues[0]) // steps[0]
            return count.clamp(min=0)[:, 0, :, 0]
        low, order = low.sort(dim=-1)
        high = high.gather(-1, order)
        reached = high.cummax(dim=-1).values.roll(1, dims=-1)
        reached[..., 0] = -1
        keys: Tensor = (high - torch.maximum(low, reached + 1) + 1).clamp(min=0)
        return keys.sum(dim=-1)[:, 0]

    def progression(self, atom: Atom) -> tuple[Tensor, Tensor, int, Tensor]:
        """The keys of an atom's rows: low <= j <= high where the step divides j - residue."""
        low, step, residue = torch.zeros_like(self.i), 1, torch.zeros_like(self.i)
        high = low + self.k_length - 1
        for term in atom:
            if term.kind == DOCUMENTS:
                _, first_key, _, keys = self.document(term.slot)
                low, high = torch.maximum(low, first_key), torch.minimum(high, first_key + keys - 1)
                continue
            assert term.bound is not None
            i, first_key, value = self.place(term.bound)
            if term.kind == STEP:
                step, residue = term.numbers[0], i + value + first_key
            elif term.kind == CHUNK:
                first_of_chunk = (i + value) // term.numbers[0] * term.numbers[0] + first_key
                low = torch.maximum(low, first_of_chunk)
                high = torch.minimum(high, first_of_chunk + term.numbers[0] - 1)
            elif term.numbers[0] == QUERY:
                inside = i >= value if term.numbers[1] == LOWER else i <= value
                high = torch.where(inside, high, -1)
            else:
                end = value + first_key + (i if term.numbers[0] == DIAGONAL else 0)
                if term.numbers[1] == LOWER:
                    low = torch.maximum(low, end)
                else:
                    high = torch.minimum(high, end)
        return low, high, step, residue
