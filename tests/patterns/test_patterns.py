"""Patterns against their rules: dense masks, schedules, densities, and what makes them values."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import Case, cases, looped

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
    expansion,
    schedule,
)
from heedful.patterns.schedule import Schedule

INTS = torch.tensor([1, 2], dtype=torch.int32)
FLAGS = torch.ones(2, 3, dtype=torch.bool)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)

STATIC = [
    Full(),
    Causal(),
    Causal(3),
    SlidingWindow(4),
    SlidingWindow(None, 2, -1),
    Dilated(3, 2),
    Chunked(4, 1),
    Prefix(3),
    Global([1, 2, 7]),
    Longformer(2, 1),
    (Causal() & SlidingWindow(3)) | Prefix(2),
    Dilated(3, 2) & Dilated(4, 3) & Chunked(5),
]
WITH_TENSORS = [
    Causal(INTS),
    Padding(INTS, INTS),
    Padding(0, INTS) & Causal(),
    Documents(CU, within=Causal() & SlidingWindow(2, 0)),
    Mask(FLAGS),
    BlockSparse(FLAGS, 4),
]

property_test = settings(max_examples=200, deadline=None)


@property_test
@given(cases())
def test_dense_is_the_rule_pair_by_pair(case: Case) -> None:
    dense = case.dense()
    s = case.sizes
    assert dense.shape[0] in (1, s.batch)
    assert dense.shape[1] in (1, s.heads)
    assert dense.shape[2:] == (s.q_length, s.k_length)
    assert torch.equal(case.expanded(), looped(case))


@property_test
@given(cases(longest=37))
def test_schedule_expands_to_dense(case: Case) -> None:
    s = case.sizes
    mask = case.pattern.schedule.mask(s.q_length, s.k_length, case.operands(), s.batch, s.heads)
    assert torch.equal(mask, case.expanded())


@property_test
@given(cases())
def test_code_says_all_of_the_schedule(case: Case) -> None:
    lowered = case.pattern.schedule
    code = lowered.encode()
    assert all(type(number) is int for number in code)
    assert Schedule.decode(code, lowered.slots) == lowered
    assert len(case.operands()) == lowered.slots
    for tensor in case.operands():
        assert (tensor.dtype, tensor.ndim) in ((torch.int32, 1), (torch.bool, 4))


@property_test
@given(cases(longest=37), st.sampled_from([1, 50, 1 << 22]))
def test_density_is_the_mean_of_dense(case: Case, at_once: int) -> None:
    dense = case.dense()
    expected = int(dense.sum()) / dense.numel() if dense.numel() else 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expansion, "_COUNTED_AT_ONCE", at_once)
        assert case.pattern.density(case.sizes.q_length, case.sizes.k_length) == expected


@property_test
@given(cases())
def test_patterns_are_values(case: Case) -> None:
    pattern = case.pattern
    for twin in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern)), copy.copy(pattern)):
        assert twin == pattern
        assert hash(twin) == hash(pattern)
        assert twin.key is pattern.key
        assert twin.schedule == pattern.schedule
        assert repr(twin) == repr(pattern)
    if "tensor" not in repr(pattern):
        assert eval(repr(pattern)) == pattern
    assert pattern != (pattern & Prefix(99))
    case.pattern.validate(case.sizes.batch, case.sizes.heads, case.sizes.q_length, case.sizes.k_length)


@property_test
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(-20, 20)), min_size=1, max_size=4))
def test_steps_merge_by_the_chinese_remainder_theorem(steps: list[tuple[int, int]]) -> None:
    terms = [schedule.every(step, schedule.Bound(residue)) for step, residue in steps]
    atom = schedule.conjunction(terms)
    diagonals = range(-400, 400)
    expected = [d for d in diagonals if all((d - residue) % step == 0 for step, residue in steps)]
    if atom is None:
        assert not [d for d in range(30000) if all((d - residue) % step == 0 for step, residue in steps)]
        return
    assert len(atom) <= 1
    step, residue = (atom[0].numbers[0], atom[0].bound.const) if atom else (1, 0)
    assert [d for d in diagonals if (d - residue) % step == 0] == expected


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        (Full(), ()),
        (Full() & Full(), ()),
        (Causal(INTS) | Full(), ()),
        (Prefix(0), (0,)),
        (Global(0), (0,)),
        (Causal(), (1, 1, 0, 2, 1, 0, -2, 1, -1)),
        (Causal(3) & Causal(2), (1, 1, 0, 2, 1, 2, -1, 1, -1)),
        (Causal() & SlidingWindow(4) & SlidingWindow(6, 0), SlidingWindow(4, 0).schedule.encode()),
        (SlidingWindow(0, None, 5) & Causal(3), (0,)),
        (Dilated(100, 2, 0) & Dilated(100, 4, 1), (0,)),
        (SlidingWindow(None), ()),
        (Dilated(3, 1), SlidingWindow(3).schedule.encode()),
        (Padding(0, 5), Prefix(5).schedule.encode()),
        (Causal() | Causal(), Causal().schedule.encode()),
        (Global([4, 5], offset=2), (2, 2, 0, 1, 0, 4, -1, 1, -1, 0, 1, 1, 5, -1, 1, -1,
                                    2, 0, 0, 0, 2, -1, 1, -1, 0, 0, 1, 3, -1, 1, -1)),
        (Global([1, 3, 4]), (Global([1]) | Global([3, 4])).schedule.encode()),
        (Causal() & Padding(INTS, 7), (1, 3, 0, 1, 0, 0, 0, 1, -1, 0, 1, 1, 6, -1, 1, -1, 0, 2, 1, 0, -2, 1, -1)),
        (Documents(CU, within=Causal()), (1, 2, 0, 2, 1, 0, -2, 1, 0, 3, 0)),
        (Chunked(4) & Mask(FLAGS), (1, 2, 2, 4, 0, -2, 1, -1, 5, 0)),
        (Prefix(2) & BlockSparse(FLAGS, 8), (1, 2, 0, 1, 1, 1, -1, 1, -1, 4, 8, 0)),
    ],
    ids=repr,
)  # fmt: skip
def test_codes(pattern: Pattern, code: tuple[int, ...]) -> None:
    assert pattern.schedule.encode() == code


@property_test
@given(cases(), st.integers(0, 5), st.integers(1, 5))
def test_parts_share_no_pair_and_leave_none_out(case: Case, radius: int, step: int) -> None:
    s = case.sizes
    schedule = (case.pattern | Dilated(radius, step)).schedule
    whole, *parts = (
        each.mask(s.q_length, s.k_length, case.operands(), s.batch, s.heads) for each in (schedule, *schedule.parted())
    )
    assert torch.equal(sum(part.int() for part in parts), whole.int())


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        (Dilated(8, 4) | SlidingWindow(3, 5), [1, 2]),
        ((Dilated(8, 4) | SlidingWindow(3)) & Causal(), [1, 1]),
        (Dilated(8, 4) | Dilated(3, 5) | SlidingWindow(1) | Prefix(2), [2, 4]),
        (Dilated(2, 4) | SlidingWindow(9), [1]),
        (Dilated(8, 4), [1]),
        (SlidingWindow(9) | Prefix(1), [2]),
        (Dilated(8, 4) | Chunked(5), [2]),
        (Documents(torch.tensor([0, 9]), within=Dilated(8, 4) | SlidingWindow(1)), [2]),
    ],
)
def test_what_is_parted(pattern: Pattern, parts: list[int]) -> None:
    assert [len(part.atoms) for part in pattern.schedule.parted()] == parts


def test_products_of_large_steps_stay_small() -> None:
    primes = (2147483647, 2147483629, 2147483587)
    pattern = Dilated(1, primes[0]) & Dilated(1, primes[1]) & Dilated(1, primes[2])
    assert pattern.schedule.atoms[0][-1] == schedule.every(2**33, schedule.Bound(0, schedule.END))
    assert torch.equal(pattern.dense(5, 7)[0, 0], torch.eye(7, dtype=torch.bool)[2:])
    assert torch.equal(pattern.schedule.mask(5, 7, ()), pattern.dense(5, 7))
    shifted = Dilated(9, primes[0], 1 - primes[0]) & Dilated(9, primes[1], 1) & Dilated(9, primes[2], 1)
    assert torch.equal(shifted.dense(5, 7)[0, 0], torch.ones(5, 7).triu(1).tril(1).bool())
    assert torch.equal(shifted.schedule.mask(5, 7, ()), shifted.dense(5, 7))
    assert (Dilated(9, primes[0], 3) & Dilated(9, primes[1], 1)).schedule.encode() == (0,)


def test_density_of_long_sequences() -> None:
    n = 1_000_000
    assert Causal().density(n, n) == (n + 1) / (2 * n)
    assert SlidingWindow(127, 0).density(n, n) == (128 * n - 127 * 64) / n**2
    assert Chunked(1000).density(n, n) == 1 / 1000
    assert Dilated(3, n // 2).density(n, n) == (n + 2 * (n // 2)) / n**2
    union = Dilated(1, n // 2) | Global(1)
    assert union.density(n, n) == (n + 2 * (n // 2) + 2 * (n - 1) - 2) / n**2
    assert BigBird(1000, 1, 0, 2).density(n, n) == 3 / 1000


def test_offset_defaults_to_the_difference_of_lengths() -> None:
    assert Causal().dense(2, 4)[0, 0].tolist() == [[True, True, True, False], [True] * 4]
    assert Causal(0).dense(2, 4)[0, 0].tolist() == [[True] + [False] * 3, [True, True, False, False]]


def test_window_is_a_two_sided_inclusive_radius() -> None:
    assert SlidingWindow(2).dense(9, 9)[0, 0, 4].nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    assert SlidingWindow(2, 0).dense(9, 9)[0, 0, 4].nonzero().flatten().tolist() == [2, 3, 4]


def test_bigbird_draws_all_that_is_left_and_no_more() -> None:
    blocks = BigBird(4, 3, 1, 2, seed=7).operands(40, 40)[0][0, 0]
    assert blocks[0].all()
    assert [int(row.sum()) for row in blocks[1:]] == [5, 6, 6, 6, 6, 6, 6, 6, 5]
    assert BigBird(4, 3, 1, 99).operands(40, 40)[0].all()
    assert not torch.equal(BigBird(4, 3, 1, 2, seed=8).operands(40, 40)[0][0, 0], blocks)


def test_tensors_are_read_when_used() -> None:
    stop = torch.tensor([1, 1])
    pattern = Padding(0, stop)
    stop.fill_(3)
    assert pattern.operands(1, 4)[0].tolist() == [3, 3]
    assert pattern.density(1, 4) == 0.75


@pytest.mark.parametrize(
    "make",
    [
        lambda stop: Padding(0, stop),
        lambda stop: Padding(0, stop) & Causal() & BigBird(2, 1, 0, 1),
        lambda stop: BlockSparse((stop > 2).view(2, 1, 1, 1), 8) | Padding(0, stop),
    ],
)
def test_fitted_operands_are_kept_and_follow_what_is_written(make: Callable[[torch.Tensor], Pattern]) -> None:
    for dtype in (torch.int32, torch.int64):
        stop = torch.tensor([1, 4], dtype=dtype)
        pattern = make(stop)
        for value in (stop, 3, 2):
            stop.copy_(torch.as_tensor(value))
            first = pattern.fitted(2, 3, 4, 4)
            for got, want in zip(first, pattern.operands(4, 4), strict=True):
                assert torch.equal(got, want)
        if dtype == torch.int32:
            assert pattern.fitted(2, 3, 4, 4) is first
            # What torch's versions do not count.
            stop.numpy()[:] = 1
            stop.data.mul_(4)
        else:
            stop.data.fill_(4)
        for got, want in zip(pattern.fitted(2, 3, 4, 4), pattern.operands(4, 4), strict=True):
            assert torch.equal(got, want)
        with pytest.raises(ValueError, match=r"one per batch item, 3 here|broadcasts to \(3, 3"):
            pattern.fitted(3, 3, 4, 4)
        stop.data = torch.tensor([2, 2], dtype=dtype)
        for got, want in zip(pattern.fitted(2, 3, 4, 4), pattern.operands(4, 4), strict=True):
            assert torch.equal(got, want)


def test_fitted_operands_of_tensors_without_versions() -> None:
    with torch.inference_mode():
        cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    pattern = Documents(cu)
    assert pattern.fitted(1, 1, 5, 5)[0].tolist() == [0, 3, 5]
    with torch.inference_mode():
        cu[1] = 2
    assert pattern.fitted(1, 1, 5, 5)[0].tolist() == [0, 2, 5]


def test_fitted_operands_of_arrays_are_made_anew() -> None:
    cu = np.array([0, 3, 5])
    pattern = Documents(cu)
    assert pattern.fitted(1, 1, 5, 5)[0].tolist() == [0, 3, 5]
    cu[2] = 4
    with pytest.raises(ValueError, match="5 here, got 4"):
        pattern.fitted(1, 1, 5, 5)


def test_fitted_checks_contents_that_changed() -> None:
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    pattern = Documents(cu)
    pattern.fitted(1, 1, 5, 5)
    cu[2] = 4
    with pytest.raises(ValueError, match="5 here, got 4"):
        pattern.fitted(1, 1, 5, 5)


def test_equality_looks_at_tensor_contents_and_the_key_does_not() -> None:
    one, same, other = (Padding(0, torch.tensor(stops)) for stops in ([1, 2], [1, 2], [1, 3]))
    assert one == same
    assert one != other
    assert hash(one) == hash(other)
    assert one.key is other.key
    assert one.key is not Padding(0, torch.tensor([1])).key
    assert Padding(0, torch.tensor([1, 2], dtype=torch.int32)) == one
    assert Causal(0) != Causal()
    assert Causal() != "Causal()"
    assert len({Causal(), Causal(), SlidingWindow(3), SlidingWindow(3, 3)}) == 2


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (Causal(), "Causal()"),
        (SlidingWindow(128, 0) & Padding(INTS, INTS), "SlidingWindow(128, 0) & Padding(tensor[2], tensor[2])"),
        (Causal(offset=2) & (Prefix(3) | Full()), "Causal(offset=2) & (Prefix(3) | Full())"),
        (Causal() & Prefix(3) | Full(), "(Causal() & Prefix(3)) | Full()"),
        (Documents(CU, within=Causal()), "Documents(tensor[3], within=Causal())"),
        (Documents(CU, CU), "Documents(tensor[3], cu_k=tensor[3])"),
        (Global([7, 3, 3]), "Global((3, 7))"),
        (Global([1, 0]), "Global(2)"),
        (BigBird(64, 3, 2, 3), "BigBird(64, 3, 2, 3)"),
        (BigBird(64, 3, 2, 3, 5), "BigBird(64, 3, 2, 3, seed=5)"),
        (Longformer(5, 1, 2), "Longformer(5, 1, offset=2)"),
        (SlidingWindow(None), "SlidingWindow(None, None)"),
    ],
)
def test_repr(pattern: Pattern, text: str) -> None:
    assert repr(pattern) == text


def test_arrays_serve_as_tensors_do() -> None:
    stop = np.array([1, 2])
    pattern = Padding(0, stop) & Mask(FLAGS.numpy()[:, None, None])
    same = Padding(0, torch.from_numpy(stop)) & Mask(FLAGS[:, None, None])
    assert pattern == same
    assert pattern.key is same.key
    assert pattern != Padding(0, np.array([1, 3])) & Mask(FLAGS.numpy()[:, None, None])
    assert repr(pattern) == "Padding(0, array[2]) & Mask(array[2, 1, 1, 3])"
    for got, want in zip(pattern.operands(4, 3), same.operands(4, 3), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    assert torch.equal(pattern.dense(4, 3), same.dense(4, 3))
    stop[:] = 3
    assert pattern.operands(4, 3)[0].tolist() == [3, 3]
    again = pickle.loads(pickle.dumps(pattern))
    assert again == pattern
    flipped, frozen = FLAGS.numpy()[:, ::-1], FLAGS.numpy().copy()
    frozen.flags.writeable = False
    assert torch.equal(Mask(flipped).dense(2, 3)[0, 0], FLAGS.flip(1))
    assert torch.equal(Mask(frozen).dense(2, 3)[0, 0], FLAGS)
    assert Global(np.array([3, 1])) == Global([1, 3])


def test_compositions_are_flat() -> None:
    a, b, c = Causal(), Prefix(2), Chunked(3)
    assert (a & b) & c == a & (b & c)
    assert (a | b) | c == a | (b | c)
    for combine in (operator.and_, operator.or_):
        with pytest.raises(TypeError):
            combine(a, 3)


@pytest.mark.parametrize("pattern", STATIC, ids=repr)
def test_static_patterns_trace_in_one_graph(pattern: Pattern) -> None:
    def made_outside(x: torch.Tensor, p: Pattern) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        p.validate(1, 1, 8, 9)
        return x + sum(p.schedule.encode()), p.operands(8, 9)

    torch._dynamo.reset()
    compiled = torch.compile(made_outside, fullgraph=True, backend="eager")
    out, operands = compiled(torch.zeros(1), copy.deepcopy(pattern))
    assert out.item() == sum(pattern.schedule.encode())
    assert operands == ()


def test_patterns_made_in_a_compiled_function() -> None:
    def made_inside(x: torch.Tensor, ints: torch.Tensor, cu: torch.Tensor, flags: torch.Tensor) -> list[torch.Tensor]:
        q, k = x.shape
        patterns = [
            Full(),
            Causal(),
            SlidingWindow(4, 0),
            Dilated(3, 2) & Dilated(4, 3),
            Chunked(4),
            Prefix(3) | Causal(2),
            Longformer(2, [1, 5]),
            BigBird(4, 3, 1, 1),
            Padding(ints, ints) & Causal(ints),
            Documents(cu, within=Causal()),
            Mask(flags) | BlockSparse(flags, 32),
        ]
        found = [Documents(cu, within=Causal() | Padding(ints, 3)).dense(8, 8)]
        for pattern in patterns:
            found += [x.sum() + sum(pattern.schedule.encode()), *pattern.operands(q, k)]
            if not isinstance(pattern, Documents):
                found.append(pattern.dense(q, k))
        return found

    torch._dynamo.reset()
    compiled = torch.compile(made_inside, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((8, 8), (8, 9), (20, 30)):
        arguments = (torch.zeros(shape), INTS, torch.tensor([0, 4, 8]), torch.ones(1, 1, dtype=torch.bool))
        for got, expected in zip(compiled(*arguments), made_inside(*arguments), strict=True):
            assert torch.equal(got, expected)


INVALID_ARGUMENTS = [
    (lambda: Causal(1.5), TypeError, "offset takes an int or an int tensor, got 1.5"),
    (lambda: Causal(True), TypeError, "offset takes an int, got True"),
    (lambda: Causal(torch.tensor([0.5])), TypeError, "offset takes .* got a float32 tensor of shape \\(1,\\)"),
    (
        lambda: Causal(torch.zeros(2, 2, dtype=torch.int32)),
        ValueError,
        "offset takes one element or one per batch item",
    ),
    (lambda: Causal(torch.tensor([2**31])), ValueError, "offset takes values from .* got 2147483648"),
    (lambda: Causal(2**31), ValueError, "offset takes an int from .* got 2147483648"),
    (lambda: SlidingWindow(-1), ValueError, "left takes an int from 0 to 2147483647, got -1"),
    (lambda: SlidingWindow(3, -2), ValueError, "right takes an int from 0 .* got -2"),
    (lambda: SlidingWindow(2.0), TypeError, "left takes an int, got 2.0"),
    (lambda: SlidingWindow(INTS), TypeError, "left takes an int, got a int32 tensor"),
    (lambda: SlidingWindow(3, offset="x"), TypeError, "offset takes .* got 'x'"),
    (lambda: Dilated(-1, 2), ValueError, "radius takes an int from 0 .* got -1"),
    (lambda: Dilated(3, 0), ValueError, "step takes an int from 1 .* got 0"),
    (lambda: Chunked(0), ValueError, "size takes an int from 1 .* got 0"),
    (lambda: Prefix(-1), ValueError, "n takes an int from 0 .* got -1"),
    (lambda: Prefix(INTS), TypeError, "n takes an int"),
    (lambda: Global(-1), ValueError, "positions takes an int from 0 .* got -1"),
    (lambda: Global([3, -1]), ValueError, "positions takes an int from 0 .* got -1"),
    (lambda: Global([1.5]), TypeError, "positions takes an int, got 1.5"),
    (lambda: Global(torch.ones(2)), TypeError, "positions takes .* 1-D int tensor, got a float32 tensor"),
    (lambda: Global(torch.ones(2, 2, dtype=torch.int64)), TypeError, "positions takes .* 1-D int tensor"),
    (lambda: Longformer(-1, 2), ValueError, "radius takes an int from 0"),
    (lambda: Longformer(1, -2), ValueError, "global_tokens takes an int from 0"),
    (lambda: BigBird(0, 3, 1, 1), ValueError, "block_size takes an int from 1"),
    (lambda: BigBird(4, 2, 1, 1), ValueError, "window_blocks takes an odd int, .* got 2"),
    (lambda: BigBird(4, 3, -1, 1), ValueError, "global_blocks takes an int from 0"),
    (lambda: BigBird(4, 3, 1, -1), ValueError, "random_blocks takes an int from 0"),
    (lambda: BigBird(4, 3, 1, 1, 2**64), ValueError, "seed takes an int from 0"),
    (lambda: BlockSparse(INTS, 4), TypeError, "blocks takes a bool tensor"),
    (lambda: BlockSparse([[True]], 4), TypeError, "blocks takes a bool tensor"),
    (lambda: BlockSparse(FLAGS, 0), ValueError, "block_size takes an int from 1"),
    (lambda: BlockSparse(FLAGS[None, None, None], 4), ValueError, "blocks takes at most 4 dimensions"),
    (lambda: Mask(torch.ones(2, 2)), TypeError, "tensor takes a bool tensor, .* got a float32 tensor"),
    (lambda: Mask(FLAGS[None, None, None]), ValueError, "tensor takes at most 4 dimensions"),
    (lambda: Padding(0.5, 3), TypeError, "start takes an int or an int tensor"),
    (lambda: Padding(0, torch.ones(2)), TypeError, "stop takes an int or an int tensor"),
    (lambda: Padding(0, torch.ones(2, 1, dtype=torch.int32)), ValueError, "stop takes one element or one per batch"),
    (lambda: Documents([0, 3]), TypeError, "cu_q takes an int32 or int64 tensor"),
    (lambda: Documents(torch.tensor([0.0, 3.0])), TypeError, "cu_q takes an int32 or int64 tensor"),
    (lambda: Documents(torch.tensor([[0, 3]])), ValueError, "cu_q takes a tensor \\(documents \\+ 1,\\)"),
    (lambda: Documents(torch.tensor([], dtype=torch.int32)), ValueError, "cu_q takes a tensor \\(documents"),
    (lambda: Documents(torch.tensor([1, 3])), ValueError, "cu_q takes 0 as its first element, got 1"),
    (lambda: Documents(torch.tensor([0, 3, 2])), ValueError, "cu_q takes elements that never decrease"),
    (lambda: Documents(torch.tensor([0, 2**31])), ValueError, "cu_q takes elements up to"),
    (lambda: Documents(CU, torch.tensor([0, 3])), ValueError, "cu_k takes as many elements as cu_q, 3, got 2"),
    (lambda: Documents(CU, torch.tensor([0, 4, 3])), ValueError, "cu_k takes elements that never decrease"),
    (lambda: Documents(CU, within="causal"), TypeError, "within takes a Pattern, got"),
    (lambda: Causal(np.array([0.5])), TypeError, "offset takes .* got a float64 array of shape \\(1,\\)"),
    (lambda: Causal(np.array([1], ">i4")), TypeError, "offset takes an int or an int tensor, got a >i4 array"),
    (lambda: Causal(np.array([2**31])), ValueError, "offset takes values from .* got 2147483648"),
    (lambda: Causal(np.zeros((2, 2), np.int32)), ValueError, "offset takes one element or one per batch item"),
    (lambda: SlidingWindow(np.array([3])), TypeError, "left takes an int, got a int64 array"),
    (lambda: Global(np.ones(2)), TypeError, "positions takes .* 1-D int tensor, got a float64 array"),
    (lambda: Mask(np.ones((2, 2))), TypeError, "tensor takes a bool tensor, .* got a float64 array"),
    (lambda: BlockSparse(np.ones((2, 2), np.uint8), 4), TypeError, "blocks takes a bool tensor"),
    (lambda: Documents(np.array([0, 3], np.int16)), TypeError, "cu_q takes an int32 or int64 tensor"),
    (lambda: Documents(np.array([0, 3, 2])), ValueError, "cu_q takes elements that never decrease"),
    (lambda: Documents(CU, np.array([0, 3])), ValueError, "cu_k takes as many elements as cu_q, 3, got 2"),
]


@pytest.mark.parametrize(
    ("make", "error", "message"), INVALID_ARGUMENTS, ids=[text for _, _, text in INVALID_ARGUMENTS]
)
def test_constructors_refuse(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


INVALID_CALLS = [
    (Causal(INTS), "offset takes one element or one per batch item, 3 here, got a int32 tensor of shape \\(2,\\)"),
    (SlidingWindow(3, offset=INTS), "offset takes one element"),
    (Dilated(3, 2, INTS), "offset takes one element"),
    (Chunked(3, INTS), "offset takes one element"),
    (Global(3, INTS), "offset takes one element"),
    (Longformer(3, 1, INTS), "offset takes one element"),
    (Padding(INTS, 3), "start takes one element"),
    (Padding(0, INTS), "stop takes one element"),
    (Mask(FLAGS), "tensor takes a shape that broadcasts to \\(3, 2, 4, 5\\), got \\(2, 3\\)"),
    (Mask(FLAGS[:, :1, None, None]), "tensor takes a shape that broadcasts"),
    (BlockSparse(FLAGS, 4), "blocks takes a shape that broadcasts to \\(3, 2, 1, 2\\), got \\(2, 3\\)"),
    (Documents(CU), "cu_q takes a last element equal to q_length, 4 here, got 5"),
    (Documents(torch.tensor([0, 4])), "cu_q .* takes a last element equal to k_length, 5 here, got 4"),
    (Documents(torch.tensor([0, 1, 4]), torch.tensor([0, 1, 6])), "cu_k takes .* k_length, 5 here, got 6"),
    (Documents(torch.tensor([0, 1, 4]), CU, Causal(INTS)), "offset takes one element"),
    (Documents(torch.tensor([0, 1, 4]), CU, Mask(FLAGS)), "tensor takes a shape that broadcasts"),
    (Causal() & Padding(0, INTS), "stop takes one element"),
    (Causal() | Padding(0, INTS), "stop takes one element"),
]


@pytest.mark.parametrize(("pattern", "message"), INVALID_CALLS, ids=repr)
def test_calls_that_do_not_fit_are_refused(pattern: Pattern, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pattern.validate(3, 2, 4, 5)


@pytest.mark.parametrize("pattern", [*STATIC, *WITH_TENSORS], ids=repr)
def test_what_fits_is_not_refused(pattern: Pattern) -> None:
    sizes = (2, 1, 2, 3) if isinstance(pattern, Mask) else (2, 1, 5, 12) if isinstance(pattern, BlockSparse) else None
    pattern.validate(*(sizes or (2, 1, 5, 5)))


@pytest.mark.parametrize("pattern", [Mask(FLAGS), BlockSparse(FLAGS, 2), Documents(CU)], ids=repr)
def test_dense_and_operands_of_other_lengths_are_refused(pattern: Pattern) -> None:
    with pytest.raises(ValueError, match="takes a"):
        pattern.dense(9, 9)


def test_a_pattern_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Diagonal(Pattern):
        def __init__(self, distance: int) -> None:
            self.distance = distance

        def pairs(self, i: torch.Tensor, j: torch.Tensor, q_length: int, k_length: int) -> torch.Tensor:
            return j - i == self.distance

        def lower(self) -> Schedule:
            bound = schedule.Bound(self.distance)
            ends = [schedule.at_least(schedule.DIAGONAL, bound), schedule.at_most(schedule.DIAGONAL, bound)]
            return Schedule.of([ends])

    pattern = Diagonal(1) | Causal(0)
    assert repr(pattern) == "Diagonal(1) | Causal(offset=0)"
    assert torch.equal(pattern.schedule.mask(3, 5, ()), pattern.dense(3, 5))


def test_documents_in_documents() -> None:
    nested = Documents(torch.tensor([0, 3, 6]), within=Documents(torch.tensor([0, 1, 3]), within=Causal()))
    flat = Documents(torch.tensor([0, 1, 3, 4, 6]), within=Causal())
    nested.validate(1, 1, 6, 6)
    assert torch.equal(nested.dense(6, 6), flat.dense(6, 6))
    assert torch.equal(nested.schedule.mask(6, 6, nested.operands(6, 6)), flat.dense(6, 6))
    assert nested.density(6, 6) == flat.density(6, 6)
    with pytest.raises(ValueError, match="cu_q takes a last element equal to q_length, 2 here, got 3"):
        Documents(torch.tensor([0, 3, 5]), within=nested.within).validate(1, 1, 5, 5)


def test_documents_within_blocks_says_that_it_is_spelled_out(caplog: pytest.LogCaptureFixture) -> None:
    from heedful.patterns import documents

    documents._log_spelled_out.cache_clear()
    pattern = Documents(CU, within=BigBird(2, 1, 0, 0))
    assert pattern.schedule.encode() == (1, 1, 5, 0)
    for _ in range(2):
        assert torch.equal(pattern.operands(5, 5)[0], pattern.dense(5, 5))
    assert [record.name for record in caplog.records] == ["heedful"]
