"""One call as the engine takes it, made once for all calls that differ in addresses alone.

To fill the engine's structures through ctypes takes 25 µs, to put a few addresses into filled ones takes half of one.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from heedful.backend.native import library
from heedful.backend.native.structures import (
    EngineFeatures,
    EngineForward,
    EngineSchedule,
    EngineTensor,
    EngineWeights,
    address,
)
from heedful.numpy.arrays import Array, storage_dtype
from heedful.numpy.errors import MFAError
from heedful.numpy.request import Request, in_index_order

_FEATURES = EngineForward.features.offset
# Where the addresses lie, in words of 64 bits.
QUERY, KEY, VALUE, OUT, LSE = (
    getattr(EngineForward, name).offset // 8 for name in ("query", "key", "value", "out", "lse")
)
_EXTRAS = ((_FEATURES + getattr(EngineFeatures, name).offset) // 8 for name in ("bias", "alibi_slopes", "sinks"))
_ADDRESSES = (QUERY, KEY, VALUE, OUT, LSE, *_EXTRAS)

# Up to so many products of two numbers, 2 µs of them, a call stays on its own thread: to have others join takes longer.
_PRODUCTS_ALONE = 1 << 14


@functools.cache
def _forward() -> Any:
    """The engine's function without argument types: references that were made before need no conversion."""
    function = library.engine()["heedful_attention_forward"]
    function.restype = ctypes.c_int
    return function


class Frame:
    """The structures of one call that runs, with `words` over them to put addresses into."""

    __slots__ = ("forward", "operands", "reference", "words")

    def __init__(self, template: bytes, operands: int) -> None:
        self.forward = EngineForward.from_buffer_copy(template)
        self.operands = (EngineTensor * operands)()
        self.forward.schedule.operands = self.operands
        self.reference = ctypes.byref(self.forward)
        self.words = memoryview(self.forward).cast("B").cast("Q")


class Prepared:
    """A kind of calls: what the engine is told of them, and what their outputs are like."""

    def __init__(self, request: Request, out_dtype: np.dtype[Any], return_lse: bool, return_weights: bool) -> None:
        batch, heads, q_length, _ = request.query.shape
        self.sizes = batch, heads, q_length, request.key.shape[2]
        self.out_shape, self.out_dtype = request.out_shape(), out_dtype
        self.precision = request.precision
        self.statistics = np.dtype(np.float64 if request.precision == "float64" else np.float32)
        self.lse_shape, self.weights_shape = request.shape(*self.sizes[:3]), request.shape(*self.sizes)
        self.return_lse, self.return_weights = return_lse, return_weights
        self.slots = request.pattern.schedule.slots
        products = batch * heads * q_length * self.sizes[3] * (request.query.shape[3] + request.value.shape[3])
        self.shared = products > _PRODUCTS_ALONE
        self.plain = not (self.slots or return_lse or return_weights)
        self.odd = storage_dtype(request.precision).itemsize - 1
        """The bits of an address that are zero where an array can be read."""
        self._code = request.pattern.schedule.encode()
        self._numbers = (ctypes.c_int64 * len(self._code))(*self._code)
        self._template = self._structure(request)
        self.forward = _forward()
        self.idle = [self.frame()]
        """Frames that no call uses."""

    def frame(self) -> Frame:
        return Frame(self._template, self.slots)

    def run(
        self,
        threads: object,
        query: Array,
        key: Array,
        value: Array,
        out: Array,
        lse: Array | None = None,
        weights: Array | None = None,
        bias: Array | None = None,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        operands: tuple[Array, ...] = (),
    ) -> None:
        """Runs one call of this kind. `threads` is a reference to the engine's structure, used where it pays.

        Raises:
            MFAError: where the engine does not.
        """
        try:
            frame = self.idle.pop()
        except IndexError:
            frame = self.frame()
        words = frame.words
        for word, array in zip(_ADDRESSES, (query, key, value, out, lse, bias, alibi_slopes, sinks), strict=True):
            words[word] = 0 if array is None else address(array)
        for slot, operand in enumerate(operands):
            frame.operands[slot] = EngineTensor.of_array(operand, "bool" if operand.ndim == 4 else "int32")
        status = self.forward(frame.reference, threads if self.shared else None)
        if status == 0 and weights is not None:
            status = library.engine().heedful_attention_weights(self._weights(frame.forward, weights), threads)
        self.idle.append(frame)
        if status:
            raise failure(status)

    def _structure(self, request: Request) -> bytes:
        """An `EngineForward` without addresses."""
        out = request.out
        if out is None or "out" in request.copied:
            out = np.empty(self.out_shape, storage_dtype(self.precision))
        shaped = [request.query, request.key, request.value, in_index_order(out)]
        views = [EngineTensor.of_array(array, self.precision) for array in shaped]
        views.append(EngineTensor.of_array(np.empty(self.sizes[:3], self.statistics), self.statistics.name))
        extras = [
            EngineTensor() if array is None else EngineTensor.of_array(array, self._extra_precision(array))
            for array in (request.bias, request.alibi_slopes, None, request.sinks)
        ]
        features = EngineFeatures(*extras, request.softcap, 0.0, 0)
        schedule = EngineSchedule(self._numbers, len(self._code), None, self.slots)
        structure = EngineForward(*views, request.scale, schedule, features, EngineTensor())
        words = memoryview(structure).cast("B").cast("Q")
        for word in _ADDRESSES:
            words[word] = 0
        return bytes(structure)

    def _extra_precision(self, array: Array) -> str:
        return "float32" if array.dtype == np.float32 else self.precision

    def _weights(self, of: EngineForward, weights: Array) -> EngineWeights:
        view = EngineTensor.of_array(weights.reshape(self.sizes), self.precision)
        none = [EngineTensor() for _ in range(4)]
        return EngineWeights(of.query, of.key, of.lse, view, *none, of.scale, of.schedule, of.features)


def failure(status: int) -> MFAError:
    return MFAError(status, library.error_message())
