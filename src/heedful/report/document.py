"""What a measurement has to say, before it is known whether a terminal, a page or a Markdown file shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

from .figure import Figure
from .page import Section, page
from .png import picture
from .svg import chart
from .table import machine_line


@dataclass(frozen=True)
class Grid:
    """A table of text. The columns in `words` stand left, all others are figures and stand right."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset({0})

    def markdown(self) -> str:
        """As GitHub Markdown."""
        rule = "|".join("---" if index in self.words else "---:" for index in range(len(self.headings)))
        lines = ["| " + " | ".join(self.headings) + " |", f"|{rule}|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        return "\n".join(lines)

    def terminal(self) -> Table:
        """As a table of rich."""
        table = Table(title=escape(self.title), title_justify="left", show_edge=False, pad_edge=False)
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if index in self.words else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table


@dataclass(frozen=True)
class Document:
    """A result for people.

    summary: sentences; checks: Check.to_json() of what was checked, summed up, the page's verdict; failures: one line
    for each thing that makes the command exit with 1, each behind a check that failed; charts: SVG beside the figures.
    """

    title: str
    lead: str
    summary: Sequence[str]
    figures: Sequence[Figure]
    grids: Sequence[Grid]
    checks: Sequence[dict[str, Any]] = ()
    failures: Sequence[str] = field(default=())
    charts: Sequence[str] = ()

    def html(self, result: dict[str, Any]) -> str:
        """The self-contained page."""
        sections = [
            Section(
                "Result",
                self.summary,
                charts=[*self.charts, *(chart(figure) for figure in self.figures)],
                checks=self.checks,
            ),
            *(Section(grid.title, [], grids=[(grid.headings, grid.rows)]) for grid in self.grids),
        ]
        return page(self.title, f"{self.lead} {machine_line(result['environment'])}.", sections, result["command"])

    def png(self, result: dict[str, Any]) -> bytes:
        """The figures as one picture."""
        return picture(self.figures, self.title, f"{machine_line(result['environment'])}; {result['command']}")

    def markdown(self, result: dict[str, Any]) -> str:
        """Everything but the figures as Markdown."""
        parts = [machine_line(result["environment"]), f"Command: `{result['command']}`", "\n".join(self.summary)]
        parts += [f"**{grid.title}**\n\n{grid.markdown()}" for grid in self.grids]
        return "\n\n".join(part for part in parts if part)
