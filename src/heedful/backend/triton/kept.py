"""Work that is put together once and repeated by the bridge: a few microseconds from the front door to the launch.

`Work` in Python costs about as much as PyTorch's whole call. So what it came to for tensors of certain shapes and
strides, which kernels with which arguments, is written down as numbers that ``bridge/launches.cpp`` goes by from the
next call on; nothing is left for Python but to hand over the tensors.
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import itertools
import struct
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.backend.native.structures import DTYPES
from heedful.backend.triton.work import INT32, Launch, Work

# As the bridge has them.
_MAX_DIMS, _MAX_PARAMETERS, _MAX_MAPS, _MAX_TENSORS, _MAX_FORMS = 5, 256, 8, 32, 8
_MAP_BYTES = 128
_SIZES = {"1": 1, "8": 1, "16": 2, "32": 4, "64": 8}
_FLOATS = {"fp32": "<f", "f32": "<f", "fp64": "<d"}

# What is put together anew costs so many calls that are not: a call whose sizes change each time is left to Python.
_KEEPING, _MOST_CREDIT = 32, 256
_K_LENGTH = "k_length"
_FROM_LENGTH, _LONG_FROM_LENGTH, _LENGTH_DIM = _MAP_BYTES + 1, _MAP_BYTES + 2, 2
# Query, key and value are the first tensors.
_GROWING = {"key_strides": 1, "value_strides": 2}

_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)


class NotKept(Exception):
    """Why work cannot be repeated by the bridge."""


class Kept:
    """The work of one kind of call, repeated by the bridge for tensors of forms that it has seen."""

    def __init__(self, device: int, single: bool = False) -> None:
        """single: float32, whose products are rounded or not as torch is told at the time of a call."""
        self.device = device
        self._tf32: bool | None = torch.backends.cuda.matmul.allow_tf32 if single else None
        self.place = 0
        """Where the bridge keeps it; 0 while there is none, -1 where there will be none."""
        self.refused: str | None = None
        """Why the last form that was not kept was not."""
        self.run_one: Any = _operator("launches_run_one")
        """The bridge's operator on query, key, value and a place: the one result, None where no form fits."""
        self.credit = _MOST_CREDIT
        self._alive: deque[Any] = deque(maxlen=_MAX_FORMS)
        self._run: Any = _operator("launches_run") if device >= 0 else None
        if self._run is None:
            self.place, self.refused = -1, "the bridge is not loaded, or Triton interprets"

    def run(self, tensors: Sequence[Tensor], make: Callable[..., Work]) -> Sequence[Tensor]:
        """The results of work on these tensors; `make` puts it together of them, and uses no others but its own."""
        if self._tf32 is not None and torch.backends.cuda.matmul.allow_tf32 != self._tf32:
            self._begin_anew()
        if self.place > 0:
            found: Sequence[Tensor] = self._run(tensors, self.place)
            if found:
                self.credit += 1
                return found
        return self.run_anew(tensors, make)

    def run_anew(self, tensors: Sequence[Tensor], make: Callable[..., Work]) -> Sequence[Tensor]:
        """As `run`, of tensors whose form is not kept yet."""
        if self.place > 0 and _current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(tensors, make)
        self.credit = min(self.credit, _MOST_CREDIT)
        if self.place < 0 or self.credit < _KEEPING:
            self.credit += 1
            work = make(*tensors)
            work.run()
            return work.results
        # By identity it is told which argument of a kernel is which of the tensors.
        apart = [tensor.detach() for tensor in tensors]
        work = make(*apart)
        self._keep(work, work.run(), apart)
        return work.results

    def _begin_anew(self) -> None:
        self._tf32 = torch.backends.cuda.matmul.allow_tf32
        if self.place > 0:
            _forget(self.place)
            self.place = 0
            self._alive.clear()

    def _keep(self, work: Work, compiled: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        self.credit -= _KEEPING
        try:
            code = _encode(work, compiled, tensors, cuda=True)
        except NotKept as why:
            self.refused = str(why)
            return
        place = _operator("launches_keep")(torch.tensor(code, dtype=torch.int64, device="cpu"), self.place)
        if place < 0:
            self.place, self.refused = -1, "the driver is not there, or knows the kernel by other parameters"
            return
        if self.place == 0:
            # A place is forgotten twice where `_begin_anew` came first: there are no two of one number.
            weakref.finalize(self, _forget, place).atexit = False
        self.place = place
        # A kernel is unloaded with the last reference to it.
        self._alive.append(compiled)

    def launching(self, tensors: Sequence[Tensor], times: int = 200) -> float:
        """Seconds of what `run` takes for these tensors that are the driver's own, the launches alone."""
        if self.place <= 0:
            raise ValueError(self.refused or "nothing was kept yet")
        return float(_operator("launches_time")(list(tensors), self.place, times)) / times


def _operator(name: str) -> Any:
    """None where the bridge is not loaded."""
    packet = getattr(torch.ops.heedful, name, None)
    return None if packet is None else packet.default._op


def _forget(place: int) -> None:
    _operator("launches_forget")(torch.tensor([place], device="cpu"))


def _encode(work: Work, compiled: Sequence[Any], tensors: Sequence[Tensor], cuda: bool) -> list[int]:
    """Work as the bridge takes it: device, lengths, tensors, then each kernel with its parameters.

    Raises:
        NotKept: it uses what the bridge does not know.
    """
    own = [*work.results, *work.scratch, *work.unread]
    known = {id(tensor): index for index, tensor in enumerate([*tensors, *own])}
    if len(known) != len(tensors) + len(own) or len(known) > _MAX_TENSORS:
        raise NotKept("a tensor is given twice, or there are too many")
    lengths = work.lengths()
    low, high = lengths or (0, 0)
    growth = None
    if lengths is not None:
        length = tensors[1].shape[_LENGTH_DIM]
        growth = Growth(length, {place: _rates(tensors[place], high) for place in _GROWING.values()})
    counts = len(tensors), len(own), len(work.results), len(work.unread), len(work.launches)
    code = [int(cuda), work.device, low, high, *counts]
    for index, tensor in enumerate(tensors):
        code += _shape(tensor, tensor.data_ptr() % 16 == 0, growth.rates.get(index) if growth is not None else None)
    for tensor in own:
        code += _shape(tensor, False, None)
    for launch, kernel in zip(work.launches, compiled, strict=True):
        code += _kernel(launch, kernel, known, growth)
    return code


Rates = tuple[int, ...]


class Growth(NamedTuple):
    """What a call's length, that of its keys, has to do with."""

    length: int
    rates: dict[int, Rates]
    """By how much the strides of a tensor grow with the length, by the tensor's place."""


def _rates(tensor: Tensor, longest: int) -> Rates:
    """Of a buffer that is filled, none; where a tensor is made anew for each length, those of batch and head."""
    batch, heads, length, dim = tensor.shape
    if batch * heads * longest * dim < INT32 // 4 and tensor.stride() == (heads * length * dim, length * dim, dim, 1):
        return heads * dim, dim, 0, 0
    return 0, 0, 0, 0


def _shape(tensor: Tensor, aligned: bool, rates: Rates | None) -> list[int]:
    if tensor.ndim > _MAX_DIMS or tensor.dtype not in _CODES:
        raise NotKept("a tensor has too many dimensions, or a dtype that the bridge does not know")
    strides, grows = tensor.stride(), rates or (0,) * tensor.ndim
    if rates is not None:
        strides = tuple(stride if rate == 0 else 0 for stride, rate in zip(strides, rates, strict=True))
    return [_CODES[tensor.dtype], int(aligned), int(rates is not None), tensor.ndim, *tensor.shape, *strides, *grows]


_CODES = {getattr(torch, name): number for name, number in DTYPES.items()}


def _kernel(launch: Launch, kernel: Any, known: dict[int, int], growth: Growth | None) -> list[int]:
    metadata = kernel.metadata
    usual = {"num_ctas": 1, "launch_cooperative_grid": False, "global_scratch_size": 0,
             "profile_scratch_size": 0}  # fmt: skip
    if any(getattr(metadata, name, None) != value for name, value in usual.items()):
        raise NotKept("the kernel is launched in a way of its own")
    parameters: list[list[int]] = []
    maps = iter(getattr(metadata, "tensordesc_meta", None) or ())
    given = *launch.arguments, *launch.constants
    for (name, kind), value in zip(kernel.src.signature.items(), given, strict=True):
        rates: Rates = ()
        if growth is not None and name == _K_LENGTH:
            parameters.append(_from_length(kind, value, growth, 0))
            continue
        if growth is not None and name in _GROWING:
            rates = growth.rates[_GROWING[name]]
        for place, (leaf, its_value) in enumerate(_leaves((kind,), (value,))):
            if growth is not None and place < len(rates) and rates[place]:
                # As `in_units` hides them.
                parameters.append(_from_length(leaf, its_value, growth, 3))
            else:
                parameters += _parameter(leaf, its_value, known, maps, growth)
    # Two more of triton's own: memory that these kernels do not ask for.
    parameters += [[8, 0], [8, 0]]
    if len(parameters) >= _MAX_PARAMETERS or sum(p[0] == _MAP_BYTES for p in parameters) > _MAX_MAPS:
        raise NotKept("the kernel has too many parameters")
    head = [
        kernel.function,
        *launch.grid,
        1,
        32 * metadata.num_warps,
        metadata.shared,
        int(metadata.launch_pdl),
        len(parameters),
    ]
    return [*head, *itertools.chain.from_iterable(parameters)]


def _leaves(kinds: tuple[Any, ...], values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The parameters that a kernel was compiled with and their values, tuples taken apart."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _leaves(kind, value)
        elif kind != "constexpr":
            yield kind, value


def _from_length(kind: str, value: int, growth: Growth, constant: int) -> list[int]:
    """A parameter that is a multiple of the length, and the constant."""
    if kind != "i32":
        raise NotKept("the kernel was compiled for one length")
    return [_FROM_LENGTH, (value - constant) // growth.length, constant]


def _parameter(
    kind: str, value: Any, known: dict[int, int], maps: Iterator[Any], growth: Growth | None
) -> list[list[int]]:
    """Its size and its value; a pointer is 0 and which tensor's."""
    if kind.startswith("*"):
        return [[0, _place(value, known)]]
    if kind.startswith("tensordesc"):
        rates = growth.rates.get(_place(value.base, known)) if growth is not None else None
        sizes = [[4, int(n)] for n in value.shape]
        strides = [[8, int(n)] for n in value.strides]
        if rates is not None:
            sizes[_LENGTH_DIM] = [_FROM_LENGTH, 1, 0]
            strides = [
                [_LONG_FROM_LENGTH, rate, 0] if rate else plain for plain, rate in zip(strides, rates, strict=True)
            ]
        return [_map(value, next(maps, None), known, rates), *sizes, *strides]
    if kind in _FLOATS:
        packed = struct.pack(_FLOATS[kind], value)
        return [[len(packed), int.from_bytes(packed, "little", signed=len(packed) == 8)]]
    if kind[:1] not in ("i", "u") or kind[1:] not in _SIZES:
        raise NotKept(f"a parameter is {kind}")
    number = int(value)
    return [[_SIZES[kind[1:]], number - (1 << 64) if number >= 1 << 63 else number]]


def _place(tensor: Any, known: dict[int, int]) -> int:
    if id(tensor) not in known:
        raise NotKept("a kernel uses a tensor that is neither the call's nor its own, such as a copy")
    return known[id(tensor)]


def _map(descriptor: Any, metadata: Any, known: dict[int, int], rates: Rates | None) -> list[int]:
    """A tensor as a copy engine sees it, its innermost axis first."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    if metadata is None or metadata["fp4_padded"]:
        raise NotKept("a descriptor is no map of the driver's")
    rank, size = len(metadata["block_size"]), metadata["elem_size"]
    grows = rates or (0,) * rank
    strides = [0 if rate else size * int(stride) for stride, rate in zip(descriptor.strides, grows, strict=True)]
    return [
        _MAP_BYTES, _place(descriptor.base, known), int(rates is not None),
        TMA_DTYPE_DEVICE_TO_HOST[metadata["elem_type"]], metadata["swizzle"], int(descriptor.padding == "nan"), rank,
        *reversed(metadata["block_size"]), *(int(n) for n in reversed(descriptor.shape)), *strides[-2::-1],
        *(size * rate for rate in grows[-2::-1]),
    ]  # fmt: skip
