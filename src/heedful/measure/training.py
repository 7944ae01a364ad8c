"""Training a language model with heedful and with masked SDPA: the same loss, and how long a step takes."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .checks import Check, all_passed
from .collect import Progress, collect
from .machine import environment
from .numerics import check_backward, check_forward
from .timing import compare_samples, pinned_threads

if TYPE_CHECKING:
    from torch import Tensor

    from heedful import Pattern

    from .language_model import Attend, Size

STEPS, SEED = 100, 0
# Two runs that differ in rounding drift apart by chance, one further than the other: within this factor of what the
# order of summation alone does to SDPA, nothing is to be seen but rounding.
NOISE_FACTOR = 4.0
NOISE_RULE = (
    "4 × the largest difference between two runs of SDPA that add the same numbers in another order, which is what "
    "rounding alone does to this training"
)
SIDES = ("heedful", "sdpa", "reordered")


def measure_training(
    steps: int, *, size: Size | None = None, threads: int, command: str, progress: Progress
) -> dict[str, Any]:
    """Train three models from the same weights on the same batches, step by step in turns.

    "heedful" and "sdpa" are compared; "reordered" is SDPA over reversed keys, the noise that they are held against.

    Returns:
        JSON-serialisable: schema, mode, command, environment, threads, seed, size, pattern, text_bytes, parameters,
        backend, interrupted, losses and seconds (by side, a number a step), comparison (None without green checks or
        without a step that was timed) and checks.
    """
    import heedful

    from .language_model import Size, Trainer

    size = size or Size()
    pattern = heedful.SlidingWindow(size.window - 1, 0)
    text = training_text()
    with pinned_threads(threads):
        progress.begin("numerical check")
        backend, checks = _check_attention(size, pattern)
        progress.advance()
        ways = _ways(size, pattern)
        trainers = {side: Trainer(size, ways[side], SEED, steps) for side in SIDES}
        losses: dict[str, list[float]] = {side: [] for side in SIDES}
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}

        def step(index: int) -> None:
            batch = _batch(text, size, index)
            done = {}
            # Every side goes first in turn.
            for turn in range(len(SIDES)):
                side = SIDES[(index + turn) % len(SIDES)]
                start = time.perf_counter()
                loss = trainers[side].step(batch)
                done[side] = loss, time.perf_counter() - start
            for side, (loss, taken) in done.items():
                losses[side].append(loss)
                seconds[side].append(taken)

        _, interrupted = collect(range(steps), step, progress, lambda index: f"step {index + 1} of {steps}")
    checks += _check_losses(losses)
    # The first step of each side also warms it up.
    timed = {side: values[1:] for side, values in seconds.items()}
    comparison = None
    if timed["sdpa"] and all_passed(checks):
        comparison = compare_samples(timed["sdpa"], timed["heedful"]).to_json()
    return {
        "schema": 1,
        "mode": "training",
        "command": command,
        "environment": environment(),
        "threads": threads,
        "seed": SEED,
        "steps": steps,
        "size": asdict(size),
        "pattern": repr(pattern),
        "text_bytes": len(text),
        "parameters": sum(tensor.numel() for tensor in trainers["heedful"].model.parameters()),
        "backend": backend,
        "interrupted": interrupted,
        "losses": losses,
        "seconds": seconds,
        "comparison": comparison,
        "checks": [check.to_json() for check in checks],
    }


def training_text() -> bytes:
    """Documentation that every Python carries: the topics behind help(), two thirds of a megabyte."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()).encode()


def _batch(text: bytes, size: Size, index: int) -> Tensor:
    """(B, L + 1) bytes, the same for every side."""
    import torch

    generator = torch.Generator().manual_seed(SEED + index)
    starts = torch.randint(len(text) - size.length - 1, (size.batch,), generator=generator).tolist()
    return torch.tensor([list(text[start : start + size.length + 1]) for start in starts])


def _ways(size: Size, pattern: Pattern) -> dict[str, Attend]:
    """The three sides' attention. The masks are built once, as a user would."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from heedful import attention

    mask = pattern.dense(size.length, size.length)
    reversed_mask = mask.flip(3).contiguous()
    return {
        "heedful": lambda q, k, v: attention(q, k, v, pattern=pattern),
        "sdpa": lambda q, k, v: sdpa(q, k, v, attn_mask=mask),
        # Softmax does not care for the order of the keys; sums in floating point do.
        "reordered": lambda q, k, v: sdpa(q, k.flip(2), v.flip(2), attn_mask=reversed_mask),
    }


def _check_attention(size: Size, pattern: Pattern) -> tuple[str | None, list[Check]]:
    """The backend of the model's attention, and checks of its output and gradients against fp64."""
    import torch

    import heedful

    generator = torch.Generator().manual_seed(SEED)
    shape = (size.batch, size.heads, size.length, size.head_dim)
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(3))
    grad_out = torch.randn(shape, generator=generator)
    out = heedful.attention(q, k, v, pattern=pattern)
    gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    backend = heedful.explain(q, k, v, pattern=pattern).backend
    q, k, v = q.detach(), k.detach(), v.detach()
    checks = check_forward("attention", q, k, v, out.detach(), pattern=pattern)
    return backend, checks + check_backward("attention", q, k, v, grad_out, gradients, pattern=pattern)


def largest_difference(losses: dict[str, list[float]], side: str) -> float:
    """Between a side's losses and SDPA's, step by step."""
    return max((abs(a - b) for a, b in zip(losses[side], losses["sdpa"], strict=True)), default=0.0)


def _check_losses(losses: dict[str, list[float]]) -> list[Check]:
    """The losses of heedful and SDPA differ by no more than rounding does, and the model learns."""
    import torch

    if not losses["sdpa"]:
        return []
    ours, noise = (largest_difference(losses, side) for side in ("heedful", "reordered"))
    # A loss has itself no more digits than this.
    floor = torch.finfo(torch.float32).eps * max(losses["sdpa"])
    checks = [Check("largest difference of the losses", ours, NOISE_FACTOR * max(noise, floor), NOISE_RULE)]
    if len(losses["sdpa"]) >= 20:
        first, last = (statistics.fmean(losses["heedful"][part]) for part in (slice(3), slice(-3, None)))
        checks.append(Check("loss at the end, nats per byte", last, first - 1.0, "1 nat below the loss at the start"))
    return checks
