"""The `heedful` command."""

from __future__ import annotations

from typing import Annotated

import typer

from heedful import __version__

from .benchmark import bench
from .demonstration import demo
from .diagnosis import doctor
from .ladder import levels
from .matrix import support
from .new_operation import new_op
from .operations import ops
from .running import SETTINGS, run
from .tuning import tune

app = typer.Typer(
    name="heedful",
    help="Exact attention that works only for the keys a model attends to.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(doctor)
app.command()(bench)
app.command()(demo)
app.command()(tune)
app.command()(support)
app.command()(levels)
app.command()(ops)
app.command()(new_op)
app.command(context_settings=SETTINGS)(run)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"heedful {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Exact attention that works only for the keys a model attends to."""


def main() -> None:
    """Entry point of the installed command."""
    app()
