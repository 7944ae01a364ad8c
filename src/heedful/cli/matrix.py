"""`heedful support`: what runs where."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .console import output


def support(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Show what each backend runs and what each door has words for.

    Asked of the backends' declarations: nothing is computed, and it does not matter what this machine has.
    """
    from heedful.support import matrix
    from heedful.support.table import tables

    found = matrix()
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    console = output()
    for part in tables(found):
        console.print(part)
