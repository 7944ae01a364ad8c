"""Where the Triton kernels are measured to be faster than PyTorch's SDPA, for problems that both can run."""

from __future__ import annotations

from heedful.problem import Problem


def triton_is_faster(problem: Problem) -> bool:
    """Whether to run this CUDA problem on Triton rather than SDPA."""
    return True
