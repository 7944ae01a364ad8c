"""What callers hand over as arrays, as numpy arrays that the engine can read where they lie, or a copy of them."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from heedful.checks import what
from heedful.errors import wrong_type, wrong_value

Array = npt.NDArray[Any]

_DTYPES: dict[str, type[np.floating[Any]]] = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
}
# Looked up, because numpy takes 2 µs to make a dtype's name.
_PRECISIONS = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_NAMES = {
    **{name: name for name in (*_DTYPES, "bfloat16")},
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
}
_TAKES = "float16, bfloat16, float32 or float64"

# Of DLPack (dlpack.h): the CPU's device type, a type code of bfloat16 and of unsigned integers, and where a tensor's
# type code lies in what the capsules of either name hold.
_CPU, _UINT, _BFLOAT = 1, 1, 4
_CODE_OFFSETS = {b"dltensor": 20, b"dltensor_versioned": 52}


class Given(NamedTuple):
    """An argument as the engine reads it."""

    array: Array
    """Aligned, strides too, and in the machine's byte order; bfloat16 as its bits, uint16."""
    precision: str
    copied: str | None = None
    """Why it is a copy; None where it is the caller's memory."""


def given(name: str, value: object) -> Given:
    """A float argument, without a copy where that can be.

    Raises:
        TypeError: it is no array, not on the CPU, or of another dtype.
    """
    array, is_bfloat16 = imported(name, value)
    precision = "bfloat16" if is_bfloat16 else _PRECISIONS.get(array.dtype) or array.dtype.name
    if precision == "bfloat16":
        array = array.view(np.uint16)
    elif precision not in _DTYPES:
        raise wrong_type(name, f"dtype {array.dtype}", _TAKES)
    why = unreadable(array)
    if why is not None:
        array = array.astype(array.dtype.newbyteorder("="), order="C", copy=True)
    return Given(array, precision, why)


def imported(name: str, value: object) -> tuple[Array, bool]:
    """A numpy array over the memory of one, of what exports DLPack, or of a buffer; True where its uint16 are bfloat16.

    Raises:
        TypeError: `value` is none of these, or not on the CPU.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise wrong_type(name, "a masked array", "an array without a mask; attn_mask= leaves out keys")
    if isinstance(value, np.ndarray):
        return np.asarray(value), False
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(name, value)
    if hasattr(value, "__array_interface__") or hasattr(value, "__array__"):
        return np.asarray(value), False
    try:
        return np.asarray(memoryview(value)), False  # type: ignore[arg-type]
    except TypeError:
        raise wrong_type(name, what(value), "a numpy array, or what exports DLPack or a buffer") from None


def unreadable(array: Array) -> str | None:
    """Why the engine cannot read an array where it lies, None where it can."""
    if not array.dtype.isnative:
        return "in another byte order"
    return None if array.flags.aligned else "not aligned"


def cast(of: Given, precision: str) -> Given:
    """The same in another precision: rounded to the nearest, ties to even."""
    if of.precision == precision:
        return of
    array = widened(of.array) if of.precision == "bfloat16" else of.array
    array = _bfloat16_bits(array) if precision == "bfloat16" else array.astype(_DTYPES[precision], order="C")
    return Given(array, precision, f"cast from {of.precision} to {precision}")


def precision_of(name: str, value: object) -> str | None:
    """The precision that an option names: "fp16", "float16", np.float16 and the like; None for None."""
    if value is None:
        return None
    if isinstance(value, str):
        found = _NAMES.get(value.lower())
    else:
        try:
            found = _NAMES.get(np.dtype(value).name)  # type: ignore[call-overload]
        except TypeError:
            found = None
    if found is None:
        raise wrong_value(name, what(value), "'fp16', 'bf16', 'fp32', 'fp64', a dtype of these, or None")
    return found


def wider(a: str, b: str) -> str:
    """The precision that holds every number of both."""
    if a == b:
        return a
    return "float64" if "float64" in (a, b) else "float32"


def dtype_of(precision: str) -> np.dtype[Any]:
    """numpy's dtype for a precision.

    Raises:
        TypeError: for bfloat16 where ml_dtypes is not installed.
    """
    return bfloat16_dtype() if precision == "bfloat16" else np.dtype(_DTYPES[precision])


def storage_dtype(precision: str) -> np.dtype[Any]:
    """What arrays of a precision are in `Given`."""
    return np.dtype(np.uint16 if precision == "bfloat16" else _DTYPES[precision])


def bfloat16_dtype() -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        raise wrong_type(
            "output_precision",
            "bfloat16 and no out=, while ml_dtypes, which has numpy's bfloat16, is not installed",
            "'fp32' or another precision of numpy's own then",
        ) from None
    return dtype


def widened(bits: Array) -> Array:
    """bfloat16, given by its bits, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bfloat16_bits(array: Array) -> Array:
    single = np.ascontiguousarray(array, np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(single), 0x7FC0, rounded).astype(np.uint16).reshape(array.shape)


class _AsUnsigned:
    """A bfloat16 tensor that exports itself as uint16, which numpy takes."""

    def __init__(self, exporter: Any) -> None:
        self.exporter = exporter

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU, 0

    def __dlpack__(self, **options: Any) -> object:
        try:
            capsule = self.exporter.__dlpack__(**options)
        except TypeError:
            # An exporter from before the protocol had options.
            capsule = self.exporter.__dlpack__()
        name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
        name.restype, name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        kind = name(capsule)
        code = ctypes.c_uint8.from_address(pointer(capsule, kind) + _CODE_OFFSETS[kind])
        if code.value != _BFLOAT:
            raise BufferError(f"DLPack's type code {code.value}")
        code.value = _UINT
        return capsule


def _from_dlpack(name: str, value: Any) -> tuple[Array, bool]:
    device = value.__dlpack_device__()
    if int(device[0]) != _CPU:
        raise wrong_type(name, f"an array on DLPack's device {tuple(map(int, device))}", "an array on the CPU")
    exporter: Any
    for exporter, is_bfloat16 in ((value, False), (_AsUnsigned(value), True)):
        try:
            return np.from_dlpack(exporter), is_bfloat16
        except (BufferError, RuntimeError, TypeError) as error:
            failure = error
    raise wrong_type(name, f"an array that cannot be shared ({failure})", _TAKES)
