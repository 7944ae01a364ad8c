"""Attention with its weights against matmul, softmax and matmul, eager and compiled.

pytest benchmarks/bench_fused_attention.py --benchmark-only
"""

import torch

OPERATIONS = ("fused_attention",)
DTYPES = (torch.float32, torch.bfloat16)


def test_fused_attention(benchmark, timed):
    benchmark(timed)
