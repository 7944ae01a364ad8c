"""Does the cost of a pattern follow its density? Each family of patterns from sparse to dense, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .checks import all_passed
from .collect import Progress, collect
from .machine import environment
from .numerics import check_backward, check_forward
from .timing import interleave, pinned_threads

if TYPE_CHECKING:
    from torch import Tensor

    from heedful import Pattern

LENGTH, HEADS, HEAD_DIM = 4096, 2, 64
CASE_SECONDS = 0.8
Maker = Callable[[int, float], "Pattern"]


@dataclass(frozen=True)
class Point:
    """A family at about this density, whose maker gets the length and the density."""

    family: str
    aim: float

    @property
    def name(self) -> str:
        """The point in a few words."""
        return f"{self.family}, density about {self.aim:.3g}"


def _window(length: int, density: float) -> Pattern:
    from heedful import SlidingWindow

    return SlidingWindow(max(1, round(density * length / 2)))


def _dilated(length: int, density: float) -> Pattern:
    from heedful import Dilated

    # As far as the sequence's half to each side, but for the densest, which are wider than that allows.
    step = max(2, round(1 / (2 * density)))
    return Dilated(max(1, round(density * length / 2)), step)


def _dilated_or_window(length: int, density: float) -> Pattern:
    from heedful import Dilated, SlidingWindow

    # Half of the pairs each: the nearest keys, and every so many of those further off.
    step = max(2, round(1 / density))
    return Dilated(max(1, round(density * length / 4)), step) | SlidingWindow(max(1, round(density * length / 4)))


def _chunked(length: int, density: float) -> Pattern:
    from heedful import Chunked

    return Chunked(max(1, round(density * length)))


def _longformer(length: int, density: float) -> Pattern:
    from heedful import Longformer

    # Half of the pairs from the window, half from tokens that see everything and are seen by everything.
    return Longformer(max(1, round(density * length / 4)), max(1, round(density * length / 4)))


def _bigbird(length: int, density: float) -> Pattern:
    from heedful import BigBird

    if density < 0.05:
        return BigBird(16, 1, 0, max(0, round(density * length / 16 - 1)), seed=0)
    # Three blocks from the window, and about two of the global block, which is a row and a column.
    return BigBird(64, 3, 1, max(0, round(density * length / 64 - 3 - 2)), seed=0)


def _blocks(size: int) -> Maker:
    def make(length: int, density: float) -> Pattern:
        import torch

        from heedful import BlockSparse

        count = -(-length // size)
        generator = torch.Generator().manual_seed(0)
        return BlockSparse(torch.rand(count, count, generator=generator) < density, size)

    return make


def _documents(length: int, density: float) -> Pattern:
    import torch

    from heedful import Documents

    if density > 0.5:
        # Two documents, of the share s and 1 - s: s² + (1 - s)² is the density.
        share = (1 + math.sqrt(2 * density - 1)) / 2
        return Documents(torch.tensor([0, round(share * length), length], dtype=torch.int32))
    return Documents(torch.linspace(0, length, round(1 / density) + 1).round().to(torch.int32))


def _mask(length: int, density: float) -> Pattern:
    import torch

    from heedful import Mask

    return Mask(torch.rand(length, length, generator=torch.Generator().manual_seed(0)) < density)


def _padding(length: int, density: float) -> Pattern:
    import torch

    from heedful import Padding

    return Padding(0, torch.tensor([round(density * length)], dtype=torch.int32))


FAMILIES: dict[str, Maker] = {
    "window": _window,
    "dilated": _dilated,
    "dilated | window": _dilated_or_window,
    "chunked": _chunked,
    "Longformer": _longformer,
    "BigBird": _bigbird,
    "blocks of 16": _blocks(16),
    "blocks of 32": _blocks(32),
    "blocks of 64": _blocks(64),
    "blocks of 128": _blocks(128),
    "documents": _documents,
    "random mask": _mask,
    "padding": _padding,
}
DENSITIES = (0.01, 0.03, 0.1, 0.3, 0.7)


def points(families: Sequence[str] | None = None) -> list[Point]:
    """Every density of the families, all of them if None."""
    return [Point(family, density) for family in families or FAMILIES for density in DENSITIES]


def measure_density(
    chosen: Sequence[Point],
    *,
    dtype: str,
    threads: int,
    command: str,
    progress: Progress,
    length: int = LENGTH,
    seconds: float = CASE_SECONDS,
) -> dict[str, Any]:
    """Check and time every point against the dense call, forward and backward.

    Returns:
        JSON-serialisable: schema, mode, command, environment, threads, dtype, shape, interrupted, sdpa_seconds (what
        SDPA takes with a mask, forward and backward, at any density) and points.
    """
    tensors = _draw(length, dtype)

    def run(point: Point) -> dict[str, Any]:
        return run_point(point, tensors, seconds=seconds)

    with pinned_threads(threads):
        progress.begin("SDPA with a mask")
        sdpa = _sdpa_seconds(tensors, seconds)
        progress.advance()
        done, interrupted = collect(chosen, run, progress, lambda point: point.name)
    return {
        "schema": 1,
        "mode": "density",
        "command": command,
        "environment": environment(),
        "threads": threads,
        "dtype": dtype,
        "shape": [1, HEADS, length, HEAD_DIM],
        "interrupted": interrupted,
        "sdpa_seconds": sdpa,
        "points": done,
    }


def run_point(point: Point, tensors: tuple[Tensor, ...], *, seconds: float) -> dict[str, Any]:
    """One family at one density.

    Each direction has "seconds", "dense_seconds" (the full call, turn by turn with it) and "overhead": its time over
    the dense time times the density.
    """
    import torch

    import heedful

    q, k, v, grad_out = tensors
    length = q.shape[2]
    pattern = FAMILIES[point.family](length, point.aim)
    density = pattern.density(length, length)
    found: dict[str, Any] = asdict(point) | {"name": point.name, "pattern": repr(pattern), "density": density}
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]

    def call(pattern: Pattern | None) -> Tensor:
        return heedful.attention(*inputs, pattern=pattern)

    out = call(pattern)
    gradients = torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
    with torch.no_grad():
        found["backends"] = {"forward": heedful.explain(q, k, v, pattern=pattern).backend}
        checks = check_forward(f"{point.name}, forward", q, k, v, call(pattern), pattern=pattern)
        checks += check_backward(f"{point.name}, backward", q, k, v, grad_out, gradients, pattern=pattern)
    found["backends"]["backward"] = heedful.explain(*inputs, pattern=pattern).backend
    found |= {"checks": [check.to_json() for check in checks], "directions": None}
    if not all_passed(checks):
        return found

    def forward(pattern: Pattern | None) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return call(pattern)

        return run

    def backward(out: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

    sides = {"forward": (forward(None), forward(pattern)), "backward": (backward(call(None)), backward(out))}
    directions = {}
    for name, (dense, sparse) in sides.items():
        timing = interleave(dense, sparse, seconds=seconds)
        directions[name] = {
            "seconds": timing.candidate_seconds,
            "dense_seconds": timing.baseline_seconds,
            "ratio": timing.ratio,
            "overhead": 1 / (timing.ratio * density) if density else None,
        }
    return found | {"directions": directions}


def _draw(length: int, dtype: str) -> tuple[Tensor, ...]:
    """Query, key, value and the output's gradient, each (1, HEADS, length, HEAD_DIM)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, length, HEAD_DIM)
    return tuple(torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(4))


def _sdpa_seconds(tensors: tuple[Tensor, ...], seconds: float) -> dict[str, float]:
    """What SDPA takes with a bool mask, which it does not skip anything by."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    q, k, v = inputs = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    mask = _window(q.shape[2], 0.1).dense(q.shape[2], q.shape[2])
    out = sdpa(q, k, v, attn_mask=mask)

    def forward() -> object:
        with torch.no_grad():
            return sdpa(q, k, v, attn_mask=mask)

    def backward() -> object:
        return torch.autograd.grad(out, inputs, tensors[3], retain_graph=True)

    timing = interleave(forward, backward, seconds=seconds)
    return {"forward": timing.baseline_seconds, "backward": timing.candidate_seconds}
