"""What a family of models is to `patch`, and how one module is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from heedful.hf.patches.masks import make_masks, makes_patterns


class Patched(nn.Module):
    """Base, before the original class, of the classes that attention modules get."""

    replaces: ClassVar[type[nn.Module]]

    @classmethod
    def describe(cls, module: Any) -> str | None:
        """What the attention of `module` becomes, for the report; None where it has none itself."""
        return None

    @classmethod
    def notes(cls, module: Any) -> tuple[str, ...]:
        """Where results differ from the module's own, beyond rounding."""
        return ()


@dataclass(frozen=True)
class Family:
    """Which classes are known, and what becomes of them. A subclass of one is not known: it may differ.

    Attributes:
        attention: the class of an attention module, and the one that takes its place.
        masks: the class of a model that makes masks, and the mask function that makes them from now on.
        methods: the class of a model, and functions in place of some of its methods; they get no self.
    """

    attention: Mapping[type[nn.Module], type[Patched]]
    masks: Mapping[type[nn.Module], str] = field(default_factory=dict)
    methods: Mapping[type[nn.Module], Mapping[str, Callable[..., Any]]] = field(default_factory=dict)

    def knows(self, module: nn.Module) -> bool:
        return any(type(module) in classes for classes in (self.attention, self.masks, self.methods))


def is_patched(module: nn.Module) -> bool:
    return isinstance(module, Patched) or makes_patterns(module) or bool(_methods(module))


def undo(modules: Iterable[nn.Module]) -> None:
    """Gives modules their own class, masks and methods again.

    Raises:
        ValueError: something else was put over a forward of ours since; nothing is changed then.
    """
    found = list(modules)
    for module in found:
        if isinstance(module, Patched) and "forward" in vars(module):
            raise ValueError(
                f"model takes modules whose forward nobody has replaced since the patch, got a {type(module).__name__} "
                "with another; take accelerate's hooks or other wrappers off first"
            )
    for module in found:
        _undo(module)


def _undo(module: nn.Module) -> None:
    if isinstance(module, Patched):
        # Such as a self-attention that was exchanged since.
        for child in module.children():
            _undo(child)
        module.__class__ = module.replaces  # type: ignore[assignment]
    make_masks(module)
    for name in _methods(module):
        delattr(module, name)


def _methods(module: nn.Module) -> list[str]:
    """The attributes of an object that hide methods of its class by functions of ours."""
    return [name for name, value in vars(module).items() if getattr(value, "__module__", "").startswith(__package__)]
