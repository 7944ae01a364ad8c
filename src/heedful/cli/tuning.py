"""`heedful tune`: measure what is fastest on this machine, and keep it for later calls."""

from __future__ import annotations

import json
import logging
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
) -> None:
    """Measure on this machine where SDPA is faster than the engine, and the engine's own constants.

    The table is used by every later process of this user on this processor; results keep their accuracy, their last
    bits may change. Takes about two minutes on one thread, on a quiet machine.
    """
    if sum((quick, show, reset)) > 1:
        raise typer.BadParameter("takes no other of --quick, --show and --reset", param_hint="--quick, --show, --reset")
    path = table_path()
    if reset:
        existed = path.exists()
        path.unlink(missing_ok=True)
        _say(as_json, {"path": str(path), "deleted": existed}, [f"{path}: {'deleted' if existed else 'was not there'}"])
        return
    if show:
        table = _stored()
        lines = (
            [f"{path}: not there, the shipped values hold (heedful tune measures)"] if table is None else _lines(table)
        )
        _say(as_json, {"path": str(path), "table": table}, lines)
        return
    result = _measure(quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result["table"])
    lines = [*result["notes"], "", *_lines(result["table"])]
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


def _stored() -> dict[str, Any] | None:
    """The stored table, None if there is none; one that is no JSON object is an error of the command."""
    try:
        table = json.loads(table_path().read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        typer.echo(f"heedful tune: {table_path()}: {error}", err=True)
        raise typer.Exit(1) from error
    if not isinstance(table, dict):
        typer.echo(f"heedful tune: {table_path()} holds no JSON object", err=True)
        raise typer.Exit(1)
    return table


def _lines(table: dict[str, Any]) -> list[str]:
    return [f"{table_path()}:", *(f"  {name}: {value}" for name, value in table.items())]


def _say(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    if as_json:
        typer.echo(json.dumps(value, indent=2, allow_nan=False))
        return
    console = output()
    for line in lines:
        console.print(line, markup=False)
