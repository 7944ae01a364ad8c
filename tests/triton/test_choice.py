"""Which CUDA calls are Triton's and which SDPA's, and which tiles a kernel gets: pure functions, no device."""

from __future__ import annotations

import pytest
import torch

from heedful import Causal, Chunked, Dilated, Documents, Full, Longformer, Mask, Padding, SlidingWindow
from heedful.backend.sdpa import SdpaBackend
from heedful.backend.triton.plan import FAR, attends_to_all, keys_between, plan
from heedful.backend.triton.prefer import triton_is_faster
from heedful.backend.triton.tuning import Tiles, architecture, forward_tiles, key_runs, split_dim, takes_dense_tiles
from heedful.problem import Problem

MASKED = Mask(torch.ones(4, 4, dtype=torch.bool))


def problem(pattern=None, q_length=1024, k_length=1024, dtype=torch.bfloat16, features=(), **changes) -> Problem:
    schedule = (pattern or Full()).schedule
    made = Problem(2, 8, 8, q_length, k_length, 64, 64, dtype, "cuda", schedule, frozenset(features))
    return made._replace(**changes)


@pytest.mark.parametrize(
    "call",
    [
        problem(),
        problem(Causal()),
        problem(Causal(0), k_length=500),
        problem(features=("gradient",)),
        problem(dtype=torch.float32),
        problem(kv_heads=2),
        problem(value_dim=128),
        problem(head_dim=512, value_dim=512),
        problem(dtype=torch.float32, kv_heads=2),
        problem(dtype=torch.float32, batch=16, q_length=1, k_length=4096),
        problem(q_length=1000, k_length=1000, features=("gradient",)),
        problem(q_length=1000, k_length=1000, dtype=torch.float32),
        problem(q_length=1000, k_length=1000, head_dim=256, value_dim=256),
        problem(batch=8, q_length=12_001, k_length=12_001),
        problem(features=("bias",), dtype=torch.float32),
        problem(Causal(), features=("bias",), dtype=torch.float32),
        problem(features=("bias", "gradient"), dtype=torch.float32),
        problem(features=("bias", "gradient")),
        problem(features=("bias",), k_length=197),
        problem(q_length=1, k_length=16, features=("gradient",)),
    ],
)
def test_plain_attention_is_left_to_sdpa(call) -> None:
    assert not triton_is_faster(call)


@pytest.mark.parametrize(
    "call",
    [
        problem(SlidingWindow(100, 0)),
        problem(Longformer(32, 2)),
        problem(Causal(), k_length=2048),
        problem(features=("softcap",)),
        problem(features=("bias",)),
        problem(Causal(), features=("bias",)),
        problem(Causal(), features=("bias", "gradient")),
        problem(features=("lse",)),
        problem(features=("bias", "softcap")),
        problem(SlidingWindow(100, 0), features=("bias",)),
        problem(features=("bias",), q_length=9000, k_length=9000),
        problem(q_length=1, k_length=4096, kv_heads=2),
        problem(batch=64, q_length=4, k_length=4096, kv_heads=2),
        problem(q_length=40, k_length=4096),
        problem(batch=64, q_length=1, k_length=4096, kv_heads=2),
        problem(batch=16, q_length=1, k_length=4096),
        problem(q_length=1000, k_length=1000),
        problem(Causal(), q_length=3001, k_length=3001),
        problem(q_length=1, k_length=16),
        problem(Causal(), dtype=torch.float32, kv_heads=2),
        problem(dtype=torch.float32, kv_heads=2, q_length=8192, k_length=8192),
    ],
)
def test_all_else_is_triton_s(call) -> None:
    assert triton_is_faster(call)


def test_tiles_depend_on_what_is_attended_to() -> None:
    assert forward_tiles(90, torch.bfloat16, 128, 128, 0, 0, False, True) == Tiles(128, 64, 4, 2, True)
    assert forward_tiles(90, torch.bfloat16, 128, 128, 0, 0, False, False) == Tiles(64, 64, 4, 3, True)
    assert forward_tiles(90, torch.bfloat16, 128, 128, 0, 0, True, True).stages == 2
    assert forward_tiles(90, torch.bfloat16, 128, 128, 8, 0, False, True) == Tiles(16, 128, 4, 3, True)
    assert forward_tiles(80, torch.bfloat16, 128, 128, 32, 0, False, True).rows == 32
    dense = {
        pattern: plan(pattern.schedule.encode()).dense for pattern in (Full(), Causal(), SlidingWindow(9, 0), MASKED)
    }
    assert list(dense.values()) == [True, False, False, False]
    causal = plan(Causal().schedule.encode())
    assert [takes_dense_tiles(causal.dense, causal.one_sided, dim) for dim in (64, 80, 128, 256)] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("dim", "parts"), [(1, (16, 0)), (33, (32, 16)), (80, (64, 16)), (96, (64, 32)), (120, (128, 0)), (128, (128, 0))]
)
def test_head_dims_are_split_where_that_loads_less(dim, parts) -> None:
    assert split_dim(dim) == parts
    assert split_dim(dim, unit=1) == (16 if dim == 1 else 64 if dim == 33 else 128, 0)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 9), (9, 1), (7, 12), (12, 7), (9, 9)])
@pytest.mark.parametrize(
    "pattern",
    [
        Full(), Causal(), Causal(0), Causal(-3), SlidingWindow(3), SlidingWindow(3, 0), SlidingWindow(0, 2, offset=4),
        Longformer(2, 1), SlidingWindow(None, 2) & SlidingWindow(4, None), Causal() | SlidingWindow(20),
    ],
    ids=repr,
)  # fmt: skip
def test_patterns_that_attend_to_every_key_or_from_every_query(pattern, lengths) -> None:
    dense = pattern.dense(*lengths)[0, 0]
    code = pattern.schedule.encode()
    single = len(pattern.schedule.atoms) == 1
    found = attends_to_all(code, *lengths), attends_to_all(code, *reversed(lengths), True)
    wanted = bool(dense.any(0).all()), bool(dense.any(1).all())
    assert found == wanted if single else all(a <= b for a, b in zip(found, wanted, strict=True))


def test_what_tensors_say_is_not_known_to_attend_to_all() -> None:
    starts = torch.zeros(2, dtype=torch.int32)
    for pattern in (Padding(starts, starts + 9), MASKED, Causal(starts), Chunked(4)):
        assert not attends_to_all(pattern.schedule.encode(), 4, 4)


@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize(
    "pattern",
    [
        SlidingWindow(3), SlidingWindow(3, 0), SlidingWindow(0, 2, offset=4), SlidingWindow(4, None) & Causal(),
        Chunked(5), Chunked(4) & Causal(), Chunked(40) & SlidingWindow(6), Dilated(3, 4),
    ],
    ids=repr,
)  # fmt: skip
def test_keys_that_consecutive_queries_see_lie_close_together(pattern, queries) -> None:
    bound = keys_between(pattern.schedule.encode(), queries)
    dense = pattern.dense(31, 40)[0, 0]
    widest = 0
    for first in range(31 - queries + 1):
        seen = dense[first : first + queries].any(0).nonzero().flatten().tolist()
        widest = max(widest, seen[-1] - seen[0] + 1 if seen else 0)
    assert widest <= bound <= widest + queries + 5


def test_of_most_patterns_it_is_not_known_how_close_keys_lie() -> None:
    documents = Documents(torch.tensor([0, 5, 9], dtype=torch.int32), within=SlidingWindow(2, 0))
    for pattern in (Full(), Causal(), MASKED, Longformer(2, 1), SlidingWindow(4, None) & Causal(-2), documents):
        assert keys_between(pattern.schedule.encode(), 4) == FAR


@pytest.mark.parametrize("programs", [1, 8, 32, 100, 131, 200, 400])
@pytest.mark.parametrize("keys", [1, 100, 511, 513, 4096, 16384, 100_001])
@pytest.mark.parametrize("few_rows", [True, False])
def test_runs_of_keys_cover_them(programs, keys, few_rows) -> None:
    count, length = key_runs(programs, 132, keys, few_rows, programs * (4 if few_rows else 128))
    assert (count, length) == (1, 0) or (count - 1) * length < keys <= count * length


def test_keys_are_cut_where_that_is_worth_putting_results_together() -> None:
    def count(programs: int, keys: int, rows: int = 0) -> int:
        return key_runs(programs, 132, keys, rows == 0, rows or programs)[0]

    assert count(8, 16384) == 16
    assert count(132, 16384) == 1
    # Of 8,192 rows: cut for 64 programs, but not for 128, which fill the device once, nor for few keys.
    assert [count(64, 2048, 8192), count(128, 2048, 8192), count(64, 512, 8192), count(128, 8192, 8192)] == [4, 1, 1, 2]


def test_architectures() -> None:
    known = {(8, 0): 80, (8, 6): 86, (8, 9): 86, (9, 0): 90, (10, 0): 90, (12, 0): 86}
    assert {capability: architecture(capability) for capability in known} == known


def test_sdpa_refuses_a_bias_that_its_kernels_do_not_take() -> None:
    def refused(**changes) -> bool:
        return bool(SdpaBackend().not_supported_reasons(problem(features=("bias", "gradient"))._replace(**changes)))

    assert refused(bias_dtype=torch.float32)
    assert refused(bias_dtype=torch.float32, dtype=torch.float16)
    assert not refused(bias_dtype=torch.bfloat16)
    assert not refused(bias_dtype=torch.float32, dtype=torch.float32)
    assert not refused(bias_dtype=torch.float32, device_type="cpu")
    assert refused(features=frozenset({"alibi"}))
    assert not refused(features=frozenset({"alibi"}), dtype=torch.float32)
