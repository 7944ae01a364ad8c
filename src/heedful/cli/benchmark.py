"""`heedful bench`: the table of workloads for this machine."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from heedful.measure.files import replace_block, write_atomically, write_json

from .console import output, steps

QUICK_SECONDS, FULL_SECONDS = 1.0, 6.0


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="The main rows only, with fewer rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the result as JSON to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the speed-ups to this file.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    update: Annotated[
        Path | None, typer.Option(help="Replace the block between the bench markers of this Markdown file.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the rows that otherwise use one.")] = None,
    only: Annotated[str | None, typer.Option(metavar="TEXT", help="Rows whose name contains this text.")] = None,
) -> None:
    """Measure heedful against PyTorch on this machine, each row behind a numerical check of the same call.

    Exits with 1 if a check failed.
    """
    from heedful.measure.workloads import select_rows

    rows = select_rows(quick=quick, only=only)
    if not rows:
        raise typer.BadParameter(f"no row's name contains {only!r}", param_hint="--only")
    if as_json and as_markdown:
        raise typer.BadParameter("is not possible together with --json", param_hint="--markdown")
    command = _command(quick=quick, threads=threads, only=only, update=update)
    result = measure(rows, command=command, threads=threads, seconds=QUICK_SECONDS if quick else FULL_SECONDS)
    if save is not None:
        write_json(save, result)
    if plot is not None:
        from heedful.report.plot import ratio_plot

        write_atomically(plot, ratio_plot(result))
    from heedful.report import table

    if update is not None:
        try:
            replace_block(update, "bench", table.markdown(result))
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--update") from error
    if as_json:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
    elif as_markdown:
        typer.echo(table.markdown(result))
    else:
        console = output()
        console.print(table.machine_line(result["environment"]), markup=False)
        console.print(table.peaks_line(result["peaks"]), markup=False)
        console.print(table.terminal_table(result["rows"], console.width))
        for text in failures(result):
            console.print(text, style="bold red", markup=False)
    if failures(result):
        raise typer.Exit(1)


def _command(*, quick: bool, threads: int | None, only: str | None, update: Path | None) -> str:
    """The command line with the options that the numbers depend on, and --update where the table goes to a file."""
    words = ["heedful", "bench", *(["--quick"] if quick else [])]
    words += [] if threads is None else ["--threads", str(threads)]
    words += [] if only is None else ["--only", only]
    return shlex.join([*words, *([] if update is None else ["--update", update.name])])


def measure(rows: list[Any], *, command: str, threads: int | None, seconds: float) -> dict[str, Any]:
    """Run the workloads one after another, the machine's peaks first.

    Returns:
        JSON-serialisable: schema, command, environment, peaks (None without the engine), rows.
    """
    from heedful.measure.machine import environment
    from heedful.measure.peaks import measure_peaks
    from heedful.measure.rows import run_row

    done = []
    with steps(len(rows) + 1) as progress:
        progress.begin("measuring the machine's peaks")
        counts = {threads or 1} | {row.threads for row in rows}
        peaks = measure_peaks(tuple(counts))
        progress.advance()
        for row in rows:
            progress.begin(row.name)
            done.append(run_row(row, peaks=peaks, threads=threads, seconds=seconds).to_json())
            progress.advance()
    return {
        "schema": 1,
        "command": command,
        "environment": environment(),
        "peaks": peaks.to_json() if peaks else None,
        "rows": done,
    }


def failures(result: dict[str, Any]) -> list[str]:
    """One line for each numerical check that failed."""
    return [
        f"FAILED {check['name']}: {check['measured']} against {check['limit']:.3g}"
        for row in result["rows"]
        for check in row["checks"]
        if not check["passed"]
    ]
