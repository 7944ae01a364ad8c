"""A schedule as Triton's kernels take it: a flat tuple of integers that they are compiled for.

Nothing of it depends on lengths. A kernel reads ``CODE`` at compile time, so that each structure of a pattern becomes
its own straight code; lengths, offsets and operands are run-time arguments.

Code
    The number of atoms n; n + 1 places of terms, where atom a has those from a up to a + 1; then the terms, seven
    integers each: kind, two numbers, and a bound (const, symbol, sign, frame), as `heedful.patterns.schedule` has them.
    One more term behind the last is the residue of the class step.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from heedful.patterns.schedule import (
    BLOCKS,
    BOUND,
    CHUNK,
    DIAGONAL,
    DOCUMENTS,
    END,
    KEY,
    LOWER,
    MASK,
    NONE,
    QUERY,
    STEP,
    UPPER,
    Atom,
    Bound,
    Schedule,
    Term,
)

TERM_LENGTH = 7

# Beyond any length; the sum of two such numbers and a position is an int32.
FAR = 1 << 28
# As far as constants go before they meet operands, in int64.
_WIDE = 1 << 40


class Plan(NamedTuple):
    """What a kernel is compiled for."""

    code: tuple[int, ...]
    step: int
    """Queries and keys fall into so many classes that have nothing to do with each other; 1 where there are none."""
    intervals: bool
    """One atom whose rows are intervals of keys: two loops without a look at single tiles."""
    solid: bool
    """The one atom has nothing but its intervals: tiles inside them need no mask."""
    monotone: tuple[bool, bool]
    """Both ends of the one atom's intervals never fall from a row to the next; of queries, and transposed."""
    dense: bool
    """Every query attends to every key."""
    gapless: bool
    """Between the first and the last key of consecutive rows of an atom every key is attended to."""
    block: int
    """The smallest block size of a map of blocks; 0 where there is none."""
    documents: bool
    one_sided: bool
    """Rows' intervals are bounded on one side at most, as full and causal attention's are."""

    @property
    def slanted(self) -> bool:
        """Whether a row has the more pairs the further it is from one end, as causal attention's."""
        return self.one_sided and not self.dense


@functools.lru_cache(maxsize=4096)
def plan(code: tuple[int, ...], in_classes: bool = True) -> Plan:
    """The plan of an encoded schedule; not `in_classes`, a common step is a condition as others are."""
    atoms = Schedule.decode(code).atoms
    step, residue = _common_step(atoms) if in_classes else (1, Bound(0))
    if step > 1:
        atoms = tuple(tuple(t for t in atom if t.kind != STEP or t.numbers[0] != step) for atom in atoms)
    terms = [term for atom in atoms for term in atom]
    kinds = {term.kind for term in terms}
    places = [0]
    for atom in atoms:
        places.append(places[-1] + len(atom))
    flat = [len(atoms), *places]
    for term in (*terms, Term(STEP, (step,), residue)):
        flat += _encode(term)
    return Plan(
        tuple(flat),
        step,
        len(atoms) == 1 and BLOCKS not in kinds,
        len(atoms) == 1 and not kinds & {BLOCKS, MASK, STEP},
        (len(atoms) == 1 and _is_monotone(atoms[0], QUERY), len(atoms) == 1 and _is_monotone(atoms[0], KEY)),
        not terms,
        all(map(_is_gapless, atoms)),
        min([term.numbers[0] for term in terms if term.kind == BLOCKS], default=0),
        DOCUMENTS in kinds,
        not terms or (len(terms) == 1 and terms[0].kind == BOUND and terms[0].numbers[0] == DIAGONAL),
    )


@functools.lru_cache(maxsize=4096)
def attends_to_all(code: tuple[int, ...], x_length: int, y_length: int, transposed: bool = False) -> bool:
    """Whether every y is known to be attended to by some x: queries and keys, `transposed` keys and queries.

    Then whole tiles may be loaded that reach beyond what their rows see: nothing in them is to be kept from the result.
    """
    for atom in Schedule.decode(code).atoms:
        low, high = -FAR, FAR
        for term in atom:
            bound = term.bound
            if term.kind != BOUND or term.numbers[0] != DIAGONAL or bound is None or bound.frame != NONE:
                break
            if bound.symbol not in (NONE, END):
                break
            limit = bound.const
            if bound.symbol == END:
                limit += bound.sign * (x_length - y_length if transposed else y_length - x_length)
            if term.numbers[1] == LOWER:
                low = max(low, limit)
            else:
                high = min(high, limit)
        else:
            if transposed:
                low, high = -high, -low
            if low <= min(high, 0) and y_length - 1 - high <= x_length - 1:
                return True
    return False


@functools.lru_cache(maxsize=4096)
def keys_between(code: tuple[int, ...], queries: int) -> int:
    """At most so many keys lie from the first to the last that some of consecutive queries see, whatever the lengths;
    FAR where nothing is known of it."""
    atoms = Schedule.decode(code).atoms
    if len(atoms) != 1:
        return FAR
    found = FAR
    ends: tuple[list[Bound], list[Bound]] = [], []
    for term in atoms[0]:
        if term.kind == CHUNK:
            found = min(found, term.numbers[0] * (1 + -(-(queries - 1) // term.numbers[0])))
        elif term.kind == BOUND and term.numbers[0] == DIAGONAL and term.bound is not None:
            ends[term.numbers[1]].append(term.bound)
    for low in ends[LOWER]:
        for high in ends[UPPER]:
            if low.frame == NONE and low[1:] == high[1:]:
                found = min(found, max(high.const - low.const, 0) + queries)
    return found


def _common_step(atoms: tuple[Atom, ...]) -> tuple[int, Bound]:
    """The largest step that all diagonals of all atoms share, and their residue; 1 where there is none."""
    bounds = []
    step = 0
    for atom in atoms:
        steps = [term for term in atom if term.kind == STEP]
        if len(steps) != 1 or steps[0].bound is None or steps[0].bound.frame != NONE:
            return 1, Bound(0)
        step = math.gcd(step, steps[0].numbers[0])
        bounds.append(steps[0].bound)
    if not bounds or step >= FAR:
        return 1, Bound(0)
    first = bounds[0]
    for bound in bounds:
        if (bound.symbol, bound.sign) != (first.symbol, first.sign):
            return 1, Bound(0)
        step = math.gcd(step, bound.const - first.const)
    return (step, first._replace(const=first.const % step)) if step > 1 else (1, Bound(0))


def _is_monotone(atom: Atom, rows: int) -> bool:
    """Whether nothing ties rows, queries or keys, to places of their own or to documents."""
    for term in atom:
        if term.kind == DOCUMENTS or (term.bound is not None and term.bound.frame != NONE):
            return False
        if term.kind == BOUND and term.numbers[0] == rows:
            return False
    return True


def _is_gapless(atom: Atom) -> bool:
    kinds = [term.kind for term in atom]
    framed = any(term.bound is not None and term.bound.frame != NONE for term in atom)
    if framed or set(kinds) - {BOUND, CHUNK}:
        return False
    diagonal = any(term.kind == BOUND and term.numbers[0] == DIAGONAL for term in atom)
    return kinds.count(CHUNK) + diagonal <= 1


def _encode(term: Term) -> list[int]:
    numbers = [min(number, 2 * _WIDE) for number in term.numbers]
    if term.kind == CHUNK:
        # Beyond twice any position every size parts the positions alike.
        numbers[0] = min(numbers[0], 2 * FAR - 1)
    if term.slot != NONE:
        numbers.append(term.slot)
    numbers += [0] * (2 - len(numbers))
    bound = term.bound or Bound(0)
    const = bound.const if term.kind == STEP else max(-_WIDE, min(bound.const, _WIDE))
    return [term.kind, *numbers, const, *bound[1:]]
