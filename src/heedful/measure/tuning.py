"""Where the table that `heedful tune` measures is kept. Light to import, because attention looks here for it."""

from __future__ import annotations

import os
from pathlib import Path


def table_path() -> Path:
    """The file of this user's table, whether or not there is one: $XDG_CACHE_HOME or ~/.cache, heedful/tuning.json."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "heedful" / "tuning.json"
