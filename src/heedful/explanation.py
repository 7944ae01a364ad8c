"""What `heedful.explain` returns, and how it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heedful.problem import Problem


@dataclass(frozen=True)
class Explanation:
    """What a call would run, and why not the others.

    Attributes:
        backend: the name of the backend that would run; None where `heedful.attention` would raise UnsupportedError.
        reasons: for every backend, why it cannot run the call; an empty list where it can.
        notes: what else there is to know: pieces that run dense, casts, slower roads.
        problem: what the call is, as the backends are asked about it.
        pattern: the call's pattern, as it prints.
        density: the share of the pairs that the pattern allows.
    """

    backend: str | None
    reasons: dict[str, list[str]]
    notes: list[str]
    problem: Problem
    pattern: str
    density: float

    def __str__(self) -> str:
        problem = self.problem
        heads = f"{problem.heads} heads" + (
            "" if problem.heads == problem.kv_heads else f" sharing {problem.kv_heads} of keys and values"
        )
        dims = f"head dim {problem.head_dim}" + (
            "" if problem.head_dim == problem.value_dim else f", value dim {problem.value_dim}"
        )
        facts = {
            "call": f"batch {problem.batch}, {heads}, {problem.q_length} queries, {problem.k_length} keys, {dims}",
            "tensors": f"{str(problem.dtype).removeprefix('torch.')} on {problem.device_type}",
            "pattern": self.pattern,
            "density": f"{100 * self.density:.3g} % of the pairs",
            "needs": ", ".join(sorted(problem.features)) or "the output only",
        }
        lines = _aligned(list(facts.items()))
        rows = [("backend", "verdict", "why")]
        for name, why in self.reasons.items():
            verdict = "runs" if name == self.backend else "cannot" if why else "could"
            rows.append((name, verdict, "; ".join(why)))
        lines += ["", *_aligned(rows)]
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
