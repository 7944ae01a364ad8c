"""Cases measured one after another, so that Ctrl-C loses only the one that was running."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

Case = TypeVar("Case")
Result = TypeVar("Result")


class Progress(Protocol):
    """Who wants to know how far a measurement is."""

    def begin(self, text: str) -> None:
        """Name what is being done now."""

    def advance(self, amount: float = 1) -> None:
        """Some of the work is done."""


def collect(
    cases: Iterable[Case], run: Callable[[Case], Result], progress: Progress, name: Callable[[Case], str] = str
) -> tuple[list[Result], bool]:
    """Results of the cases in their order, and whether Ctrl-C ended it before the last one."""
    done: list[Result] = []
    try:
        for case in cases:
            progress.begin(name(case))
            done.append(run(case))
            progress.advance()
    except KeyboardInterrupt:
        return done, True
    return done, False
