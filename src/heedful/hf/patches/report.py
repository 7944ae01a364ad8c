"""What `patch` did."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from heedful.hf.patches.family import undo


class Replaced(NamedTuple):
    """One attention module: its name in the model, its own class, and what its attention is now."""

    name: str
    was: str
    attention: str


@dataclass(frozen=True)
class PatchReport:
    """What `heedful.hf.patch` did to a model.

    Attributes:
        model: the model's class.
        replaced: the attention modules, in the model's order; empty where all had been patched before.
        notes: what is different from the model's own implementation.
        modules: what was changed, the modules that make masks too.
    """

    model: str
    replaced: tuple[Replaced, ...]
    notes: tuple[str, ...]
    modules: tuple[nn.Module, ...] = field(repr=False)

    def undo(self) -> None:
        """Takes back what this report tells of.

        Raises:
            ValueError: as `heedful.hf.unpatch`.
        """
        undo(self.modules)

    def to_json(self) -> str:
        """The report as a JSON object: model, replaced (name, was, attention), notes."""
        return json.dumps(
            {"model": self.model, "replaced": [r._asdict() for r in self.replaced], "notes": list(self.notes)}
        )

    def __str__(self) -> str:
        if not self.replaced:
            return f"{self.model}: patched before, nothing left to do"
        lines = [f"{self.model}: {len(self.replaced)} attention modules run on heedful"]
        groups: dict[tuple[str, str], list[str]] = {}
        for name, was, attention in self.replaced:
            groups.setdefault((was, attention), []).append(name)
        for (was, attention), names in groups.items():
            shown = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
            lines.append(f"  {shown}: {was} → {attention}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
