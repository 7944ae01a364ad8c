"""One self-contained HTML page: no script, no font, no picture and no style from anywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from .figure import DARK, LIGHT


def _series_style() -> str:
    """Colours of numbered series; a dot is filled, a line drawn."""
    rules = "".join(
        f"svg .s{n} {{ stroke: var(--s{n}); }} svg .dot.s{n} {{ fill: var(--s{n}); stroke: none; }}\n" for n in range(8)
    )
    light, dark = (" ".join(f"--s{n}: {colour};" for n, colour in enumerate(colours)) for colours in (LIGHT, DARK))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{rules}"


LONGEST_FIGURE = 48
SERIES = _series_style()
STYLE = (
    """
:root { color-scheme: light dark; --ink: #1d2321; --soft: #5c6663; --paper: #fbfbf9; --card: #ffffff; --line: #dfe3e0;
  --ours: #1f7a5c; --theirs: #b3bab7; --good: #1f7a5c; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eae8; --soft: #9aa5a1; --paper: #121615; --card: #1a201e;
  --line: #2d3532; --ours: #4fc79d; --theirs: #56615d; --good: #4fc79d; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .4rem 0; max-width: 44rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.4rem 1.5rem;
  margin-top: 1.4rem; }
.soft { color: var(--soft); }
.verdict { display: inline-block; font-weight: 600; padding: .3rem .8rem; border-radius: 6px; margin: .6rem 0 .2rem;
  border: 1.5px solid currentColor; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1rem 0; padding: 0; list-style: none; }
.figures b { display: block; font-size: 1.7rem; line-height: 1.15; font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: .9rem; }
svg { display: block; width: 100%; max-width: 40rem; height: auto; margin: 1.1rem 0; }
svg text { fill: var(--ink); font-size: 14px; dominant-baseline: middle; }
svg .chart-title { font-weight: 600; dominant-baseline: auto; }
svg .label { fill: var(--soft); }
svg .bar { fill: var(--theirs); }
svg .ours { fill: var(--ours); }
svg .tick { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); }
svg .line { fill: none; stroke-width: 2; }
svg .rule { fill: none; stroke-width: 1.5; stroke-dasharray: 5 4; }
svg .neutral { stroke: var(--soft); } svg .dot.neutral { fill: var(--soft); stroke: none; }
"""
    + SERIES
    + """.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
td span { font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
"""
)


@dataclass(frozen=True)
class Section:
    """A part of the page. figures are (value, what it is); charts are SVG; facts are (name, value);
    grids are (headings, rows of text)."""

    title: str
    paragraphs: Sequence[str]
    figures: Sequence[tuple[str, str]] = ()
    charts: Sequence[str] = ()
    checks: Sequence[dict[str, Any]] = ()
    facts: Sequence[tuple[str, str]] = field(default=())
    grids: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]] = ()
    failure: str | None = None


def page(title: str, lead: str, sections: Sequence[Section], command: str) -> str:
    """The whole document. Everything but the charts is escaped here.

    The verdict on top counts every check of every section; a section that could not run counts as failed.
    """
    checks = [check for section in sections for check in section.checks]
    failed = sum(not check["passed"] for check in checks) + sum(section.failure is not None for section in sections)
    if failed:
        verdict = f'<p class="verdict bad">FAILED: {failed} of {len(checks)} checks or parts</p>'
    else:
        what = "The check" if len(checks) == 1 else f"All {len(checks)} checks"
        verdict = f'<p class="verdict good">{what} passed</p>'
    body = "\n".join(map(_section, sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="soft">{escape(lead)}</p>
{verdict}
{body}
<p class="soft">Made by <code>{escape(command)}</code>.</p>
</main>
</body>
</html>
"""


def check_numbers(check: dict[str, Any]) -> str:
    """Measured and allowed, as in "2.1e-07 ≤ 1e-05"."""
    relation = "≥" if check["at_least"] else "≤"
    return f"{_number(check['measured'])} {relation} {_number(check['limit'])}"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.7f}" if 0.9 < value < 1 else f"{value:.3g}"


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>"]
    if section.failure is not None:
        parts.append(f'<p class="verdict bad">FAILED: {escape(section.failure)}</p>')
    parts += [f"<p>{escape(text)}</p>" for text in section.paragraphs]
    if section.figures:
        items = "".join(
            f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in section.figures
        )
        parts.append(f'<ul class="figures">{items}</ul>')
    parts += section.charts
    if section.checks:
        parts.append("<h3>Checks</h3>")
        rows = (
            (_verdict(c), escape(c["name"]), f"<span>{check_numbers(c)}</span>", escape(c["derivation"]))
            for c in section.checks
        )
        parts.append(_table(("verdict", "check", "measured, allowed", "where the allowance comes from"), rows))
    if section.facts:
        parts.append("<h3>What ran</h3>" if section.checks else "")
        rows_of_facts = ((escape(name), escape(value)) for name, value in section.facts)
        parts.append(_table(("", ""), rows_of_facts))
    for headings, rows_of_text in section.grids:
        cells = ([_cell(cell) for cell in row] for row in rows_of_text)
        parts.append(_table([escape(heading) for heading in headings], cells))
    return "\n".join([*parts, "</section>"])


def _cell(text: str) -> str:
    """A figure stays on one line; the page scrolls sideways where there are many. Sentences are wrapped."""
    return f"<span>{escape(text)}</span>" if len(text) <= LONGEST_FIGURE else escape(text)


def _verdict(check: dict[str, Any]) -> str:
    return '<b class="good">passed</b>' if check["passed"] else '<b class="bad">FAILED</b>'


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; without a header row where every heading is empty."""
    head = f"<tr>{''.join(f'<th>{heading}</th>' for heading in headings)}</tr>" if any(headings) else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}{body}</table></div>'
