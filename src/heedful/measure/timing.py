"""Two sides timed in one process, turn by turn, on pinned threads."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .machine import affinity

# A sample shorter than this is dominated by the clock and by the first misses after the other side's turn.
SAMPLE_SECONDS = 2e-3
# A call that takes longer is warm after one, and its second costs more than it tells.
WARM_SECONDS = 0.3

# Seconds per call of so many calls.
Sample = Callable[[Callable[[], object], int], float]


@dataclass(frozen=True)
class Comparison:
    """Interleaved timings of a baseline and a candidate.

    ratio is the median of the rounds' own ratios baseline ÷ candidate (above 1: the candidate is faster), with its
    quartiles; seconds are medians per call.
    """

    baseline_seconds: float
    candidate_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """A plain dict of the fields."""
        return asdict(self)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; the one value three times if there is only one."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def compare_samples(baseline: list[float], candidate: list[float]) -> Comparison:
    """The statistics of two equally long lists of seconds whose i-th elements were taken in the same round."""
    if len(baseline) != len(candidate) or not baseline:
        raise ValueError(
            f"baseline and candidate need the same number of samples, got {len(baseline)}, {len(candidate)}"
        )
    low, median, high = quartiles([a / b for a, b in zip(baseline, candidate, strict=True)])
    return Comparison(statistics.median(baseline), statistics.median(candidate), median, low, high, len(baseline))


def interleave(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    *,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 200,
) -> Comparison:
    """Time two calls turn by turn for about `seconds`, after a warm-up of each.

    The side that goes first changes every round, so that neither profits from always following the other.

    Args:
        baseline: the call that is compared with; returns anything.
        candidate: the call under test.
        seconds: time for the rounds; at least min_rounds are run however long they take.
        min_rounds: rounds to run in any case.
        max_rounds: rounds after which to stop even if time is left.
    """
    sides = (baseline, candidate)
    samples = take_turns(sides, seconds=seconds, min_rounds=min_rounds, max_rounds=max_rounds)
    return compare_samples(*samples)


def take_turns(
    sides: Sequence[Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 200,
    sample: Sample | None = None,
    sample_seconds: float = SAMPLE_SECONDS,
) -> list[list[float]]:
    """Seconds per call of each side, one sample a round, for about `seconds` after a warm-up of each.

    The side that goes first changes every round. The i-th samples of all sides were taken in the same round. `sample`
    is by whose clock, the host's if None; so much of each is in one sample.
    """
    sample = sample or sample_on_host
    repeats = [_repeats(side, sample, sample_seconds) for side in sides]
    samples: list[list[float]] = [[] for _ in sides]
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < max_rounds and (rounds < min_rounds or time.perf_counter() < deadline):
        for turn in range(len(sides)):
            index = (rounds + turn) % len(sides)
            samples[index].append(sample(sides[index], repeats[index]))
        rounds += 1
    return samples


def _repeats(call: Callable[[], object], sample: Sample, sample_seconds: float) -> int:
    """Warm a call up and say how many of it fill one sample."""
    once = sample(call, 1)
    if once > WARM_SECONDS:
        return 1
    once = min(once, sample(call, 1))
    if once > sample_seconds:
        return 1
    once = min(once, sample(call, 10))
    return max(1, round(sample_seconds / max(once, 1e-9)))


def sample_on_host(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call of so many calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def rotation(call: Callable[..., object], inputs: list[tuple[Any, ...]]) -> Callable[[], object]:
    """A call without arguments that takes the next of the inputs each time."""
    position = -1

    def take_next() -> object:
        nonlocal position
        position = (position + 1) % len(inputs)
        return call(*inputs[position])

    return take_next


@contextmanager
def pinned_threads(threads: int) -> Iterator[list[int] | None]:
    """Let torch use `threads` threads and keep the whole process on as many CPUs; restores both.

    Yields the CPUs, or None where the system cannot pin. The last CPUs of the allowed set are taken, because
    interrupts usually land on the first.

    Raises:
        ValueError: threads is below 1 or above the number of CPUs that the process may use.
    """
    import torch

    allowed = affinity()
    available = len(allowed) if allowed is not None else os.cpu_count() or 1
    if not 1 <= threads <= available:
        raise ValueError(f"threads must be between 1 and the {available} CPUs of this process, got {threads}")
    before = torch.get_num_threads()
    chosen = None if allowed is None else allowed[-threads:]
    torch.set_num_threads(threads)
    _pin(chosen)
    try:
        yield chosen
    finally:
        torch.set_num_threads(before)
        _pin(allowed)


def _pin(cpus: list[int] | None) -> None:
    """Set the affinity of every thread of the process: a running pool does not inherit the caller's."""
    if cpus is None:
        return
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cpus)
        except ProcessLookupError:  # the thread ended since the folder was listed
            continue
