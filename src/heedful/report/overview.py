"""The bench table for people: the table, and bars of how near each row comes to the machine's ceiling."""

from __future__ import annotations

from typing import Any

from heedful.measure.checks import Check

from .charts import Bar, bar_chart
from .document import Document, Grid
from .table import HEADINGS, NUMERIC, cells, peaks_line, ratio


def document(result: dict[str, Any]) -> Document:
    """The whole table."""
    rows = result["rows"]
    summary = [peaks_line(result["peaks"])]
    reached = [row["targets"]["first"]["reached"] for row in rows if row["targets"]["first"]]
    summary.append(f"{sum(r is True for r in reached)} of {len(reached)} rows with a first target reach it.")
    if result["interrupted"]:
        summary.append("Stopped by Ctrl-C.")
    timed = [row for row in rows if row["comparison"]]
    speed = [
        Bar(_name(row), row["comparison"]["ratio"], ratio(row["comparison"]["ratio"]), row["comparison"]["ratio"] >= 1)
        for row in timed
    ]
    share = [Bar(_name(row), row["peak_share"], f"{row['peak_share']:.0%}", True) for row in timed if row["peak_share"]]
    checks = [check for row in rows for check in row["checks"]]
    failures = [f"{c['name']}: {c['measured']} against {c['limit']:.3g}" for c in checks if not c["passed"]]
    worst = [float(check["measured"]) / float(check["limit"]) for check in checks if check["limit"]]
    rule = "largest error of all rows as a share of its bound, which follows from rounding"
    summed = Check(f"numerical checks, worst of {len(checks)}", max(worst, default=0.0), 1.0, rule)
    words = frozenset(range(len(HEADINGS))) - frozenset(NUMERIC)
    return Document(
        "heedful bench",
        "Each speed-up is the median of ratios of calls timed turn by turn in one process, behind a numerical check.",
        summary,
        [],
        [Grid("Workloads", HEADINGS, [cells(row) for row in rows], words)],
        [summed.to_json()] if checks else [],
        failures,
        [
            bar_chart("Speed-up over the other side, logarithmic", speed, logarithmic=True, label_width=330),
            bar_chart("Share of this machine's measured ceiling", share, label_width=330),
        ],
    )


def _name(row: dict[str, Any]) -> str:
    return str(row["title"] if row["baseline"] == "sdpa" else f"{row['title']} vs {row['baseline']}")
