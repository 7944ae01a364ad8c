"""Tiles that `heedful tune --gpu` measured on this machine's device, in place of those that tuning.py ships."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from heedful.backend.triton.tuning import Tiles
from heedful.measure.tuning import table_path

logger = logging.getLogger("heedful")

TABLE_VERSION = 1


def gpu_table_path() -> Path:
    """The file of this user's table of tiles, whether or not there is one: tuning_gpu.json beside the engine's."""
    return table_path().with_name("tuning_gpu.json")


def stored_tiles() -> dict[tuple[object, ...], Tiles]:
    """The tiles of the stored table, by what `forward_tiles` and `backward_tiles` are asked for.

    HEEDFUL_GPU_TUNING names another file, or "off" for none. A table of another device, of another triton or of
    another heedful is not used, and a log line says so.
    """
    chosen = os.environ.get("HEEDFUL_GPU_TUNING")
    path = Path(chosen) if chosen else gpu_table_path()
    if chosen == "off" or not (chosen or path.exists()):
        return {}
    try:
        table = json.loads(path.read_text())
        why = mismatch(table)
        if why is None:
            return {_key(entry["of"]): Tiles(*entry["tiles"]) for entry in table["entries"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
    logger.warning("the tuning table %s is not used: %s", path, why)
    return {}


def mismatch(table: Any) -> str | None:
    """Why a table is not one for this process."""
    if not isinstance(table, dict) or table.get("version") != TABLE_VERSION:
        return f"it is not of version {TABLE_VERSION}"
    for name, here in identity().items():
        if table.get(name) != here:
            return f"it was measured with {name} {table.get(name)!r}, and here it is {here!r}"
    return None


def identity() -> dict[str, str]:
    """What tiles depend on, beside a call."""
    from heedful import __version__

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "triton": importlib.metadata.version("triton"),
        "heedful": __version__,
    }


def encoded_key(key: tuple[Any, ...]) -> list[Any]:
    """Arguments of `forward_tiles` or `backward_tiles` as JSON."""
    return [str(part).removeprefix("torch.") if isinstance(part, torch.dtype) else part for part in key]


def _key(of: list[Any]) -> tuple[object, ...]:
    return (of[0], getattr(torch, of[1]), *of[2:])
