"""The catalogue of fused operations as plain data and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from heedful.measure.machine import environment
from heedful.ops._catalogue import Operation

from .table import duration, ratio

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
            ("operation", "", "gradients", "module"),
            (
                (
                    f"[`{operation['name']}`](#{operation['name']})",
                    operation["summary"],
                    _codes(operation["gradients"]),
                    f"`heedful.nn.{operation['module']}`" if operation["module"] else "–",
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


def measured_cells(row: dict[str, Any]) -> list[str]:
    """One measured row, one text per heading."""
    peers = (
        f"{name} {ratio(peer['ratio'])} ({ratio(peer['ratio_low'])}–{ratio(peer['ratio_high'])})"
        for name, peer in row["peers"].items()
    )
    time, moved = duration(row["seconds"]), f"{row['bytes_per_second'] / 1e9:.1f}"
    return [row["operation"], row["case"], row["dtype"], row["pass"], time, moved, ", ".join(peers)]


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
