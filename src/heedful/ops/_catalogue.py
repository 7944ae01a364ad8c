"""The facts about every operation, in one machine-readable place."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Argument:
    """A tensor or a parameter of an operation."""

    name: str
    shape: str
    """Of a tensor, as in "(..., C)"; of a parameter its type."""
    meaning: str


@dataclass(frozen=True)
class Cost:
    """The least that a call has to do: floating-point operations, and bytes read and written once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Case:
    """A call that is measured."""

    name: str
    inputs: Callable[[torch.dtype], dict[str, Any]]
    """Its keyword arguments, fresh at each call; tensors that `Operation.gradients` names get gradients."""
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Functions of PyTorch's own that compute the same from the same arguments, by their names."""


@dataclass(frozen=True)
class Slower:
    """Calls that PyTorch was measured to run as fast as the engine or faster."""

    peer: str
    """What runs them so."""
    where: str
    """Which calls they are, in words."""
    applies: Callable[[Inputs, bool], bool]
    """The same of a call's keyword arguments and whether it needs a gradient."""
    left_by: tuple[str, ...] = ()
    """What would use the operation of its own accord, and leaves these calls to the peer. Elsewhere the operation is
    called by name, or gives something that the peer does not."""


@dataclass(frozen=True)
class Operation:
    """What there is to know about an operation; its file has one of these beside it."""

    name: str
    summary: str
    formula: str
    source: str
    """Who defined the formula."""
    inputs: tuple[Argument, ...]
    parameters: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    gradients: tuple[str, ...]
    """The arguments that have gradients."""
    complexity: str
    cost: Callable[[Inputs, bool], Cost]
    """Of a call's keyword arguments, and whether its backward is meant."""
    function: Callable[..., Any]
    reference: Callable[..., Any]
    """The same in plain PyTorch, with the same arguments: the specification, to be run in float64, and what runs where
    the engine does not."""
    operators: tuple[str, ...]
    """Those of torch.ops.heedful that it is made of."""
    cases: tuple[Case, ...]
    module: str | None = None
    """Its class in heedful.nn."""
    slower: tuple[Slower, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    backends: tuple[str, ...] = ("native", "reference")

    def to_json(self) -> dict[str, Any]:
        """The facts as plain data."""
        plain = {name: getattr(self, name) for name in ("name", "summary", "formula", "source", "complexity", "module")}
        for name in ("inputs", "parameters", "outputs"):
            plain[name] = [vars(argument) for argument in getattr(self, name)]
        for name in ("gradients", "operators", "backends"):
            plain[name] = list(getattr(self, name))
        plain["dtypes"] = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        plain["cases"] = [case.name for case in self.cases]
        plain["slower"] = [
            {"peer": slower.peer, "where": slower.where, "left_by": list(slower.left_by)} for slower in self.slower
        ]
        return plain


def catalogue() -> dict[str, Operation]:
    """Every operation's facts by its name."""
    from heedful import ops

    names = [name for name in ops._HOME if name not in ops._NOT_OPERATIONS]
    files = {ops._HOME[name] for name in names}
    found = {
        operation.name: operation
        for file in files
        for operation in importlib.import_module(f"heedful.ops.{file}").OPERATIONS
    }
    return {name: found[name] for name in sorted(names)}


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of all of them together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
