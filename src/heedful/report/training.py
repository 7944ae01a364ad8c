"""The training comparison for people: both loss curves, their difference beside the noise, seconds a step."""

from __future__ import annotations

import statistics
from typing import Any

from heedful.measure.training import largest_difference

from .document import Document, Grid
from .figure import Axis, Figure, Series
from .table import duration, ratio

NAMES = {"heedful": "heedful", "sdpa": "SDPA with a mask", "reordered": "SDPA, keys in reverse"}


def document(result: dict[str, Any]) -> Document:
    """The whole result."""
    losses, seconds, size = result["losses"], result["seconds"], result["size"]
    steps, timing, threads = len(losses["sdpa"]), result["comparison"], result["threads"]
    summary = [
        f"A byte-level language model of {size['layers']} layers, width {size['heads'] * size['head_dim']} and "
        f"{result['parameters'] / 1e6:.2f} million parameters reads {size['length']} bytes at a time of "
        f"{result['text_bytes'] / 2**20:.2g} MiB of Python's documentation through {result['pattern']}, in fp32 on "
        f"{threads} thread{'s' if threads > 1 else ''}.",
        f"{steps} steps{' until Ctrl-C' if result['interrupted'] else ''}: the models start from the same weights, see "
        "the same batches and take turns.",
    ]
    if steps:
        drift, noise = (largest_difference(losses, side) for side in ("heedful", "reordered"))
        summary.append(
            f"Loss of heedful {losses['heedful'][0]:.3f} → {losses['heedful'][-1]:.3f} nats per byte, of SDPA "
            f"{losses['sdpa'][0]:.3f} → {losses['sdpa'][-1]:.3f}. Largest difference {drift:.1e}; between two runs of "
            f"SDPA that add in another order {noise:.1e}."
        )
    if timing:
        tokens = size["batch"] * size["length"]
        ours, theirs = timing["candidate_seconds"], timing["baseline_seconds"]
        summary.append(
            f"A step takes {duration(ours)} with heedful, {duration(theirs)} with SDPA: {ratio(timing['ratio'])} "
            f"({ratio(timing['ratio_low'])}–{ratio(timing['ratio_high'])}), {tokens / ours:.0f} against "
            f"{tokens / theirs:.0f} tokens a second. heedful ran on {result['backend']}."
        )
    failures = [
        f"{check['name']}: {check['measured']:.3g}, limit {check['limit']:.3g}"
        for check in result["checks"]
        if not check["passed"]
    ]
    rows = [
        [NAMES[side], f"{values[0]:.4f}", f"{values[-1]:.4f}", duration(statistics.median(seconds[side]))]
        for side, values in losses.items()
        if values
    ]
    return Document(
        "Training with a sliding window",
        "The same small language model is trained with heedful's attention and with PyTorch's under a mask.",
        summary,
        _figures(losses, seconds) if steps else [],
        [Grid("Runs", ("attention", "first loss", "last loss", "median step"), rows)],
        result["checks"],
        failures,
    )


def _figures(losses: dict[str, list[float]], seconds: dict[str, list[float]]) -> list[Figure]:
    steps = list(range(1, len(losses["sdpa"]) + 1))
    x = Axis("step")
    curves = [
        Series(NAMES["sdpa"], steps, losses["sdpa"], "line", 1),
        Series("heedful", steps, losses["heedful"], "rule", 0),
    ]
    # On a logarithmic axis, equal losses stand at the last digit that a loss has.
    least = 1e-7
    apart = [
        Series(
            f"{NAMES[side]} against SDPA",
            steps,
            [max(abs(a - b), least) for a, b in zip(losses[side], losses["sdpa"], strict=True)],
            "line",
            colour,
        )
        for side, colour in (("heedful", 0), ("reordered", 7))
    ]
    times = [
        Series(NAMES[side], steps, seconds[side], "line", colour) for side, colour in (("heedful", 0), ("sdpa", 1))
    ]
    return [
        Figure("Loss", x, Axis("nats per byte"), curves),
        Figure("How far the losses are apart", x, Axis("absolute difference", log=True), apart),
        Figure("Time of each step", x, Axis("seconds", low=0.0), times),
    ]
