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

if TYPE_CHECKING:
    import torch

ABI_VERSION = 1
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3, "int32": 4, "bool": 5}

_operators_lock = threading.Lock()
_operators_loaded = False


class EngineTensor(ctypes.Structure):
    """``heedful_tensor``: a view of memory that the caller owns, with strides in elements."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    )

    @classmethod
    def of(cls, tensor: torch.Tensor) -> EngineTensor:
        """The view of a CPU tensor of at most 4 dimensions, which must outlive it."""
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise TypeError(f"tensor has dtype {tensor.dtype}, and takes one of {', '.join(DTYPES)}")
        if tensor.device.type != "cpu" or tensor.ndim > 4:
            raise ValueError(f"tensor is {tensor.ndim}-D on {tensor.device}, and takes at most 4-D on the CPU")
        size, stride = (tensor.shape, tensor.stride()) if tensor.ndim else ((1,), (1,))
        four = ctypes.c_int64 * 4
        return cls(tensor.data_ptr(), DTYPES[name], len(size), four(*size), four(*stride))


class EngineSchedule(ctypes.Structure):
    """``heedful_schedule``: the encoded atoms and the tensors that their slots refer to."""

    _fields_ = (
        ("code", ctypes.POINTER(ctypes.c_int64)),
        ("code_length", ctypes.c_int64),
        ("operands", ctypes.POINTER(EngineTensor)),
        ("operand_count", ctypes.c_int64),
    )

    @classmethod
    def of(cls, code: Sequence[int], operands: Sequence[torch.Tensor]) -> EngineSchedule:
        """The schedule of this code over these CPU operands, which must outlive it."""
        return cls(
            (ctypes.c_int64 * len(code))(*code),
            len(code),
            (EngineTensor * len(operands))(*map(EngineTensor.of, operands)),
            len(operands),
        )


class EngineForward(ctypes.Structure):
    """``heedful_forward``: the arguments of one forward call."""

    _fields_ = (
        *((name, EngineTensor) for name in ("query", "key", "value", "out", "lse")),
        ("scale", ctypes.c_double),
        ("schedule", EngineSchedule),
    )


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
    signatures: dict[str, tuple[type, tuple[type, ...]]] = {
        "heedful_attention_forward": (ctypes.c_int, (ctypes.POINTER(EngineForward), ctypes.c_void_p)),
        "heedful_error_message": (ctypes.c_char_p, ()),
        "heedful_version": (ctypes.c_char_p, ()),
        "heedful_isa_count": (index, ()),
        "heedful_isa_name": (ctypes.c_char_p, (index,)),
        "heedful_isa_runnable": (index, (index,)),
        "heedful_isa_selected": (index, ()),
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
        message = engine().heedful_error_message().decode()
        raise MemoryError(message) if status == 3 else ValueError(message)


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
) -> None:
    """Run the engine's forward on the calling thread, into tensors that the caller made.

    query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv) and out (B, H, Lq, Dv) of one dtype and any
    strides; lse (B, H, Lq) contiguous, float32, or float64 for float64.

    Raises:
        ValueError: where the engine refuses an argument.
        MemoryError: where there is no room for its scratch.
    """
    views = map(EngineTensor.of, (query, key, value, out, lse))
    arguments = EngineForward(*views, scale, EngineSchedule.of(code, operands))
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
        if not hasattr(torch.ops.heedful, "attention_forward"):
            raise ImportError(f"torch {torch.__version__} refused the operators of {path}", path=str(path))
        torch.library.register_fake("heedful::attention_forward", _fake_attention_forward)
        _operators_loaded = True


def _fake_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    operands: Sequence[torch.Tensor],
    schedule: Sequence[int],
    scale: float,
    blhd: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes, dtypes and strides of what the operator returns, for tracing."""
    import torch

    batch, heads, q_length, _ = query.shape
    value_dim = value.shape[3]
    if blhd:
        out = query.new_empty(batch, q_length, heads, value_dim).transpose(1, 2)
    else:
        out = query.new_empty(batch, heads, q_length, value_dim)
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty(batch, heads, q_length, dtype=statistics)
