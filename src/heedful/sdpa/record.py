"""What became of the attention calls of this process, while somebody wants to know (`heedful run`)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heedful.backend.native import library
from heedful.sdpa.call import SLOW, SMALL

# The columns and outcomes of bridge/hook.cpp.
_DTYPES = {0: "float32", 1: "bfloat16", 2: "float16", 3: "float64"}
_SEEN = (
    "every pair",
    "causal",
    "a mask that is a band",
    "a mask that is a band and padding of keys",
    "a mask read by tiles",
    "a mask",
    "a bias",
)
WRITTEN_OUT = "a call that PyTorch has no kernel for"
WEIGHTS = "nn.MultiheadAttention with need_weights=True, its default, for which PyTorch writes the attention out"
_LEFT = {
    16: SMALL,
    17: "not what the engine computes, or wrong arguments",
    18: 'backend="sdpa" was asked for',
    19: SLOW,
}


@dataclass(frozen=True)
class Kind:
    """Calls that are counted together."""

    taken: bool
    what: str
    """What the call was recognised as, or why it was left to PyTorch."""
    backward: bool
    dtype: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    """Shapes; a length of -1 stands for several."""


@dataclass
class Count:
    calls: int = 0
    seconds: float = 0.0


class Recorder:
    """Counts and times by kind; the time of a call that is not waited for is that of making it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Kind, Count] = {}
        # The engine's rows at the end of the recording; None while it goes on.
        self._ended: list[list[int]] | None = None

    def add(self, taken: bool, what: str, query: object, key: object, seconds: float) -> None:
        self._add(Kind(taken, what, False, _dtype(query), _shape(query), _shape(key)), 1, seconds)

    def _add(self, kind: Kind, calls: int, seconds: float) -> None:
        with self._lock:
            count = self._counts.setdefault(kind, Count())
            count.calls += calls
            count.seconds += seconds

    def rows(self) -> list[dict[str, Any]]:
        """JSON-serialisable, what took longest first."""
        with self._lock:
            counts = {kind: Count(count.calls, count.seconds) for kind, count in self._counts.items()}
        ended = self._ended
        for row in torch.ops.heedful.sdpa_calls(torch.tensor([1])).tolist() if ended is None else ended:
            backward, outcome, dtype, batch, heads, kv_heads, q_length, k_length, dim, calls, elapsed = row
            what = _SEEN[outcome] if outcome < len(_SEEN) else _LEFT[outcome]
            kind = Kind(
                outcome < len(_SEEN),
                what,
                bool(backward),
                _DTYPES.get(dtype, "other"),
                (batch, heads, q_length, dim),
                (batch, kv_heads, k_length, dim),
            )
            count = counts.setdefault(kind, Count())
            count.calls += calls
            count.seconds += elapsed / 1e9
        rows = [asdict(kind) | asdict(count) for kind, count in counts.items()]
        return sorted(rows, key=lambda row: -row["seconds"])


recorder: Recorder | None = None
"""The one that wants to know, if there is one."""


@contextmanager
def recording() -> Iterator[Recorder]:
    """Counts from here on, over all threads, calls that reach heedful; `heedful.activate` is the caller's to do.

    Raises:
        RuntimeError: somebody counts already.
    """
    global recorder
    if recorder is not None:
        raise RuntimeError("attention calls are being recorded already")
    library.load_operators()
    recorder = counting = Recorder()
    torch.ops.heedful.sdpa_calls(torch.tensor([1]))
    before = functional.multi_head_attention_forward
    watching = _watching(before)
    functional.__dict__["multi_head_attention_forward"] = watching
    try:
        yield counting
    finally:
        if functional.multi_head_attention_forward is watching:
            functional.__dict__["multi_head_attention_forward"] = before
        recorder = None
        counting._ended = torch.ops.heedful.sdpa_calls(torch.tensor([0])).tolist()


def _watching(function: Callable[..., Any]) -> Callable[..., Any]:
    """The body of nn.MultiheadAttention, which calls no scaled_dot_product_attention where weights are asked for."""

    @functools.wraps(function)
    def multi_head_attention_forward(*arguments: Any, **options: Any) -> Any:
        need_weights = arguments[15] if len(arguments) > 15 else options.get("need_weights", True)
        if not need_weights or recorder is None or torch.compiler.is_compiling():
            return function(*arguments, **options)
        began = perf_counter()
        result = function(*arguments, **options)
        query, key = (arguments[n] if len(arguments) > n else options.get(("query", "key")[n]) for n in (0, 1))
        recorder.add(False, WEIGHTS, query, key, perf_counter() - began)
        return result

    # torch.jit.script then compiles the function itself.
    names = {"__script_if_tracing_wrapper": True, "__original_fn": function}
    multi_head_attention_forward.__dict__.update(names)
    return multi_head_attention_forward


def _add_traced(why: str | None) -> None:
    """Note a call that became part of a compiled graph, where nothing counts how often it runs; why it was left."""
    if recorder is not None:
        recorder.add(why is None, f"{why or WRITTEN_OUT}, in a compiled graph, counted once", None, None, 0.0)


add_traced: Callable[[str | None], None] = torch.compiler.assume_constant_result(_add_traced)


def _dtype(tensor: object) -> str:
    return str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, Tensor) else ""


def _shape(tensor: object) -> tuple[int, ...]:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) and not tensor.is_nested else ()
