"""Swish with a steepness against PyTorch's composition of it, eager and compiled, and at 1 against its SiLU.

pytest benchmarks/bench_parametric_swish.py --benchmark-only
"""

import torch

OPERATIONS = ("parametric_swish",)
DTYPES = (torch.float32, torch.bfloat16)


def test_parametric_swish(benchmark, timed):
    benchmark(timed)
