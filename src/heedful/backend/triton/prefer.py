"""Where the Triton kernels are measured to be faster than PyTorch's SDPA, for problems that both can run.

The sections short, forward, backward and decode of benchmarks/gpu.py measured it on an H200 (torch 2.11, triton 3.6),
where SDPA takes cuDNN's kernels for 16-bit types: docs/performance/gpu.md has the figures. Full and causal attention
is SDPA's at every length there, forward and backward, and in float32. What SDPA would need a dense mask for is
Triton's, and so are few queries against long caches.
"""

from __future__ import annotations

import torch

from heedful.backend.sdpa import lower
from heedful.problem import Problem, known

# One query against 16,384 keys reads them at 1.3 times the speed of SDPA's flash kernel.
FEW_QUERIES, MANY_KEYS = 16, 1024
# SDPA has no fused kernel for wider heads.
LARGEST_HEAD_DIM = 256


def triton_is_faster(problem: Problem) -> bool:
    """Whether to run this CUDA problem on Triton rather than SDPA."""
    if problem.features - {"gradient"} or problem.head_dim != problem.value_dim:
        return True
    if problem.head_dim > LARGEST_HEAD_DIM or (problem.dtype == torch.float32 and problem.heads != problem.kv_heads):
        return True
    if known(problem.q_length <= FEW_QUERIES) and known(problem.k_length >= MANY_KEYS):
        return True
    lowering = lower(problem)
    return lowering.dense or lowering.mask is not None
