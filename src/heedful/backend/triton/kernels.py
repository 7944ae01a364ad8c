"""Everything that needs triton, loaded with the first call."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from heedful.backend.triton.combine import combine_splits
from heedful.backend.triton.delta import row_delta
from heedful.backend.triton.dense import dense_tiles
from heedful.backend.triton.forward import attention_forward
from heedful.backend.triton.key_gradient import key_value_gradients
from heedful.backend.triton.query_gradient import query_gradient

__all__ = [
    "INTERPRETED",
    "TensorDescriptor",
    "attention_forward",
    "combine_splits",
    "dense_tiles",
    "key_value_gradients",
    "launch",
    "query_gradient",
    "row_delta",
]

INTERPRETED = bool(triton.knobs.runtime.interpret)
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def launch(
    function: Any,
    grid: tuple[int, int],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int,
    stages: int,
    device: int,
    compiled: dict[Hashable, Any] | None,
    kind: Hashable,
    dependent: bool = False,
) -> None:
    """Runs a kernel on a device's current stream.

    compiled: kernels like this one by device and `kind`, which has to tell apart what triton would compile anew for:
    triton's own look at every argument takes several times as long as a launch. None leaves it to triton.
    dependent: the kernel may begin before the ones in front of it have ended, and waits for them itself.
    """
    if INTERPRETED:
        function[grid](*arguments, *constants)
        return
    if _current_device() != device:
        with torch.cuda.device(device):
            launch(function, grid, arguments, constants, warps, stages, device, compiled, kind, dependent)
        return
    found = None if compiled is None else compiled.get((device, kind))
    if found is not None:
        found.run(
            grid[0], grid[1], 1, _current_stream(device), found.function, found.packed_metadata, None, None, None,
            *arguments, *constants,
        )  # fmt: skip
        return
    found = function[grid](*arguments, *constants, num_warps=warps, num_stages=stages, launch_pdl=dependent)
    if compiled is not None:
        compiled[device, kind] = found
