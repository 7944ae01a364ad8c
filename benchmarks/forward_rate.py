"""How fast is the engine's forward at its best, in GFLOP/s and as a share of the core's multiply-add rate?

For comparing versions of the kernels: the fastest of many calls on one thread, without a peer beside it.

    python benchmarks/forward_rate.py --seconds 0.8
"""

from __future__ import annotations

import argparse
import time

import torch

import heedful
from heedful.backend.native import library
from heedful.measure.timing import pinned_threads

CASES = (
    ("full", (1, 8, 2048, 64), None),
    ("full", (1, 8, 2048, 128), None),
    ("causal", (1, 8, 2048, 64), heedful.Causal()),
    ("causal", (2, 8, 512, 64), heedful.Causal()),
    ("window", (1, 4, 8192, 64), heedful.SlidingWindow(128)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.8, help="time for each case")
    options = parser.parse_args()
    with pinned_threads(1), torch.no_grad():
        for name in ("float32", "bfloat16", "float16"):
            peak = library.peak_flops(name, 0.3)
            for what, shape, pattern in CASES:
                q, k, v = (torch.randn(shape).to(getattr(torch, name)) for _ in range(3))
                best, end = float("inf"), time.perf_counter() + options.seconds
                while time.perf_counter() < end:
                    start = time.perf_counter()
                    heedful.attention(q, k, v, pattern=pattern, backend="native")
                    best = min(best, time.perf_counter() - start)
                batch, heads, length, dim = shape
                density = 1.0 if pattern is None else pattern.density(length, length)
                rate = 4 * batch * heads * length * length * dim * density / best
                print(f"{name:8} {what:6} {shape!s:17} {rate / 1e9:6.1f} GFLOP/s, {rate / peak:.1%} of the limit")


if __name__ == "__main__":
    main()
