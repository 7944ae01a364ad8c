"""The machine's own ceilings, measured by the engine: multiply-add rate and read bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from .machine import affinity, last_level_cache_bytes
from .timing import pinned_threads

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Peaks:
    """FLOP/s by dtype of one core and bytes/s by thread count."""

    flops: dict[str, float]
    read_bandwidth: dict[int, float]

    def flops_of(self, dtype: str, threads: int) -> float | None:
        """Multiply-add ceiling of so many cores, None where the dtype was not measured."""
        rate = self.flops.get(dtype)
        return None if rate is None else rate * threads

    def to_json(self) -> dict[str, Any]:
        """A plain dict; JSON makes the thread counts text."""
        return asdict(self)


def measure_peaks(threads: tuple[int, ...], seconds: float = 0.3) -> Peaks | None:
    """Measure every ceiling for about `seconds` each; None where the engine is not available."""
    from heedful.backend.native import library

    try:
        library.engine()
    except ImportError:
        return None
    with pinned_threads(1):
        flops = {dtype: library.peak_flops(dtype, seconds) for dtype in DTYPES}
    # Several times the last cache, so that memory is what answers.
    size = max(256 << 20, 4 * last_level_cache_bytes())
    bandwidth = {}
    allowed = affinity()
    for count in sorted(count for count in set(threads) if allowed is None or count <= len(allowed)):
        with pinned_threads(count):
            bandwidth[count] = _together(count, lambda share: library.read_bandwidth(size // share, seconds))
    return Peaks(flops, bandwidth)


def _together(count: int, measure: Callable[[int], float]) -> float:
    """Sum of what `count` threads reach at the same time; the engine's calls release the interpreter lock."""
    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(measure, [count] * count))
