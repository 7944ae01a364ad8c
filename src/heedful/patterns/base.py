"""What every pattern is: `Pattern`, and its compositions `And` and `Or`."""

from __future__ import annotations

import functools
import inspect
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar, final

from heedful.patterns.arguments import check_per_batch
from heedful.patterns.arrays import as_operand, is_array, is_tensor, is_tracing, same
from heedful.patterns.moved import held
from heedful.patterns.schedule import BLOCKS, DOCUMENTS, MASK, Schedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from heedful.patterns.arrays import Array


class Key:
    """Stands for the static part of equal patterns, hashed and compared by identity; holds their schedule."""

    __slots__ = ("schedule",)

    def __init__(self) -> None:
        self.schedule: Schedule | None = None


@functools.lru_cache(maxsize=4096)
def _key_of(static: Hashable) -> Key:
    return Key()


class Pattern(ABC):
    """Which keys each query may attend to.

    Patterns are immutable, know no lengths, and combine with `&` (both allow the pair) and `|` (either does).
    Query i sits at key position i + offset. An `offset` is an int, or an int tensor of one element or one per
    batch item; None is k_length - q_length, where the last query meets the last key. d is j - i - offset.

    Wherever a tensor is taken, a numpy array is too, and a pattern without tensors needs no torch; `dense`, `density`
    and `plot` do. Equal patterns have equal classes, arguments and tensor contents. Tensors are kept, not copied: what
    is written into them later holds for later calls.

    A new pattern is a subclass whose `__init__` keeps each argument in an attribute of the argument's name,
    with `pairs` (its definition) and `lower` (the same as a schedule, whose operands are the tensors among the
    arguments in their order, unless `arrays` says otherwise).
    """

    _parameters: ClassVar[dict[str, inspect.Parameter]] = {}
    _names: ClassVar[tuple[str, ...]] = ()
    _kept: tuple[object, tuple[Tensor, ...]] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._parameters = dict(inspect.signature(cls).parameters)
        cls._names = tuple(cls._parameters)

    @abstractmethod
    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        """The definition: bool, broadcastable to (B or 1, H or 1, q_length, k_length), for queries i
        (1, 1, q_length, 1) and keys j (1, 1, 1, k_length).

        Inside `Documents` a pattern that is `by_position` gets tensors for all four, which broadcast with one
        another: positions in each pair's document, and that document's lengths.
        """

    @abstractmethod
    def lower(self) -> Schedule:
        """The pattern as a schedule. It may depend on ints and on the shapes of tensors only."""

    def dense(self, q_length: int, k_length: int, device: torch.device | str = "cpu") -> Tensor:
        """The specification: bool (B or 1, H or 1, q_length, k_length), True where query i may attend to key j."""
        import torch

        i = torch.arange(q_length, device=device).view(1, 1, -1, 1)
        j = torch.arange(k_length, device=device).view(1, 1, 1, -1)
        pairs = self.pairs(i, j, q_length, k_length)
        return pairs.expand(*pairs.shape[:2], q_length, k_length).contiguous()

    @property
    def schedule(self) -> Schedule:
        """The pattern as a schedule: static, hashable, the same whatever the lengths and the tensors' contents."""
        if is_tracing():
            return self.lower()
        if self.key.schedule is None:
            self.key.schedule = self.lower()
        return self.key.schedule

    @property
    def by_position(self) -> bool:
        """Whether nothing but positions and lengths decides, so that both may be counted inside documents."""
        return not any(term.kind in (BLOCKS, DOCUMENTS, MASK) for atom in self.schedule.atoms for term in atom)

    def arrays(self, q_length: int, k_length: int) -> tuple[Array, ...]:
        """What the schedule's slots refer to, in their order, as the pattern has it: ints, or bools (4-D)."""
        return tuple([value for value in self.arguments if is_array(value)])

    @final
    def operands(self, q_length: int, k_length: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """The tensors that the schedule's slots refer to, in their order, on a device: int32 (1-D) or bool (4-D)."""
        return held(tuple([as_operand(array, device) for array in self.arrays(q_length, k_length)]))

    def validate(self, batch: int, heads: int, q_length: int, k_length: int) -> None:
        """Raises ValueError where the pattern does not fit a call of these sizes."""
        for name in self._names:
            check_per_batch(name, getattr(self, name), batch)

    def fitted(
        self, batch: int, heads: int, q_length: int, k_length: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, ...]:
        """`validate`, then `operands` on a device, kept for the next call of these sizes: a layer or a step asks for
        the same again and again, and making views and looking at ends costs 1 to 7 microseconds. Operands that are
        copies are not kept: they would not follow what is written into the tensors."""
        try:
            within = self._within
            if len(within) == 1:
                # Most have one, for which a list's own frame would be a fifth of this.
                (tensor,) = within
                call: Any = batch, heads, q_length, k_length, device, tensor._version, tensor.data_ptr(), tensor.shape
            else:
                tensors = [(tensor._version, tensor.data_ptr(), tensor.shape) for tensor in within]
                call = batch, heads, q_length, k_length, device, tensors
        except (AttributeError, RuntimeError):
            # numpy's arrays and the tensors of inference mode count no versions.
            call = None
        kept = self._kept
        if kept is not None and kept[0] == call:
            return held(kept[1])
        self.validate(batch, heads, q_length, k_length)
        operands = self.operands(q_length, k_length, device)
        self._kept = (call, operands) if call is not None and self._follows(operands) else None
        return operands

    def _follows(self, operands: tuple[Tensor, ...]) -> bool:
        """Whether operands stay right when the tensors that the pattern was made of are written into."""
        memory = {tensor.untyped_storage().data_ptr() for tensor in self._within}
        return not memory or all(operand.untyped_storage().data_ptr() in memory for operand in operands)

    @functools.cached_property
    def _within(self) -> tuple[Any, ...]:
        """The tensors and arrays among the arguments and among those of patterns there."""
        found: list[Any] = []
        for value in self.arguments:
            found += value._within if isinstance(value, Pattern) else [value] if is_array(value) else []
        return tuple(found)

    @property
    def is_constant(self) -> bool:
        """Whether its ints are all that decides: no tensor is among what it was made of."""
        return not self._within

    def density(self, q_length: int, k_length: int) -> float:
        """The share of (query, key) pairs that the pattern allows, exactly; 0.0 where there are no pairs."""
        return self.schedule.density(q_length, k_length, self.operands(q_length, k_length))

    def plot(
        self,
        path: str | os.PathLike[str],
        *,
        q_length: int = 256,
        k_length: int | None = None,
        tile: int = 16,
        batch_index: int = 0,
        head_index: int = 0,
    ) -> None:
        """Writes a picture (PNG) of the pattern's tiles, `tile` queries by `tile` keys: full, partial or empty.

        `k_length` None is `q_length`. Needs matplotlib.
        """
        from heedful.patterns.plot import plot

        k_length = q_length if k_length is None else k_length
        plot(self, path, q_length, k_length, tile, batch_index, head_index)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the pattern was made of, in the order of its parameters."""
        return tuple([getattr(self, name) for name in self._names])

    @functools.cached_property
    def static(self) -> tuple[Hashable, ...]:
        """The class and the arguments, with shapes in place of tensors."""
        return (type(self), *[_static(value) for value in self.arguments])

    @functools.cached_property
    def key(self) -> Key:
        """Stands for the static part in caches, the same object for equal ones; cheap to hash and to compare."""
        return _key_of(self.static)

    def __and__(self, other: Pattern) -> Pattern:
        return And(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return Or(self, other) if isinstance(other, Pattern) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Pattern):
            return NotImplemented
        return self.static == other.static and all(map(_same, self.arguments, other.arguments))

    def __hash__(self) -> int:
        return hash(self.static)

    def __reduce__(self) -> tuple[type[Pattern], tuple[Any, ...]]:
        return type(self), self.arguments

    def __repr__(self) -> str:
        shown = []
        for parameter, value in zip(self._parameters.values(), self.arguments, strict=True):
            if parameter.default in (parameter.empty, ...):
                shown.append(_shown(value))
            elif value is not parameter.default and not (isinstance(value, Pattern) and value == parameter.default):
                shown.append(f"{parameter.name}={_shown(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


class _Composition(Pattern):
    """Patterns joined by one operator; a part of the same class is taken apart."""

    parts: tuple[Pattern, ...]

    def __init__(self, *parts: Pattern) -> None:
        flat: list[Pattern] = []
        for part in parts:
            flat.extend(part.parts if isinstance(part, type(self)) else (part,))
        self.parts = tuple(flat)

    @property
    def arguments(self) -> tuple[Pattern, ...]:
        return self.parts

    @property
    def by_position(self) -> bool:
        return all(part.by_position for part in self.parts)

    def arrays(self, q_length: int, k_length: int) -> tuple[Array, ...]:
        return tuple([array for part in self.parts for array in part.arrays(q_length, k_length)])

    def validate(self, batch: int, heads: int, q_length: int, k_length: int) -> None:
        for part in self.parts:
            part.validate(batch, heads, q_length, k_length)

    def _follows(self, operands: tuple[Tensor, ...]) -> bool:
        for part in self.parts:
            count = part.schedule.slots
            if not part._follows(operands[:count]):
                return False
            operands = operands[count:]
        return True


class And(_Composition):
    """The pairs that every part allows; `a & b` makes it."""

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        return functools.reduce(operator.and_, [part.pairs(i, j, q_length, k_length) for part in self.parts])

    def lower(self) -> Schedule:
        return functools.reduce(operator.and_, [part.schedule for part in self.parts])

    def __repr__(self) -> str:
        return " & ".join([f"({part})" if isinstance(part, Or) else repr(part) for part in self.parts])


class Or(_Composition):
    """The pairs that some part allows; `a | b` makes it."""

    def pairs(self, i: Tensor, j: Tensor, q_length: int, k_length: int) -> Tensor:
        return functools.reduce(operator.or_, [part.pairs(i, j, q_length, k_length) for part in self.parts])

    def lower(self) -> Schedule:
        return functools.reduce(operator.or_, [part.schedule for part in self.parts])

    def __repr__(self) -> str:
        return " | ".join([f"({part})" if isinstance(part, And) else repr(part) for part in self.parts])


def _static(value: Any) -> Hashable:
    if is_array(value):
        return "tensor", tuple(value.shape)
    return value.static if isinstance(value, Pattern) else value


def _same(a: Any, b: Any) -> bool:
    """Whether arguments with the same static part are equal."""
    return same(a, b) if is_array(a) else bool(a == b)


def _shown(value: Any) -> str:
    if is_array(value):
        return f"{'tensor' if is_tensor(value) else 'array'}{list(value.shape)}"
    return repr(value)
