"""The bench table as rows of text, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

HEADINGS = (
    "workload",
    "against",
    "its time",
    "heedful",
    "speed-up (quartiles)",
    "of peak",
    "2 threads",
    "first",
    "goal",
    "ran on",
)
NUMERIC = range(2, 9)
# Without these the table still says how fast and how far from the targets, in 80 columns.
WIDE_ONLY = {2, 3, 6, 9}
WIDE = 180


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table from a row's JSON, one text per heading."""
    timing = row["comparison"]
    against = "PyTorch SDPA" if row["baseline"] == "sdpa" else row["baseline"]
    targets = [_target(row["targets"][label]) for label in ("first", "goal")]
    backend = row["backend"] or "–"
    if timing is None:
        return [row["title"], against, "–", "–", row["note"] or "–", "–", "–", *targets, backend]
    share = row["peak_share"]
    return [
        row["title"],
        against,
        _time(timing["baseline_seconds"], row["baseline_rate"], row["rate_unit"]),
        _time(timing["candidate_seconds"], row["rate"], row["rate_unit"]),
        f"{ratio(timing['ratio'])} ({ratio(timing['ratio_low'])}–{ratio(timing['ratio_high'])})",
        "–" if share is None else f"{share:.0%}",
        _more(row["more_threads"]),
        *targets,
        backend,
    ]


def ratio(value: float) -> str:
    """A speed-up with as many digits as it deserves."""
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.2f} µs"
    if seconds < 10:
        return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
    return f"{seconds:.1f} s"


def _time(seconds: float, rate: float | None, unit: str) -> str:
    return duration(seconds) if not unit or rate is None else f"{duration(seconds)}, {rate / 1e9:.3g} {unit}"


def _more(more: dict[str, Any] | None) -> str:
    """The row again on more threads: speed-up over the other side there, share of the ceiling, and over one thread."""
    if more is None or more["comparison"] is None:
        return "–"
    share = "" if more["peak_share"] is None else f", {more['peak_share']:.0%}"
    return f"{ratio(more['comparison']['ratio'])}{share}, {more['scaling']:.2f} of one"


def _target(target: dict[str, Any] | None) -> str:
    if target is None:
        return "–"
    verdict = {True: " ✓", False: " ✗", None: ""}[target["reached"]]
    return f"{target['text']}{verdict}"


def peaks_line(peaks: dict[str, Any] | None) -> str:
    """The measured ceilings in one line."""
    if peaks is None:
        return "Peaks: not measured, the engine is not available."
    flops = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in peaks["flops"].items())
    read = ", ".join(f"{rate / 1e9:.1f} GB/s on {count}" for count, rate in peaks["read_bandwidth"].items())
    return f"Measured peaks: multiply-add on one core {flops}; memory read, by threads: {read}."


def machine_line(environment: dict[str, Any]) -> str:
    """Machine, date and versions in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return f"{environment['cpu']} ({environment['threads']['cpus']} CPUs), {environment['date']}, {versions}"


def terminal_table(rows: Sequence[dict[str, Any]], width: int) -> Table:
    """A rich table for a terminal so wide; speed-ups that keep their first target are green, failed checks red."""
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    shown = [index for index in range(len(HEADINGS)) if width >= WIDE or index not in WIDE_ONLY]
    for index, heading in ((index, HEADINGS[index]) for index in shown):
        table.add_column(heading, justify="right" if index in NUMERIC else "left", overflow="fold")
    for row in rows:
        texts = [escape(text) for text in cells(row)]
        first = row["targets"]["first"]
        if any(not check["passed"] for check in row["checks"]):
            texts[4] = f"[bold red]{texts[4]}[/]"
        elif first is not None and first["reached"] is not None:
            texts[4] = f"[{'green' if first['reached'] else 'yellow'}]{texts[4]}[/]"
        table.add_row(*(texts[index] for index in shown))
    return table
