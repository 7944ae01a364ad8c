"""Fused operations beside attention: each one pass over memory where PyTorch takes several, forward and backward.

On a CPU they run in the engine; on other devices, and where a call is outside of what the engine takes, as the plain
PyTorch composition that also defines them, which the log says once. `heedful.ops.catalogue()` lists them with their
facts. A module of this package never has the name of an operation: importing it would hide the function.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# By the file that each is in.
_HOME = {
    "catalogue": "_catalogue",
    "fused_attention": "_fused_attention",
    "parametric_swish": "_parametric_swish",
}
_NOT_OPERATIONS = ("catalogue",)

__all__ = ["catalogue", "fused_attention", "parametric_swish"]

if TYPE_CHECKING:
    from heedful.ops._catalogue import catalogue
    from heedful.ops._fused_attention import fused_attention
    from heedful.ops._parametric_swish import parametric_swish


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'heedful.ops' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"heedful.ops.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
