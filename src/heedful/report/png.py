"""Figures as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from .figure import LIGHT, Axis, Figure, Series

COLUMNS = 2
LEGEND_COLUMNS = 4


def picture(figures: Sequence[Figure], title: str, footer: str) -> bytes:
    """A PNG of all figures, two in a row, under a title; footer says where and when."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(COLUMNS, len(figures)) or 1
    rows = -(-len(figures) // columns) or 1
    sheet, grid = pyplot.subplots(rows, columns, figsize=(7.2 * columns, 4.6 * rows + 0.7), squeeze=False)
    for axes in grid.flat[len(figures) :]:
        axes.set_axis_off()
    for axes, figure in zip(grid.flat, figures, strict=False):
        _draw(axes, figure)
    sheet.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    sheet.text(0.01, 0.004, footer, fontsize=7, color="#555555")
    sheet.tight_layout(rect=(0, 0.015, 1, 0.99))
    target = io.BytesIO()
    sheet.savefig(target, format="png", dpi=130)
    pyplot.close(sheet)
    return target.getvalue()


def _draw(axes: Any, figure: Figure) -> None:
    (left, right), (low, high) = figure.limits()
    for series in figure.series:
        _draw_series(axes, series)
    named = [series for series in figure.series if series.name]
    lines = -(-len(named) // LEGEND_COLUMNS)
    axes.set_title(figure.title, loc="left", fontsize=10, pad=6 + 13 * lines)
    for axis, described, ends in ((axes.xaxis, figure.x, (left, right)), (axes.yaxis, figure.y, (low, high))):
        _draw_axis(axis, described, ends)
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.grid(color="#e3e6e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if named:
        # Above the axes, where it hides nothing.
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.99), "borderaxespad": 0.2}
        axes.legend(fontsize=7, frameon=False, ncols=LEGEND_COLUMNS, columnspacing=1.2, handlelength=1.6, **place)


def _draw_series(axes: Any, series: Series) -> None:
    colour = "#555555" if series.colour is None else LIGHT[series.colour % len(LIGHT)]
    name = series.name or None
    if series.style == "bars":
        widths = [after - before for before, after in zip(series.x[:-1], series.x[1:], strict=True)]
        axes.bar(series.x[:-1], series.y, width=widths, align="edge", color=colour, edgecolor="white", label=name)
    elif series.style == "points":
        axes.scatter(series.x, series.y, s=16, color=colour, alpha=0.85, linewidths=0, label=name)
    elif series.style == "rule":
        axes.plot(series.x, series.y, color=colour, linestyle="--", linewidth=1.2, label=name)
    else:
        marker = "o" if len(series.x) <= 40 else ""
        axes.plot(series.x, series.y, color=colour, linewidth=1.5, marker=marker, markersize=3.5, label=name)


def _draw_axis(axis: Any, described: Axis, ends: tuple[float, float]) -> None:
    from matplotlib.ticker import NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log" if described.log else "linear"})
    places = described.places(*ends)
    axis.set_ticks(places, [described.text(place) for place in places], fontsize=8)
    axis.set_minor_locator(NullLocator())
    axis.set_label_text(described.label, fontsize=8)
