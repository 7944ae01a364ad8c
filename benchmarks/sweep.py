"""Where is the engine faster than PyTorch's SDPA, and where not?

Runs a grid of shapes, types and patterns that both can compute, engine against SDPA, and prints each ratio with its
quartiles; the cases that SDPA wins come last again. This is what `heedful/backend/native/prefer.py` is made from.

    python benchmarks/sweep.py --threads 1 --seconds 0.5 --save sweep.json
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import heedful
from heedful.measure.checks import all_passed
from heedful.measure.files import write_json
from heedful.measure.machine import environment
from heedful.measure.numerics import check_forward
from heedful.measure.timing import interleave, pinned_threads

DTYPES = ("float32", "bfloat16", "float16")
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
# (batch, heads, key heads, queries, keys)
SHAPES = (
    (1, 1, 1, 8, 8),
    (1, 4, 4, 32, 32),
    (1, 8, 8, 64, 64),
    (8, 12, 12, 128, 128),
    (32, 12, 12, 256, 256),
    (2, 8, 8, 512, 512),
    (1, 8, 8, 1023, 1023),
    (1, 8, 2, 2048, 2048),
    (1, 32, 8, 1, 128),
    (1, 32, 8, 1, 4096),
    (8, 32, 8, 1, 1024),
    (1, 32, 8, 5, 2048),
    (1, 8, 8, 1, 128),
    (1, 8, 8, 1, 1024),
    (1, 8, 8, 1, 8192),
    (1, 8, 8, 4, 1024),
)
PATTERNS = ("full", "causal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for the rounds of a case")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="this type only; may be repeated")
    parser.add_argument("--head-dim", action="append", type=int, help="this head dim only; may be repeated")
    parser.add_argument("--save", help="write the results to this JSON file")
    options = parser.parse_args()
    grid = itertools.product(PATTERNS, options.dtype or DTYPES, SHAPES, options.head_dim or HEAD_DIMS)
    results = []
    with pinned_threads(options.threads), torch.no_grad():
        for pattern, dtype, shape, head_dim in grid:
            # With other lengths than the keys' SDPA's is_causal means something else.
            if pattern == "causal" and shape[3] != shape[4]:
                continue
            results.append(case(pattern, dtype, shape, head_dim, options.seconds))
            print(line(results[-1]), flush=True)
    slower = [result for result in results if result["ratio"] is None or result["ratio"] < 1]
    print(f"\n{len(slower)} of {len(results)} cases that SDPA wins or that failed:")
    for result in slower:
        print(line(result))
    if options.save:
        write_json(options.save, {"environment": environment(), "threads": options.threads, "results": results})


def case(
    pattern: str, dtype: str, shape: tuple[int, int, int, int, int], head_dim: int, seconds: float
) -> dict[str, Any]:
    """One comparison; the ratio is None where the numerical check failed."""
    batch, heads, kv_heads, q_length, k_length = shape
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, head_dim, generator=generator).to(getattr(torch, dtype))

    q, k, v = draw(heads, q_length), draw(kv_heads, k_length), draw(kv_heads, k_length)
    wanted = heedful.Causal() if pattern == "causal" else None

    def theirs() -> torch.Tensor:
        return sdpa(q, k, v, is_causal=pattern == "causal", enable_gqa=heads != kv_heads)

    def ours() -> torch.Tensor:
        return heedful.attention(q, k, v, pattern=wanted, backend="native")

    found = {"pattern": pattern, "dtype": dtype, "shape": shape, "head_dim": head_dim, "ratio": None}
    if not all_passed(check_forward("sweep", q, k, v, ours(), pattern=wanted, sdpa_out=theirs())):
        return found
    return found | interleave(theirs, ours, seconds=seconds).to_json()


def line(result: dict[str, Any]) -> str:
    """A case in one line."""
    batch, heads, kv_heads, q_length, k_length = result["shape"]
    name = (
        f"{result['pattern']:6} {result['dtype']:8} B {batch:<3} H {heads}/{kv_heads:<3} "
        f"{q_length:>5} x {k_length:<5} D {result['head_dim']:<4}"
    )
    if result["ratio"] is None:
        return f"{name} NUMERICAL CHECK FAILED"
    low, high = result["ratio_low"], result["ratio_high"]
    return f"{name} {result['ratio']:6.2f}x ({low:.2f}-{high:.2f})  SDPA {1e6 * result['baseline_seconds']:.1f} us"


if __name__ == "__main__":
    main()
