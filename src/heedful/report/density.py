"""Time against density for people: a chart on two logarithmic axes, and the overhead over ideal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from heedful.measure.checks import Check

from .document import Document, Grid
from .figure import Axis, Figure, Series
from .table import duration

DIRECTIONS = ("forward", "backward")
HEADINGS = (
    "pattern", "density", "forward", "overhead", "of SDPA with a mask", "backward", "overhead", "of SDPA with a mask",
    "ran on", "spelled out",
)  # fmt: skip


def document(result: dict[str, Any]) -> Document:
    """The whole result."""
    timed = [point for point in result["points"] if point["directions"]]
    batch, heads, length, dim = result["shape"]
    threads = result["threads"]
    summary = [
        f"{len(result['points'])} patterns, {result['dtype']} ({batch}, {heads}, {length}, {dim}) on {threads} "
        f"thread{'s' if threads > 1 else ''}{', stopped by Ctrl-C' if result['interrupted'] else ''}. The overhead is "
        "the pattern's time over the dense call's time × density, the two timed turn by turn: 1× is ideal.",
    ]
    for direction in DIRECTIONS:
        overheads = sorted(
            (point["directions"][direction]["overhead"], point["name"])
            for point in timed
            if point["directions"][direction]["overhead"] is not None
        )
        if overheads:
            worst, name = overheads[-1]
            middle = median(value for value, _ in overheads)
            summary.append(f"{direction.capitalize()}: median overhead {middle:.2f}×, largest {worst:.2f}× ({name}).")
    failures = [
        f"numerical check failed: {check['name']}"
        for point in result["points"]
        for check in point["checks"]
        if not check["passed"]
    ]
    return Document(
        "Does the cost follow the density?",
        "Each family of patterns from sparse to dense, and the line that an engine without any overhead would be on.",
        summary,
        [
            _figure(f"{direction.capitalize()}, {what}", direction, chosen, result["sdpa_seconds"][direction])
            for direction in DIRECTIONS
            for what, chosen in _split(timed)
        ],
        [Grid("Every pattern", HEADINGS, [_row(point, result) for point in timed], frozenset({0, 8, 9}))],
        _checks(result["points"]),
        failures,
    )


def _row(point: dict[str, Any], result: dict[str, Any]) -> list[str]:
    cells = [point["family"], f"{point['density']:.3g}"]
    for direction in DIRECTIONS:
        timing = point["directions"][direction]
        cells += [
            duration(timing["seconds"]),
            "–" if timing["overhead"] is None else f"{timing['overhead']:.2f}×",
            f"{timing['seconds'] / result['sdpa_seconds'][direction]:.1%}",
        ]
    backends = point["backends"]
    ran_on = backends["forward"] if len(set(backends.values())) == 1 else "/".join(backends[d] for d in DIRECTIONS)
    return [*cells, ran_on, point["pattern"]]


def _split(timed: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The points in two charts, because twelve lines in one cannot be told apart."""
    listed = [point for point in timed if point["family"].startswith(("blocks", "BigBird", "random"))]
    other = [point for point in timed if point not in listed]
    return [(what, chosen) for what, chosen in (("by position", other), ("blocks and masks", listed)) if chosen]


def _figure(title: str, direction: str, timed: Sequence[dict[str, Any]], sdpa: float) -> Figure:
    dense = median(point["directions"][direction]["dense_seconds"] for point in timed) * 1e3
    ends = (min(point["density"] for point in timed), 1.0)
    series = [
        Series("dense time × density", ends, [dense * end for end in ends], "rule"),
        Series("SDPA with a mask", ends, (sdpa * 1e3,) * 2, "rule", 1),
    ]
    for index, family in enumerate(dict.fromkeys(point["family"] for point in timed)):
        points = sorted((p for p in timed if p["family"] == family), key=lambda point: point["density"])
        series.append(
            Series(
                family,
                [point["density"] for point in points],
                [point["directions"][direction]["seconds"] * 1e3 for point in points],
                colour=index,
                labels=[f"{p['pattern']}: {duration(p['directions'][direction]['seconds'])}" for p in points],
            )
        )
    return Figure(title, Axis("share of the pairs that count", log=True), Axis("time", log=True, unit=" ms"), series)


def _checks(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst of each kind of check."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        for check in point["checks"]:
            kinds.setdefault(check["name"].removeprefix(point["name"]).strip(", "), []).append(check)
    return [
        Check(
            f"{kind}, worst of {len(found)}",
            max(float(check["measured"]) for check in found),
            1.0,
            found[0]["derivation"],
        ).to_json()
        for kind, found in kinds.items()
    ]
