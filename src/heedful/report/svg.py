"""A figure as inline SVG that follows the page's colours, light or dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from html import escape

from .figure import Axis, Figure, Series

WIDTH, PLOT_HEIGHT, LEFT, RIGHT, BELOW = 640, 300, 62, 14, 48
LEGEND_LINE, CHARACTER = 20, 7.2


def chart(figure: Figure) -> str:
    """The figure; its title, ticks and names are text, and every labelled point says on hovering what it is."""
    legend, lines = _legend(figure)
    top = 30 + lines * LEGEND_LINE + 8
    height = top + PLOT_HEIGHT + BELOW
    (left, right), (low, high) = figure.limits()
    x = _scale(figure.x, left, right, LEFT, WIDTH - RIGHT)
    y = _scale(figure.y, low, high, top + PLOT_HEIGHT, top)
    summary = f"{figure.title}: {figure.y.label} over {figure.x.label}"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(summary)}">',
        f'<text class="chart-title" x="0" y="16">{escape(figure.title)}</text>',
        *legend,
    ]
    for tick in figure.x.places(left, right):
        parts.append(_line("grid", x(tick), top, x(tick), top + PLOT_HEIGHT))
        text = escape(figure.x.text(tick))
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{top + PLOT_HEIGHT + 14}" text-anchor="middle">{text}</text>'
        )
    for tick in figure.y.places(low, high):
        parts.append(_line("grid", LEFT, y(tick), WIDTH - RIGHT, y(tick)))
        text = escape(figure.y.text(tick))
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y(tick):.1f}" text-anchor="end">{text}</text>')
    for series in figure.series:
        parts += _draw(series, x, y, y(max(low, 0.0)), (LEFT, WIDTH - RIGHT, top, top + PLOT_HEIGHT))
    middle = top + PLOT_HEIGHT / 2
    parts += [
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 12}" text-anchor="middle">'
        f"{escape(figure.x.label)}</text>",
        f'<text class="tick" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{escape(figure.y.label)}</text>",
        "</svg>",
    ]
    return "\n".join(parts)


def _scale(axis: Axis, low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    if axis.log:
        span = math.log(high / low)
        return lambda value: first + (last - first) * math.log(value / low) / span
    return lambda value: first + (last - first) * (value - low) / (high - low)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _class(series: Series) -> str:
    return "neutral" if series.colour is None else f"s{series.colour % 8}"


def _legend(figure: Figure) -> tuple[list[str], int]:
    """Swatches with names, wrapped to the width, and how many lines they take."""
    parts: list[str] = []
    place, line = 0.0, 0
    named = [series for series in figure.series if series.name]
    for series in named:
        width = 26 + CHARACTER * len(series.name) + 12
        if place and place + width > WIDTH:
            place, line = 0.0, line + 1
        y = 38 + line * LEGEND_LINE
        if series.style == "rule":
            parts.append(f'<line class="rule {_class(series)}" x1="{place}" y1="{y}" x2="{place + 18}" y2="{y}"/>')
        else:
            parts.append(f'<circle class="dot {_class(series)}" cx="{place + 9}" cy="{y}" r="5"/>')
        parts.append(f'<text class="tick" x="{place + 24}" y="{y}">{escape(series.name)}</text>')
        place += width
    return parts, line + 1 if named else 0


def _draw(
    series: Series,
    x: Callable[[float], float],
    y: Callable[[float], float],
    ground: float,
    box: tuple[float, float, float, float],
) -> Iterator[str]:
    kind = _class(series)
    if series.style == "bars":
        for index, value in enumerate(series.y):
            start, end, top = x(series.x[index]), x(series.x[index + 1]), y(value)
            size = f'width="{max(end - start - 1, 1):.1f}" height="{max(ground - top, 0):.1f}"'
            yield f'<rect class="dot {kind}" x="{start + 0.5:.1f}" y="{top:.1f}" {size}/>'
        return
    places = [(x(a), y(b)) for a, b in zip(series.x, series.y, strict=True)]
    if series.style in ("line", "rule") and places:
        points = " ".join(f"{_within(a, *box[:2]):.1f},{_within(b, *box[2:]):.1f}" for a, b in places)
        yield f'<polyline class="{series.style} {kind}" points="{points}"/>'
    # Marks on a curve of hundreds of points would hide it.
    if series.style == "points" or (series.style == "line" and len(places) <= 40):
        labels = series.labels or [""] * len(places)
        for (a, b), label in zip(places, labels, strict=True):
            title = f"<title>{escape(label)}</title>" if label else ""
            radius = 3.6 if series.style == "points" else 3
            yield f'<circle class="dot {kind}" cx="{a:.1f}" cy="{b:.1f}" r="{radius}">{title}</circle>'


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
