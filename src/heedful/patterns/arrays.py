"""Tensors and numpy arrays: patterns are made of either.

Nothing here loads torch before there is a tensor, so that patterns serve callers who have none.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from heedful.patterns.moved import moved

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import TypeIs

    Array: TypeAlias = Tensor | npt.NDArray[Any]

_torch: Any = None


def _loaded() -> Any:
    """torch, where this process has loaded it, otherwise None."""
    global _torch
    if sys.modules.get("torch") is not None:
        import torch

        _torch = torch
    return _torch


# Asked here first, since a traced call would note the change.
_loaded()


def is_tensor(value: object) -> TypeIs[Tensor]:
    torch = _torch or _loaded()
    return torch is not None and isinstance(value, torch.Tensor)


def is_array(value: object) -> TypeIs[Array]:
    return isinstance(value, np.ndarray) or is_tensor(value)


def is_bool(array: Array) -> bool:
    return bool(array.dtype == (np.bool_ if isinstance(array, np.ndarray) else _torch.bool))


def is_tracing() -> bool:
    """Whether torch traces what is being called, for torch.compile or torch.export."""
    torch = _torch or _loaded()
    return torch is not None and torch.compiler.is_compiling()


def count(array: Array) -> int:
    return array.size if isinstance(array, np.ndarray) else array.numel()


def dtype_name(array: Array) -> str:
    """As in "int32", for torch and numpy alike; numpy's of another byte order has no such name."""
    return str(array.dtype).removeprefix("torch.")


def broadcast(array: Array, shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(array, shape) if isinstance(array, np.ndarray) else array.expand(shape)


def as_tensor(array: Array, device: torch.device | str) -> Tensor:
    """The array as a tensor on a device, without a copy where none is needed."""
    if isinstance(array, np.ndarray):
        import torch

        # torch takes no negative strides, and warns of memory that cannot be written.
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()
        return torch.from_numpy(array).to(device)
    # A call that only asks for the CPU costs half a microsecond.
    return array if device == "cpu" and array.is_cpu else array.to(device)


def as_operand(array: Array, device: torch.device | str) -> Tensor:
    """The tensor that a schedule's slot refers to, on a device: bool (4-D) as it is, ints as int32 (n,)."""
    if device == "cpu" or not is_elsewhere(array, device) or is_tracing():
        return _in_form(as_tensor(array, device))
    source = as_tensor(array, "cpu")
    return moved(source, _in_form(source), _torch.device(device))


def is_elsewhere(array: Array, device: torch.device | str) -> bool:
    """Whether an array is on the host and a device is not."""
    return (device if isinstance(device, str) else device.type)[:3] != "cpu" and (
        isinstance(array, np.ndarray) or (array.is_cpu and type(array) is _torch.Tensor)
    )


def _in_form(tensor: Tensor) -> Tensor:
    if tensor.ndim == 4:
        return tensor
    tensor = tensor.int()
    return tensor if tensor.ndim == 1 else tensor.reshape(-1)


def as_numpy_operand(array: Array) -> npt.NDArray[Any]:
    """The same as a numpy array."""
    found: npt.NDArray[Any] = array if isinstance(array, np.ndarray) else array.detach().cpu().numpy()
    return found if found.ndim == 4 else np.require(found, np.int32, "A").reshape(-1)


def per_item(value: int | Array, device: torch.device | str) -> int | Tensor:
    """An int as it is; one element, or one per batch item, as an int64 tensor (1 or B, 1, 1, 1)."""
    return as_tensor(value, device).long().view(-1, 1, 1, 1) if is_array(value) else value


def same(a: Array, b: Array) -> bool:
    """Whether arrays of one shape hold the same."""
    if a is b:
        return True
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool((a == b).all())
    return bool((as_tensor(a, "cpu") == as_tensor(b, "cpu")).all())
