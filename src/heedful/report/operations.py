"""The catalogue of fused operations as plain data and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from heedful.measure.machine import environment
from heedful.ops._catalogue import Operation

from .table import duration, machine_line, ratio

MEASURED_HEADINGS = ("operation", "case", "dtype", "pass", "time", "GB/s", "against PyTorch (quartiles)")


def as_data(operations: Iterable[Operation], rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Every fact of the operations, and what was measured of them with the machine that it was measured on."""
    return {
        "operations": [operation.to_json() for operation in operations],
        "measured": None if rows is None else {"environment": environment(), "rows": rows},
    }


def page(data: dict[str, Any]) -> str:
    """A page with a table of all operations, a section for each, and what was measured."""
    lines = [
        "# Operations",
        "",
        "Those of `heedful.ops`: one pass over memory, forward and backward, where PyTorch takes several.",
        "",
        *_table(
            ("operation", "", "gradients", "module", "PyTorch is as fast or faster"),
            (
                (
                    f"[`{operation['name']}`](#{operation['name']})",
                    operation["summary"],
                    _codes(operation["gradients"]),
                    f"`heedful.nn.{operation['module']}`" if operation["module"] else "–",
                    "; ".join(slower["where"] for slower in operation["slower"]) or "–",
                )
                for operation in data["operations"]
            ),
        ),
    ]
    for operation in data["operations"]:
        lines += ["", *_section(operation)]
    if data["measured"] is not None:
        machine = data["measured"]["environment"]
        lines += [
            "",
            "## Measured",
            "",
            f"`heedful ops --measure` on {machine['cpu']}; ratios are PyTorch's time divided by heedful's.",
            "",
            *_table(MEASURED_HEADINGS, (measured_cells(row) for row in data["measured"]["rows"])),
        ]
    return "\n".join(lines) + "\n"


# What a repeated measurement moves a ratio by, on a machine that others share.
AS_FAST = 0.95


def measured_block(data: dict[str, Any], command: str) -> str:
    """What was measured of all operations, with the machine and the command: the block of a page."""
    measured, operations = data["measured"], {operation["name"]: operation for operation in data["operations"]}
    rows = measured["rows"]
    behind = [row for row in rows if _best(row) < AS_FAST]
    threads = sorted({row["threads"] for row in rows})
    lines = [
        machine_line(measured["environment"]),
        "",
        f"Command: `{command}`",
        "",
        f"{len(rows)} rows on {' and '.join(map(str, threads))} thread{'s' if threads != [1] else ''}, each after a"
        " check of its numbers. Ratios are PyTorch's time divided by heedful's, medians of interleaved rounds with"
        " quartiles; bytes are the least that the operation has to move, forward and, where it is meant, backward.",
        f"In {len(rows) - len(behind)} of them heedful takes at most 1/{AS_FAST} of the time of the fastest of all that"
        " stand beside it.",
    ]
    if behind:
        lines += ["", "Slower than that:", ""]
        for row in behind:
            known = "; ".join(slower["where"] for slower in operations[row["operation"]]["slower"])
            said = f" (the catalogue names: {known})" if known else ""
            kind = f"{row['dtype']}, {row['pass']}: {ratio(_best(row))}"
            lines.append(f"- `{row['operation']}` {row['case']}, {kind}{said}")
    for name in operations:
        own = [row for row in rows if row["operation"] == name]
        if own:
            lines += ["", f"**{name}**", "", *_table(MEASURED_HEADINGS[1:], (measured_cells(row)[1:] for row in own))]
    return "\n".join(lines)


def _best(row: dict[str, Any]) -> float:
    """The ratio to the fastest of what stands beside heedful."""
    best: float = min(peer["ratio"] for peer in row["peers"].values())
    return best


def measured_cells(row: dict[str, Any]) -> list[str]:
    """One measured row, one text per heading."""
    peers = (
        f"{name} {ratio(peer['ratio'])} ({ratio(peer['ratio_low'])}–{ratio(peer['ratio_high'])})"
        for name, peer in row["peers"].items()
    )
    time, moved = duration(row["seconds"]), f"{row['bytes_per_second'] / 1e9:.1f}"
    return [row["operation"], row["case"], row["dtype"], row["pass"], time, moved, ", ".join(peers)]


def slower_text(operation: dict[str, Any]) -> str:
    """Which calls of an operation PyTorch runs as fast or faster, by what, and what leaves them to it."""
    parts = []
    for slower in operation["slower"]:
        left = f"; {', '.join(slower['left_by'])} leaves them to it" if slower["left_by"] else ""
        parts.append(f"{slower['where']}: {slower['peer']}{left}")
    return ". ".join(parts)


def _section(operation: dict[str, Any]) -> list[str]:
    arguments = [
        (f"`{argument['name']}`", kind, argument["shape"], argument["meaning"])
        for kind in ("input", "parameter", "output")
        for argument in operation[f"{kind}s"]
    ]
    facts = [
        ("complexity", operation["complexity"]),
        ("dtypes", _codes(operation["dtypes"])),
        ("backends", ", ".join(operation["backends"])),
        ("operators", _codes(f"torch.ops.heedful.{name}" for name in operation["operators"])),
        ("PyTorch is as fast or faster", slower_text(operation) or "nowhere that was measured"),
        ("source", operation["source"]),
    ]
    return [
        f"## {operation['name']}",
        "",
        f"{operation['summary']}: `{operation['formula']}`",
        "",
        *_table(("", "", "shape or type", ""), arguments),
        "",
        *_table(("", ""), facts),
    ]


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(headings: tuple[str, ...], rows: Iterable[Iterable[str]]) -> list[str]:
    cells = [headings, ("---",) * len(headings), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]
