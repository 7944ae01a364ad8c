"""Whether the modules that a graph was captured from still are what they were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class Weights:
    """Where the parameters and buffers of some modules lie, and which modules are in them.

    A graph reads memory, so that weights which are written in place need nothing. Anything else, such as `.data = `,
    `load_state_dict(assign=True)`, `.to()`, a module put in place of another one, or `train()`, makes `changed` True.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._tensors: list[tuple[dict[str, Any], str, int | None]] = []
        self._modules: list[tuple[dict[str, nn.Module | None], str, nn.Module | None]] = []
        self._training: list[tuple[nn.Module, bool]] = []
        self.need_gradient = False
        for module in {module: None for root in modules for module in root.modules()}:
            both: tuple[dict[str, Any], ...] = module._parameters, module._buffers
            for tensors in both:
                for name, tensor in tensors.items():
                    self._tensors.append((tensors, name, None if tensor is None else tensor.data_ptr()))
                    self.need_gradient |= tensor is not None and tensor.requires_grad
            self._modules += [(module._modules, name, child) for name, child in module._modules.items()]
            self._training.append((module, module.training))

    def changed(self) -> bool:
        try:
            for tensors, name, place in self._tensors:
                tensor = tensors[name]
                if (None if tensor is None else tensor.data_ptr()) != place:
                    return True
            return any(modules[name] is not module for modules, name, module in self._modules) or any(
                module.training is not training for module, training in self._training
            )
        except KeyError:
            return True
