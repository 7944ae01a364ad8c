"""Where the Triton kernels are measured to be faster than PyTorch's SDPA, for problems that both can run.

benchmarks/gpu_choice.py measured it on an H200 (torch 2.11, triton 3.6), where SDPA takes cuDNN's kernels for 16-bit
types: docs/performance/gpu.md has the figures. Full and causal attention is SDPA's, forward and backward, at any head
and value dim, but for lengths that look like a text's. Patterns that SDPA would need a dense mask for are Triton's, and
so are few queries that share keys, and calls that are over before they are launched.
"""

from __future__ import annotations

import functools

import torch

from heedful.backend.sdpa import lower
from heedful.patterns import Causal, Full
from heedful.problem import Problem, known

# A call takes 12 µs and not SDPA's 19 where the device is done before: up to 64 queries against 256 keys of 32 heads
# were 1.4 to 2.9 times as fast.
TINY_PAIRS, TINY_KEYS = 1 << 19, 1 << 15
# Few queries of a head against many keys: SDPA has work for so many of the device's multiprocessors, and does not cut
# keys for the others. Those of a group that are rows of one tile read their keys once.
FEW_QUERIES, MANY_KEYS, MANY_HEADS, ROWS_OF_A_TILE = 16, 1024, 128, 64
# With twice to four times the queries it was faster on few heads, 8 of 16.
SOME_QUERIES, FEW_HEADS = 64, 16
# SDPA repeats the keys of a group in float32 and holds all scores: 1.5 times as fast without a pattern, of 1 GiB at
# most. A causal one takes it 1.5 times as long.
HELD_PAIRS = 1 << 28
# As much of a bias is held with it, and as a mask: 3 to 25 times as fast in float32, in full and causal attention. In
# 16 bit 0.2 to 0.4 times as fast without gradients; with the bias's own, 1.3 times where it is full, 0.8 where causal.
BIAS_PAIRS = 1 << 26
# cuDNN plans some 30 ms for each shape that it has not seen. A length that is no multiple of this is more likely one of
# many texts' than of a model; the forward at such lengths was 0.78 to 1.14 times as fast where batches fill the device.
# From this many pairs times head dim on, 32 layers may lose as much as a plan.
ROUND_LENGTH, LONG_WORK = 64, 1 << 39
_FULL = Full().schedule
_DENSE = _FULL, Causal().schedule, Causal(0).schedule


def triton_is_faster(problem: Problem) -> bool:
    """Whether to run this CUDA problem on Triton rather than SDPA."""
    features = problem.features - {"gradient"}
    single = problem.dtype == torch.float32
    if features == {"bias"}:
        if not (known(problem.q_length * problem.k_length <= BIAS_PAIRS) and problem.schedule in _DENSE):
            return True
        if single:
            return False
        # Without descriptors a bias comes number by number.
        in_tiles = known(problem.k_length % 8 == 0)
        return in_tiles and ("gradient" not in problem.features or problem.schedule != _FULL)
    if features:
        return True
    lowering = lower(problem)
    if lowering.dense or lowering.mask is not None:
        return True
    if single and problem.heads != problem.kv_heads:
        return lowering.is_causal or not known(problem.pairs <= HELD_PAIRS)
    return "gradient" not in problem.features and (_is_soon_over(problem) or _is_planned_in_vain(problem))


def _is_soon_over(problem: Problem) -> bool:
    """Whether a forward of full or causal attention is short, or has too few rows for SDPA to fill the device."""
    queries, heads = problem.q_length, problem.batch * problem.kv_heads
    if known(problem.pairs <= TINY_PAIRS) and known(heads * problem.k_length <= TINY_KEYS):
        return True
    group = problem.heads // problem.kv_heads
    many_heads = not known(heads < MANY_HEADS)
    if group > 1 and known(queries * group <= ROWS_OF_A_TILE) and (known(queries > 1) or not many_heads):
        return True
    if not known(problem.k_length >= MANY_KEYS):
        return False
    return (known(queries <= FEW_QUERIES) and not many_heads) or (
        known(queries <= SOME_QUERIES) and known(heads <= FEW_HEADS)
    )


def _is_planned_in_vain(problem: Problem) -> bool:
    """Whether SDPA would plan for a shape that hardly comes often enough to be worth it."""
    dim = max(problem.head_dim, problem.value_dim)
    return (
        _sdpa_plans()
        and problem.dtype.itemsize == 2
        and dim <= 128
        and (problem.head_dim | problem.value_dim) % 8 == 0
        and known(problem.q_length % ROUND_LENGTH != 0)
        and known(problem.pairs * dim <= LONG_WORK)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _sdpa_plans() -> bool:
    return _takes_cudnn()


@functools.cache
def _takes_cudnn() -> bool:
    """Whether SDPA prefers cuDNN's kernels to its own: from sm_90 on."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
