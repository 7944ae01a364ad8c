"""The matrix: every row asked of every backend, by itself and through each door."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from heedful.backend.base import Backend
from heedful.choose import BACKENDS
from heedful.problem import FEATURES, Problem
from heedful.support.asks import GROUPS, Ask, asks
from heedful.support.doors import DOORS, Door

# The first that a backend takes is what it is asked for in rows about something else.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Verdict:
    """What one backend says of one row.

    Attributes:
        reasons: why it cannot compute the output; empty where it can.
        gradient_reasons: why it cannot give gradients too; None where the row is not asked for them.
    """

    reasons: tuple[str, ...]
    gradient_reasons: tuple[str, ...] | None

    @property
    def forward(self) -> bool:
        """Whether it computes the output."""
        return not self.reasons

    @property
    def gradient(self) -> bool:
        """Whether it was asked for gradients and gives them."""
        return self.gradient_reasons == ()


@dataclass(frozen=True)
class Matrix:
    """What `heedful.support.matrix` found.

    Attributes:
        rows: what was asked for.
        devices: the device type that each backend was asked for.
        backends: by row and backend, the verdict.
        doors: the same by door, for the rows that the door has words for and the backends that it reaches.
    """

    rows: tuple[Ask, ...]
    devices: dict[str, str]
    backends: dict[str, dict[str, Verdict]]
    doors: dict[str, dict[str, dict[str, Verdict]]]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-serialisable data: rows, then a list of cells."""
        cells = [
            {"door": door, "feature": row, "written": written, "backend": backend, "forward": verdict.forward}
            | {"gradient": verdict.gradient, **asdict(verdict)}
            for door, row, written, verdicts in self._cells()
            for backend, verdict in verdicts.items()
        ]
        rows = [{"name": row.name, "title": row.title, "group": row.group} for row in self.rows]
        return {"schema": 1, "features": rows, "devices": self.devices, "cells": cells}

    def _cells(self) -> list[tuple[str | None, str, str | None, dict[str, Verdict]]]:
        found: list[tuple[str | None, str, str | None, dict[str, Verdict]]] = [
            (None, row, None, verdicts) for row, verdicts in self.backends.items()
        ]
        for door in DOORS:
            found += [(door.name, row, door.says[row], v) for row, v in self.doors[door.name].items()]
        return found


def matrix() -> Matrix:
    """Ask every backend for every kind of call, and through every door.

    Nothing is computed, and it does not matter which of the backends can run in this process.

    Returns:
        A `Matrix`; `.to_json()` is what `heedful support --json` prints.
    """
    rows = tuple(sorted(asks(), key=lambda row: GROUPS.index(row.group)))
    devices = {name: home(backend)[0] for name, backend in BACKENDS.items()}
    return Matrix(
        rows,
        devices,
        {row.name: {name: ask(row, backend) for name, backend in BACKENDS.items()} for row in rows},
        {door.name: _through(door, rows) for door in DOORS},
    )


def home(backend: Backend) -> tuple[str, torch.dtype]:
    """The device type and the dtype that a backend is asked for."""
    device = "cpu" if backend.devices is None or "cpu" in backend.devices else min(backend.devices)
    return device, next(dtype for dtype in _DTYPES if dtype in backend.dtypes)


def ask(row: Ask, backend: Backend, gradients: bool = True) -> Verdict:
    """What a backend says of a row."""
    problem = row.problem(*home(backend))
    reasons = _reasons(backend, problem)
    if not (row.gradients and gradients):
        return Verdict(reasons, None)
    return Verdict(reasons, _reasons(backend, problem._replace(features=problem.features | {"gradient"})))


def _reasons(backend: Backend, problem: Problem) -> tuple[str, ...]:
    unknown = problem.features - FEATURES.keys()
    assert not unknown, unknown
    return tuple(backend.not_supported_reasons(problem))


def _through(door: Door, rows: tuple[Ask, ...]) -> dict[str, dict[str, Verdict]]:
    said = [row for row in rows if row.name in door.says]
    assert len(said) == len(door.says), door.says.keys() - {row.name for row in said}
    backends = {name: backend for name, backend in BACKENDS.items() if door.backends is None or name in door.backends}
    return {row.name: {name: ask(row, b, door.gradients) for name, b in backends.items()} for row in said}
