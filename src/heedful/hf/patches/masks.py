"""Patterns in place of masks, in one model that makes its masks by its config.

transformers asks the config which mask function to call. The config may be shared with other models, so while the
model runs, it alone sees one that says otherwise and is the same in all else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


class MaskConfig:
    """A config under the name of another attention implementation; what is set on it, as transformers does while a
    forward runs, stays its own."""

    def __init__(self, original: Any, implementation: str) -> None:
        self.original = original
        self._attn_implementation = implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


@dataclass(frozen=True)
class Begin:
    """A hook before a model's forward."""

    implementation: str

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not isinstance(module.config, MaskConfig):
            module.config = MaskConfig(module.config, self.implementation)  # type: ignore[assignment]


def end(module: nn.Module, args: Any, output: Any) -> None:
    """The hook after it, also where it raised."""
    if isinstance(module.config, MaskConfig):
        module.config = module.config.original


def make_patterns(module: nn.Module, implementation: str) -> None:
    """From now on the masks that `module` makes come from the mask function of that name."""
    module.register_forward_pre_hook(Begin(implementation))
    module.register_forward_hook(end, always_call=True)


def makes_patterns(module: nn.Module) -> bool:
    return any(isinstance(hook, Begin) for hook in module._forward_pre_hooks.values())


def make_masks(module: nn.Module) -> None:
    """Takes `make_patterns` back, where it was."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Begin)]:
        del module._forward_pre_hooks[key]
    for key in [key for key, hook in module._forward_hooks.items() if hook is end]:
        del module._forward_hooks[key]
        module._forward_hooks_always_called.pop(key, None)
