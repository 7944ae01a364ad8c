"""What all operations share: where a call runs, fakes for tracing, and derivatives of any order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from heedful.backend.native import library

logger = logging.getLogger("heedful")

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))

_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_said: set[tuple[str, str]] = set()
_missing: str | None = None

try:
    library.load_operators()
except ImportError as error:
    _missing = str(error)


def runs_in_engine(name: str, *tensors: Tensor | None) -> bool:
    """Whether the engine takes a call with these tensors; where not, the log says once why the composition runs.

    The first tensor is there, and of a floating dtype. The operators read tensors of any strides.
    """
    for tensor in tensors:
        if tensor is not None and not (type(tensor) in _PLAIN and tensor.is_cpu and tensor.dtype in DTYPES):
            break
    else:
        if _missing is None and not _transforms_active() and forward_ad._current_level < 0:
            return True
    why = _reason(tensors)
    if why is None:
        return True
    # A traced call could not log.
    if not torch.compiler.is_compiling() and (name, why) not in _said:
        _said.add((name, why))
        logger.warning("%s runs as plain PyTorch: %s (said once for calls of this kind)", name, why)
    return False


def _reason(tensors: tuple[Tensor | None, ...]) -> str | None:
    if _missing is not None:
        return _missing
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device.type}, and the engine runs on CPUs"
        if tensor.dtype not in DTYPES:
            return f"a tensor is {tensor.dtype}"
        if tensor.layout != torch.strided:
            return f"a tensor's layout is {tensor.layout}"
    if _transforms_active():
        return "it is inside a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken"
    from torch._subclasses import FakeTensor

    for tensor in given:
        if type(tensor) not in _PLAIN and not isinstance(tensor, FakeTensor):
            return f"a tensor is a {type(tensor).__name__}"
    return None


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what the decorated function returns as the shapes, dtypes and strides of torch.ops.heedful.<name>."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if _missing is None:
            torch.library.register_fake(f"heedful::{name}", function)
        return function

    return register


def operator(name: str) -> Any:
    """torch.ops.heedful.<name>, past the layers of Python that only pass on arguments; None without the engine."""
    return None if _missing is not None else getattr(torch.ops.heedful, name).default


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a type is computed in: float64 for itself, float32 for the others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know of a call with these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply, without its search for transforms where nothing is traced: 2.5 of 10 µs."""
    eagerly: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*arguments: Any) -> Any:
        return function.apply(*arguments) if torch.compiler.is_compiling() else eagerly(*arguments)

    return apply


def is_differentiated_again() -> bool:
    """In a backward: whether somebody may ask for derivatives of its results. The operators have none."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def through(
    composition: Callable[..., Any], inputs: tuple[Tensor | None, ...], *output_gradients: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the composition's inputs, which can be differentiated again; None for those that need none."""
    outputs = composition(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = [(y, dy) for y, dy in zip(outputs, output_gradients, strict=True) if dy is not None and y.requires_grad]
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    if not pairs or not wanted:
        return (None,) * len(inputs)
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], wanted, [dy for _, dy in pairs], create_graph=True, allow_unused=True
        )
    )
    return tuple(next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs)


def written_in_place(name: str, tensor: Tensor, *, needs: bool) -> None:
    """Refuses to overwrite a tensor that a gradient needs or whose elements share memory, by its argument's name."""
    if needs:
        raise ValueError(
            f"inplace=True would overwrite {name}, which a gradient needs; call without it, or under torch.no_grad()"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"inplace=True takes {name} with memory of its own for each element, and it is expanded")
