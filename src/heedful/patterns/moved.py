"""Operands of patterns made on the host, on the devices that calls run on."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Bytes that are kept in all, and of one operand: beyond, comparing takes as long as copying.
MOST_KEPT = 64 << 20
_LARGEST = 16 << 20

_lock = threading.Lock()
_kept: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()
_bytes = 0
# By thread. No threading.local, which torch.compile does not trace.
_lists: dict[int, list[Tensor]] = {}


def moved(source: Tensor, operand: Tensor, device: torch.device) -> Tensor:
    """An operand on a device, copied there again only if what it comes from has changed.

    A copy waits for the device and cannot be part of a CUDA graph, and all layers and steps of a model ask for the same
    ones. Contents are compared, as nothing tells of every change of a tensor's memory: 2 µs for a few numbers.

    Args:
        source: on the CPU, what the caller has.
        operand: on the CPU, made of it.
    """
    global _bytes
    if source.nbytes > _LARGEST:
        return operand.to(device)
    import torch

    key = source.data_ptr(), source.shape, source.stride(), source.dtype, operand.shape, operand.dtype, device
    with _lock:
        found = _kept.get(key)
        if found is not None and torch.equal(found[0], source):
            _kept.move_to_end(key)
            return found[1]
        with torch.inference_mode(False), torch.no_grad():
            there = operand.to(device)
            fresh = source.clone(), there
        if found is not None:
            _bytes -= found[0].nbytes
        _kept[key] = fresh
        _kept.move_to_end(key)
        _bytes += source.nbytes
        if _bytes > MOST_KEPT:
            _drop(MOST_KEPT // 2)
    return there


def forget() -> None:
    """Gives back everything that is kept."""
    with _lock:
        _drop(0)


def _drop(bytes_left: int) -> None:
    global _bytes
    dropped = []
    while _kept and _bytes > bytes_left:
        _, (snapshot, there) = _kept.popitem(last=False)
        _bytes -= snapshot.nbytes
        dropped.append(there)
    for device in {tensor.device for tensor in dropped if tensor.is_cuda}:
        import torch

        # Another stream than the one that they were made on may still read them.
        torch.cuda.synchronize(device)


@contextmanager
def holding() -> Iterator[list[Tensor]]:
    """Lists the operands that calls of this thread use on devices meanwhile: who captures those calls as a graph keeps
    them as long as the graph."""
    thread = threading.get_ident()
    before = _lists.get(thread)
    listed: list[Tensor] = []
    _lists[thread] = listed
    try:
        yield listed
    finally:
        if before is None:
            del _lists[thread]
        else:
            _lists[thread] = before


def held(operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The operands, which are listed where somebody is `holding`."""
    if _lists:
        _lists.get(threading.get_ident(), []).extend(operands)
    return operands
