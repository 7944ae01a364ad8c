"""Bar charts as inline SVG that follow the page's colours, light or dark."""

from __future__ import annotations

import math
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


def bar_chart(title: str, bars: Sequence[Bar], *, logarithmic: bool = False, label_width: int = LABEL_WIDTH) -> str:
    """An SVG figure of horizontal bars; its title and values are text, readable by a reader.

    Bars start at zero, or at 1 to the right and to the left of it where they are logarithmic.
    """
    span = (
        math.log(max([bar.value for bar in bars] + [1.01]))
        if logarithmic
        else max([bar.value for bar in bars] + [1e-12])
    )
    below = -math.log(min([bar.value for bar in bars] + [1.0])) if logarithmic else 0.0
    room = WIDTH - label_width - VALUE_WIDTH / (2 if label_width > LABEL_WIDTH else 1)
    unit = room / (span + below)
    height = TOP + len(bars) * (BAR + GAP)
    spoken = "; ".join(f"{bar.label} {bar.text}" for bar in bars)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}: {escape(spoken)}">',
        f'<text class="chart-title" x="0" y="16">{escape(title)}</text>',
    ]
    for index, bar in enumerate(bars):
        top = TOP + index * (BAR + GAP)
        middle = top + BAR / 2
        length = unit * (math.log(bar.value) if logarithmic else bar.value)
        width = max(abs(length), 1.0)
        start = label_width + unit * below + min(length, 0.0)
        kind = "bar ours" if bar.emphasised else "bar"
        parts += [
            f'<text class="label" x="{label_width - 10}" y="{middle}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect class="{kind}" x="{start:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" rx="3"/>',
            f'<text class="value" x="{start + width + 8:.1f}" y="{middle}">{escape(bar.text)}</text>',
        ]
    return "\n".join([*parts, "</svg>"])
