"""Results reach the disk whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write content to path through a temporary file in the same folder and a rename.

    A reader sees the old file or the new one, never a part; on an error the old file stays and nothing is left behind.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes the file private; a result is meant to be read by others, as far as the umask allows.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Serialise first, then write atomically, so that a value that is no JSON leaves the old file alone."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_block(path: str | Path, marker: str) -> str:
    """The text of a file that has `<!-- marker:begin -->` and, after it, `<!-- marker:end -->`, each once.

    Raises:
        ValueError: the file does not have exactly one such pair of markers, in that order.
    """
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    text = Path(path).read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path} must hold {begin} and, after it, {end}, each once")
    return text


def replace_block(path: str | Path, marker: str, content: str) -> None:
    """Replace what stands between `<!-- marker:begin -->` and `<!-- marker:end -->` in a file, atomically.

    Raises:
        ValueError: the file does not have exactly one such pair of markers, in that order.
    """
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    text = check_block(path, marker)
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    write_atomically(path, f"{head}{begin}\n{content.strip()}\n{end}{tail}")
