"""Every other operation of the catalogue against PyTorch.

pytest benchmarks/bench_operations.py --benchmark-only
"""

import torch

from heedful.ops import catalogue

OPERATIONS = tuple(name for name in catalogue() if name not in ("fused_attention", "parametric_swish"))
DTYPES = (torch.float32,)


def test_operation(benchmark, timed):
    benchmark(timed)
