"""Everything that needs triton, loaded with the first call."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from heedful.backend.triton.combine import combine_splits
from heedful.backend.triton.delta import row_delta
from heedful.backend.triton.dense import dense_tiles
from heedful.backend.triton.forward import attention_forward
from heedful.backend.triton.key_gradient import key_value_gradients
from heedful.backend.triton.nonfinite import find_nonfinite
from heedful.backend.triton.query_gradient import query_gradient

if TYPE_CHECKING:
    from heedful.backend.triton.work import Launch

__all__ = [
    "INTERPRETED",
    "TensorDescriptor",
    "attention_forward",
    "combine_splits",
    "dense_tiles",
    "find_nonfinite",
    "key_value_gradients",
    "launch",
    "query_gradient",
    "row_delta",
]

INTERPRETED = bool(triton.knobs.runtime.interpret)
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def launch(device: int, one: Launch) -> Any:
    """Runs a kernel on a device's current stream: what it was compiled to, None under the interpreter."""
    if INTERPRETED:
        one.function[one.grid](*one.arguments, *one.constants)
        return None
    if _current_device() != device:
        with torch.cuda.device(device):
            return launch(device, one)
    compiled = one.compiled
    found = None if compiled is None else compiled.get((device, one.kind))
    if found is not None:
        found.run(
            *one.grid, 1, _current_stream(device), found.function, found.packed_metadata, None, None, None,
            *one.arguments, *one.constants,
        )  # fmt: skip
        return found
    found = one.function[one.grid](
        *one.arguments, *one.constants, num_warps=one.warps, num_stages=one.stages, launch_pdl=one.dependent
    )
    if compiled is not None:
        compiled[device, one.kind] = found
    return found
