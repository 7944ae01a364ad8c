"""Where the engine is measured to be faster than PyTorch's SDPA, for problems that both can run.

The defaults were measured by benchmarks/sweep.py and benchmarks/tiny_calls.py; docs/performance/log.md has the figures.
`heedful tune` measures them on the machine at hand. What SDPA would need a dense mask for is the engine's: building the
mask alone costs more than many a call.
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

TABLE_VERSION = 2

# few_pairs: below so many query-key pairs a call is its overhead, and SDPA's is smaller; with gradients by 7 µs, since
# autograd calls the engine through Python. few_queries: with so few to a head of its own keys, in float32 and float64,
# SDPA multiplies them where they lie, and its overhead decides while keys and values are few, cached_bytes; a quarter
# of the queries with gradients, for which the engine reads them in place too. engine: its own constants, 0 for its
# choice.
_PAIRS = {"float32": 64, "float64": 16, "bfloat16": 0, "float16": 0}
_GRADIENT_PAIRS = {"float32": 640, "float64": 512, "bfloat16": 64, "float16": 16}
DEFAULTS: dict[str, dict[str, Any]] = {
    tier: {
        "few_pairs": _PAIRS,
        "few_pairs_gradient": _GRADIENT_PAIRS,
        "few_queries": few_queries,
        "cached_bytes": cached_bytes,
        "engine": {},
    }
    for tier, few_queries, cached_bytes in (
        ("neon", 4, 32 << 20),
        ("avx2", 4, 32 << 20),
        ("avx512", 1, 1 << 20),
        ("avx512_bf16", 1, 1 << 20),
    )
}

# The engine packs a whole vector of keys, however few there are: with so few to the width of a row, in bytes, that is
# most of the call.
FEW_KEYS = 8

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# No functools.cache: torch.compile would trace into the function behind it.
_table: dict[str, Any] | None = None
_table_loaded = False


def native_is_faster(problem: Problem) -> bool:
    """Whether to run a problem on the engine rather than on SDPA.

    Depends on the problem, the instruction set and the tuning table alone, not on the number of threads: the choice
    decides the bits of the result.
    """
    # SDPA's other way, for values of another width than keys, takes ten times as long to begin.
    if lower(problem).dense or (problem.value_dim != problem.head_dim and load_table() is not None):
        return True
    return engine_pays(
        problem.dtype,
        problem.batch,
        problem.heads,
        problem.kv_heads,
        problem.q_length,
        problem.k_length,
        problem.head_dim,
        gradient="gradient" in problem.features,
    )


def engine_pays(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    kv_heads: int,
    q_length: int,
    k_length: int,
    head_dim: int,
    *,
    gradient: bool = False,
) -> bool:
    """Whether the engine is the faster one where SDPA has a kernel too and nothing has to be made for it."""
    table = load_table()
    if table is None:
        # Without fused multiply-adds the engine reaches a third of what PyTorch's own libraries do.
        return False
    few_pairs = table["few_pairs_gradient" if gradient else "few_pairs"][_DTYPES[dtype]]
    if known(batch * heads * q_length * k_length < few_pairs):
        return False
    if dtype.itemsize < 4:
        return True
    if known(k_length * FEW_KEYS * dtype.itemsize <= head_dim):
        return False
    if heads != kv_heads:
        return True
    key_bytes = batch * kv_heads * k_length * head_dim * 2 * dtype.itemsize
    few_queries, cached_bytes = table["few_queries"], table["cached_bytes"]
    if gradient:
        few_queries //= 4
    return not (known(q_length <= few_queries) and known(key_bytes <= cached_bytes))


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
    return {name: table[name] for name in ("few_pairs", "few_pairs_gradient", "few_queries", "cached_bytes", "engine")}


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
    engine = table.get("engine")
    for name in ("few_pairs", "few_pairs_gradient"):
        pairs = table.get(name)
        if not isinstance(pairs, dict) or not all(_is_count(pairs.get(dtype)) for dtype in _PAIRS):
            return f"{name} is {pairs!r}, and takes a count for each of {', '.join(_PAIRS)}"
    for name in ("few_queries", "cached_bytes"):
        if not _is_count(table.get(name)):
            return f"{name} is {table.get(name)!r}, and takes a count"
    if not isinstance(engine, dict) or not all(_is_count(value) for value in engine.values()):
        return f"engine is {engine!r}, and takes counts by name"
    unknown = engine.keys() - library.tuning().keys()
    return f"this engine has no constant {', '.join(sorted(unknown))}" if unknown else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
