"""Pictures of the patterns that pages show."""

from __future__ import annotations

import re
import tempfile
from functools import cached_property
from pathlib import Path

import torch

import heedful

LENGTH = 256
BLOCK = re.compile(r"^```python picture\n(?P<code>.*?)^```$", re.M | re.S)


class Picture:
    """The picture of the pattern that is the last line of a block of code."""

    def __init__(self, code: str) -> None:
        self.code = code
        *before, last = code.strip().splitlines()
        self._before, self._last = "\n".join(before), last
        slug = re.sub(r"\W+", "-", last.replace("heedful.", "")).strip("-").lower()
        self.path = f"pictures/{slug}.png"

    @cached_property
    def pattern(self) -> heedful.Pattern:
        names = {"heedful": heedful, "torch": torch}
        torch.manual_seed(0)
        exec(self._before, names)
        found = eval(self._last, names)
        if not isinstance(found, heedful.Pattern):
            raise TypeError(f"a picture takes a pattern, got {self._last}")
        return found

    def png(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pattern.png"
            self.pattern.plot(path, q_length=LENGTH)
            return path.read_bytes()

    def markdown(self, up: str) -> str:
        """The picture beside the code and the density."""
        share = 100 * self.pattern.density(LENGTH, LENGTH)
        return (
            f"```python\n{self.code}```\n\n"
            f"Density at {LENGTH} × {LENGTH}: **{share:.1f} %**.\n\n"
            f"![Tiles of {self._last.replace('heedful.', '')}]({up}{self.path}){{ .pattern }}"
        )
