"""The structures of the engine's C interface (engine/include/heedful.h) as ctypes sees them."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3, "int32": 4, "bool": 5, "int64": 6}


_FIELDS = struct.Struct("@Qii4q4q")
_DATA = object.__basicsize__
_READABLE = (
    sys.implementation.name == "cpython"
    and ctypes.c_size_t.from_address(id(_probe := np.zeros(1)) + _DATA).value == _probe.ctypes.data
)


def address(array: npt.NDArray[Any]) -> int:
    """Where a numpy array's first element lies."""
    # The first field of numpy's public struct; through array.ctypes it takes 1.3 µs and not 0.2.
    return ctypes.c_size_t.from_address(id(array) + _DATA).value if _READABLE else array.ctypes.data


class EngineTensor(ctypes.Structure):
    """``heedful_tensor``: a view of memory that the caller owns, with strides in elements; without data, none."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    )

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> EngineTensor:
        """The view of a CPU tensor of at most 4 dimensions, which must outlive it."""
        if tensor is None:
            return cls()
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise TypeError(f"tensor has dtype {tensor.dtype}, and takes one of {', '.join(DTYPES)}")
        if tensor.device.type != "cpu" or tensor.ndim > 4:
            raise ValueError(f"tensor is {tensor.ndim}-D on {tensor.device}, and takes at most 4-D on the CPU")
        size, stride = (tensor.shape, tensor.stride()) if tensor.ndim else ((1,), (1,))
        four = ctypes.c_int64 * 4
        return cls(tensor.data_ptr(), DTYPES[name], len(size), four(*size), four(*stride))

    @classmethod
    def of_array(cls, array: npt.NDArray[Any], dtype: str) -> EngineTensor:
        """The view of a numpy array of 1 to 4 dimensions, strides a multiple of its elements, which must outlive it."""
        size, rest = array.itemsize, (0,) * (4 - array.ndim)
        strides = [stride // size for stride in array.strides]
        # Half the time that ctypes takes to fill the fields.
        return cls.from_buffer_copy(
            _FIELDS.pack(address(array), DTYPES[dtype], array.ndim, *array.shape, *rest, *strides, *rest)
        )


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


class EngineThreads(ctypes.Structure):
    """``heedful_threads``: how many threads a call may use, and who runs them."""

    _fields_ = (("count", ctypes.c_int64), ("run", ctypes.c_void_p), ("pool", ctypes.c_void_p))


class EngineFeatures(ctypes.Structure):
    """``heedful_features``: what happens to scores before the softmax and to weights after it; zeros for nothing."""

    _fields_ = (
        *((name, EngineTensor) for name in ("bias", "alibi_slopes", "query_offset", "sinks")),
        ("softcap", ctypes.c_double),
        ("dropout_p", ctypes.c_double),
        ("seed", ctypes.c_uint64),
    )


class EngineForward(ctypes.Structure):
    """``heedful_forward``: the arguments of one forward call."""

    _fields_ = (
        *((name, EngineTensor) for name in ("query", "key", "value", "out", "lse")),
        ("scale", ctypes.c_double),
        ("schedule", EngineSchedule),
        ("features", EngineFeatures),
        ("pages", EngineTensor),
    )


class EngineBackward(ctypes.Structure):
    """``heedful_backward``: the arguments of one backward call."""

    _fields_ = (
        *(
            (name, EngineTensor)
            for name in ("query", "key", "value", "out", "lse", "grad_out", "grad_lse", "grad_weights")
        ),
        *(
            (name, EngineTensor)
            for name in ("grad_query", "grad_key", "grad_value", "delta", "grad_bias", "grad_slopes")
        ),
        ("scale", ctypes.c_double),
        ("schedule", EngineSchedule),
        ("features", EngineFeatures),
    )


class EngineWeights(ctypes.Structure):
    """``heedful_weights``: the arguments of one call for weights or for how many of them there are."""

    _fields_ = (
        *(
            (name, EngineTensor)
            for name in ("query", "key", "lse", "weights", "values", "indices", "row_begin", "counts")
        ),
        ("scale", ctypes.c_double),
        ("schedule", EngineSchedule),
        ("features", EngineFeatures),
    )
