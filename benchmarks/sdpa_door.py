"""What does `heedful.scaled_dot_product_attention` cost or save beside PyTorch's function, from tiny calls up?

Forward alone, without a mask and under a bool and a float mask, and forward and backward. The limits at the top of
`heedful/sdpa/call.py` are made from this. On a busy machine: `chrt -f 50 taskset -c 1` before it.

    python benchmarks/sdpa_door.py
"""

from __future__ import annotations

import argparse

import torch

import heedful
from heedful.measure.timing import interleave, pinned_threads

SHAPES = (
    (1, 1, 4),
    (1, 1, 16),
    (1, 1, 32),
    (1, 1, 64),
    (1, 8, 8),
    (1, 8, 16),
    (1, 8, 32),
    (4, 8, 16),
    (1, 8, 64),
    (2, 8, 128),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.2, help="time for the rounds of a case")
    options = parser.parse_args()
    torch_sdpa, ours = torch.nn.functional.scaled_dot_product_attention, heedful.scaled_dot_product_attention
    with pinned_threads(1):
        for dtype in options.dtype or ("float32", "bfloat16"):
            print(f"{dtype}: µs of PyTorch → heedful")
            for batch, heads, length in SHAPES:
                q, k, v = (torch.randn(batch, heads, length, options.head_dim).to(getattr(torch, dtype)) for _ in "qkv")
                mask = torch.rand(length, length) < 0.7
                added = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
                leaves = [t.clone().requires_grad_() for t in (q, k, v)]
                arriving = torch.randn_like(q)

                def forward(call, attn_mask, q=q, k=k, v=v):
                    return lambda: call(q, k, v, attn_mask)

                def both(call, leaves=leaves, arriving=arriving):
                    return lambda: torch.autograd.grad(call(*leaves), leaves, arriving)

                shown = [
                    f"{name} {_times([forward(call, attn_mask) for call in (torch_sdpa, ours)], options.seconds)}"
                    for name, attn_mask in (("no mask", None), ("bool", mask), ("float", added))
                ]
                shown.append(f"with backward {_times([both(call) for call in (torch_sdpa, ours)], options.seconds)}")
                print(f"  {(batch, heads, length, options.head_dim)!s:20} " + "   ".join(shown), flush=True)


def _times(sides: list, seconds: float) -> str:
    timing = interleave(*sides, seconds=seconds)
    before, after = timing.baseline_seconds * 1e6, timing.candidate_seconds * 1e6
    return f"{before:6.1f} → {after:6.1f} ({timing.ratio:.2f}×)"


if __name__ == "__main__":
    main()
