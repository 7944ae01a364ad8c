"""The Triton kernels alone, as CUDA graphs: calls of docs/performance/gpu.md that no peer is beside.

    PYTHONPATH=src python benchmarks/gpu_kernels.py [--only TEXT]

bfloat16. Microseconds of the device, and TFLOP/s of the pairs attended to; a window that is decoded has the same keys
each time, which the device's cache holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

import heedful
from heedful import Causal, Full, Pattern, SlidingWindow
from heedful.backend.triton import gradients, launch
from heedful.measure.gpu import as_graph, sampler
from heedful.measure.timing import take_turns

DEVICE = torch.device("cuda")
TIMES = 10


class Shape(NamedTuple):
    """Of one call; with its backward, without the forward, where `backward`."""

    pattern: Pattern
    heads: int
    kv_heads: int
    q_length: int
    k_length: int
    dim: int = 128
    batch: int = 1
    backward: bool = False


SHAPES = {
    "one query, 4,096 of 32,768 keys": Shape(SlidingWindow(4095, 0), 32, 8, 1, 32768),
    "one query, 4,096 of 131,072 keys": Shape(SlidingWindow(4095, 0), 16, 8, 1, 131072),
    "16 heads of 1,000": Shape(Full(), 16, 16, 1000, 1000),
    "one head of 8,192": Shape(Full(), 1, 1, 8192, 8192),
    "128 queries, 32,768 keys": Shape(Causal(), 32, 8, 128, 32768),
    "8 heads of 2,048, causal": Shape(Causal(), 8, 8, 2048, 2048),
    "8 heads of 2,048, causal, backward": Shape(Causal(), 8, 8, 2048, 2048, backward=True),
    "32/8 heads of 1,024 in fours, causal": Shape(Causal(), 32, 8, 1024, 1024, batch=4),
    "32/8 heads of 1,024 in fours, causal, backward": Shape(Causal(), 32, 8, 1024, 1024, batch=4, backward=True),
    "32 heads of 4,001, backward": Shape(Full(), 32, 32, 4001, 4001, backward=True),
    "32 heads of 4,096, backward": Shape(Full(), 32, 32, 4096, 4096, backward=True),
}


def call_of(shape: Shape) -> Callable[[], object]:
    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(shape.batch, heads, length, shape.dim, device=DEVICE, dtype=torch.bfloat16)

    q, k, v = draw(shape.heads, shape.q_length), *(draw(shape.kv_heads, shape.k_length) for _ in range(2))
    code, scale = shape.pattern.schedule.encode(), shape.dim**-0.5
    if not shape.backward:
        return lambda: launch.forward(q, k, v, (), code, scale, False)
    out, lse = launch.forward(q, k, v, (), code, scale, False)
    grad = torch.randn_like(out)
    none = None, None, 0.0, 0.0, None, None, None, False, False
    return lambda: gradients.backward(grad, q, k, v, out, lse, (), code, scale, *none)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="calls whose names contain this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_kernels.py needs a CUDA device, and torch sees none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, heedful {heedful.__version__}\n")
    for name, shape in SHAPES.items():
        if arguments.only is not None and arguments.only not in name:
            continue
        call = call_of(shape)
        graph = as_graph(lambda call=call: [call() for _ in range(TIMES)])  # type: ignore[misc]
        (times,) = take_turns([graph], seconds=0.2, sample=sampler(DEVICE))
        seconds = sorted(times)[len(times) // 2] / TIMES
        pairs = shape.batch * shape.heads * shape.q_length * shape.k_length
        pairs *= float(shape.pattern.density(shape.q_length, shape.k_length))
        rate = 4 * shape.dim * pairs * (2.5 if shape.backward else 1) / seconds
        print(f"{name:50s} {seconds * 1e6:9.1f} us  {rate / 1e12:6.1f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
