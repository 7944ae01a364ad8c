"""Where the engine is measured to be faster than PyTorch's SDPA, for problems that both can run.

The defaults were measured by benchmarks/sweep.py; docs/performance/log.md has the figures. `heedful tune` measures
them on the machine at hand. What SDPA would need a dense mask for is the engine's: building the mask alone costs more
than many a call.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from heedful.backend.native import library
from heedful.backend.sdpa import lower
from heedful.problem import Problem, known

logger = logging.getLogger("heedful")

TABLE_VERSION = 1

_PAIRS = {"float32": 8192, "float64": 8192, "bfloat16": 512, "float16": 256}
# few_pairs: below so many query-key pairs a call is its overhead, and SDPA's is smaller. In 16 bit SDPA catches up
# later. few_queries: with so few to a head of its own keys, SDPA multiplies them where they lie, and packing them costs
# more than it saves, as long as they come from the cache, cached_bytes. engine: its own constants, 0 for its choice.
DEFAULTS: dict[str, dict[str, Any]] = {
    tier: {"few_pairs": _PAIRS, "few_queries": few_queries, "cached_bytes": 32 << 20, "engine": {}}
    for tier, few_queries in (("neon", 4), ("avx2", 4), ("avx512", 1), ("avx512_bf16", 1))
}

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# No functools.cache: torch.compile would trace into the function behind it.
_table: dict[str, Any] | None = None
_table_loaded = False


def native_is_faster(problem: Problem) -> bool:
    """Whether to run a problem on the engine rather than on SDPA.

    Depends on the problem, the instruction set and the tuning table alone, not on the number of threads: the choice
    decides the bits of the result.
    """
    if lower(problem).dense:
        return True
    return engine_pays(
        problem.dtype,
        problem.batch,
        problem.heads,
        problem.kv_heads,
        problem.q_length,
        problem.k_length,
        problem.head_dim,
    )


def engine_pays(
    dtype: torch.dtype, batch: int, heads: int, kv_heads: int, q_length: int, k_length: int, head_dim: int
) -> bool:
    """Whether the engine is the faster one where SDPA has a kernel too and nothing has to be made for it."""
    table = load_table()
    if table is None:
        # Without fused multiply-adds the engine reaches a third of what PyTorch's own libraries do.
        return False
    if known(batch * heads * q_length * k_length < table["few_pairs"][_DTYPES[dtype]]):
        return False
    if dtype.itemsize < 4 or heads != kv_heads:
        return True
    key_bytes = batch * kv_heads * k_length * head_dim * 2 * dtype.itemsize
    return not (known(q_length <= table["few_queries"]) and known(key_bytes <= table["cached_bytes"]))


def load_table() -> dict[str, Any] | None:
    """The thresholds of this process, as in `DEFAULTS`; None for a tier that has none. Sets the engine's constants.

    They come from the table that `heedful tune` stored, or from the one that HEEDFUL_TUNING names ("off" for none),
    if it was measured on this processor and tier; otherwise a log line says why not. Read once.

    Raises:
        ImportError: where there is no engine.
    """
    global _table, _table_loaded
    if not _table_loaded:
        _table, _table_loaded = _read_table(), True
    return _table


def _read_table() -> dict[str, Any] | None:
    tier = library.isa_names()[library.isa_selected()]
    path = _path()
    if path is None:
        return DEFAULTS.get(tier)
    try:
        table = json.loads(path.read_text())
        why = _mismatch(table, tier)
    except (OSError, ValueError) as error:
        why = str(error)
    if why is None:
        why = _set_constants(table["engine"])
    if why is not None:
        logger.warning("the tuning table %s is not used: %s", path, why)
        return DEFAULTS.get(tier)
    return {name: table[name] for name in ("few_pairs", "few_queries", "cached_bytes", "engine")}


def _set_constants(values: dict[str, int]) -> str | None:
    """Why the engine does not take these values for its constants, which then are its own choice; None if it does."""
    try:
        for name, value in values.items():
            library.tune(name, value)
    except ValueError as error:
        for name in values:
            library.tune(name, 0)
        return str(error)
    return None


def _path() -> Path | None:
    chosen = os.environ.get("HEEDFUL_TUNING")
    if chosen:
        return None if chosen == "off" else Path(chosen)
    from heedful.measure.tuning import table_path

    path = table_path()
    return path if os.path.exists(path) else None


def _mismatch(table: Any, tier: str) -> str | None:
    """Why a table is not this machine's, or None."""
    from heedful.measure.machine import cpu_model

    if not isinstance(table, dict):
        return "it is no JSON object"
    here = {"version": TABLE_VERSION, "tier": tier, "cpu": cpu_model()}
    for name, wanted in here.items():
        if table.get(name) != wanted:
            return f"its {name} is {table.get(name)!r}, here it is {wanted!r}"
    pairs, engine = table.get("few_pairs"), table.get("engine")
    if not isinstance(pairs, dict) or not all(_is_count(pairs.get(dtype)) for dtype in _PAIRS):
        return f"few_pairs is {pairs!r}, and takes a count for each of {', '.join(_PAIRS)}"
    for name in ("few_queries", "cached_bytes"):
        if not _is_count(table.get(name)):
            return f"{name} is {table.get(name)!r}, and takes a count"
    if not isinstance(engine, dict) or not all(_is_count(value) for value in engine.values()):
        return f"engine is {engine!r}, and takes counts by name"
    unknown = engine.keys() - library.tuning().keys()
    return f"this engine has no constant {', '.join(sorted(unknown))}" if unknown else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
