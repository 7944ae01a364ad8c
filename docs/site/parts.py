"""Pieces of pages that are made from the code and from other files of the repository."""

from __future__ import annotations

import html
import importlib
import re
from pathlib import Path

import typer

from heedful.cli import app
from heedful.support import DOORS, matrix
from heedful.support.table import markdown

BENCH = re.compile(r"<!-- bench:begin -->\n(.*?)<!-- bench:end -->", re.S)


def bench_table(path: Path) -> str:
    """What `heedful bench --update` wrote into a file."""
    found = BENCH.search(path.read_text())
    if found is None:
        raise ValueError(f"{path} has no table of heedful bench")
    return found[1]


def support_tables(up: str) -> str:
    """The support matrix, whose doors link to their pages."""
    return markdown(matrix(), {door.name: up + door.page for door in DOORS})


def command_table(name: str) -> str:
    """What a command of `heedful` is for, and its options."""
    group = typer.main.get_command(app)
    command = group.commands[name]  # type: ignore[attr-defined]
    context = command.make_context(f"heedful {name}", [], resilient_parsing=True)
    usage = _plain(" ".join([f"heedful {name}", *command.collect_usage_pieces(context)]))
    lines = [f"```\n{usage}\n```", "", command.help or "", "", "| option | |", "|---|---|"]
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None and record[0] != "--help":
            option, text = (re.sub(r"\s+", " ", part) for part in record)
            lines.append(f"| `{_plain(option)}` | {html.escape(text, quote=False)} |")
    return "\n".join(lines)


def _plain(usage: str) -> str:
    """A usage or an option without the brackets that click puts around its types and our names of arguments."""
    for word, plain in (("<path>", "FILE"), ("<int range>", "N"), ("<str>", "TEXT"), (" <list[str]>", "")):
        usage = usage.replace(word, plain)
    return usage.replace("[N] N", "[N]").replace("[[N]]", "[N]").replace("{", "").replace("}...", "")


def public_names(module: str, page: str) -> str:
    """The reference of what a module makes public and the page does not have yet."""
    found = importlib.import_module(module)
    names = [f"{module}.{name}" for name in found.__all__]
    return "\n\n".join(f"::: {name}" for name in names if f"::: {name}\n" not in page)


def linked_from_docs(text: str) -> str:
    """A file of the repository's root as a page: what lies in docs/ is its neighbour."""
    return text.replace("](docs/", "](")


def code_page(path: Path) -> str:
    """A file of code as a page."""
    language = {".py": "python", ".c": "c"}[path.suffix]
    return f'# {path.name}\n\n```{language} title="{path.parent.name}/{path.name}"\n{path.read_text()}```\n'
