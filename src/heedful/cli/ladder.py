"""`heedful levels`: the five levels of each component side by side."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from heedful.errors import UnsupportedError
from heedful.measure.files import check_block, replace_block, write_atomically, write_json
from heedful.report.document import Document
from heedful.report.table import machine_line

from .console import output, steps

INTERRUPTED = 130
QUICK_SECONDS = 0.3
# The pages of a folder for --update: the table's, and one of each level.
INDEX, PAGES = "README.md", {
    1: "1-pytorch.md", 2: "2-torchscript.md", 3: "3-compile.md", 4: "4-triton.md", 5: "5-native.md",
}  # fmt: skip
PICTURE = "levels.png"


def levels(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Cases whose name contains one of these.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller inputs and fewer rounds.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the result as Markdown.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the result as JSON to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the result to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page to this file.")] = None,
    update: Annotated[
        Path | None, typer.Option(help="Replace tables, profiles and picture in a folder like docs/levels.")
    ] = None,
) -> None:
    """Compare every component at five levels of optimization, from plain PyTorch to the native engine.

    Each level is checked against the first, outputs and gradients, before anything is timed. Ctrl-C ends it early with
    what was measured until then. Exits with 1 if a check failed.
    """
    from heedful.measure.levels import CASE_SECONDS, cases, measure_levels
    from heedful.report import levels as report

    if as_json and as_markdown:
        raise typer.BadParameter("is not possible together with --json", param_hint="--markdown")
    _check_targets(update, {"--save": save, "--plot": plot, "--html": html})
    chosen = [case for case in cases(quick=quick) if not names or any(name in case.name for name in names)]
    if not chosen:
        known = "; ".join(case.name for case in cases())
        raise typer.BadParameter(f"no case's name contains {' or '.join(map(repr, names or []))}; there are {known}")
    logging.getLogger("heedful").setLevel(logging.ERROR)
    with steps(len(chosen) + 1) as progress:
        try:
            result = measure_levels(
                chosen,
                threads=threads,
                command=_command(names, quick, threads, device, update),
                progress=progress,
                seconds=QUICK_SECONDS if quick else CASE_SECONDS,
                device=device,
            )
        except (ValueError, UnsupportedError) as error:
            raise typer.BadParameter(str(error)) from error
    document = report.document(result)
    if save is not None:
        write_json(save, result)
    if plot is not None:
        write_atomically(plot, report.plot(result))
    if html is not None:
        write_atomically(html, document.html(result))
    if update is not None and (result["interrupted"] or document.failures):
        typer.echo(f"{update} stays as it is: the measurement was interrupted or failed a check", err=True)
    elif update is not None:
        write_pages(update, result, document)
    if as_json:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
    elif as_markdown:
        typer.echo(document.markdown(result))
    else:
        _print(result, document)
    if result["interrupted"]:
        raise typer.Exit(INTERRUPTED)
    if document.failures:
        raise typer.Exit(1)


def _command(names: list[str] | None, quick: bool, threads: int, device: str, update: Path | None) -> str:
    """The command line with the options that the numbers depend on."""
    words = ["heedful", "levels", *(names or []), *(["--quick"] if quick else [])]
    words += [] if threads == 1 else ["--threads", str(threads)]
    words += [] if device == "cpu" else ["--device", device]
    return shlex.join([*words, *([] if update is None else ["--update", str(update)])])


def _check_targets(update: Path | None, files: dict[str, Path | None]) -> None:
    """Minutes of measuring are not to end at a folder that is not there."""
    for option, path in files.items():
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"no folder {path.absolute().parent}", param_hint=option)
    if update is not None:
        try:
            check_block(update / INDEX, "levels")
            for level, page in PAGES.items():
                check_block(update / page, f"level-{level}")
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--update") from error


def write_pages(folder: Path, result: dict[str, Any], document: Document) -> None:
    """The blocks of every page of the folder, and the picture."""
    from heedful.report import levels as report

    replace_block(folder / INDEX, "levels", document.markdown(result))
    for level, page in PAGES.items():
        replace_block(folder / page, f"level-{level}", report.level_page(result, level))
    write_atomically(folder / PICTURE, report.plot(result))


def _print(result: dict[str, Any], document: Document) -> None:
    console = output()
    console.print(machine_line(result["environment"]), markup=False)
    for sentence in document.summary:
        console.print(sentence, markup=False)
    for grid in document.grids:
        console.print()
        console.print(grid.terminal())
    for line in document.failures:
        console.print(f"FAILED {line}", style="bold red", markup=False)
