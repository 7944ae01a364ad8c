"""The ladder for people: a table of each component, a chart, and what each level removed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from .charts import Bar, bar_chart
from .document import Document, Grid
from .table import duration, machine_line, peaks_line, ratio

HEADINGS = (
    "", "equal", "forward", "speed-up", "of peak", "backward", "speed-up", "of peak", "memory at the peak",
    "operator calls", "copies", "new memory",
)  # fmt: skip
GENERATION_HEADINGS = ("", "same tokens", "prompt", "a token", "speed-up")
PROFILE_HEADINGS = ("operator or fused loop", "calls", "time", "share")
PROFILED = "transformer block, causal"
SHOWN = 12


def document(result: dict[str, Any]) -> Document:
    """The whole result."""
    threads = result["threads"]
    summary = [
        f"{len(result['cases'])} cases in float32 on "
        f"{f'{threads} thread' + 's' * (threads > 1) if result['device'] == 'cpu' else result['device']}"
        f"{', stopped by Ctrl-C' if result['interrupted'] else ''}. Outputs and gradients of every level were compared "
        "before it was timed; speed-ups are medians of interleaved ratios to level 1, with quartiles.",
        "Of peak: the time that the measured multiply-add rate or memory bandwidth allows at best, by what the "
        "component has to compute and to move, as a share of the time taken (what stays in the cache may exceed it). "
        "Memory is of forward and backward together; calls, copies and newly made memory are forward + backward, "
        "counted by torch.profiler.",
        peaks_line(result["peaks"]),
    ]
    for status in result["availability"]:
        if status["reason"] is not None:
            summary.append(
                f"Level {status['level']} ({status['name']}) is not there: {status['reason']}. How to get it: "
                f"{status['remedy']}."
            )
    return Document(
        "The ladder: five levels of each component",
        "The same computation at five levels of optimization.",
        summary,
        [],
        [_grid(case, result) for case in result["cases"]],
        [check for case in result["cases"] for check in _checks(case)],
        list(_failures(result)),
        [_bars(case) for case in result["cases"]],
    )


def text(comparison: dict[str, Any]) -> str:
    """A comparison as a plain table."""
    console = Console(width=240, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(_comparison_grid("", comparison, {}).terminal())
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _grid(case: dict[str, Any], result: dict[str, Any]) -> Grid:
    title = f"{case['name']} {', '.join(_shape(shape) for shape in _distinct(case['shapes']))}"
    names = _level_names(result)
    if "generation" not in case:
        return _comparison_grid(title, case["comparison"], names)
    rows = [
        [
            names.get(row["name"], row["name"]),
            "✓" if row["same_tokens"] else "✗",
            duration(row["prompt_seconds"]),
            duration(row["token_seconds"]),
            _speedup(row["speedup"]),
        ]
        for row in case["generation"]
    ]
    return Grid(f"{title}, then one token at a time", GENERATION_HEADINGS, rows)


def _distinct(shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(tuple(shape) for shape in shapes))


def _shape(shape: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _level_names(result: dict[str, Any]) -> dict[str, str]:
    return {f"level {status['level']}": f"{status['level']} {status['name']}" for status in result["availability"]}


def _comparison_grid(title: str, comparison: dict[str, Any], names: dict[str, str]) -> Grid:
    return Grid(title, HEADINGS, [_row(row, names) for row in comparison["results"]])


def _row(row: dict[str, Any], names: dict[str, str]) -> list[str]:
    name, equal = names.get(row["name"], row["name"]), "✓" if row["equivalent"] else "✗"
    if row["forward_seconds"] is None:
        return [name, equal, row["note"] or "–", *["–"] * (len(HEADINGS) - 3)]
    forward, backward = row["forward_profile"], row["backward_profile"]
    return [
        name,
        equal,
        duration(row["forward_seconds"]),
        _speedup(row["forward_speedup"]),
        _share(row["forward_share"]),
        duration(row["backward_seconds"]),
        _speedup(row["backward_speedup"]),
        _share(row["backward_share"]),
        _size(row["peak_bytes"]),
        f"{forward['calls']} + {backward['calls']}",
        f"{forward['copies']} + {backward['copies']}",
        _size(forward["made_bytes"] + backward["made_bytes"]),
    ]


def _speedup(quartiles: Sequence[float] | None) -> str:
    if quartiles is None:
        return "–"
    low, middle, high = quartiles
    return f"{ratio(middle)} ({ratio(low)}–{ratio(high)})"


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _size(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.1f} MiB"


def _checks(case: dict[str, Any]) -> list[dict[str, Any]]:
    if "generation" in case:
        return []
    return [
        {**check, "name": f"{case['name']}, {check['name']}"}
        for row in case["comparison"]["results"]
        for check in row["checks"]
    ]


def _failures(result: dict[str, Any]) -> Iterator[str]:
    for case in result["cases"]:
        for check in _checks(case):
            if not check["passed"]:
                yield f"{check['name']}: {check['measured']}, limit {check['limit']:.3g}"
        for row in case.get("generation", ()):
            if not row["same_tokens"]:
                yield f"{case['name']}: {row['name']} generates other tokens"


def _times(case: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Level, what, seconds."""
    if "generation" in case:
        return [(row["name"], "a token", row["token_seconds"]) for row in case["generation"]]
    return [
        (row["name"], what, row[f"{what}_seconds"])
        for row in case["comparison"]["results"]
        if row["forward_seconds"] is not None
        for what in ("forward", "backward")
    ]


def _bars(case: dict[str, Any]) -> str:
    bars = [
        Bar(f"{name}, {what}", seconds, duration(seconds), name == "level 5") for name, what, seconds in _times(case)
    ]
    return bar_chart(case["name"], bars, label_width=230)


def plot(result: dict[str, Any]) -> bytes:
    """A PNG: a chart of each case, forward and backward of every level as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 3 if len(result["cases"]) > 2 else max(1, len(result["cases"]))
    rows = -(-len(result["cases"]) // columns) or 1
    sheet, grid = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 2.7 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(result["cases"]) :]:
        axes.set_axis_off()
    for axes, case in zip(grid.flat, result["cases"], strict=False):
        _draw(axes, case, _level_names(result))
    sheet.suptitle(
        f"Time at each level: forward dark, backward light. {machine_line(result['environment'])}",
        fontsize=7, x=0.01, ha="left", color="#555555",
    )  # fmt: skip
    target = io.BytesIO()
    sheet.savefig(target, format="png", dpi=130)
    pyplot.close(sheet)
    return target.getvalue()


def _draw(axes: Any, case: dict[str, Any], names: dict[str, str]) -> None:
    times = _times(case)
    levels = list(dict.fromkeys(name for name, _, _ in times))
    height = 0.8 if "generation" in case else 0.4
    for name, what, seconds in times:
        place = levels.index(name) + (0.0 if "generation" in case else (-0.2 if what == "forward" else 0.2))
        colour = {"forward": "#2f6f4f", "backward": "#9cc4ae", "a token": "#3465a4"}[what]
        axes.barh(place, seconds * 1e3, height=height, color=colour)
        axes.annotate(duration(seconds), (seconds * 1e3, place), (3, 0), textcoords="offset points", va="center",
                      fontsize=6)  # fmt: skip
    axes.set_title(case["name"], fontsize=9, loc="left")
    axes.set_yticks(range(len(levels)), [names.get(name, "PyTorch's fused") for name in levels], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max((seconds for *_, seconds in times), default=1) * 1e3)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("ms", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def level_page(result: dict[str, Any], level: int) -> str:
    """What a level changed, as Markdown: each case beside the level before it, and a real profile of it."""
    name = f"level {level}"
    status = next(status for status in result["availability"] if status["level"] == level)
    parts = [f"{machine_line(result['environment'])}\n\nCommand: `{result['command']}`"]
    if all(_result(case, name) is None for case in result["cases"]):
        parts.append(f"Level {level} was not measured there: {status['reason']}. How to get it: {status['remedy']}.")
        return "\n\n".join(parts)
    before = next(
        (
            f"level {lower}"
            for lower in range(level - 1, 0, -1)
            if any(_result(case, f"level {lower}") is not None for case in result["cases"])
        ),
        None,
    )
    rows = [row for case in result["cases"] if (row := _step(case, before, name)) is not None]
    headings = ("", "forward", "backward", "memory at the peak", "operator calls", "copies", "new memory")
    what = f"{status['name']} beside {before}: before → after" if before else "What it does"
    parts.append(f"**{what}**\n\n{Grid('', headings, rows).markdown()}")
    profiled = next((case for case in result["cases"] if case["name"] == PROFILED), None)
    measured = None if profiled is None else _result(profiled, name)
    if measured is not None:
        for direction in ("forward", "backward"):
            grid = _profile_grid(measured[f"{direction}_profile"])
            parts.append(f"**Profile of the {PROFILED}: {direction}**\n\n{grid.markdown()}")
    return "\n\n".join(parts)


def _result(case: dict[str, Any], name: str) -> dict[str, Any] | None:
    """A level's row that was timed, None if there is none."""
    rows = case["comparison"]["results"] if "comparison" in case else ()
    return next((row for row in rows if row["name"] == name and row["forward_seconds"] is not None), None)


def _step(case: dict[str, Any], before: str | None, name: str) -> list[str] | None:
    """What one level did to one case."""
    after = _result(case, name)
    if after is None:
        return None
    first = None if before is None else _result(case, before)

    def cell(show: Any) -> str:
        return str(show(after)) if first is None else f"{show(first)} → {show(after)}"

    def both(row: dict[str, Any], what: str) -> int:
        return int(row["forward_profile"][what] + row["backward_profile"][what])

    return [
        case["name"],
        cell(lambda row: duration(row["forward_seconds"])),
        cell(lambda row: duration(row["backward_seconds"])),
        cell(lambda row: _size(row["peak_bytes"])),
        cell(lambda row: both(row, "calls")),
        cell(lambda row: both(row, "copies")),
        cell(lambda row: _size(both(row, "made_bytes"))),
    ]


def _profile_grid(profile: dict[str, Any]) -> Grid:
    total = sum(operator["seconds"] for operator in profile["operators"]) or 1.0
    rows = [
        [
            f"`{operator['name']}`",
            str(operator["calls"]),
            duration(operator["seconds"]),
            f"{operator['seconds'] / total:.0%}",
        ]
        for operator in profile["operators"][:SHOWN]
    ]
    rest = profile["operators"][SHOWN:]
    if rest:
        seconds = sum(operator["seconds"] for operator in rest)
        calls = sum(operator["calls"] for operator in rest)
        rows.append([f"{len(rest)} others", str(calls), duration(seconds), f"{seconds / total:.0%}"])
    return Grid("", PROFILE_HEADINGS, rows)
