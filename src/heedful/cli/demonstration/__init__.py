"""`heedful demo`: a real model and a long-context model answer the same with heedful, and faster."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from heedful.cli.console import Steps, output, steps
from heedful.measure.files import write_atomically

from . import decoder, encoder
from .result import passed, print_result, report_page

QUICK_ENCODER = encoder.Size(passages=8, rounds=1, seconds=5.0)
QUICK_DECODER = decoder.Size(
    widths=(2,), lengths=(96,), window=32, prefix=64, layers=2, tokens=8, turns=2, rounds=1, max_rounds=1, seconds=20.0
)


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A few sentences and a tiny decoder, as a test.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    report: Annotated[Path, typer.Option(help="Where the HTML report goes.")] = Path("heedful-report.html"),
) -> None:
    """Run two models with PyTorch's attention and with heedful's, compare every answer, then time and memory.

    Needs no network. Exits with 1 if a check failed or a part could not run.
    """
    if importlib.util.find_spec("transformers") is None:
        typer.echo("heedful demo needs transformers: pip install 'heedful[hf]' (or make demo)", err=True)
        raise typer.Exit(1)
    try:
        encoder.model_folder()
    except encoder.MissingError as error:
        typer.echo(f"heedful demo: {error}", err=True)
        raise typer.Exit(1) from error
    command = shlex.join(["heedful", "demo", *(["--quick"] if quick else [])])
    result = run(command, quick=quick)
    write_atomically(report, report_page(result))
    if as_json:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
    else:
        console = output()
        print_result(result, console)
        console.print(f"\nreport: {report}", markup=False)
    if not passed(result):
        raise typer.Exit(1)


def run(command: str, *, quick: bool) -> dict[str, Any]:
    """Both halves one after the other; one that cannot run leaves {"failure": why}.

    Returns:
        JSON-serialisable: schema, command, environment, encoder, decoder.
    """
    # Everything is on the disk already: transformers must neither ask the hub nor draw bars of its own.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    from heedful.measure.machine import environment

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sizes = (QUICK_ENCODER, QUICK_DECODER) if quick else (encoder.Size(), decoder.Size())
    with steps(2) as progress:
        progress.begin("sentence encoder: embedding Python's documentation")
        first = _half(lambda: encoder.run_encoder(sizes[0], progress.advance), progress, 1)
        progress.begin("decoder: reading a long text, each side in its own process")
        second = _half(lambda: decoder.run_decoder(sizes[1], progress.advance), progress, 2)
    return {"schema": 1, "command": command, "environment": environment(), "encoder": first, "decoder": second}


def _half(part: Callable[[], dict[str, Any]], progress: Steps, done: int) -> dict[str, Any]:
    try:
        return part()
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        return {"failure": f"{type(error).__name__}: {error}"}
    finally:
        progress.reach(done)
