"""heedful: exact attention that works only for the keys that a model attends to.

`heedful.attention` is the way in, `heedful.explain` says what it would run and why. Everything is loaded
on first use, so that importing heedful costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "attention": "api",
    "explain": "api",
    "list_backends": "api",
    "clear_caches": "api",
    "convert": "conversion",
    "get_include": "locations",
    "get_library_dir": "locations",
    "Attention": "problem",
    "Explanation": "explanation",
    "UnsupportedError": "errors",
    "KVCache": "kv_cache",
    "set_num_threads": "numpy",
    "Pattern": "patterns",
    "Full": "patterns",
    "Causal": "patterns",
    "SlidingWindow": "patterns",
    "Dilated": "patterns",
    "Chunked": "patterns",
    "Prefix": "patterns",
    "Global": "patterns",
    "Longformer": "patterns",
    "BigBird": "patterns",
    "BlockSparse": "patterns",
    "Documents": "patterns",
    "Padding": "patterns",
    "Mask": "patterns",
    "scaled_dot_product_attention": "sdpa",
    "activate": "sdpa",
    "deactivate": "sdpa",
}

# Found as attributes without an import of their own.
_SUBPACKAGES = ("flash_attn", "graphs", "levels", "nn", "numpy", "ops")

__all__ = [
    "Attention",
    "BigBird",
    "BlockSparse",
    "Causal",
    "Chunked",
    "Dilated",
    "Documents",
    "Explanation",
    "Full",
    "Global",
    "KVCache",
    "Longformer",
    "Mask",
    "Padding",
    "Pattern",
    "Prefix",
    "SlidingWindow",
    "UnsupportedError",
    "__version__",
    "activate",
    "attention",
    "clear_caches",
    "convert",
    "deactivate",
    "explain",
    "get_include",
    "get_library_dir",
    "list_backends",
    "scaled_dot_product_attention",
    "set_num_threads",
]

if TYPE_CHECKING:
    from heedful import graphs as graphs
    from heedful import levels as levels
    from heedful import nn as nn
    from heedful import ops as ops
    from heedful.api import attention, clear_caches, explain, list_backends
    from heedful.conversion import convert
    from heedful.errors import UnsupportedError
    from heedful.explanation import Explanation
    from heedful.kv_cache import KVCache
    from heedful.locations import get_include, get_library_dir
    from heedful.numpy import set_num_threads
    from heedful.patterns import (
        BigBird,
        BlockSparse,
        Causal,
        Chunked,
        Dilated,
        Documents,
        Full,
        Global,
        Longformer,
        Mask,
        Padding,
        Pattern,
        Prefix,
        SlidingWindow,
    )
    from heedful.problem import Attention
    from heedful.sdpa import activate, deactivate, scaled_dot_product_attention


def __getattr__(name: str) -> object:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"heedful.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'heedful' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"heedful.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
