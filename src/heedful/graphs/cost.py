"""What launching costs a model, measured: eager calls against replays of their graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from heedful.graphs.captured import Captured
from heedful.measure.timing import compare_samples, quartiles


class Cost(NamedTuple):
    """Seconds per call, medians of rounds in which both sides took turns.

    eager_seconds: the model as it is, calls one after the other. graph_seconds: the captured one, its copies of inputs
    and outputs included. launch_seconds: what the graph saves, 0 or more. share: launch_seconds / eager_seconds.
    speedup: the median of the rounds' ratios, with its quartiles speedup_low and speedup_high. eager_samples and
    graph_samples: all of them.
    """

    eager_seconds: float
    graph_seconds: float
    launch_seconds: float
    share: float
    speedup: float
    speedup_low: float
    speedup_high: float
    eager_samples: list[float]
    graph_samples: list[float]


def compare(captured: Captured, *args: Any, rounds: int = 20, calls: int = 10, **kwargs: Any) -> Cost:
    """Times a captured model against the model itself on the same inputs, after checking that both give the same.

    Args:
        captured: as `heedful.graphs.capture` made it.
        args, kwargs: inputs of a form that it has, or that is captured now.
        rounds: samples of each side, 2 or more.
        calls: calls in a sample, behind which the device is waited for.

    Raises:
        AssertionError: the results differ by more than rounding, as those of a model that draws random numbers do;
            nothing is timed then.
    """
    captured.prepare(*args, **kwargs)
    assert captured.device is not None
    with torch.no_grad():
        _check_same(captured(*args, **kwargs), captured.model(*args, **kwargs))
        sides = (captured.model, captured)
        samples: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds + 1):
            for side in (0, 1) if turn % 2 else (1, 0):
                seconds = _sample(captured, lambda side=side: sides[side](*args, **kwargs), calls)  # type: ignore[misc]
                # The first round warms up.
                if turn:
                    samples[side].append(seconds)
    found = compare_samples(*samples)
    launch = max(0.0, found.baseline_seconds - found.candidate_seconds)
    return Cost(
        found.baseline_seconds,
        found.candidate_seconds,
        launch,
        launch / found.baseline_seconds,
        found.ratio,
        found.ratio_low,
        found.ratio_high,
        *samples,
    )


def _check_same(found: Any, wanted: Any) -> None:
    """Raises unless the tensors are alike up to a few roundings of their type, as shares of their norms."""
    for mine, theirs in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        if not isinstance(theirs, torch.Tensor):
            continue
        if not theirs.is_floating_point():
            assert torch.equal(mine, theirs), "the graph gives other numbers than the model"
            continue
        off = (mine.double() - theirs.double()).nan_to_num().norm()
        bound = max(4 * torch.finfo(theirs.dtype).eps, 1e-5) * theirs.double().nan_to_num().norm()
        assert mine.isfinite().equal(theirs.isfinite()), "the graph gives NaN or infinity elsewhere than the model"
        assert off <= bound, f"the graph is off by {off:.2e}, of which {bound:.2e} is rounding"


def _sample(captured: Captured, call: Callable[[], object], calls: int) -> float:
    captured.synchronize()
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    captured.synchronize()
    return (time.perf_counter() - begun) / calls


def spread(samples: list[float]) -> dict[str, float]:
    """Mean, least, largest and standard deviation of samples, and their quartiles."""
    low, median, high = quartiles(samples)
    return {
        "mean_time": statistics.fmean(samples),
        "min_time": min(samples),
        "max_time": max(samples),
        "std_time": statistics.stdev(samples) if len(samples) > 1 else 0.0,
        "median_time": median,
        "quartile_low": low,
        "quartile_high": high,
    }
