"""The context of calls that name none, and what the machine offers."""

from __future__ import annotations

import ctypes
import sys

from heedful import __version__
from heedful.errors import wrong_type
from heedful.numpy.context import Context, LastCall

_default: Context | None = None


def default_context() -> Context:
    """The context of calls that name none, made when it is first needed."""
    global _default
    # Threads that come here at once may make two, and one is dropped: a lock could be held in a fork.
    context = _default
    if context is None:
        context = _default = Context()
    return context


def set_num_threads(num_threads: int) -> None:
    """How many threads calls on numpy arrays may use that name no context of their own.

    Calls on torch tensors use torch's threads (torch.set_num_threads).

    Raises:
        ValueError, TypeError: num_threads is not an int from 1 to 4096.
    """
    global _default
    if num_threads is None:
        raise wrong_type("num_threads", "None", "an int")
    # Not closed: another thread may be about to use it. Its threads end with its last call.
    _default = Context(num_threads)


def get_num_threads() -> int:
    """How many threads calls on numpy arrays may use that name no context of their own."""
    return default_context().num_threads


def last_call() -> LastCall | None:
    """How this thread's last call without a context of its own got at its arrays; None before the first."""
    return default_context().last_call


def get_version() -> tuple[int, int, int]:
    """heedful's version: major, minor, patch."""
    major, minor, patch = (int(part) for part in __version__.split("."))
    return major, minor, patch


def is_metal_available() -> bool:
    """Whether this is a Mac with a Metal device. Attention runs on the CPU either way."""
    if sys.platform != "darwin":
        return False
    try:
        metal = ctypes.CDLL("/System/Library/Frameworks/Metal.framework/Metal")
        metal.MTLCreateSystemDefaultDevice.restype = ctypes.c_void_p
        return metal.MTLCreateSystemDefaultDevice() is not None
    except (OSError, AttributeError):
        return False
