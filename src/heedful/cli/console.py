"""Terminal output: rich where someone is looking, plain text in a pipe, results on stdout, progress on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

# In a pipe nobody folds lines for us, and rich would cut tables at 80 columns.
PIPE_WIDTH = 240


def output() -> Console:
    """The console for results."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH, soft_wrap=True)


class Steps:
    """Progress of a known number of steps: a bar on a terminal, one line per step elsewhere."""

    def __init__(self, console: Console, progress: Progress | None, total: float) -> None:
        self._console, self._progress = console, progress
        self._task = progress.add_task("", total=total) if progress else None

    def begin(self, text: str) -> None:
        """Name what is being done now."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)
        else:
            self._console.print(text, markup=False)

    def advance(self, amount: float = 1) -> None:
        """Some of the work is done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, amount)

    def reach(self, amount: float) -> None:
        """So much of the work is done, whatever was told before."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=amount)


@contextmanager
def steps(total: float, *, quiet: bool = False) -> Iterator[Steps]:
    """Progress on stderr over `total` units of work."""
    console = Console(stderr=True, highlight=False, quiet=quiet)
    if quiet or not console.is_terminal:
        yield Steps(console, None, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Steps(console, progress, total)
