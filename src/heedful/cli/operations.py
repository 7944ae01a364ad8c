"""`heedful ops`: the facts of every fused operation."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from heedful.measure.files import check_block, replace_block

from .console import output, steps


def ops(
    as_json: Annotated[bool, typer.Option("--json", help="Print every fact as JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of the documentation.")] = False,
    semantics: Annotated[
        Path | None,
        typer.Option(metavar="DIRECTORY", help="Write the facts there as semantics.pl, with tests semantics.plt."),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time every case on this machine.")] = False,
    only: Annotated[str, typer.Option(help="Operations whose name contains this.")] = "",
    dtype: Annotated[str, typer.Option(help="What is measured in.")] = "float32",
    seconds: Annotated[float, typer.Option(help="Time for each measured row.", min=0.01)] = 0.2,
    update: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure, and replace the results in a page of the documentation."),
    ] = None,
) -> None:
    """List the fused operations of heedful.ops: what they compute, their gradients, modules and backends.

    With --measure each case is timed against PyTorch, eager and compiled, forward and with its backward, after a check
    of its numbers; ratios are PyTorch's time divided by heedful's. All cases take 3 minutes, and twice that the first
    time, when torch.compile's cache is empty.
    """
    if sum((as_json, markdown, semantics is not None)) > 1:
        raise typer.BadParameter(
            "take no other of --json, --markdown and --semantics", param_hint="--json, --markdown, --semantics"
        )
    from heedful.ops import catalogue
    from heedful.report.operations import as_data, measured_block, page

    chosen = {name: operation for name, operation in catalogue().items() if only in name}
    if not chosen:
        raise typer.BadParameter(f"no operation's name contains {only!r}", param_hint="--only")
    known = {str(kind).removeprefix("torch."): kind for operation in chosen.values() for kind in operation.dtypes}
    if dtype not in known:
        raise typer.BadParameter(f"takes {', '.join(known)}, got {dtype!r}", param_hint="--dtype")
    if update is not None:
        try:
            check_block(update, "operations")
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--update") from error
    rows = _measured(chosen, known[dtype], seconds) if measure or update is not None else None
    data = as_data(chosen.values(), rows)
    if update is not None:
        replace_block(update, "operations", measured_block(data, _command(only, dtype, seconds, update)))
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    elif markdown:
        typer.echo(page(data), nl=False)
    elif semantics is not None:
        from heedful.report.semantics import write_semantics

        for path in write_semantics(data, semantics):
            typer.echo(path)
    else:
        _print(data)


def _measured(chosen: dict[str, Any], dtype: Any, seconds: float) -> list[dict[str, Any]]:
    import torch

    from heedful.measure.operations import Setting, measure_case

    wanted = [
        (operation, case, backward)
        for operation in chosen.values()
        for case in operation.cases
        for backward in (False, True)
        if dtype in operation.dtypes
    ]
    rows = []
    with steps(len(wanted)) as progress:
        for operation, case, backward in wanted:
            progress.begin(f"{operation.name} {case.name}{', with its backward' if backward else ''}")
            setting = Setting(dtype, backward, torch.get_num_threads(), seconds)
            rows.append(measure_case(operation, case, setting, checked=backward))
            progress.advance()
    return rows


def _command(only: str, dtype: str, seconds: float, update: Path) -> str:
    """The command line with the options that the numbers depend on."""
    words = ["heedful", "ops", *(["--only", only] if only else [])]
    words += [] if dtype == "float32" else ["--dtype", dtype]
    words += [] if seconds == 0.2 else ["--seconds", str(seconds)]
    return shlex.join([*words, "--update", str(update)])


def _print(data: dict[str, Any]) -> None:
    from heedful.report.operations import MEASURED_HEADINGS, measured_cells, slower_text

    console = output()
    table = Table("operation", "formula", "gradients", "module", "backends", "PyTorch is as fast or faster")
    for operation in data["operations"]:
        table.add_row(
            operation["name"],
            operation["formula"],
            ", ".join(operation["gradients"]),
            operation["module"] or "–",
            ", ".join(operation["backends"]),
            slower_text(operation) or "–",
        )
    console.print(table)
    if data["measured"] is not None:
        timed = Table(*MEASURED_HEADINGS)
        for row in data["measured"]["rows"]:
            timed.add_row(*measured_cells(row))
        console.print(timed)
