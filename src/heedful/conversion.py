"""`convert`: heedful's attention in the place of every torch.nn.MultiheadAttention of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from heedful.arguments import DTYPES
from heedful.errors import wrong_type, wrong_value
from heedful.nn.multihead_attention import MultiheadAttention, keep_from_being_bypassed
from heedful.nn.transformer import TransformerEncoderLayer
from heedful.patterns import Pattern

if TYPE_CHECKING:
    from rich.table import Table

Model = TypeVar("Model", bound=nn.Module)
Patterns = Pattern | Callable[[str], Pattern | None] | Mapping[str, Pattern | None]

_REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
}
_ABSENT = object()


class Entry(NamedTuple):
    """What was done with one module."""

    name: str
    """Its name in the model, "" for the model itself."""
    kind: str
    """Its class before."""
    converted: bool
    what: str
    """What was done, or why nothing."""
    pattern: str | None
    """The pattern that it was given."""


class ConversionReport:
    """What `heedful.convert` did and what it left alone; printable, and the way back.

    Attributes:
        entries: one for each module that was considered, in the order of the model.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._changes: list[_Change] = []

    @property
    def converted(self) -> list[str]:
        """Names of the modules that were converted."""
        return [entry.name for entry in self.entries if entry.converted]

    @property
    def left(self) -> dict[str, str]:
        """Names of the modules that were left alone, and why."""
        return {entry.name: entry.what for entry in self.entries if not entry.converted}

    def undo(self) -> None:
        """Make every converted module what it was before; a second time does nothing.

        Raises:
            RuntimeError: a module has got another class since, such as by an undo of an earlier conversion; then
                nothing is changed.
        """
        for change in self._changes:
            if type(change.module) is not change.after:
                raise RuntimeError(
                    f"{_shown(change.name)} is a {type(change.module).__name__} now, and {change.after.__name__} is "
                    "what this conversion made of it: nothing is undone"
                )
        for change in self._changes:
            change.revert()
        self._changes.clear()

    def to_json(self) -> str:
        """The entries and how many of them were converted, as JSON."""
        entries = [entry._asdict() for entry in self.entries]
        return json.dumps({"converted": len(self.converted), "left": len(self.left), "modules": entries}, indent=2)

    def __str__(self) -> str:
        return "\n".join([self._summary(), *[f"  {': '.join(filter(None, row))}" for row in self._rows()]])

    __repr__ = __str__

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table("module", "what", "pattern", title=self._summary(), title_justify="left")
        for entry, row in zip(self.entries, self._rows(), strict=True):
            table.add_row(*row, style=None if entry.converted else "yellow")
        return table

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(f"{_shown(entry.name)} ({entry.kind})", entry.what, entry.pattern or "") for entry in self.entries]

    def _summary(self) -> str:
        if not self.entries:
            return "no torch.nn.MultiheadAttention in the model: nothing was changed"
        return f"{len(self.converted)} modules converted, {len(self.left)} left alone"


def convert(model: Model, pattern: Patterns | None = None) -> tuple[Model, ConversionReport]:
    """Make every torch.nn.MultiheadAttention of a model a `heedful.nn.MultiheadAttention`, in place.

    The modules stay the same objects, with their parameters, hooks, names and training mode, and get another class; so
    optimizers and references to them stay valid. Each torch.nn.TransformerEncoderLayer becomes a
    `heedful.nn.TransformerEncoderLayer`, because torch's fused one would compute past its attention module.
    An encoder whose pattern is made for one length (a mask, blocks, documents) stops making nested tensors of padding.
    Subclasses, quantized, parametrized and scripted modules, and those whose `forward` somebody replaced, are left
    alone and reported.

    Args:
        model: any module, itself a torch.nn.MultiheadAttention perhaps.
        pattern: which queries see which keys, besides the masks of a call: one pattern for all, cross-attention too;
            a function of a module's name in the model that gives its pattern or None; or a dict from globs over these
            names to patterns or None, where the first glob that matches counts. None is every key.

    Returns:
        The same model, and what was done: printable, `.to_json()`, `.undo()`.

    Raises:
        TypeError, ValueError: an argument is none of these, or a glob matches no attention module; nothing is changed
            then.
    """
    if not isinstance(model, nn.Module):
        raise wrong_type("model", f"a {type(model).__name__}", "a torch.nn.Module")
    candidates = [(name, module) for name, module in model.named_modules() if _is_candidate(module)]
    patterns = _patterns(pattern, [name for name, module in candidates if not _is_layer(module)])
    report = ConversionReport()
    for name, module in candidates:
        given = patterns.get(name)
        what = _why_not(module, given)
        shown = None if what is not None or given is None else repr(given)
        report.entries.append(Entry(name, _kind(module), what is None, what or _done(module), shown))
        if what is None:
            report._changes.append(_Change(name, module, {} if _is_layer(module) else {"pattern": given}))
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and _makes_nested_tensors_in_vain(module):
            what = "keeps padding instead of making nested tensors, which the pattern does not go with"
            report.entries.append(Entry(name, _kind(module), True, what, None))
            report._changes.append(_Change(name, module, {"use_nested_tensor": False}))
    return model, report


class _Change:
    """One module's new class and attributes, given on creation, and what it takes to go back."""

    def __init__(self, name: str, module: nn.Module, attributes: dict[str, Any]) -> None:
        self.name = name
        self.module = module
        self.before = type(module)
        self.after = _REPLACED.get(self.before, self.before)
        self._saved = {key: module.__dict__.get(key, _ABSENT) for key in attributes}
        self._hook: RemovableHandle | None = None
        if self.after is not self.before:
            module.__class__ = self.after
            if isinstance(module, MultiheadAttention):
                self._hook = keep_from_being_bypassed(module)
        module.__dict__.update(attributes)

    def revert(self) -> None:
        self.module.__class__ = self.before
        for key, value in self._saved.items():
            if value is _ABSENT:
                self.module.__dict__.pop(key, None)
            else:
                self.module.__dict__[key] = value
        if self._hook is not None:
            self._hook.remove()


def _makes_nested_tensors_in_vain(encoder: nn.TransformerEncoder) -> bool:
    """Whether an encoder would make nested tensors of padded ones for layers whose pattern is made for one length."""
    patterns = [getattr(getattr(layer, "self_attn", None), "pattern", None) for layer in encoder.layers]
    return bool(encoder.use_nested_tensor) and any(isinstance(p, Pattern) and not p.by_position for p in patterns)


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return module.original_name in [replaced.__name__ for replaced in _REPLACED]
    # A layer that is heedful's already has nothing to tell beside its attention.
    return isinstance(module, tuple(_REPLACED)) and type(module) is not TransformerEncoderLayer


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.TransformerEncoderLayer)


def _why_not(module: Any, pattern: Pattern | None = None) -> str | None:
    """Why a candidate is left alone; None where it is converted."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted: its code is fixed"
    if "forward" in module.__dict__:
        return "has a forward of its own, put there by another library perhaps"
    if type(module) is MultiheadAttention:
        return "is heedful's already" if pattern is None else None
    if parametrize.is_parametrized(module):
        return "is parametrized: its class is made for that"
    if type(module) not in _REPLACED:
        return f"is a subclass, {type(module).__module__}.{type(module).__qualname__}: its own code would be lost"
    if _is_layer(module):
        attention = module.self_attn
        return (
            None
            if type(attention) is MultiheadAttention or _why_not(attention) is None
            else "has a self_attn that is left alone"
        )
    for name in ("in_proj_weight", "q_proj_weight", "out_proj.weight"):
        weight = _attribute(module, name)
        if weight is not None and not (isinstance(weight, Tensor) and weight.dtype in DTYPES):
            return f"has a quantized or unknown {name}"
    return None


def _done(module: nn.Module) -> str:
    if _is_layer(module):
        return "runs module by module, so that its self_attn is called in evaluation too"
    return "was heedful's already, and got a pattern" if type(module) is MultiheadAttention else "runs on heedful"


def _patterns(pattern: Patterns | None, names: list[str]) -> dict[str, Pattern | None]:
    """The pattern of each attention module.

    Raises:
        TypeError, ValueError: as `convert`.
    """
    if isinstance(pattern, Mapping):
        idle = [glob for glob in pattern if not any(fnmatchcase(name, glob) for name in names)]
        if idle:
            found = ", ".join(map(_shown, names)) or "none"
            raise wrong_value("pattern", f"{idle[0]!r}", f"globs that match attention modules, which are: {found}")
        given = {name: next((pattern[glob] for glob in pattern if fnmatchcase(name, glob)), None) for name in names}
    elif pattern is None or isinstance(pattern, Pattern):
        given = dict.fromkeys(names, pattern)
    elif callable(pattern) and not isinstance(pattern, type):
        given = {name: pattern(name) for name in names}
    else:
        takes = "a heedful.Pattern (an instance), a function of a module's name, a dict from globs, or None"
        raise wrong_type("pattern", f"a {type(pattern).__name__}", takes)
    for name, one in given.items():
        if one is not None and not isinstance(one, Pattern):
            raise wrong_type(f"pattern for {_shown(name)}", f"a {type(one).__name__}", "a heedful.Pattern or None")
    return given


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _kind(module: nn.Module) -> str:
    return str(module.original_name) if isinstance(module, torch.jit.ScriptModule) else type(module).__name__


def _shown(name: str) -> str:
    return name or "the model itself"
