"""Where is a small call faster on the engine than on PyTorch's SDPA, and where not?

Prints, for small shapes, the time of both through heedful's front door, without gradients and with them (forward and
backward). The thresholds of `heedful/backend/native/prefer.py` are made from this.

    python benchmarks/tiny_calls.py --head-dim 64
"""

from __future__ import annotations

import argparse
import itertools

import torch

import heedful
from heedful.measure.timing import interleave, pinned_threads

DTYPES = ("float32", "float64", "bfloat16", "float16")
LENGTHS = (
    *((n, n) for n in (1, 2, 4, 8, 16, 24, 32, 64)),
    *((1, 16), (1, 200), (1, 1000), (2, 1000), (4, 1000), (3, 50), (16, 4)),
    *((500, n) for n in (1, 2, 3, 4, 8)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="this type only; may be repeated")
    parser.add_argument("--seconds", type=float, default=0.1, help="time for the rounds of a case")
    options = parser.parse_args()
    with pinned_threads(1):
        for dtype, gradients, heads in itertools.product(options.dtype or DTYPES, (False, True), (1, 16)):
            print(f"{dtype}, {heads} heads, {'forward and backward' if gradients else 'forward'}")
            for q_length, k_length in LENGTHS:
                show(dtype, gradients, heads, q_length, k_length, options.head_dim, options.seconds)


def show(dtype: str, gradients: bool, heads: int, q_length: int, k_length: int, head_dim: int, seconds: float) -> None:
    tensors = [
        torch.randn(1, heads, length, head_dim).to(getattr(torch, dtype)).requires_grad_(gradients)
        for length in (q_length, k_length, k_length)
    ]
    grad_out = torch.randn_like(tensors[0])

    def side(backend: str):
        if gradients:
            return lambda: torch.autograd.grad(heedful.attention(*tensors, backend=backend), tensors, grad_out)
        return lambda: heedful.attention(*tensors, backend=backend)

    timing = interleave(side("sdpa"), side("native"), seconds=seconds)
    chosen = heedful.explain(*tensors).backend
    print(
        f"  {q_length:5} × {k_length:<5} SDPA {timing.baseline_seconds * 1e6:8.1f} µs  native "
        f"{timing.candidate_seconds * 1e6:8.1f} µs  {timing.ratio:5.2f}×  chosen: {chosen}",
        flush=True,
    )


if __name__ == "__main__":
    main()
