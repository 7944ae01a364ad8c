"""Schedules: which (query, key) pairs count, as a few integers that do not depend on lengths.

A `Schedule` is a union of atoms, and an atom is a conjunction of terms. A pair (i, j) counts where every
term of some atom holds. Whatever depends on the call is referred to, not stored: the call's lengths by the
symbol `END`, tensors by their slot in the list of operands that travels beside the schedule.

Bounds
    A number in a term is a bound, four integers `const symbol sign frame`: its value is const + sign * S.

    symbol  NONE (-1)   S is 0
            END (-2)    S is k_length - q_length, in a frame that of the document
            n >= 0      S is operand n at the batch item, or its only element (INT32, B or 1 elements)
    frame   NONE (-1)   the term speaks of the call's i and j
            f >= 0      it speaks of i - cu_q[t] and j - cu_k[t], where cu_q is operand f, cu_k is operand
                        f + 1 (INT32, one more than there are documents) and t is the document of the pair;
                        the atom then has the term DOCUMENTS f

Terms, each a run of integers that starts with its kind
    0 BOUND      axis side, bound     the query i (axis 0), the key j (1) or the diagonal j - i (2) is at
                                      least (side 0) or at most (side 1) the bound
    1 STEP       step, bound          step divides j - i - bound
    2 CHUNK      size, bound          (i + bound) // size == j // size, rounding down
    3 DOCUMENTS  f                    some t has cu_q[t] <= i < cu_q[t+1] and cu_k[t] <= j < cu_k[t+1];
                                      it splits the atom into one per document
    4 BLOCKS     size slot            operand[b, h, i // size, j // size] (BOOL; B or 1, H or 1, blocks of
                                      queries, blocks of keys)
    5 MASK       slot                 operand[b, h, i, j] (BOOL, each of the four sizes may be 1)

Code
    The number of atoms; then for each atom the number of its terms, then the terms. The schedule of every
    pair is the empty code, the schedule of no pair is (0,).

The order of the terms of an atom has no meaning; here they are sorted, so that equal conjunctions have equal
codes. Along one axis and one symbolic part an atom has at most one lower and one upper bound.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from heedful.patterns.arrays import is_array, is_tracing

if TYPE_CHECKING:
    from torch import Tensor

    from heedful.patterns.arrays import Array

NONE, END = -1, -2
QUERY, KEY, DIAGONAL = 0, 1, 2
LOWER, UPPER = 0, 1
BOUND, STEP, CHUNK, DOCUMENTS, BLOCKS, MASK = range(6)

# How many plain integers follow each kind, before its bound or its slot.
_NUMBERS = {BOUND: 2, STEP: 1, CHUNK: 1, DOCUMENTS: 0, BLOCKS: 1, MASK: 0}

# More than twice any j - i - bound, so that at most one number of a residue class of this step comes into reach.
_LARGEST_STEP = 2**33

# Atoms that a schedule is parted into at most.
_PARTED = 16


class Bound(NamedTuple):
    """The number const + sign * S, S being what `symbol` stands for in the call; see the module."""

    const: int
    symbol: int = NONE
    sign: int = 1
    frame: int = NONE

    @classmethod
    def of(cls, value: int | Array | None, slot: int = 0) -> Bound:
        """An argument as a bound: an int is itself, a tensor is operand `slot`, None is k_length - q_length."""
        if value is None:
            return cls(0, END)
        return cls(0, slot) if is_array(value) else cls(value)

    def plus(self, number: int) -> Bound:
        return Bound(self.const + number, self.symbol, self.sign, self.frame)

    def negative(self) -> Bound:
        return Bound(-self.const, self.symbol, 1 if self.symbol == NONE else -self.sign, self.frame)

    def shifted(self, slots: int) -> Bound:
        return Bound(self.const, _shifted(self.symbol, slots), self.sign, _shifted(self.frame, slots))


class Term(NamedTuple):
    """One condition on a pair; `at_least` and the functions below it make them."""

    kind: int
    numbers: tuple[int, ...]
    bound: Bound | None = None
    slot: int = NONE

    def shifted(self, slots: int) -> Term:
        bound = self.bound.shifted(slots) if self.bound is not None else None
        return Term(self.kind, self.numbers, bound, _shifted(self.slot, slots))

    def aligned(self, slot: int) -> Term:
        if self.bound is None or self.bound.symbol != END or self.bound.frame != NONE:
            return self
        return self._replace(bound=self.bound._replace(symbol=slot))

    def encode(self) -> tuple[int, ...]:
        return (self.kind, *self.numbers, *(self.bound if self.bound is not None else (self.slot,)))


Atom = tuple[Term, ...]


def at_least(axis: int, bound: Bound) -> Term:
    return Term(BOUND, (axis, LOWER), bound)


def at_most(axis: int, bound: Bound) -> Term:
    return Term(BOUND, (axis, UPPER), bound)


def every(step: int, bound: Bound) -> Term:
    return Term(STEP, (step,), bound)


def same_chunk(size: int, bound: Bound) -> Term:
    return Term(CHUNK, (size,), bound)


def same_document(slot: int) -> Term:
    return Term(DOCUMENTS, (), None, slot)


def in_blocks(size: int, slot: int) -> Term:
    return Term(BLOCKS, (size,), None, slot)


def in_mask(slot: int) -> Term:
    return Term(MASK, (), None, slot)


def _opposite(term: Term) -> Term:
    """What holds where a bound does not."""
    assert term.bound is not None
    axis, side = term.numbers
    return at_most(axis, term.bound.plus(-1)) if side == LOWER else at_least(axis, term.bound.plus(1))


def _shifted(slot: int, slots: int) -> int:
    return slot + slots if slot >= 0 else slot


def conjunction(terms: Iterable[Term]) -> Atom | None:
    """The terms as an atom: bounds and steps of the same kind merged, the rest sorted; None if none can hold."""
    limits: dict[tuple[int, ...], int] = {}
    steps: dict[tuple[int, ...], tuple[int, int]] = {}
    atom: set[Term] = set()
    for term in terms:
        if term.kind == BOUND and term.bound is not None:
            const, *symbolic = term.bound
            limit = (*term.numbers, *symbolic)
            closest = max if term.numbers[1] == LOWER else min
            limits[limit] = closest(const, limits.get(limit, const))
        elif term.kind == STEP and term.bound is not None:
            const, *symbolic = term.bound
            residue, step = steps.get(tuple(symbolic), (0, 1))
            common = math.gcd(step, term.numbers[0])
            if (const - residue) % common:
                return None
            other = term.numbers[0] // common
            residue += (const - residue) // common * pow(step // common, -1, other) % other * step
            step *= other
            residue %= step
            if step > _LARGEST_STEP:
                nearest = min(residue, residue - step, key=abs)
                if abs(nearest) > _LARGEST_STEP // 2:
                    return None
                residue, step = nearest % _LARGEST_STEP, _LARGEST_STEP
            steps[tuple(symbolic)] = (residue, step)
        else:
            atom.add(term)
    for (axis, side, symbol, sign, frame), const in limits.items():
        # Positions start at 0, in a document too.
        position = axis != DIAGONAL and symbol == NONE
        if side == LOWER and position and const <= 0:
            continue
        lower = limits.get((axis, LOWER, symbol, sign, frame), const)
        if side == UPPER and (lower > const or (position and const < 0)):
            return None
        atom.add(Term(BOUND, (axis, side), Bound(const, symbol, sign, frame)))
    for (symbol, sign, frame), (residue, step) in steps.items():
        if step > 1:
            atom.add(Term(STEP, (step,), Bound(residue, symbol, sign, frame)))
    return tuple(sorted(atom))


@dataclass(frozen=True)
class Schedule:
    """A union of atoms over `slots` operands; hashable, and the same whatever the lengths.

    `&` and `|` number the right side's operands after the left side's.
    """

    atoms: tuple[Atom, ...]
    slots: int = 0

    @classmethod
    def of(cls, conjunctions: Iterable[Iterable[Term]], slots: int = 0) -> Schedule:
        """The union of conjunctions of terms, simplified: duplicates and what cannot hold dropped."""
        atoms: dict[Atom, None] = {}
        for terms in conjunctions:
            atom = conjunction(terms)
            if atom == ():
                return cls((atom,), slots)
            if atom is not None:
                atoms[atom] = None
        return cls(tuple(atoms), slots)

    def __and__(self, other: Schedule) -> Schedule:
        right = other.shifted(self.slots)
        return Schedule.of((a + b for a in self.atoms for b in right.atoms), right.slots)

    def __or__(self, other: Schedule) -> Schedule:
        right = other.shifted(self.slots)
        return Schedule.of(self.atoms + right.atoms, right.slots)

    def shifted(self, slots: int) -> Schedule:
        """The same schedule with its operands behind `slots` others."""
        atoms = tuple(tuple(term.shifted(slots) for term in atom) for atom in self.atoms)
        return Schedule(atoms, self.slots + slots)

    def parted(self) -> tuple[Schedule, ...]:
        """This schedule in two that share no pair, its bands and its steps beyond them, over the same operands.

        Strided sub-problems follow the density of steps, but need a step in every atom: the union of a dilated and
        another pattern would cost its span. One alone where there is nothing to part, or no short way to do it.
        """
        stepped = [atom for atom in self.atoms if any(term.kind == STEP for term in atom)]
        bands = [atom for atom in self.atoms if atom not in stepped]
        if not stepped or not bands or any(t.bound is None or t.bound.frame != NONE for atom in bands for t in atom):
            return (self,)
        if any(term.kind != BOUND for atom in bands for term in atom):
            return (self,)
        beyond = stepped
        for atom in bands:
            beyond = [(*inside, _opposite(term)) for inside in beyond for term in atom]
            if len(beyond) > _PARTED:
                return (self,)
        parts = Schedule.of(bands, self.slots), Schedule.of(beyond, self.slots)
        return parts if parts[1].atoms else parts[:1]

    def in_documents(self) -> Schedule:
        """The schedule inside each document of operands 0 and 1 (cu_q, cu_k), its own operands after these."""
        atoms: list[Atom] = []
        for atom in self.shifted(2).atoms:
            framed = tuple(t._replace(bound=t.bound._replace(frame=0)) if t.bound is not None else t for t in atom)
            atoms.append((same_document(0), *framed))
        return Schedule.of(atoms, self.slots + 2)

    def aligned(self, slot: int) -> Schedule:
        """The schedule with operand `slot` in place of END, k_length - q_length; inside documents END stays theirs."""
        atoms = (tuple(term.aligned(slot) for term in atom) for atom in self.atoms)
        return Schedule.of(atoms, max(self.slots, slot + 1))

    def encode(self) -> tuple[int, ...]:
        """The code that the module describes."""
        return self._encoded() if is_tracing() else self._code

    @functools.cached_property
    def _code(self) -> tuple[int, ...]:
        return self._encoded()

    def _encoded(self) -> tuple[int, ...]:
        if self.atoms == ((),):
            return ()
        code = [len(self.atoms)]
        for atom in self.atoms:
            code.append(len(atom))
            for term in atom:
                code.extend(term.encode())
        return tuple(code)

    @classmethod
    def decode(cls, code: Sequence[int], slots: int = 0) -> Schedule:
        """The schedule that a code stands for."""
        numbers = iter(code or (1, 0))
        atoms = tuple(tuple(_decode_term(numbers) for _ in range(next(numbers))) for _ in range(next(numbers)))
        return cls(atoms, slots)

    def mask(self, q_length: int, k_length: int, operands: Sequence[Tensor], batch: int = 1, heads: int = 1) -> Tensor:
        """The pairs that count, bool (batch, heads, q_length, k_length), read from the code as a kernel reads it."""
        read = Schedule.decode(self.encode())
        return read.rows(0, q_length, q_length, k_length, operands).expand(batch, heads, -1, -1)

    def rows(self, start: int, stop: int, q_length: int, k_length: int, operands: Sequence[Tensor]) -> Tensor:
        """Rows start to stop of the mask, for what its operands tell apart: bool (B or 1, H or 1, rows, k_length)."""
        from heedful.patterns.expansion import Rows

        return Rows(start, stop, q_length, k_length, operands).mask(self.atoms)

    def density(self, q_length: int, k_length: int, operands: Sequence[Tensor]) -> float:
        """The share of pairs that count, over all batch items and heads of the operands; 0.0 where there are no pairs.

        Exact. Where each row of an atom is an interval of keys, or a progression and the atoms are few, time and
        memory follow the number of rows; otherwise the mask is expanded a few rows at a time.
        """
        from heedful.patterns.expansion import density

        return density(self.atoms, q_length, k_length, operands)


def _decode_term(code: Iterator[int]) -> Term:
    kind = next(code)
    numbers = tuple(itertools.islice(code, _NUMBERS[kind]))
    if kind in (DOCUMENTS, BLOCKS, MASK):
        return Term(kind, numbers, None, next(code))
    return Term(kind, numbers, Bound(*itertools.islice(code, 4)))
