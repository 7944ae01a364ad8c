"""`heedful tune`: measure what is fastest on this machine, and keep it for later calls."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from heedful.measure.files import write_json
from heedful.measure.tuning import table_path

from .console import output, steps


def tune(
    quick: Annotated[bool, typer.Option("--quick", help="Shorter measurements, more easily fooled by noise.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the stored table and measure nothing.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Delete the stored table and measure nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Tiles of the Triton kernels on this CUDA device.")] = False,
) -> None:
    """Measure on this machine where SDPA is faster than the engine, and the engine's own constants.

    The table is used by every later process of this user on this processor; results keep their accuracy, their last
    bits may change. Takes about two minutes on one thread, on a quiet machine. With --gpu, the same for tiles on the
    CUDA device, in a table of its own.
    """
    if sum((quick, show, reset)) > 1:
        raise typer.BadParameter("takes no other of --quick, --show and --reset", param_hint="--quick, --show, --reset")
    if gpu and quick:
        raise typer.BadParameter("is not for --gpu", param_hint="--quick")
    path = _path(gpu)
    if reset:
        existed = path.exists()
        path.unlink(missing_ok=True)
        _say(as_json, {"path": str(path), "deleted": existed}, [f"{path}: {'deleted' if existed else 'was not there'}"])
        return
    if show:
        table = _stored(path)
        lines = (
            [f"{path}: not there, the shipped values hold ({'heedful tune --gpu' if gpu else 'heedful tune'} measures)"]
            if table is None
            else _lines(path, table)
        )
        _say(as_json, {"path": str(path), "table": table}, lines)
        return
    result = _measure_gpu() if gpu else _measure(quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result["table"])
    lines = [*result["notes"], "", *_lines(path, result["table"])]
    if result["interrupted"]:
        lines.append("stopped by Ctrl-C: what was not measured has its shipped value")
    _say(as_json, {"path": str(path), **result}, lines)
    if result["interrupted"]:
        raise typer.Exit(130)


def _measure(quick: bool) -> dict[str, Any]:
    from heedful.measure.tune import measure_tuning, step_count

    logging.getLogger("heedful").setLevel(logging.ERROR)
    try:
        with steps(step_count()) as progress:
            return measure_tuning(quick=quick, progress=progress)
    except ImportError as error:
        typer.echo(f"heedful tune: {error}", err=True)
        raise typer.Exit(1) from error


def _path(gpu: bool) -> Path:
    if not gpu:
        return table_path()
    from heedful.backend.triton.tuned import gpu_table_path

    return gpu_table_path()


def _measure_gpu() -> dict[str, Any]:
    from heedful.measure import gpu

    why = gpu.why_not()
    if why is not None:
        typer.echo(f"heedful tune --gpu: {why}", err=True)
        raise typer.Exit(1)
    from heedful.measure.tune_gpu import ROWS, measure_tiles

    logging.getLogger("heedful").setLevel(logging.ERROR)
    with steps(len(ROWS) + 1) as progress:
        return measure_tiles(progress)


def _stored(path: Path) -> dict[str, Any] | None:
    """The stored table, None if there is none; one that is no JSON object is an error of the command."""
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        typer.echo(f"heedful tune: {path}: {error}", err=True)
        raise typer.Exit(1) from error
    if not isinstance(table, dict):
        typer.echo(f"heedful tune: {path} holds no JSON object", err=True)
        raise typer.Exit(1)
    return table


def _lines(path: Path, table: dict[str, Any]) -> list[str]:
    return [f"{path}:", *(f"  {name}: {value}" for name, value in table.items())]


def _say(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    if as_json:
        typer.echo(json.dumps(value, indent=2, allow_nan=False))
        return
    console = output()
    for line in lines:
        console.print(line, markup=False)
