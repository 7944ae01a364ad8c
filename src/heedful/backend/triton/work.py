"""What a launch is, where it goes, and what tensors come to in the arguments of kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.backend.triton.tuning import architecture, overrides

LOG2E = math.log2(math.e)
# Multiprocessors that a call under Triton's interpreter is cut for.
_INTERPRETED = 16
INT32 = 2**31


@functools.cache
def kernels() -> Any:
    from heedful.backend.triton import kernels as loaded
    from heedful.backend.triton import tuned

    if not loaded.INTERPRETED:
        overrides.update(tuned.stored_tiles())
    return loaded


@functools.cache
def device_limits(index: int) -> tuple[int, int]:
    """Architecture and multiprocessors."""
    if index < 0:
        return 90, _INTERPRETED
    properties = torch.cuda.get_device_properties(index)
    return architecture((properties.major, properties.minor)), properties.multi_processor_count


class Launch(NamedTuple):
    """A kernel and all that it is launched with."""

    function: Any
    grid: tuple[int, int]
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]
    warps: int
    stages: int
    compiled: dict[Hashable, Any] | None
    """Kernels like this one by device and `kind`, which has to tell apart what triton would compile anew for: triton's
    own look at every argument takes several times as long as a launch. None leaves it to triton."""
    kind: Hashable
    dependent: bool = False
    """The kernel may begin before the ones in front of it have ended, and waits for them itself."""


class Work(NamedTuple):
    """Launches on one device, one after another, and the tensors that they write."""

    device: int
    results: tuple[Tensor, ...]
    scratch: tuple[Tensor, ...]
    launches: tuple[Launch, ...]
    unread: tuple[Tensor, ...] = ()
    """Results that the caller has no use for."""
    lengths: Callable[[], tuple[int, int] | None] = lambda: None
    """Lengths of keys and values between which all of this is the same but for that number; None where that is not
    known."""

    def run(self) -> list[Any]:
        """Launches everything on the device's current stream: the compiled kernels, None under the interpreter."""
        launch = kernels().launch
        return [launch(self.device, one) for one in self.launches]


class Features(NamedTuple):
    """What a call does beside attention, as the operators take it; no feature where it is left out."""

    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None
    query_offset: Tensor | None = None

    @property
    def present(self) -> tuple[bool, ...]:
        """Softcap, bias, slopes, dropout, offsets of queries: whether each is there."""
        bias, alibi_slopes, softcap, dropout_p, _, query_offset = self
        return bool(softcap), bias is not None, alibi_slopes is not None, dropout_p > 0, query_offset is not None

    @property
    def plain(self) -> bool:
        """Whether scores are products alone."""
        return not self.softcap and self.bias is None and self.alibi_slopes is None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """As the kernels take them."""
        return self.bias, self.alibi_slopes, self.seed, self.query_offset

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Of bias, slopes and offsets; hidden."""
        return (
            broadcast_strides(self.bias, 4),
            broadcast_strides(self.alibi_slopes, 3),
            broadcast_strides(self.query_offset, 2),
        )

    @property
    def numbers(self) -> tuple[float, int, float]:
        """Softcap, the threshold that dropped words are below, and what the others grow by."""
        return self.softcap, _threshold(self.dropout_p), 1 / (1 - self.dropout_p) if self.dropout_p < 1 else 0.0


def dependent_launches(arch: int) -> bool:
    """Whether a kernel may begin while the one before it ends, and wait inside."""
    return arch >= 90 and not kernels().INTERPRETED


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def dtypes_of(*tensors: Tensor | None) -> Hashable:
    """None where there is no tensor."""
    for tensor in tensors:
        if tensor is not None:
            return tuple([None if tensor is None else tensor.dtype for tensor in tensors])
    return None


def in_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def hidden(numbers: Sequence[int]) -> tuple[int, ...]:
    """Integers as the kernels take them inside tuples, where triton would compile anew for 1 and multiples of 16."""
    return tuple([2 * number + 3 for number in numbers])


def in_units(strides: Sequence[int], unit: int) -> tuple[int, ...]:
    """The first three of four strides, hidden."""
    return 2 * (strides[0] // unit) + 3, 2 * (strides[1] // unit) + 3, 2 * (strides[2] // unit) + 3


_NO_STRIDES = {4: (3, 3, 3, 3), 3: (3, 3, 3), 2: (3, 3)}


def broadcast_strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """Strides of the first axes, 0 where there is one element or no such axis; hidden."""
    if tensor is None:
        return _NO_STRIDES[count]
    found = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return hidden(found + [0] * (count - len(found)))


def operand_numbers(operands: Sequence[Tensor]) -> tuple[tuple[tuple[int, ...], ...], bool, bool]:
    """What the kernels know of each operand, hidden; whether one differs between heads; whether all of it is usual.

    Of a vector the stride between batch items (0 where it has one element), that between elements, how many documents
    it makes and the steps of a search among them; of a map or mask the strides of its four axes.
    """
    numbers = []
    per_head = False
    usual = True
    for operand in operands:
        if operand.ndim == 4:
            strides = broadcast_strides(operand, 4)
            numbers.append(strides)
            per_head |= operand.shape[1] > 1
            usual &= max(strides) < INT32
        else:
            count, stride = operand.shape[0], operand.stride(0)
            numbers.append(hidden((0 if count == 1 else stride, stride, count - 1, max(count - 1, 0).bit_length())))
        usual &= not operand.data_ptr() & 15
    return tuple(numbers), per_head, usual


def takes_tf32(query: Tensor) -> bool:
    """Whether products of float32 may be rounded to tf32: where the caller has asked torch for that."""
    return query.dtype == torch.float32 and query.is_cuda and torch.backends.cuda.matmul.allow_tf32


def _threshold(dropout_p: float) -> int:
    """dropout_p·2^32, less 2^31: words with their top bit flipped are compared as signed."""
    return int(dropout_p * 2**32) - INT32
