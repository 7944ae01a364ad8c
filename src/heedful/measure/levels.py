"""The ladder measured: every component at every level that runs here, and how fast a decoder generates at each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from .collect import Progress, collect
from .machine import environment
from .peaks import Peaks, measure_peaks
from .timing import pinned_threads, quartiles

if TYPE_CHECKING:
    from torch import Tensor

    from heedful.levels import Decoder

CASE_SECONDS = 0.8
PROMPT, NEW_TOKENS, GENERATION_ROUNDS = 512, 32, 5
_NAMED = {1: "level 1", 2: "level 2", 3: "level 3", 4: "level 4", 5: "level 5", "torch": "PyTorch's fused functions"}


@dataclass(frozen=True)
class Case:
    """A component with arguments and the shapes of its inputs; `generates` times generation instead."""

    name: str
    component: str
    shapes: tuple[tuple[int, ...], ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    generates: bool = False


def cases(*, quick: bool = False) -> list[Case]:
    """What is measured; with quick a quarter of the positions."""
    length, rows = (256, 2048) if quick else (1024, 8192)
    head = (1, 8, length, 64)
    x = ((1, length, 512),)
    return [
        Case("scaled dot-product attention, causal", "attention", (head, head, head), {"causal": True}),
        Case("multi-head attention with RoPE", "multi_head_attention", x, {"dim": 512, "heads": 8}),
        Case("layer norm", "layer_norm", ((rows, 1024),), {"dim": 1024}),
        Case("layer norm + GELU", "layer_norm_gelu", ((rows, 1024),), {"dim": 1024}),
        Case("feed-forward, GELU", "feed_forward", x, {"dim": 512}),
        Case("feed-forward, SwiGLU", "feed_forward", x, {"dim": 512, "activation": "swiglu"}),
        Case("transformer block, causal", "transformer_block", x, {"dim": 512, "heads": 8}),
        Case("decoder", "decoder", ((1, length),), {"dim": 256, "heads": 4, "layers": 2}),
        Case("generation", "decoder", ((1, PROMPT),), {"dim": 256, "heads": 4, "layers": 2}, generates=True),
    ]


def measure_levels(
    chosen: Sequence[Case],
    *,
    threads: int,
    command: str,
    progress: Progress,
    seconds: float = CASE_SECONDS,
    device: str = "cpu",
) -> dict[str, Any]:
    """Run the cases one after another, the machine's peaks first.

    Returns:
        JSON-serialisable: schema, mode, command, environment, peaks, threads, interrupted, availability, cases.

    Raises:
        ValueError: threads is not possible here, or device is not "cpu" or "cuda".
        UnsupportedError: there is no such device.
    """
    import torch

    from heedful.levels.ladder import LEVELS, available, require

    require(1, "attention", device)
    progress.begin("measuring the machine's peaks")
    peaks = measure_peaks((threads,))
    progress.advance()
    done, interrupted = collect(
        chosen,
        lambda case: run_case(case, threads=threads, seconds=seconds, peaks=peaks, device=device),
        progress,
        lambda case: case.name,
    )
    statuses = [available(level, device=device) for level in LEVELS]
    return {
        "schema": 1,
        "mode": "levels",
        "command": command,
        "environment": environment(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "peaks": peaks.to_json() if peaks else None,
        "threads": threads,
        "interrupted": interrupted,
        "availability": [{"level": s.level, "name": s.name, "reason": s.reason, "remedy": s.remedy} for s in statuses],
        "cases": done,
    }


def run_case(case: Case, *, threads: int, seconds: float, peaks: Peaks | None, device: str = "cpu") -> dict[str, Any]:
    """One case at every level that runs here, and beside them with PyTorch's fused functions."""
    import torch

    from heedful.levels import comparison
    from heedful.levels.ladder import NAMES, available, convert, create, interpreting

    torch.manual_seed(0)
    first = create(case.component, 1, device=device, **case.arguments)
    missing: dict[str, str | None] = {}
    modules = {"level 1": first}
    for level in list(NAMES)[1:]:
        status = available(level, case.component, device=device)
        if level == 4 and interpreting():
            missing[_NAMED[level]] = "Triton runs under its interpreter here, which has no speed to measure"
        elif not status:
            missing[_NAMED[level]] = status.reason
        else:
            modules[_NAMED[level]] = convert(first, level)
    described = {
        "name": case.name,
        "component": case.component,
        "arguments": case.arguments,
        "shapes": [list(shape) for shape in case.shapes],
        "missing": missing,
    }
    if case.generates:
        return described | {"generation": _generation(modules, case.shapes[0], threads)}
    inputs = None
    if case.component == "decoder":
        inputs = [torch.randint(first.vocabulary, shape) for shape in case.shapes]
    found = comparison.compare_optimization_levels(
        modules, case.shapes, inputs=inputs, device=device, threads=threads, seconds=seconds, peaks=peaks
    )
    return described | {"comparison": found.to_json()}


def _generation(decoders: dict[str, Decoder], shape: tuple[int, ...], threads: int) -> list[dict[str, Any]]:
    """Greedy generation behind a prompt, turn by turn: seconds of the prompt and of a token."""
    import torch

    first = next(iter(decoders.values()))
    prompt = torch.randint(first.vocabulary, shape).to(first.head.weight.device)
    with pinned_threads(threads), torch.no_grad():
        # Also the warm-up: a level that compiles does so here.
        tokens = {name: decoder.generate(prompt, NEW_TOKENS) for name, decoder in decoders.items()}
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
        for _ in range(GENERATION_ROUNDS):
            for name, decoder in decoders.items():
                samples[name].append(_generate(decoder, prompt))
    reference = next(iter(decoders))
    results = []
    for name, taken in samples.items():
        pairs = zip(samples[reference], taken, strict=True)
        results.append(
            {
                "name": name,
                "same_tokens": bool(torch.equal(tokens[name], tokens[reference])),
                "prompt_seconds": median(prompt_seconds for prompt_seconds, _ in taken),
                "token_seconds": median(token_seconds for _, token_seconds in taken),
                "speedup": list(quartiles([before[1] / after[1] for before, after in pairs])),
            }
        )
    return results


def _generate(decoder: Decoder, prompt: Tensor) -> tuple[float, float]:
    """Seconds of reading the prompt, and of each token after it."""
    cache = decoder.new_cache(prompt.shape[0], prompt.shape[1] + NEW_TOKENS)
    start = time.perf_counter()
    new = decoder(prompt, cache)[:, -1:].argmax(-1)
    # Reading the token waits for a GPU, as whoever shows it does.
    new[0, 0].item()
    read = time.perf_counter()
    for _ in range(NEW_TOKENS - 1):
        new = decoder(new, cache)[:, -1:].argmax(-1)
        new[0, 0].item()
    return read - start, (time.perf_counter() - read) / (NEW_TOKENS - 1)
