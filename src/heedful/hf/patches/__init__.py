"""`patch`: heedful in models that compute their attention outside transformers' attention interface.

An attention module gets a class of ours in place of its own, which adds no parameter and differs in `forward` alone,
so that copies, checkpoints and other models of the same class know nothing of it. Where a model makes masks, they
reach its attention as patterns.
"""

from __future__ import annotations

import importlib
import sys
from typing import cast

from torch import nn

from heedful.hf.patches.family import Family, is_patched, undo
from heedful.hf.patches.masks import make_patterns
from heedful.hf.patches.report import PatchReport, Replaced

__all__ = ["PatchReport", "patch", "unpatch"]

# The module of transformers.models that a family's classes are in, and the module here that has its Family.
FAMILIES = {
    "longformer": "longformer",
    "led": "led",
    "big_bird": "big_bird",
    "bigbird_pegasus": "bigbird_pegasus",
    "bloom": "bloom",
    "mpt": "mpt",
    "falcon": "falcon",
}


def patch(model: nn.Module) -> PatchReport:
    """Puts heedful into a model of Longformer, LED, BigBird, BigBird-Pegasus, BLOOM, MPT or Falcon, in place.

    Weights, names of parameters, arguments and outputs stay. Long inputs cost what the model's sparse pattern says;
    ALiBi needs no tensor of query times key length.

    Args:
        model: the model, or one that contains it. Only this object changes, not its class.

    Returns:
        What was done; `print` shows it, `.to_json()` is the same for programs, `.undo()` takes it back, as
        `heedful.hf.unpatch(model)` does. On a model that was patched before it says that nothing was left to do.

    Raises:
        TypeError: `model` is no torch module.
        ValueError: nothing in the model is known here; or a module's forward has been replaced already, by
            accelerate's hooks for instance, which are to come after the patch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model takes a torch.nn.Module, got a {type(model).__name__}")
    families = [_family(name) for name in _names(model)]
    before = any(is_patched(module) for module in model.modules())
    found = [
        (name, module, family)
        for name, module in model.named_modules()
        for family in families
        if family.knows(module) and not is_patched(module)
    ]
    if not before and not any(type(module) in family.attention for _, module, family in found):
        raise ValueError(_unknown(model))
    for name, module, _ in found:
        if "forward" in vars(module):
            raise ValueError(
                f"model takes modules with a forward of their class, got {name or type(module).__name__!r} with "
                "another; patch before accelerate's hooks or other wrappers are put on"
            )
    replaced, notes = [], {}
    for name, module, family in found:
        for attribute, function in family.methods.get(type(module), {}).items():
            setattr(module, attribute, function)
        if type(module) in family.masks:
            make_patterns(module, family.masks[type(module)])
        ours = family.attention.get(type(module))
        if ours is not None:
            attention = ours.describe(module)
            if attention is not None:
                replaced.append(Replaced(name, type(module).__name__, attention))
            notes.update(dict.fromkeys(ours.notes(module)))
            module.__class__ = cast(type[nn.Module], ours)
    return PatchReport(type(model).__name__, tuple(replaced), tuple(notes), tuple(module for _, module, _ in found))


def unpatch(model: nn.Module) -> None:
    """Takes back what `patch` did to a model, a copy of it, or what contains it; nothing where there is none.

    Raises:
        ValueError: a module's forward has been replaced since, by accelerate's hooks for instance; nothing is changed.
    """
    undo(model.modules())


def _names(model: nn.Module) -> list[str]:
    """The families that some class in the model belongs to."""
    modules = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    return [name for name in FAMILIES if f"transformers.models.{name}.modeling_{name}" in modules]


def _family(name: str) -> Family:
    module = importlib.import_module(f"{__name__}.{FAMILIES[name]}")
    return cast(Family, module.FAMILY)


def _unknown(model: nn.Module) -> str:
    message = f"model takes one with attention of {', '.join(FAMILIES)}, got a {type(model).__name__}"
    interface = "ALL_ATTENTION_FUNCTIONS"
    if any(hasattr(sys.modules.get(cls.__module__), interface) for m in model.modules() for cls in type(m).__mro__):
        return f'{message}, which takes heedful by attn_implementation="heedful" or model.set_attn_implementation'
    return message
