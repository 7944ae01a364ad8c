"""heedful.nn.MultiheadAttention beside torch.nn.MultiheadAttention with the same weights: microseconds a call, turn by
turn on one thread, after their outputs were compared.

    python benchmarks/multihead_attention.py --seconds 0.5

Evaluation with batch_first=True is where torch has its fast path. The window is a pattern here, and the bool mask that
says the same there.
"""

from __future__ import annotations

import argparse
import datetime
from typing import Any

import torch
from torch import Tensor, nn

import heedful
from heedful.measure.machine import cpu_model
from heedful.measure.timing import interleave, pinned_threads

# batch, length, embedding, heads
SIZES = ((1, 8, 32, 4), (2, 128, 256, 8), (1, 512, 512, 8), (1, 2048, 256, 4))
WINDOW = 64


def calls(batch: int, length: int) -> dict[str, dict[str, Any]]:
    """The masks of each kind of call."""
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    padding = torch.arange(length) >= torch.arange(1, batch + 1)[:, None] * length // batch
    plain = {"need_weights": False}
    return {
        "output": plain,
        "output and weights": {},
        "causal hint": plain | {"attn_mask": causal, "is_causal": True},
        "causal bool mask": plain | {"attn_mask": causal},
        "padding": plain | {"key_padding_mask": padding},
        "window": plain,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row")
    seconds = parser.parse_args().seconds
    print(f"{datetime.date.today()}, {cpu_model()}, torch {torch.__version__}, 1 thread, float32\n")
    print("| batch, length, embedding, heads | call | mode | torch, µs | heedful, µs | torch ÷ heedful (quartiles) |")
    print("|---|---|---|---|---|---|")
    with pinned_threads(1):
        for size in SIZES:
            for name, options in calls(size[0], size[1]).items():
                for training in (False, True):
                    compare(size, name, options, training, seconds)


def compare(
    size: tuple[int, int, int, int], name: str, options: dict[str, Any], training: bool, seconds: float
) -> None:
    batch, length, embed_dim, heads = size
    theirs = nn.MultiheadAttention(embed_dim, heads, batch_first=True).train(training)
    ours = heedful.nn.MultiheadAttention(embed_dim, heads, batch_first=True).train(training)
    ours.load_state_dict(theirs.state_dict())
    masks = options
    if name == "window":
        ours.pattern = heedful.SlidingWindow(WINDOW)
        masks = options | {"attn_mask": ~ours.pattern.dense(length, length)[0, 0]}
    x = torch.randn(batch, length, embed_dim)

    def step(module: nn.Module, given: dict[str, Any]) -> Tensor:
        with torch.set_grad_enabled(training):
            out: Tensor = module(x, x, x, **given)[0]
            if training:
                module.zero_grad()
                out.sum().backward()
        return out

    torch.testing.assert_close(step(ours, options), step(theirs, masks), rtol=1e-3, atol=1e-4)
    seen = interleave(lambda: step(theirs, masks), lambda: step(ours, options), seconds=seconds)
    print(
        f"| {', '.join(map(str, size))} | {name} | {'training' if training else 'evaluation'} "
        f"| {seen.baseline_seconds * 1e6:.0f} | {seen.candidate_seconds * 1e6:.0f} "
        f"| {seen.ratio:.2f} ({seen.ratio_low:.2f}–{seen.ratio_high:.2f}) |",
        flush=True,
    )


if __name__ == "__main__":
    main()
