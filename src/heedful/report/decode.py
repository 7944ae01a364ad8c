"""Decoding for people: bytes a second over the cache's length, and every shape's share of the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heedful.measure.checks import Check
from heedful.measure.decode import LENGTHS, WAYS

from .document import Document, Grid
from .figure import Axis, Figure, Series
from .table import duration, ratio

NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
HEADINGS = (
    "type", "batch", "queries", "heads", "head dim", "keys", "SDPA", "tensors", "contiguous cache", "paged cache",
    "ratio to SDPA", "limit", "share of the limit", "SDPA call",
)  # fmt: skip


def document(result: dict[str, Any]) -> Document:
    """The whole decode table."""
    rows = result["rows"]
    timed = [row for row in rows if row["ways"]]
    bandwidth = result["read_bandwidth"]
    threads = result["threads"]
    summary = [
        f"{len(rows)} shapes on {threads} thread{'s' if threads > 1 else ''}"
        f"{', stopped by Ctrl-C' if result['interrupted'] else ''}. Memory read, measured: "
        + ("unknown without the engine." if bandwidth is None else f"{bandwidth / 1e9:.1f} GB/s."),
        "The limit of a shape is the smaller of that and what the same call reaches over keys that stay in the "
        "second-level cache. A cache's call appends its own keys and values first; SDPA's appends nothing.",
    ]
    if timed:
        shares = sorted(row["ways"][WAYS[0]]["share"] for row in timed)
        ratios = sorted(row["ways"][WAYS[0]]["ratio"] for row in timed)
        summary.append(
            f"Over tensors: {shares[0]:.0%} to {shares[-1]:.0%} of the limit, {ratio(ratios[0])} to "
            f"{ratio(ratios[-1])} as fast as SDPA."
        )
    failures = [
        f"numerical check failed: {check['name']}" for row in rows for check in row["checks"] if not check["passed"]
    ]
    return Document(
        "Decoding against a long cache",
        "A few queries read all keys and values: how fast, over plain tensors and through heedful.KVCache.",
        summary,
        _figures(timed, bandwidth),
        [Grid("Every shape", HEADINGS, [_row(row) for row in timed], frozenset({0, 13}))],
        _checks(rows),
        failures,
    )


def _row(row: dict[str, Any]) -> list[str]:
    ways = row["ways"]
    return [
        NAMES[row["dtype"]],
        str(row["batch"]),
        str(row["q_length"]),
        f"{row['heads']}/{row['kv_heads']}",
        str(row["head_dim"]),
        str(row["k_length"]),
        f"{duration(ways[WAYS[0]]['baseline_seconds'])}, {_rate(row['sdpa_rate'])}",
        *(f"{duration(ways[way]['candidate_seconds'])}, {_rate(ways[way]['rate'])}" for way in WAYS),
        " / ".join(ratio(ways[way]["ratio"]) for way in WAYS),
        _rate(row["limit"]),
        " / ".join(f"{ways[way]['share']:.0%}" for way in WAYS),
        row["sdpa"] or "plain",
    ]


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"


def _figures(timed: Sequence[dict[str, Any]], bandwidth: float | None) -> list[Figure]:
    x = Axis("keys in the cache", log=True, ticks=LENGTHS)
    y = Axis("GB/s of keys and values", low=0.0)
    by_length = [row for row in timed if _is_base(row)]
    if not by_length:
        return []
    lengths = sorted({row["k_length"] for row in by_length})
    rules = []
    if bandwidth is not None:
        ends = (lengths[0], lengths[-1])
        rules = [Series("measured read bandwidth", ends, (bandwidth / 1e9,) * 2, "rule")]

    def line(name: str, dtype: str, rate: Any, colour: int) -> Series:
        rows = sorted((row for row in by_length if row["dtype"] == dtype), key=lambda row: row["k_length"])
        return Series(name, [row["k_length"] for row in rows], [rate(row) / 1e9 for row in rows], colour=colour)

    what = "32/8 heads of 128, batch 1, one query"
    types = [
        series
        for index, dtype in enumerate(NAMES)
        for series in (
            line(f"heedful {NAMES[dtype]}", dtype, lambda row: row["ways"][WAYS[0]]["rate"], index),
            line(f"SDPA {NAMES[dtype]}", dtype, lambda row: row["sdpa_rate"], index + 4),
        )
    ]
    ways = [
        line(way, "bfloat16", lambda row, way=way: row["ways"][way]["rate"], index) for index, way in enumerate(WAYS)
    ]
    ways.append(line("SDPA over tensors", "bfloat16", lambda row: row["sdpa_rate"], 7))
    return [
        Figure(f"By type: {what}", x, y, [*rules, *types]),
        Figure(f"By kind of cache: bf16, {what}", x, y, [*rules, *ways]),
    ]


def _is_base(row: dict[str, Any]) -> bool:
    wanted = {"heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 1, "q_length": 1}
    return all(row[name] == value for name, value in wanted.items())


def _checks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst of each kind of check."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for check in row["checks"]:
            kinds.setdefault(check["name"].split(", ", 1)[1], []).append(check)
    return [
        Check(
            f"{kind}, worst of {len(found)}",
            max(float(check["measured"]) / float(check["limit"]) for check in found),
            1.0,
            f"as a share of the limit; {found[0]['derivation']}",
        ).to_json()
        for kind, found in kinds.items()
    ]
