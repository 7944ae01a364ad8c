"""`Context`: threads, and what is kept between calls."""

from __future__ import annotations

import ctypes
import operator
import os
import threading
import weakref
from collections.abc import Hashable, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy import empty, ndarray

from heedful.backend.native import library
from heedful.backend.native.structures import EngineThreads, address
from heedful.checks import what
from heedful.errors import wrong_type, wrong_value
from heedful.numpy import request as requests
from heedful.numpy.arrays import Array
from heedful.numpy.calls import run, run_first
from heedful.numpy.errors import INVALID_ARGUMENT, MFAError
from heedful.numpy.prepared import KEY, OUT, QUERY, VALUE, Prepared, failure
from heedful.numpy.request import Window
from heedful.patterns import Pattern

# Kinds of calls that a context remembers; emptied when full, since a decoding loop never stops adding lengths.
_MAX_PREPARED = 1024
_MAX_THREADS = 4096


class LastCall(NamedTuple):
    """How a call got at its arrays.

    Attributes:
        copied: by argument, why it was copied; empty where the engine read and wrote the caller's memory. "out" is
            there where the result was computed elsewhere and then copied.
    """

    copied: Mapping[str, str]

    @property
    def zero_copy(self) -> bool:
        """Whether nothing was."""
        return not self.copied


_NOTHING_COPIED = LastCall(MappingProxyType({}))


class _Pool:
    """The engine's threads; they end when the last call that uses them has returned and nobody holds this."""

    def __init__(self, count: int) -> None:
        self.threads = EngineThreads()
        status = library.engine().heedful_pool_create(count, self.threads)
        if status:
            raise failure(status)
        self.reference = ctypes.byref(self.threads)
        self.process = os.getpid()
        finalizer = weakref.finalize(self, library.engine().heedful_pool_destroy, self.threads)
        # Other threads may still be in a call while this process ends.
        finalizer.atexit = False


class Context:
    """Threads and memory for attention on numpy arrays, for any number of calls and from any number of threads.

    It owns a pool of threads, and for each kind of call (shapes, strides, dtypes, options) the engine's structures,
    filled in. The engine's scratch memory, at most 64 MiB between calls, serves all contexts of the process; closing
    one frees what no call uses.

    Args:
        num_threads: how many threads a call may use, the caller's own among them; None is what OMP_NUM_THREADS says,
            and otherwise one for each processor that this process may use. Calls that run at once share that many.

    In a forked child, calls on an inherited context run on the calling thread alone; a context made there has threads.

    Raises:
        ValueError, TypeError: num_threads is not an int from 1 to 4096.
        MFAError: the system does not start the threads.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self._pool: _Pool | None = _Pool(_thread_count(num_threads))
        self._prepared: dict[Hashable, Prepared] = {}
        self._local = threading.local()

    @property
    def num_threads(self) -> int:
        """How many threads a call may use."""
        pool = self._pool_or_raise()
        return int(pool.threads.count) if pool.process == os.getpid() else 1

    @property
    def closed(self) -> bool:
        return self._pool is None

    @property
    def last_call(self) -> LastCall | None:
        """How the last call of the calling thread on this context got at its arrays; None before the first."""
        return getattr(self._local, "call", None)

    def close(self) -> None:
        """Give threads and memory back. Calls that run go on to their end; the next one is refused. May be repeated."""
        if self._pool is not None:
            self._pool = None
            self._prepared = {}
            library.clear_caches()

    def __enter__(self) -> Self:
        self._pool_or_raise()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __bool__(self) -> bool:
        """Whether it is open."""
        return self._pool is not None

    def __repr__(self) -> str:
        return "Context(closed)" if self.closed else f"Context(num_threads={self.num_threads})"

    def attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        pattern: Pattern | Array | None = None,
        causal: bool = False,
        window: Window | None = None,
        attn_mask: Any = None,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        input_precision: Any = None,
        intermediate_precision: Any = None,
        output_precision: Any = None,
        out: Any = None,
        return_lse: bool = False,
        return_weights: bool = False,
    ) -> Any:
        """`heedful.numpy.attention` on this context."""
        pool = self._pool
        if pool is None:
            raise _closed()
        bare = out is None and attn_mask is None and alibi_slopes is None and sinks is None
        key: Hashable = None
        prepared: Prepared | None = None
        if type(q) is ndarray and type(k) is ndarray and type(v) is ndarray:
            try:
                key = (
                    q.shape,
                    k.shape,
                    v.shape,
                    q.strides,
                    k.strides,
                    v.strides,
                    q.dtype,
                    k.dtype,
                    v.dtype,
                    pattern if pattern is None else pattern.key,  # type: ignore[union-attr]
                    causal,
                    window,
                    softmax_scale,
                    softcap,
                    input_precision,
                    intermediate_precision,
                    output_precision,
                    return_lse,
                    return_weights,
                    bare or (_kind(out), _kind(attn_mask), _kind(alibi_slopes), _kind(sinks)),
                )
                prepared = self._prepared.get(key)
            except (AttributeError, TypeError):
                # Something is no array or pattern, or cannot be hashed: the checks have a word for it.
                key = None
        if prepared is not None:
            if bare and prepared.plain:
                at_q, at_k, at_v = address(q), address(k), address(v)
                if not (at_q | at_k | at_v) & prepared.odd:
                    try:
                        frame = prepared.idle.pop()
                    except IndexError:
                        frame = prepared.frame()
                    result = empty(prepared.out_shape, prepared.out_dtype)
                    words = frame.words
                    words[QUERY], words[KEY], words[VALUE], words[OUT] = at_q, at_k, at_v, address(result)
                    status = prepared.forward(frame.reference, pool.reference if prepared.shared else None)
                    prepared.idle.append(frame)
                    if status:
                        raise failure(status)
                    self._local.call = _NOTHING_COPIED
                    return result
            else:
                read = [q, k, v, attn_mask, alibi_slopes, sinks]
                if _are_aligned([*read, out]) and (out is None or not requests.overlaps(out, read)):
                    mask = attn_mask if attn_mask is not None and attn_mask.dtype == np.bool_ else None
                    bias = attn_mask if mask is None else None
                    whole = requests.resolve(pattern, causal, window, mask) if prepared.slots else None
                    found = run(prepared, pool.reference, q, k, v, whole, bias, alibi_slopes, sinks, out)
                    self._local.call = _NOTHING_COPIED
                    return found if return_lse or return_weights else found.out
        request = requests.make(
            q,
            k,
            v,
            pattern=pattern,
            causal=causal,
            window=window,
            attn_mask=attn_mask,
            softmax_scale=softmax_scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            input_precision=input_precision,
            intermediate_precision=intermediate_precision,
            output_precision=output_precision,
            out=out,
            return_lse=return_lse,
            return_weights=return_weights,
        )
        found, prepared = run_first(request, pool.reference, out, return_lse, return_weights)
        if prepared is not None and key is not None:
            if len(self._prepared) >= _MAX_PREPARED:
                self._prepared.clear()
            self._prepared[key] = prepared
        self._local.call = LastCall(MappingProxyType(request.copied)) if request.copied else _NOTHING_COPIED
        return found if return_lse or return_weights else found.out

    def _pool_or_raise(self) -> _Pool:
        if self._pool is None:
            raise _closed()
        return self._pool


def _kind(array: Any) -> Hashable:
    """What of an extra argument decides how a call runs."""
    if array is None:
        return None
    if type(array) is not ndarray:
        raise TypeError
    return array.shape, array.strides, array.dtype, array.flags.writeable


def _are_aligned(arrays: list[Array | None]) -> bool:
    return not any(array is not None and address(array) % array.itemsize for array in arrays)


def _closed() -> MFAError:
    return MFAError(INVALID_ARGUMENT, "the context is closed")


def _thread_count(asked: object) -> int:
    if asked is None:
        said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        return int(said) if said.isdecimal() and 1 <= int(said) <= _MAX_THREADS else 0
    if isinstance(asked, bool) or not hasattr(asked, "__index__"):
        raise wrong_type("num_threads", what(asked), "an int or None")
    count = operator.index(asked)
    if not 1 <= count <= _MAX_THREADS:
        raise wrong_value("num_threads", count, f"an int from 1 to {_MAX_THREADS}, or None")
    return count
