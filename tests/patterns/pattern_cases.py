"""Random patterns beside the rule of each, written from the table of patterns for one pair at a time.

A rule is a function of (b, h, i, j, q_length, k_length) and takes nothing from the library.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from heedful.patterns import (
    BigBird,
    BlockSparse,
    Causal,
    Chunked,
    Dilated,
    Documents,
    Full,
    Global,
    Longformer,
    Mask,
    Padding,
    Pattern,
    Prefix,
    SlidingWindow,
)

Rule = Callable[[int, int, int, int, int, int], bool]
Drawn = tuple[Pattern, Rule]
Draw = Callable[[st.SearchStrategy], object]

DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int
    q_length: int
    k_length: int


@dataclass(frozen=True)
class Case:
    pattern: Pattern
    rule: Rule
    sizes: Sizes

    def __repr__(self) -> str:
        tensors = [t.tolist() for t in self.operands()]
        return f"Case({self.pattern!r}, {self.sizes}, operands={tensors})"

    def operands(self) -> tuple[torch.Tensor, ...]:
        return self.pattern.operands(self.sizes.q_length, self.sizes.k_length)

    def dense(self) -> torch.Tensor:
        return self.pattern.dense(self.sizes.q_length, self.sizes.k_length)

    def expanded(self) -> torch.Tensor:
        return self.dense().expand(self.sizes.batch, self.sizes.heads, -1, -1)


def looped(case: Case) -> torch.Tensor:
    """The mask, one pair after the other."""
    s = case.sizes
    mask = torch.zeros(s.batch, s.heads, s.q_length, s.k_length, dtype=torch.bool)
    for b in range(s.batch):
        for h in range(s.heads):
            for i in range(s.q_length):
                for j in range(s.k_length):
                    mask[b, h, i, j] = case.rule(b, h, i, j, s.q_length, s.k_length)
    return mask


def philox_first_word(key: tuple[int, int], counter: tuple[int, int, int, int]) -> int:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0


@functools.lru_cache(maxsize=4096)
def bigbird_random(k_blocks: int, bi: int, radius: int, n_global: int, n_random: int, seed: int) -> frozenset[int]:
    rest = [bj for bj in range(k_blocks) if abs(bi - bj) > radius and bi >= n_global and bj >= n_global]
    rest.sort(key=lambda bj: (philox_first_word((seed % 2**32, seed // 2**32), (bj, bi, 0, 0)), bj))
    return frozenset(rest[:n_random])


@st.composite
def per_batch(draw: Draw, batch: int, low: int, high: int) -> tuple[int | torch.Tensor, Callable[[int], int]]:
    """An int, or a tensor of one element or one per batch item; and its value at b."""
    values = draw(st.lists(st.integers(low, high), min_size=batch, max_size=batch))
    one = draw(st.integers(low, high))
    dtype = draw(st.sampled_from(DTYPES))
    form = draw(st.sampled_from(["int", "scalar", "one", "batch"]))
    if form == "int":
        return one, lambda b: one
    if form == "batch":
        return torch.tensor(values, dtype=dtype), lambda b: values[b]
    return torch.tensor(one if form == "scalar" else [one], dtype=dtype), lambda b: one


@st.composite
def offsets(draw: Draw, batch: int) -> tuple[int | torch.Tensor | None, Callable[[int, int, int], int]]:
    if draw(st.booleans()):
        return None, lambda b, q, k: k - q
    offset, value = draw(per_batch(batch, -9, 9))
    return offset, lambda b, q, k: value(b)


@st.composite
def banded(draw: Draw, s: Sizes) -> Drawn:
    offset, at = draw(offsets(s.batch))
    family = draw(st.sampled_from(["full", "causal", "window", "radius", "dilated"]))
    if family == "full":
        return Full(), lambda b, h, i, j, q, k: True
    if family == "causal":
        return Causal(offset), lambda b, h, i, j, q, k: j - i - at(b, q, k) <= 0
    if family == "dilated":
        radius, step = draw(st.integers(0, 5)), draw(st.integers(1, 5))

        def rule(b: int, h: int, i: int, j: int, q: int, k: int) -> bool:
            d = j - i - at(b, q, k)
            return abs(d) <= radius * step and d % step == 0

        return Dilated(radius, step, offset), rule
    sides = st.none() | st.integers(0, 9)
    left = draw(sides)
    right = left if family == "radius" else draw(sides)

    def window(b: int, h: int, i: int, j: int, q: int, k: int) -> bool:
        d = j - i - at(b, q, k)
        return (left is None or -left <= d) and (right is None or d <= right)

    return SlidingWindow(left, offset=offset) if family == "radius" else SlidingWindow(left, right, offset), window


@st.composite
def chunked(draw: Draw, s: Sizes) -> Drawn:
    offset, at = draw(offsets(s.batch))
    size = draw(st.integers(1, 7))
    return Chunked(size, offset), lambda b, h, i, j, q, k: math.floor((i + at(b, q, k)) / size) == math.floor(j / size)


@st.composite
def prefix(draw: Draw, s: Sizes) -> Drawn:
    n = draw(st.integers(0, 9))
    return Prefix(n), lambda b, h, i, j, q, k: j < n


@st.composite
def global_tokens(draw: Draw, s: Sizes) -> Drawn:
    offset, at = draw(offsets(s.batch))
    first = draw(st.integers(0, 5))
    listed = draw(st.lists(st.integers(0, 9), max_size=6))
    argument, positions = draw(
        st.sampled_from([(first, range(first)), (listed, listed), (torch.tensor(listed, dtype=torch.int64), listed)])
    )

    def rule(b: int, h: int, i: int, j: int, q: int, k: int) -> bool:
        return j in positions or i + at(b, q, k) in positions

    if draw(st.booleans()):
        return Global(argument, offset), rule
    radius = draw(st.integers(0, 5))
    return (
        Longformer(radius, argument, offset),
        lambda b, h, i, j, q, k: abs(j - i - at(b, q, k)) <= radius or rule(b, h, i, j, q, k),
    )


@st.composite
def padding(draw: Draw, s: Sizes) -> Drawn:
    start, start_at = draw(per_batch(s.batch, -2, 12))
    stop, stop_at = draw(per_batch(s.batch, -2, 25))
    return Padding(start, stop), lambda b, h, i, j, q, k: start_at(b) <= j < stop_at(b)


@st.composite
def bool_tensor(draw: Draw, shape: tuple[int, ...], broadcast_only: bool = False) -> tuple[torch.Tensor, Callable]:
    """A tensor that broadcasts to a shape, and how to look at it; `broadcast_only` for lengths yet unknown."""
    ones = [draw(st.booleans()) for _ in shape]
    if broadcast_only:
        ones[2] = ones[3] = True
    sizes = [1 if one else size for one, size in zip(ones, shape, strict=True)]
    count = math.prod(sizes)
    if count <= 64:
        flags = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    else:
        generator = random.Random(draw(st.integers(0, 2**16)))
        share = draw(st.sampled_from([0.05, 0.5, 0.95]))
        flags = [generator.random() < share for _ in range(count)]
    tensor = torch.tensor(flags, dtype=torch.bool).view(sizes)
    table = tensor.tolist()

    def at(*place: int) -> bool:
        found = table
        for one, index in zip(ones, place, strict=True):
            found = found[0 if one else index]
        return found

    leading = next((n for n, size in enumerate(sizes) if size != 1), 4)
    dropped = draw(st.integers(0, leading))
    return tensor.reshape(sizes[dropped:]), at


@st.composite
def mask(draw: Draw, s: Sizes, broadcast_only: bool = False) -> Drawn:
    tensor, at = draw(bool_tensor((s.batch, s.heads, s.q_length, s.k_length), broadcast_only))
    return Mask(tensor), lambda b, h, i, j, q, k: at(b, h, i, j)


@st.composite
def block_sparse(draw: Draw, s: Sizes, broadcast_only: bool = False) -> Drawn:
    size = draw(st.integers(1, 6))
    blocks = math.ceil(s.q_length / size), math.ceil(s.k_length / size)
    tensor, at = draw(bool_tensor((s.batch, s.heads, *blocks), broadcast_only))
    return BlockSparse(tensor, size), lambda b, h, i, j, q, k: at(b, h, i // size, j // size)


@st.composite
def bigbird(draw: Draw, s: Sizes) -> Drawn:
    size, radius = draw(st.integers(1, 4)), draw(st.integers(0, 1))
    n_global, n_random = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    seed = draw(st.sampled_from([0, 1, 2**32, 2**64 - 1]))

    def rule(b: int, h: int, i: int, j: int, q: int, k: int) -> bool:
        bi, bj = i // size, j // size
        return (
            abs(bi - bj) <= radius
            or min(bi, bj) < n_global
            or bj in bigbird_random(math.ceil(k / size), bi, radius, n_global, n_random, seed)
        )

    return BigBird(size, 2 * radius + 1, n_global, n_random, seed), rule


@st.composite
def ends(draw: Draw, length: int, count: int) -> list[int]:
    if count == 0:
        return [0]
    inner = draw(st.lists(st.integers(0, length), min_size=count - 1, max_size=count - 1))
    return [0, *sorted(inner), length]


@st.composite
def documents(draw: Draw, s: Sizes, depth: int = 1) -> Drawn:
    alike = [n for n in range(1, 5) if s.q_length % n == s.k_length % n == 0]
    within, inner = Full(), None
    if depth and draw(st.booleans()):
        # Documents of one length, so that what depends on lengths fits into each.
        count = draw(st.sampled_from(alike))
        one = Sizes(s.batch, s.heads, s.q_length // count, s.k_length // count)
        ends_q, ends_k = ([n * length for n in range(count + 1)] for length in (one.q_length, one.k_length))
        leaves = [mask(one), block_sparse(one), bigbird(one), documents(one, depth - 1), documents(one, depth - 1)]
        within, inner = draw(compositions(st.one_of(*leaves, st.one_of(positional(one))), most=2))
    else:
        count = draw(st.integers(0 if s.q_length == s.k_length == 0 else 1, 4))
        ends_q, ends_k = draw(ends(s.q_length, count)), draw(ends(s.k_length, count))
        if s.q_length == s.k_length and draw(st.booleans()):
            ends_k = ends_q
        if draw(st.booleans()):
            leaves = [bigbird(s), mask(s, True), block_sparse(s, True)]
            most = st.one_of(positional(s))
            within, inner = draw(compositions(st.one_of(most, most, most, most, st.one_of(leaves))))
    shared = ends_q == ends_k and draw(st.booleans())
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    cu_q, cu_k = torch.tensor(ends_q, dtype=dtype), None if shared else torch.tensor(ends_k, dtype=dtype)

    def rule(b: int, h: int, i: int, j: int, q: int, k: int) -> bool:
        for t in range(len(ends_q) - 1):
            if ends_q[t] <= i < ends_q[t + 1] and ends_k[t] <= j < ends_k[t + 1]:
                lengths = ends_q[t + 1] - ends_q[t], ends_k[t + 1] - ends_k[t]
                return inner is None or inner(b, h, i - ends_q[t], j - ends_k[t], *lengths)
        return False

    return Documents(cu_q, cu_k, within) if inner is not None else Documents(cu_q, cu_k), rule


def positional(s: Sizes) -> list[st.SearchStrategy]:
    return [banded(s), banded(s), chunked(s), prefix(s), global_tokens(s), padding(s)]


@st.composite
def compositions(draw: Draw, leaves: st.SearchStrategy, most: int = 4) -> Drawn:
    pattern, rule = draw(leaves)
    for _ in range(draw(st.integers(0, most - 1))):
        other, other_rule = draw(leaves)
        swap, union = draw(st.booleans()), draw(st.booleans())
        first, second = (other, pattern) if swap else (pattern, other)
        pattern = first | second if union else first & second
        rule = joined(rule, other_rule, union)
    return pattern, rule


def joined(one: Rule, other: Rule, union: bool) -> Rule:
    if union:
        return lambda *pair: one(*pair) or other(*pair)
    return lambda *pair: one(*pair) and other(*pair)


@st.composite
def cases(draw: Draw, longest: int = 14) -> Case:
    lengths = st.sampled_from([0, 1, 2, 3, 5, 8, 9, 13, longest, longest])
    s = Sizes(draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(lengths), draw(lengths))
    leaves = st.one_of(*positional(s), documents(s), documents(s), bigbird(s), block_sparse(s), mask(s))
    pattern, rule = draw(compositions(leaves))
    return Case(pattern, rule, s)
