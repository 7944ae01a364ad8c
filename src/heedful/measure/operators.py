"""What a call runs, counted by torch.profiler: operator calls, fused loops, launches, copies, new memory."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

_OPERATOR = re.compile(r"^(\w+)::(\w+)$")
# The profiler's own names beside operators.
_NOT_NAMESPACES = frozenset({"autograd", "torch", "prim", "cuda"})
_FUSED = re.compile(r"^(?:graph_\d+_)?(?:cpp|triton)_\w*")
# They change no element, and their schemas do not say so.
_WITHOUT_WORK = frozenset({"_unsafe_view", "result_type", "lift_fresh"})
_COPIES = frozenset({"aten::copy_", "aten::clone", "aten::cat", "aten::stack", "aten::_to_copy"})


@dataclass(frozen=True)
class Operator:
    """One operator of a call: how often it ran and for how long in all."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """What one call did.

    calls are operators and fused loops that work on elements: views, and what runs inside another, do not count.
    made_bytes is the memory of every tensor that was newly made, intermediates included: each is written at least once
    and read at least once. launches are kernels on a GPU, None without one.
    """

    calls: int
    copies: int
    made_bytes: int
    launches: int | None
    operators: tuple[Operator, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain dict of the fields."""
        return asdict(self)


def profile_call(call: Callable[[], object]) -> Profile:
    """Profile one call, which should be warm."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, supported_activities

    kinds = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & set(supported_activities())
    with _without_log(), profile(activities=kinds, profile_memory=True, acc_events=True) as profiler:
        kept = call()
    del kept
    events = profiler.events()
    counts: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in events:
        if event.cpu_parent is None and event.device_type == DeviceType.CPU:
            for working in _working(event):
                counts[working.name] += 1
                times[working.name] += working.cpu_time_total
    launches = None
    if ProfilerActivity.CUDA in kinds:
        launches = sum(event.device_type == DeviceType.CUDA for event in events)
    made = 0
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    if results is not None:
        made = sum(max(event.nbytes(), 0) for event in results.events() if event.name() == "[memory]")
    operators = tuple(Operator(name, counts[name], time / 1e6) for name, time in times.most_common())
    copies = sum(count for name, count in counts.items() if name in _COPIES)
    return Profile(sum(counts.values()), copies, made, launches, operators)


@contextmanager
def _without_log() -> Iterator[None]:
    """The profiler logs each start and stop to the process's stderr, below Python and whatever the log level is."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _working(event: Any) -> Iterator[Any]:
    """The outermost events under one, itself included, that are work on elements."""
    found = _OPERATOR.match(event.name)
    if found is not None and found[1] not in _NOT_NAMESPACES:
        kind = _kind(*found.groups())
        if kind == "work":
            yield event
            return
        if kind == "none":
            return
    elif _FUSED.match(event.name):
        yield event
        return
    for child in event.cpu_children:
        yield from _working(child)


@functools.cache
def _kind(namespace: str, name: str) -> str:
    """ "work"; "none" for views and bare allocations; "parts" for what only calls other operators."""
    import torch

    if name in _WITHOUT_WORK or "empty" in name:
        return "none"
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        return "parts"
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    if any(_is_composite(overload.name()) for overload in overloads):
        return "parts"
    for overload in overloads:
        returns = overload._schema.returns
        if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return "none"
    return "work"


def _is_composite(name: str) -> bool:
    """Whether an overload is made of other operators, forward and backward."""
    import torch

    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    except RuntimeError:  # TorchScript has overloads that the dispatcher does not know.
        return False
