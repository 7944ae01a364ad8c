"""Calls on a GPU for people: each beside its peers, its share of the device's own peak, and what was aimed at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heedful.measure.checks import Check
from heedful.measure.gpu_cases import BEST, COPY, FLEX_MASK, FLEX_MASK_COMPILED

from .document import Document, Grid
from .figure import Axis, Figure, Series
from .table import duration, ratio

HEADINGS = ("call", "heedful", "of peak", "peers (ratio)", "first aim", "goal", "reached")
PATTERN_HEADINGS = ("pattern", "time", "density", "to full", "rate")
WORDS = frozenset({0, 3, 4, 5, 6})
SHORT = {
    BEST: "the best",
    COPY: "a copy's bandwidth",
    FLEX_MASK: "FlexAttention with its mask",
    FLEX_MASK_COMPILED: "FlexAttention with its mask, compiled",
}


def document(result: dict[str, Any]) -> Document:
    """The whole table; of several runs, with a column that says of which each row is."""
    rows = result["rows"]
    runs = result.get("runs") or [{key: result[key] for key in ("command", "environment", "device")}]
    timed = [row for row in rows if row["seconds"] is not None]
    summary = [_run_line(number, run, len(runs) > 1) for number, run in enumerate(runs, 1)]
    if result["interrupted"]:
        summary.append("Stopped by Ctrl-C.")
    summary += [_front_line(row) for row in timed if row["section"] == "front door"]
    goals = [goal for row in timed for goal in row["goals"] if goal["reached"] is not None]
    if goals:
        first = sum(goal["reached"] != "no" for goal in goals)
        full = sum(goal["reached"] == "goal" for goal in goals)
        summary.append(f"Of {len(goals)} aims {first} are reached, {full} with their goal.")
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for peer in row.get("errors", {}).items():
            missing.setdefault(peer, []).append(row["name"])
    summary += [
        f"Not beside it in {names[0] if len(names) == 1 else f'{len(names)} calls'}: {who} ({why})."
        for (who, why), names in missing.items()
    ]
    failures = [
        f"numerical check failed: {check['name']}" for row in rows for check in row["checks"] if not check["passed"]
    ]
    several = len(runs) > 1
    beside = [_cells(row, runs) + _run_of(row, several) for row in timed if row["section"] != "patterns"]
    grids = [Grid("Calls beside their peers", HEADINGS + (("run",) if several else ()), beside, WORDS)]
    patterns = _pattern_cells([row for row in timed if row["section"] == "patterns"], several)
    if patterns:
        grids.append(Grid("Patterns beside full attention", PATTERN_HEADINGS + (("run",) if several else ()), patterns))
    return Document(
        "Attention on a GPU",
        "heedful's Triton kernels beside PyTorch's and others in the same process, turn by turn, behind a check "
        "against float64. A rate counts 4·D operations for each attended pair, the backward 2.5 times that.",
        summary,
        _figures(timed),
        grids,
        _checks(rows),
        failures,
    )


def _run_line(number: int, run: dict[str, Any], several: bool) -> str:
    device, versions = run["device"], run["environment"]["versions"]
    return (
        f"{f'Run {number}: ' if several else ''}{device['name']}, {run['environment']['date'][:10]}, torch "
        f"{versions['torch']}, triton {device['triton']}; its own peaks in that run: matrix product of bfloat16 "
        f"{device['product'] / 1e12:.0f} TFLOP/s, copy {device['copy'] / 1e12:.2f} TB/s."
    )


def _front_line(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in row["seconds"].items())
    text = f"Until a tiny call returns: {times}."
    if row["launch"] is not None:
        text += f" Of heedful's the driver's launch is {duration(row['launch'])}, before it {duration(row['front'])}."
    if row["replay"] is not None:
        text += f" In a CUDA graph {duration(row['replay'])} a call, none of it heedful's."
    if "new_length" in row:
        times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in row["new_length"].items())
        text += f" Until the result is there of a length of some 2,000 that was not seen before: {times}."
    return text


def _cells(row: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[str]:
    goals = row["goals"]
    verdicts = ", ".join(_verdict(goal, len(goals) > 1) for goal in goals)
    if row["section"] == "front door":
        aims = [duration(goals[0][label]) for label in ("first", "goal")]
        before = "–" if row["front"] is None else duration(row["front"])
        return ["before the launch of a tiny call", before, "–", "–", *aims, verdicts]
    device = runs[row.get("run", 1) - 1]["device"]
    peak = device["copy"] if row["unit"] == "TB/s" else device["product"]
    rate = row["rates"]["heedful"]
    peers = ", ".join(
        f"{name} {row['rates'][name] / 1e12:.3g} ({ratio(timing['ratio'])})" for name, timing in row["ratios"].items()
    )
    aims = [", ".join(_aim(goal, label) for goal in goals) or "–" for label in ("first", "goal")]
    return [row["name"], f"{rate / 1e12:.3g} {row['unit']}", f"{rate / peak:.0%}", peers, *aims, verdicts or "–"]


def _aim(goal: dict[str, Any], label: str) -> str:
    if goal["against"] == COPY:
        return f"{goal[label]:.0%} of {SHORT[COPY]}"
    return f"{goal[label]:g}× {SHORT.get(goal['against'], goal['against'])}"


def _verdict(goal: dict[str, Any], named: bool) -> str:
    text = {"goal": "goal", "first": "first aim", "no": "no", None: "not measured"}[goal["reached"]]
    return f"{text} ({SHORT.get(goal['against'], goal['against'])})" if named else text


def _pattern_cells(rows: Sequence[dict[str, Any]], several: bool) -> list[list[str]]:
    full = next((row["seconds"]["heedful"] for row in rows if row["name"] == "pattern full"), None)
    return [
        [
            row["name"].removeprefix("pattern "),
            duration(row["seconds"]["heedful"]),
            f"{row['density']:.2%}",
            "–" if full is None else ratio(full / row["seconds"]["heedful"]),
            f"{row['rates']['heedful'] / 1e12:.3g} {row['unit']}",
            *_run_of(row, several),
        ]
        for row in rows
    ]


def _run_of(row: dict[str, Any], several: bool) -> list[str]:
    return [str(row.get("run", 1))] if several else []


def _figures(timed: Sequence[dict[str, Any]]) -> list[Figure]:
    """Rates over lengths, a figure for each kind of call that has several."""
    kinds: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for row in timed:
        name, _, length = row["name"].rpartition(" ")
        if row["section"] in ("forward", "backward", "window"):
            kinds.setdefault(name, []).append((int(length), row))
    figures = []
    for name, points in kinds.items():
        points.sort(key=lambda point: point[0])
        who = list(dict.fromkeys(side for _, row in points for side in row["rates"]))
        series = [
            Series(
                side,
                [length for length, row in points if side in row["rates"]],
                [row["rates"][side] / 1e12 for _, row in points if side in row["rates"]],
                colour=index,
            )
            for index, side in enumerate(who)
        ]
        ticks = [length for length, _ in points]
        figures.append(Figure(name, Axis("queries and keys", log=True, ticks=ticks), Axis("TFLOP/s", low=0.0), series))
    return figures


def _checks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst of all, as a share of its limit."""
    checks = [check for row in rows for check in row["checks"]]
    if not checks:
        return []
    worst = max(float(check["measured"]) / float(check["limit"]) for check in checks)
    rule = f"as a share of the limit; {checks[0]['derivation']}"
    return [Check(f"error against float64, worst of {len(checks)} checks", worst, 1.0, rule).to_json()]
