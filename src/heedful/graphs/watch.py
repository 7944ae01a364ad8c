"""A run of a model under observation: what its operators read from outside, and what a CUDA graph cannot hold."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_BOOLS = (torch.bool, torch.uint8)


@dataclass(frozen=True)
class Finding:
    """An operation that a CUDA graph cannot hold.

    module: the module that ran it, by name and class; None outside of any. operation: the operator, as in
    "aten.nonzero.default". why: what is wrong with it. line: "file:number" in the caller's code, if there is one.
    """

    module: str | None
    operation: str
    why: str
    line: str | None

    def __str__(self) -> str:
        where = self.module or "outside of any module"
        return f"{where}: {self.operation} {self.why}" + (f" ({self.line})" if self.line else "")


class Stack:
    """The modules that are running, outermost first; after an exception, those that were."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._names: dict[nn.Module, str] = {}
        for root in modules:
            for name, module in root.named_modules():
                self._names.setdefault(module, name)
        self.running: list[nn.Module] = []

    @property
    def top(self) -> str | None:
        if not self.running:
            return None
        module = self.running[-1]
        return f"{self._names[module] or 'the model'} ({type(module).__name__})"

    @contextmanager
    def followed(self) -> Iterator[Stack]:
        self.running = []
        # A compiled module would be compiled again for a hook, within the capture.
        if any(module._compiled_call_impl is not None or _is_compiled(module) for module in self._names):
            yield self
            return
        hooks = [hook for module in self._names for hook in self._hooks(module)]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks(self, module: nn.Module) -> tuple[Any, Any]:
        def enter(module: nn.Module, arguments: Any) -> None:
            self.running.append(module)

        def leave(module: nn.Module, arguments: Any, result: Any) -> None:
            self.running.pop()

        return module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)


class Watch(TorchDispatchMode):
    """Sees every operator of a run.

    outside: tensors that were there before it, one for each memory. A graph reads them where they are, so they must
    live as long as it does.
    """

    def __init__(self, device_type: str, stack: Stack) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type, self._stack = device_type, stack
        self._made: set[int] = set()
        self._outside: dict[int, Tensor] = {}
        self._findings: dict[Finding, None] = {}

    @property
    def outside(self) -> tuple[Tensor, ...]:
        return tuple(self._outside.values())

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(self._findings)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in read:
            memory = _memory(tensor)
            if memory not in self._made:
                self._outside.setdefault(memory, tensor)
        result = func(*args, **kwargs)
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._made.update(memory for memory in map(_memory, written) if memory not in self._outside)
        why = why_not(func, args, read, written, self._device_type)
        if why is not None:
            self._findings.setdefault(Finding(self._stack.top, str(func), why, _callers_line()))
        return result


def why_not(func: Any, args: Any, read: Sequence[Tensor], written: Sequence[Tensor], device_type: str) -> str | None:
    """Why a graph on devices of this type cannot hold an operator's call, or None."""
    on_device = [tensor.device.type == device_type for tensor in read]
    if any(on_device):
        if torch.Tag.data_dependent_output in func.tags:
            return "reads numbers of a tensor (.item(), int(), bool(), `if` on a tensor), which waits for the device"
        if torch.Tag.dynamic_output_shape in func.tags and (
            func is not torch.ops.aten.index.Tensor or _has_mask(args[1])
        ):
            return "gives a tensor whose shape depends on data, which waits for the device"
    elsewhere = any(tensor.device.type != device_type for tensor in written)
    if any(on_device) and elsewhere:
        return f"copies to {written[0].device}, which waits for the device"
    copies_here = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    if copies_here and not all(on_device) and any(tensor.device.type == device_type for tensor in written):
        return "copies from the CPU, which waits for the device; make the tensor on the device before the capture"
    if read and not any(on_device) and elsewhere and any(tensor.ndim for tensor in read):
        return f"computes on {read[0].device}: a graph would keep what came out at the capture"
    return None


@contextmanager
def watched(device_type: str, modules: Iterable[nn.Module]) -> Iterator[Watch]:
    """Watches what is run inside."""
    with Stack(modules).followed() as stack, Watch(device_type, stack) as watch:
        yield watch


def _is_compiled(module: nn.Module) -> bool:
    from torch._dynamo.eval_frame import OptimizedModule

    return isinstance(module, OptimizedModule)


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in _BOOLS for index in indices)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


def _callers_line() -> str | None:
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((*_OURS, "<")):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def run_watched(
    run: Callable[[], object], device_type: str, modules: Iterable[nn.Module]
) -> tuple[tuple[Tensor, ...], tuple[Finding, ...]]:
    """What a run reads from outside, and its findings."""
    with watched(device_type, modules) as watch:
        run()
    return watch.outside, watch.findings
