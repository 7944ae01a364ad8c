"""The sweep for people: what was slower, and ratios against work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from heedful.measure.checks import Check

from .document import Document, Grid
from .figure import Axis, Figure, Series
from .table import duration, ratio

VERDICTS = ("faster", "equal", "loss", "wrong")
BINS_PER_DECADE = 12


def document(result: dict[str, Any]) -> Document:
    """The whole sweep."""
    cases = result["cases"]
    count = {verdict: sum(case["verdict"] == verdict for case in cases) for verdict in VERDICTS}
    timed = [case for case in cases if case["comparison"]]
    ratios = [case["comparison"]["ratio"] for case in timed]
    switching = [case["name"] for case in cases if case["choice_depends_on_threads"]]
    both = " and ".join(map(str, sorted({result["threads"], result["other_threads"]})))
    summary = [
        f"{len(cases)} of {result['asked']} cases run{' until Ctrl-C' if result['interrupted'] else ''}, seed "
        f"{result['seed']}, {_threads(result['threads'])}.",
        f"{count['faster']} faster by more than 5 %, {count['equal']} equal, {count['loss']} slower by more than 5 % "
        f"and 2 µs, {count['wrong']} with a failed numerical check.",
    ]
    if ratios:
        low, middle, high = min(ratios), math.exp(statistics.fmean(map(math.log, ratios))), max(ratios)
        summary.append(
            f"SDPA's time ÷ heedful's: smallest {ratio(low)}, geometric mean {ratio(middle)}, largest {ratio(high)}."
        )
    summary.append(
        f"The choice of a backend does not depend on the number of threads: explain() said the same with {both} for "
        f"{len(cases) - len(switching)} of {len(cases)} cases."
    )
    failures = [f"slower: {_sentence(case)}" for case in timed if case["verdict"] == "loss"]
    failures += [f"numerical check failed: {case['name']}" for case in cases if case["verdict"] == "wrong"]
    failures += [f"the choice depends on the number of threads: {name}" for name in switching]
    losses = sorted((case for case in timed if case["verdict"] == "loss"), key=lambda case: case["comparison"]["ratio"])
    slowest = sorted(timed, key=lambda case: case["comparison"]["ratio"])[:12]
    grids = [Grid("Slower than SDPA", HEADINGS, [_row(case) for case in losses], WORDS)] if losses else []
    grids += [Grid("Smallest ratios", HEADINGS, [_row(case) for case in slowest], WORDS), _by_group(timed)]
    return Document(
        "Is heedful ever slower than SDPA?",
        "Random calls: heedful.attention against the fastest SDPA call that a user would write for the same, each "
        "behind a numerical check, turn by turn. A ratio above 1 means that heedful is faster.",
        summary,
        _figures(timed) if timed else [],
        grids,
        _checks(cases, len(losses), len(switching)),
        failures,
    )


HEADINGS = ("case", "density", "SDPA call", "SDPA", "heedful", "ratio (quartiles)", "ran on")
WORDS = frozenset({0, 2, 6})


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _row(case: dict[str, Any]) -> list[str]:
    timing = case["comparison"]
    return [
        f"{case['name']}: {case['pattern']}",
        f"{case['density']:.1%}",
        case["sdpa"],
        duration(timing["baseline_seconds"]),
        duration(timing["candidate_seconds"]),
        f"{ratio(timing['ratio'])} ({ratio(timing['ratio_low'])}–{ratio(timing['ratio_high'])})",
        case["backend"],
    ]


def _sentence(case: dict[str, Any]) -> str:
    _, _, call, theirs, ours, ratios, backend = _row(case)
    return f"{case['name']}: SDPA ({call}) {theirs}, heedful ({backend}) {ours}, {ratios}"


def _by_group(timed: Sequence[dict[str, Any]]) -> Grid:
    rows = []
    for name in sorted({case["group"] for case in timed}):
        ratios = sorted(case["comparison"]["ratio"] for case in timed if case["group"] == name)
        rows.append([name, str(len(ratios)), ratio(ratios[0]), ratio(statistics.median(ratios)), ratio(ratios[-1])])
    return Grid("By pattern", ("pattern", "cases", "smallest", "median", "largest"), rows)


def _figures(timed: Sequence[dict[str, Any]]) -> list[Figure]:
    # A pattern without a pair has no place on a logarithmic axis; it stands at the left end.
    least = min((case["flops"] for case in timed if case["flops"] > 0), default=1.0)
    ends = (least, max([least, *(case["flops"] for case in timed)]))
    level = [Series("", ends, (1.0, 1.0), "rule"), Series("5 % slower", ends, (1 / 1.05, 1 / 1.05), "rule", 1)]

    def scatter(title: str, key: str) -> Figure:
        series = []
        for index, name in enumerate(sorted({case[key] for case in timed})):
            chosen = [case for case in timed if case[key] == name]
            series.append(
                Series(
                    name,
                    [max(case["flops"], least) for case in chosen],
                    [case["comparison"]["ratio"] for case in chosen],
                    "points",
                    index,
                    [f"{case['name']}: {ratio(case['comparison']['ratio'])}" for case in chosen],
                )
            )
        x = Axis("floating-point operations of the attended pairs", log=True)
        return Figure(title, x, Axis("SDPA's time ÷ heedful's", log=True, unit="×"), [*level, *series])

    logs = [math.log10(case["comparison"]["ratio"]) for case in timed]
    first = math.floor(min(logs) * BINS_PER_DECADE)
    last = math.floor(max(logs) * BINS_PER_DECADE) + 1
    heights = [0] * (last - first)
    for value in logs:
        heights[math.floor(value * BINS_PER_DECADE) - first] += 1
    edges = [10 ** (index / BINS_PER_DECADE) for index in range(first, last + 1)]
    histogram = Figure(
        "How many cases have which ratio",
        Axis("SDPA's time ÷ heedful's", log=True, unit="×"),
        Axis("cases"),
        [Series("", edges, heights, "bars", 0), Series("as fast as SDPA", (1.0, 1.0), (0.0, max(heights)), "rule")],
    )
    return [
        scatter("Ratio against work, by type", "dtype"),
        scatter("Ratio against work, by pattern", "group"),
        histogram,
    ]


def _checks(cases: Sequence[dict[str, Any]], losses: int, switching: int) -> list[dict[str, Any]]:
    """The cases' checks by kind, the worst of each, and the two claims of the sweep."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        for check in case.get("checks", []):
            kind = f"{check['name'].removeprefix(case['name']).strip(' :')}"
            kinds.setdefault(kind, []).append(check)
    summed = [
        Check(
            f"{kind}, worst of {len(found)}",
            max(float(check["measured"]) / float(check["limit"]) if check["limit"] else 0.0 for check in found),
            1.0,
            f"as a share of the limit; {found[0]['derivation']}",
        )
        for kind, found in kinds.items()
    ]
    if cases:
        rule = "a case counts that is slower by more than 5 % and 2 µs, and again in a longer run"
        summed.append(Check("cases slower than SDPA", losses, 0, rule))
        summed.append(Check("cases whose backend depends on the threads", switching, 0, "explain() with both counts"))
    return [check.to_json() for check in summed]
