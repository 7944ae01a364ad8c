"""The engine's two shared objects: where they are, how they are loaded, and the engine's plain functions.

``libheedful_engine.so`` is the engine alone and needs no torch; ``libheedful_torch.so`` registers it as
``torch.ops.heedful.*``. Both lie in ``heedful/_engine``, or in the folder that ``HEEDFUL_ENGINE_DIR`` names.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from heedful.backend.native.structures import (
    DTYPES,
    EngineBackward,
    EngineFeatures,
    EngineForward,
    EngineSchedule,
    EngineTensor,
    EngineThreads,
    EngineWeights,
)
from heedful.errors import wrong_value

if TYPE_CHECKING:
    import torch

ABI_VERSION = 2

_operators_lock = threading.Lock()
_operators_loaded = False


def directory() -> Path:
    """The folder of the shared objects, whether or not they are there."""
    chosen = os.environ.get("HEEDFUL_ENGINE_DIR")
    return Path(chosen) if chosen else Path(__file__).resolve().parents[2] / "_engine"


def _find(name: str) -> Path:
    path = directory() / name
    if not path.exists():
        raise ImportError(
            f"heedful's compiled engine is not there: no {path}. An installation has it (pip install .); "
            "in a source tree, make build puts it there.",
            path=str(path),
        )
    return path


@functools.cache
def engine() -> ctypes.CDLL:
    """The engine's C interface, loaded once.

    Raises:
        ImportError: where it is absent, cannot be loaded, or speaks another version of the interface.
    """
    path = _find("libheedful_engine.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"heedful's compiled engine cannot be loaded: {error}", path=str(path)) from error
    library.heedful_abi_version.restype = ctypes.c_int32
    found = library.heedful_abi_version()
    if found != ABI_VERSION:
        raise ImportError(f"{path} has interface version {found}, and this heedful takes {ABI_VERSION}", path=str(path))
    length, index = ctypes.c_int64, ctypes.c_int32
    schedule, output = ctypes.POINTER(EngineSchedule), ctypes.c_void_p
    threads = ctypes.POINTER(EngineThreads)
    signatures: dict[str, tuple[type | None, tuple[type, ...]]] = {
        "heedful_attention_forward": (ctypes.c_int, (ctypes.POINTER(EngineForward), ctypes.c_void_p)),
        "heedful_attention_backward": (ctypes.c_int, (ctypes.POINTER(EngineBackward), ctypes.c_void_p)),
        "heedful_attention_weights": (ctypes.c_int, (ctypes.POINTER(EngineWeights), ctypes.c_void_p)),
        "heedful_pool_create": (ctypes.c_int, (length, threads)),
        "heedful_pool_destroy": (None, (threads,)),
        "heedful_error_message": (ctypes.c_char_p, ()),
        "heedful_version": (ctypes.c_char_p, ()),
        "heedful_isa_count": (index, ()),
        "heedful_isa_name": (ctypes.c_char_p, (index,)),
        "heedful_isa_runnable": (index, (index,)),
        "heedful_isa_selected": (index, ()),
        "heedful_tuning_count": (index, ()),
        "heedful_tuning_name": (ctypes.c_char_p, (index,)),
        "heedful_tuning_get": (length, (index,)),
        "heedful_tuning_set": (ctypes.c_int, (index, length)),
        "heedful_clear_caches": (length, ()),
        "heedful_peak_flops": (ctypes.c_double, (ctypes.c_int32, ctypes.c_double)),
        "heedful_read_bandwidth": (ctypes.c_double, (ctypes.c_size_t, ctypes.c_double)),
        "heedful_schedule_mask": (ctypes.c_int, (schedule, *[length] * 5, output)),
        "heedful_schedule_tiles": (ctypes.c_int, (schedule, *[length] * 7, output)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def _check(status: int) -> None:
    if status != 0:
        message = error_message()
        raise MemoryError(message) if status == 3 else ValueError(message)


def error_message() -> str:
    """What the last call of this thread that failed said."""
    return str(engine().heedful_error_message().decode())


def version() -> str:
    """The engine's version, as in ``"0.1.0"``."""
    return str(engine().heedful_version().decode())


def isa_names() -> tuple[str, ...]:
    """The instruction-set tiers that the engine was built with, from the plainest up."""
    return tuple(engine().heedful_isa_name(index).decode() for index in range(engine().heedful_isa_count()))


def isa_runnable(index: int) -> bool:
    """Whether this processor has the tier, whatever ``HEEDFUL_ISA`` says."""
    return bool(engine().heedful_isa_runnable(index))


def isa_selected() -> int:
    """The index of the tier in use."""
    return int(engine().heedful_isa_selected())


def tuning() -> dict[str, int]:
    """The engine's own constants by name, 0 for those that its cost model picks."""
    library = engine()
    return {
        library.heedful_tuning_name(index).decode(): int(library.heedful_tuning_get(index))
        for index in range(library.heedful_tuning_count())
    }


def tune(name: str, value: int) -> None:
    """Have the engine use this value for one of its constants; 0 gives the choice back to its cost model.

    Raises:
        ValueError: where the engine has no such constant or refuses the value.
    """
    names = list(tuning())
    if name not in names:
        raise wrong_value("name", repr(name), f"one of {', '.join(map(repr, names))}")
    _check(engine().heedful_tuning_set(names.index(name), value))


def clear_caches() -> int:
    """Free the scratch memory that idle threads keep between calls; return how many bytes it was."""
    return int(engine().heedful_clear_caches())


def peak_flops(dtype_name: str, seconds: float) -> float:
    """Measure one core's multiply-add rate in FLOP/s for a dtype, as in ``"float32"``, on the selected tier."""
    return float(engine().heedful_peak_flops(DTYPES[dtype_name], seconds))


def read_bandwidth(size: int, seconds: float) -> float:
    """Measure one core's read bandwidth in bytes/s over a buffer of ``size`` bytes."""
    return float(engine().heedful_read_bandwidth(size, seconds))


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    code: Sequence[int],
    operands: Sequence[torch.Tensor],
    scale: float,
    *,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    query_offset: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
) -> None:
    """Run the engine's forward on the calling thread, into tensors that the caller made.

    query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv) and out (B, H, Lq, Dv) of one dtype and any
    strides; lse (B, H, Lq) contiguous, float32, or float64 for float64. bias is (B, H, Lq, Lk), where each size may be
    1; alibi_slopes (B or 1, H); sinks (H,); query_offset int32 (B or 1,); with pages, int32 (B, n), key and value are
    pools (blocks, Hkv, P, D or Dv).

    Raises:
        ValueError: where the engine refuses an argument.
        MemoryError: where there is no room for its scratch.
    """
    views = map(EngineTensor.of, (query, key, value, out, lse))
    extras = map(EngineTensor.of, (bias, alibi_slopes, query_offset, sinks))
    features = EngineFeatures(*extras, softcap, dropout_p, seed)
    schedule = EngineSchedule.of(code, operands)
    arguments = EngineForward(*views, scale, schedule, features, EngineTensor.of(pages))
    _check(engine().heedful_attention_forward(arguments, None))


def schedule_mask(
    code: Sequence[int],
    operands: Sequence[torch.Tensor],
    batch: int,
    batch_index: int,
    head_index: int,
    q_length: int,
    k_length: int,
) -> torch.Tensor:
    """Expand a schedule as the kernels do: a bool tensor (Lq, Lk) of the pairs that count for one item and head.

    Raises:
        ValueError: where the engine refuses the code or an operand.
    """
    import torch

    mask = torch.empty(q_length, k_length, dtype=torch.bool)
    schedule = EngineSchedule.of(code, operands)
    _check(
        engine().heedful_schedule_mask(schedule, batch, batch_index, head_index, q_length, k_length, mask.data_ptr())
    )
    return mask


def schedule_tiles(
    code: Sequence[int],
    operands: Sequence[torch.Tensor],
    batch: int,
    batch_index: int,
    head_index: int,
    q_length: int,
    k_length: int,
    tile_q: int,
    tile_k: int,
) -> torch.Tensor:
    """Classify a schedule's tiles as the kernels do: uint8 (⌈Lq/tile_q⌉, ⌈Lk/tile_k⌉), 0 empty, 1 partial, 2 full.

    Raises:
        ValueError: where the engine refuses the code, an operand or a tile size.
    """
    import torch

    if tile_q < 1 or tile_k < 1:
        raise ValueError(f"tile_q and tile_k are {tile_q} and {tile_k}, and take 1 or more")
    tiles = torch.empty(-(-q_length // tile_q), -(-k_length // tile_k), dtype=torch.uint8)
    schedule = EngineSchedule.of(code, operands)
    _check(
        engine().heedful_schedule_tiles(
            schedule, batch, batch_index, head_index, q_length, k_length, tile_q, tile_k, tiles.data_ptr()
        )
    )
    return tiles


def load_operators() -> None:
    """Register ``torch.ops.heedful.*``, once; further calls return at once.

    Raises:
        ImportError: where the shared objects are absent or torch refuses them.
    """
    global _operators_loaded
    if _operators_loaded:
        return
    with _operators_lock:
        if _operators_loaded:
            return
        engine()
        import torch

        path = _find("libheedful_torch.so")
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise ImportError(
                f"heedful's operators cannot be loaded into torch {torch.__version__}: {error}", path=str(path)
            ) from error
        from heedful.backend.native import fakes

        if not all(hasattr(torch.ops.heedful, name) for name in fakes.FAKES):
            raise ImportError(f"torch {torch.__version__} refused the operators of {path}", path=str(path))
        fakes.register()
        _operators_loaded = True
