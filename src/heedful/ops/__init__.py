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
    "add_rms_norm": "_rms_norm",
    "catalogue": "_catalogue",
    "cross_entropy": "_cross_entropy",
    "fused_attention": "_fused_attention",
    "geglu": "_gated",
    "layer_norm_gelu": "_layer_norm_gelu",
    "linear_cross_entropy": "_linear_cross_entropy",
    "parametric_swish": "_parametric_swish",
    "rms_norm": "_rms_norm",
    "rope": "_rope",
    "softmax": "_softmax",
    "swiglu": "_gated",
}
_NOT_OPERATIONS = ("catalogue",)

__all__ = [
    "add_rms_norm",
    "catalogue",
    "cross_entropy",
    "fused_attention",
    "geglu",
    "layer_norm_gelu",
    "linear_cross_entropy",
    "parametric_swish",
    "rms_norm",
    "rope",
    "softmax",
    "swiglu",
]

if TYPE_CHECKING:
    from heedful.ops._catalogue import catalogue
    from heedful.ops._cross_entropy import cross_entropy
    from heedful.ops._fused_attention import fused_attention
    from heedful.ops._gated import geglu, swiglu
    from heedful.ops._layer_norm_gelu import layer_norm_gelu
    from heedful.ops._linear_cross_entropy import linear_cross_entropy
    from heedful.ops._parametric_swish import parametric_swish
    from heedful.ops._rms_norm import add_rms_norm, rms_norm
    from heedful.ops._rope import rope
    from heedful.ops._softmax import softmax


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'heedful.ops' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"heedful.ops.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
