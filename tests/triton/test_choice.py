"""Which CUDA calls are Triton's and which SDPA's, and which tiles a kernel gets: pure functions, no device."""

from __future__ import annotations

import pytest
import torch

from heedful import Causal, Full, Longformer, Mask, SlidingWindow
from heedful.backend.triton.plan import plan
from heedful.backend.triton.prefer import triton_is_faster
from heedful.backend.triton.tuning import Tiles, forward_tiles, split_dim
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
        problem(q_length=1, k_length=16),
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
        problem(features=("bias", "gradient")),
        problem(features=("lse",)),
        problem(q_length=1, k_length=4096, kv_heads=2),
        problem(value_dim=128),
        problem(head_dim=512, value_dim=512),
        problem(dtype=torch.float32, kv_heads=2),
    ],
)
def test_all_else_is_triton_s(call) -> None:
    assert triton_is_faster(call)


def test_tiles_depend_on_what_is_attended_to() -> None:
    wide = forward_tiles(90, torch.bfloat16, 128, 128, 0, 0, False, True)
    assert wide == Tiles(128, 64, 4, 2, True)
    assert forward_tiles(90, torch.bfloat16, 128, 128, 0, 0, False, False) == Tiles(64, 64, 4, 3)
    assert forward_tiles(90, torch.bfloat16, 128, 128, 0, 0, True, True).stages == 2
    assert forward_tiles(90, torch.bfloat16, 128, 128, 16, 0, False, True).rows == 16
    dense = {
        pattern: plan(pattern.schedule.encode()).dense for pattern in (Full(), Causal(), SlidingWindow(9, 0), MASKED)
    }
    assert list(dense.values()) == [True, True, False, False]


@pytest.mark.parametrize(
    ("dim", "parts"), [(1, (16, 0)), (33, (32, 16)), (80, (64, 16)), (96, (64, 32)), (120, (128, 0)), (128, (128, 0))]
)
def test_head_dims_are_split_where_that_loads_less(dim, parts) -> None:
    assert split_dim(dim) == parts
    assert split_dim(dim, unit=1) == (16 if dim == 1 else 64 if dim == 33 else 128, 0)
