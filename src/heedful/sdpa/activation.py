"""`activate` and `deactivate`: heedful behind PyTorch's own attention, for the whole process.

What is put in place, all of it taken away again by the last `deactivate`:

- a kernel in front of PyTorch's own CPU kernel of `scaled_dot_product_attention` (bridge/hook.cpp). Eager calls,
  autograd, compiled graphs and C++ reach it, and small calls pass on through it to PyTorch's;
- a function behind `torch.nn.functional.scaled_dot_product_attention` (`heedful.sdpa.patched`), for the calls that
  PyTorch has no kernel for and writes out (dropout, other than four dimensions, a value dim of its own, gradients of
  the mask), and for bool masks, of which PyTorch would make float ones;
- kernels in front of the fast path of nn.MultiheadAttention and nn.TransformerEncoder (`heedful.sdpa.fast_path`);
- PyTorch's registry of flash attention implementations says "heedful", where no other one is active.
"""

from __future__ import annotations

import threading
import warnings
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from heedful.backend import sdpa as sdpa_backend
from heedful.backend.native import library, prefer
from heedful.sdpa import fast_path, patched
from heedful.sdpa.call import few_pairs_behind, torch_sdpa

NAME = "heedful"
_NEVER = 2**63 - 1

_lock = threading.RLock()
_depth = 0
_owned = False
"""Whether the hooks are here for `activate`, and not for somebody's call of PyTorch's registry."""
_hooks: _Hooks | None = None


class Activation:
    """What `activate` returns: as a context manager it deactivates at its end."""

    def __init__(self) -> None:
        self._over = False

    def __enter__(self) -> Activation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._over:
            self._over = True
            deactivate()


def activate() -> Activation:
    """Put heedful behind PyTorch's attention, in this process and for all its threads.

    `torch.nn.functional.scaled_dot_product_attention` and what is built on it (nn.MultiheadAttention,
    nn.TransformerEncoder and its fast path, torch.compile with any backend, autograd) then runs on heedful's engine
    for CPU tensors where that is faster, with the same results up to rounding; on a GPU, calls through the public name
    of the function run on heedful's kernels where these are. Calls nest: as many `deactivate` as `activate` restore
    what was there. As a context manager:

        with heedful.activate():
            model(inputs)

    Other threads may call attention meanwhile, but not while the first `activate` and the last `deactivate` run:
    PyTorch's dispatcher does not expect a kernel to change under a call.

    Raises:
        ImportError: heedful's engine is not there.
    """
    global _depth, _owned
    with _lock:
        if _hooks is None:
            registry = _registry()
            if registry is not None and registry.current_flash_attention_impl() is None:
                registry.activate_flash_attention_impl(NAME)
            else:
                _install()
            _owned = True
        _depth += 1
    return Activation()


def deactivate() -> None:
    """Take back one `activate`; the last one restores what was there. Without an `activate` it does nothing."""
    global _depth, _owned
    with _lock:
        if _depth == 0:
            return
        _depth -= 1
        if _depth > 0 or not _owned:
            return
        _owned = False
        registry = _registry()
        if registry is not None and registry.current_flash_attention_impl() == NAME:
            registry.restore_flash_attention_impl()
        elif _hooks is not None:
            _hooks.remove()


class _Hooks:
    """Everything that is put in place; PyTorch's registry calls `remove` too."""

    def __init__(self) -> None:
        library.load_operators()
        self._library = torch.library.Library("aten", "IMPL")
        try:
            with warnings.catch_warnings():
                # PyTorch says once in a process that a kernel is overridden. Said here, it is not said on stderr.
                warnings.simplefilter("ignore")
                fast_path.install(self._library)
            torch.ops.heedful.sdpa_hook(_limits())
        except BaseException:
            self._library._destroy()
            raise
        patched.put_in_place()
        sdpa_backend._sdpa = _past_the_hook

    def remove(self) -> None:
        global _hooks
        with _lock:
            if _hooks is not self:
                return
            _hooks = None
            sdpa_backend._sdpa = torch_sdpa
            patched.take_away()
            torch.ops.heedful.sdpa_hook(torch.empty(0, dtype=torch.int64))
            self._library._destroy()


def _install() -> _Hooks:
    global _hooks
    with _lock:
        if _hooks is None:
            _hooks = _Hooks()
        return _hooks


def _limits() -> Tensor:
    """The sizes up to which a call is PyTorch's, as bridge/hook.h has them."""
    table = prefer.load_table()
    if table is None:
        return torch.tensor([_NEVER] * 4 + [0, 0])
    names = ("float32", "bfloat16", "float16", "float64")
    pairs = [max(few_pairs_behind(getattr(torch, name)), table["few_pairs"][name]) for name in names]
    return torch.tensor([*pairs, table["few_queries"], table["cached_bytes"]])


_MORE, _FEWER = torch.tensor([1]), torch.tensor([-1])


def _past_the_hook(*arguments: Any, **options: Any) -> Tensor:
    """PyTorch's function with PyTorch's kernel: what heedful's own sdpa backend is for."""
    if torch.compiler.is_dynamo_compiling():
        return torch_sdpa(*arguments, **options)
    torch.ops.heedful.sdpa_bypass(_MORE)
    try:
        return torch_sdpa(*arguments, **options)
    finally:
        torch.ops.heedful.sdpa_bypass(_FEWER)


def _registry() -> Any:
    """PyTorch's public registry of flash attention implementations; None where this PyTorch has none."""
    public = torch.nn.attention
    names = ("register", "activate", "current", "restore")
    return public if all(hasattr(public, f"{name}_flash_attention_impl") for name in names) else None


def _join_registry() -> None:
    registry = _registry()
    if registry is not None:
        registry.register_flash_attention_impl(NAME, register_fn=_install)


_join_registry()
