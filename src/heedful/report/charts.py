"""Bar charts as inline SVG that follow the page's colours, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, LABEL_WIDTH, VALUE_WIDTH, BAR, GAP, TOP = 640, 110, 120, 22, 12, 34


class Bar(NamedTuple):
    """One bar: its label, its length in the chart's unit, what stands behind it, and whether it is the one to see."""

    label: str
    value: float
    text: str
    emphasised: bool


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """An SVG figure of horizontal bars that start at zero; its title and values are text, readable by a reader."""
    longest = max([bar.value for bar in bars] + [1e-12])
    room = WIDTH - LABEL_WIDTH - VALUE_WIDTH
    height = TOP + len(bars) * (BAR + GAP)
    spoken = "; ".join(f"{bar.label} {bar.text}" for bar in bars)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}: {escape(spoken)}">',
        f'<text class="chart-title" x="0" y="16">{escape(title)}</text>',
    ]
    for index, bar in enumerate(bars):
        top = TOP + index * (BAR + GAP)
        middle = top + BAR / 2
        length = max(1.0, room * bar.value / longest)
        kind = "bar ours" if bar.emphasised else "bar"
        parts += [
            f'<text class="label" x="{LABEL_WIDTH - 10}" y="{middle}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect class="{kind}" x="{LABEL_WIDTH}" y="{top}" width="{length:.1f}" height="{BAR}" rx="3"/>',
            f'<text class="value" x="{LABEL_WIDTH + length + 8:.1f}" y="{middle}">{escape(bar.text)}</text>',
        ]
    return "\n".join([*parts, "</svg>"])
