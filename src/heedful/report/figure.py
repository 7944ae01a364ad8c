"""A chart as data, drawn by `png` for files and by `svg` for pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

# Series by number, on white and on black; told apart by people who do not see red and green, too.
LIGHT = ("#1f7a5c", "#c2571a", "#3465a4", "#8a4fa3", "#9a7d0a", "#1d8fa5", "#b0446b", "#6b7471")
DARK = ("#4fc79d", "#f0945a", "#7fa8e0", "#c58fdd", "#d8bd4a", "#5ec6da", "#e885ab", "#9aa5a1")


@dataclass(frozen=True)
class Series:
    """Points of one name.

    style: "line" joins them and marks each; "points" marks them only; "rule" is a dashed line to compare with;
    "bars" are the bars of a histogram, of which x holds one edge more than y holds heights. No colour is neutral.
    labels: what each point says about itself on a page.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Literal["line", "points", "rule", "bars"] = "line"
    colour: int | None = None
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """One axis; unit stands behind each tick. ticks are chosen to fit where none are given."""

    label: str
    log: bool = False
    unit: str = ""
    ticks: Sequence[float] = ()
    low: float | None = None
    high: float | None = None

    def limits(self, values: Sequence[float]) -> tuple[float, float]:
        """From where to where the axis goes for these values, with some room."""
        found = [value for value in values if math.isfinite(value) and (value > 0 or not self.log)] or [1.0]
        low, high = min(found), max(found)
        if self.log:
            room = max((high / low) ** 0.05, 1.1)
            low, high = low / room, high * room
        else:
            room = 0.05 * (high - low) or 0.5
            low, high = min(low - room, max(low, 0.0)) if low >= 0 else low - room, high + room
        return (low if self.low is None else self.low), (high if self.high is None else self.high)

    def places(self, low: float, high: float) -> list[float]:
        """Where the ticks are between two ends."""
        if self.ticks:
            return [tick for tick in self.ticks if low <= tick <= high]
        return list(_log_ticks(low, high) if self.log else _linear_ticks(low, high))

    def text(self, value: float) -> str:
        """A tick as people read it."""
        return f"{number(value)}{self.unit}"


@dataclass(frozen=True)
class Figure:
    """A chart: its title, its axes and what is drawn in it."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]

    def limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The ends of the two axes, from everything that is drawn. Bars begin at 0."""
        xs = [value for series in self.series for value in series.x]
        ys = [value for series in self.series for value in series.y]
        if any(series.style == "bars" for series in self.series):
            ys.append(0.0)
        return self.x.limits(xs), self.y.limits(ys)


def number(value: float) -> str:
    """A number in few characters: 4096, 16k, 1e+09, 0.05."""
    if value and abs(value) >= 1024 and value % 1024 == 0 and abs(value) < 1 << 20:
        return f"{value / 1024:g}k"
    return f"{value:.3g}" if abs(value) < 1000 or abs(value) >= 1e5 else f"{value:g}"


def _log_ticks(low: float, high: float) -> Iterator[float]:
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2.5 else (1,)
    stride = max(1, round(decades / 6))
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        if exponent % stride == 0:
            yield from (tick for step in steps if low <= (tick := step * 10.0**exponent) <= high)


def _linear_ticks(low: float, high: float) -> Iterator[float]:
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    for index in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield index * step
