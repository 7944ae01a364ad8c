"""One verdict of a numerical check: what was measured, what was allowed, and where the allowance comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """A measured value held against a limit; NaN never passes.

    measured may not exceed limit, or fall below it where at_least is set. derivation says in words why the limit is
    what it is.
    """

    name: str
    measured: float
    limit: float
    derivation: str
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """Whether the measured value keeps the limit."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def to_json(self) -> dict[str, Any]:
        """The fields and the verdict; a value that JSON cannot hold becomes its name as text."""
        fields = asdict(self) | {"passed": self.passed}
        if not math.isfinite(self.measured):
            fields["measured"] = str(self.measured)
        return fields


def all_passed(checks: Iterable[Check]) -> bool:
    """Whether there is at least one check and none has failed: an unchecked result counts as red."""
    verdicts = [check.passed for check in checks]
    return bool(verdicts) and all(verdicts)
