"""`heedful bench`: the table of workloads, and what looks further: sweep, decode, training, density, gpu."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from heedful.measure.files import check_block, replace_block, write_atomically, write_json
from heedful.report import table
from heedful.report.document import Document

from . import modes
from .console import output, steps

QUICK_SECONDS, FULL_SECONDS = 1.0, 5.0
INTERRUPTED = 130


def bench(
    count: Annotated[
        int | None, typer.Argument(min=1, metavar="[N]", help="Cases of --sweep, 200 if left out.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Random calls against SDPA: is any slower?")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Few queries against long caches.")] = False,
    training: Annotated[bool, typer.Option("--training", help="Train a small language model with both.")] = False,
    density: Annotated[bool, typer.Option("--density", help="Time against density, by pattern.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Calls on a CUDA device beside their peers.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The main rows only, with fewer rounds.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every combination of --decode, which takes an hour.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the result as JSON to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the result to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page to this file.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the result as Markdown.")] = False,
    update: Annotated[
        Path | None,
        typer.Option(help="Replace the block between the bench markers (sweep, decode, ...) of this Markdown file."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; of the table, of rows that use one.")] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Rows of the table, --decode, --density or --gpu that contain this."),
    ] = None,
    stored: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Show what earlier runs of --gpu saved, the first's rows where several have one."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="What --sweep draws its cases from.")] = 0,
    training_steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps of --training.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of --density: float32, bfloat16, float16, float64.")] = "float32",
) -> None:
    """Measure heedful against PyTorch on this machine, everything behind a numerical check of the same call.

    Ctrl-C ends it early with what was measured until then. Exits with 1 if a check failed or --sweep found a loss.
    """
    chosen = [
        n
        for n, on in (("sweep", sweep), ("decode", decode), ("training", training), ("density", density), ("gpu", gpu))
        if on
    ]
    if len(chosen) > 1:
        raise typer.BadParameter("take one at a time", param_hint=" and ".join(f"--{name}" for name in chosen))
    mode = chosen[0] if chosen else "bench"
    _refuse_foreign(
        mode,
        {
            "[N]": (count is not None, {"sweep"}),
            "--seed": (seed != 0, {"sweep"}),
            "--full": (full, {"decode"}),
            "--steps": (training_steps is not None, {"training"}),
            "--dtype": (dtype != "float32", {"density"}),
            "--only": (only is not None, {"bench", "decode", "density", "gpu"}),
            "--threads": (threads is not None, {"bench", "sweep", "decode", "training", "density"}),
            "--from": (bool(stored), {"gpu"}),
        },
    )
    if as_json and as_markdown:
        raise typer.BadParameter("is not possible together with --json", param_hint="--markdown")
    _check_targets(mode, update, {"--save": save, "--plot": plot, "--html": html})
    options = modes.Options(
        _command(
            mode, count=count, quick=quick, full=full, threads=threads, only=only, seed=seed, steps=training_steps,
            dtype=dtype, update=update, stored=stored or (),
        ),
        quick, threads, count, seed, full, training_steps, only, dtype, tuple(stored or ()),
    )  # fmt: skip
    # What a call runs on stands in every table; the log's hints would tear the progress bar.
    logging.getLogger("heedful").setLevel(logging.ERROR)
    if mode == "bench":
        from heedful.measure.workloads import select_rows
        from heedful.report import overview

        rows = select_rows(quick=quick, only=only)
        if not rows:
            raise typer.BadParameter(f"no row's name contains {only!r}", param_hint="--only")
        seconds = QUICK_SECONDS if quick else FULL_SECONDS
        result = measure(rows, command=options.command, threads=threads, seconds=seconds)
        document = overview.document(result)
    else:
        try:
            result, document = modes.run(mode, options)
        except modes.Unavailable as why:
            typer.echo(f"heedful bench --{mode}: {why}", err=True)
            raise typer.Exit(1) from None
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
    _write(mode, result, document, save=save, plot=plot, html=html, update=update)
    if as_json:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
    elif as_markdown:
        typer.echo(document.markdown(result))
    else:
        _print(mode, result, document, output())
    if result["interrupted"]:
        raise typer.Exit(INTERRUPTED)
    if document.failures:
        raise typer.Exit(1)


def _refuse_foreign(mode: str, given: dict[str, tuple[bool, set[str]]]) -> None:
    """An option that the mode does not know is an error rather than without effect."""
    for name, (used, where) in given.items():
        if used and mode not in where:
            places = " or ".join("the table" if place == "bench" else f"--{place}" for place in sorted(where))
            raise typer.BadParameter(f"belongs to {places}", param_hint=name)


def _check_targets(mode: str, update: Path | None, files: dict[str, Path | None]) -> None:
    """Minutes of measuring are not to end at a folder that is not there."""
    for option, path in files.items():
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"no folder {path.absolute().parent}", param_hint=option)
    if update is not None:
        try:
            check_block(update, mode)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--update") from error


def _command(
    mode: str,
    *,
    count: int | None,
    quick: bool,
    full: bool,
    threads: int | None,
    only: str | None,
    seed: int,
    steps: int | None,
    dtype: str,
    update: Path | None,
    stored: Sequence[Path],
) -> str:
    """The command line with the options that the numbers depend on, and --update where the table goes to a file."""
    words = ["heedful", "bench", *([] if mode == "bench" else [f"--{mode}"])]
    words += [] if count is None else [str(count)]
    words += [name for name, on in (("--quick", quick), ("--full", full)) if on]
    for name, value in (("--threads", threads), ("--only", only), ("--seed", seed or None), ("--steps", steps)):
        words += [] if value is None else [name, str(value)]
    words += [] if dtype == "float32" else ["--dtype", dtype]
    words += [word for path in stored for word in ("--from", path.name)]
    return shlex.join([*words, *([] if update is None else ["--update", update.name])])


def _write(
    mode: str,
    result: dict[str, Any],
    document: Document,
    *,
    save: Path | None,
    plot: Path | None,
    html: Path | None,
    update: Path | None,
) -> None:
    """The files that were asked for, each whole or not at all; a part of a result replaces no published table."""
    if save is not None:
        write_json(save, result)
    if plot is not None:
        from heedful.report.plot import ratio_plot

        write_atomically(plot, ratio_plot(result) if mode == "bench" else document.png(result))
    if html is not None:
        write_atomically(html, document.html(result))
    if update is not None and result["interrupted"]:
        typer.echo(f"{update} stays as it is: the measurement was interrupted", err=True)
    elif update is not None:
        replace_block(update, mode, document.markdown(result))


def _print(mode: str, result: dict[str, Any], document: Document, console: Console) -> None:
    console.print(table.machine_line(result["environment"]), markup=False)
    for sentence in document.summary:
        console.print(sentence, markup=False)
    if mode == "bench":
        console.print(table.terminal_table(result["rows"], console.width))
    else:
        for grid in document.grids:
            console.print()
            console.print(grid.terminal())
    for text in document.failures:
        console.print(f"FAILED {text}", style="bold red", markup=False)


def measure(rows: list[Any], *, command: str, threads: int | None, seconds: float) -> dict[str, Any]:
    """Run the workloads one after another, the machine's peaks first.

    Returns:
        JSON-serialisable: schema, mode, command, environment, peaks (None without the engine), interrupted, rows.
    """
    from heedful.measure.collect import collect
    from heedful.measure.machine import environment
    from heedful.measure.peaks import measure_peaks
    from heedful.measure.rows import MORE_THREADS, run_row

    with steps(len(rows) + 1) as progress:
        progress.begin("measuring the machine's peaks")
        counts = {threads or 1} | {row.threads for row in rows} | ({MORE_THREADS} if threads is None else set())
        peaks = measure_peaks(tuple(counts))
        progress.advance()
        done, interrupted = collect(
            rows,
            lambda row: run_row(row, peaks=peaks, threads=threads, seconds=seconds).to_json(),
            progress,
            lambda row: str(row.name),
        )
    return {
        "schema": 2,
        "mode": "bench",
        "command": command,
        "environment": environment(),
        "peaks": peaks.to_json() if peaks else None,
        "interrupted": interrupted,
        "rows": done,
    }
