"""The matrix as Markdown, for the documentation, and as text, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from heedful.support.asks import GROUPS
from heedful.support.doors import DOORS
from heedful.support.matrix import Matrix, Verdict

YES, FORWARD, NO = "yes", "forward", "no"
SIGNS = {YES: "✓", FORWARD: "forward", NO: "–"}
LEGEND = "✓ runs, forward and backward where there is one; forward: the output, without gradients; –: refused"


def word(verdict: Verdict) -> str:
    """One word for a verdict."""
    if not verdict.forward:
        return NO
    return YES if verdict.gradient_reasons is None or verdict.gradient else FORWARD


class Notes:
    """Reasons, numbered in the order in which they come up."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def sign(self, verdict: Verdict) -> str:
        """The verdict's sign, with the number of what is in its way."""
        reasons = verdict.reasons or verdict.gradient_reasons or ()
        text = "; ".join(reasons)
        if not text:
            return SIGNS[word(verdict)]
        number = self.numbers.setdefault(text, len(self.numbers) + 1)
        return f"{SIGNS[word(verdict)]} ({number})"

    def lines(self) -> list[str]:
        return [f"({number}) {text}" for text, number in self.numbers.items()]


def markdown(found: Matrix, link: Mapping[str, str] | None = None) -> str:
    """A section for the backends, one for the doors, and one for each door.

    link: where each door's page is, by its name; none are linked without it.
    """
    notes = Notes()
    names = list(found.devices)
    parts = ["## Backends", ""]
    for group in GROUPS:
        rows = [
            (row.title, *(notes.sign(found.backends[row.name][name]) for name in names))
            for row in found.rows
            if row.group == group
        ]
        parts += _grid((group, *(f"{name} ({found.devices[name]})" for name in names)), rows)
    parts += [f"{LEGEND}.", "", *(f"{line}  " for line in notes.lines()), ""]

    parts += ["## Doors", "", "✓ where callers of a door have words for it; how they write it is below.", ""]
    said = [row for row in found.rows if any(row.name in door.says for door in DOORS)]
    grid = [(row.title, *(SIGNS[YES if row.name in door.says else NO] for door in DOORS)) for row in said]
    parts += _grid(("", *(door.column for door in DOORS)), grid)

    parts += ["## Door by door", ""]
    for door in DOORS:
        notes = Notes()
        verdicts = found.doors[door.name]
        backends = list(next(iter(verdicts.values())))
        titles = {row.name: row.title for row in found.rows}
        rows = [
            (titles[row], door.says[row], *(notes.sign(each[name]) for name in backends))
            for row, each in verdicts.items()
        ]
        page = f"[Its page]({link[door.name]})." if link else ""
        only = "" if door.gradients else "It has no gradients."
        parts += [f"### {door.name}", "", *(text for text in (f"{page} {only}".strip(), "") if text or page), ""]
        parts += _grid(("", "written", *backends), rows)
        parts += [*(f"{line}  " for line in notes.lines()), ""]
    return "\n".join(parts)


def tables(found: Matrix) -> list[Table | str]:
    """The backends' table and the doors' as rich tables, and the notes."""
    notes = Notes()
    names = list(found.devices)
    first = Table("", *(f"{name} ({found.devices[name]})" for name in names), title="Backends", title_justify="left")
    for row in found.rows:
        first.add_row(row.title, *(notes.sign(found.backends[row.name][name]) for name in names))
    second = Table("", *(door.column for door in DOORS), title="Doors", title_justify="left")
    for row in found.rows:
        if any(row.name in door.says for door in DOORS):
            second.add_row(row.title, *(SIGNS[YES if row.name in door.says else NO] for door in DOORS))
    return [first, LEGEND, *notes.lines(), second]


def _grid(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]
