"""The bench table as a picture."""

from __future__ import annotations

import io
from typing import Any

from .table import machine_line, ratio


def ratio_plot(result: dict[str, Any]) -> bytes:
    """A PNG of horizontal bars, one per measured row, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = [row for row in result["rows"] if row["comparison"]]
    figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.32 * len(rows)), layout="constrained")
    ratios = [row["comparison"]["ratio"] for row in rows]
    below = [value - row["comparison"]["ratio_low"] for value, row in zip(ratios, rows, strict=True)]
    above = [row["comparison"]["ratio_high"] - value for value, row in zip(ratios, rows, strict=True)]
    colours = ["#2f6f4f" if value >= 1 else "#a5562c" for value in ratios]
    places = range(len(rows))
    axes.barh(places, [value - 1 for value in ratios], left=1, color=colours, height=0.66)
    axes.errorbar(ratios, places, xerr=[below, above], fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
    for place, value, row in zip(places, ratios, rows, strict=True):
        outside = max(value, 1.0, row["comparison"]["ratio_high"])
        axes.annotate(ratio(value), (outside, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *(0.8 * value for value in ratios)) if ratios else 0.5, 2 * max([2.0, *ratios]))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(places, [_label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="#222222", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("speed-up: median of interleaved ratios, whiskers are quartiles (logarithmic)")
    figure.suptitle(machine_line(result["environment"]), fontsize=7, x=0.01, ha="left", color="#555555")
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=150)
    pyplot.close(figure)
    return target.getvalue()


def _label(row: dict[str, Any]) -> str:
    return row["title"] if row["baseline"] == "sdpa" else f"{row['title']}\nagainst {row['baseline']}"
