"""The levels: what each is, whether this machine runs it, and modules made or converted at one."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from heedful.errors import unsupported, wrong_type, wrong_value

if TYPE_CHECKING:
    import torch

    from heedful.levels.operations import Operations

Level = int | str

# The rung that is none: PyTorch's own fused functions, for comparison.
BESIDE = "torch"
LEVELS: MappingProxyType[Level, str] = MappingProxyType(
    {1: "PyTorch", 2: "TorchScript", 3: "torch.compile", 4: "Triton", 5: "native"}
)
NAMES: MappingProxyType[Level, str] = MappingProxyType({**LEVELS, BESIDE: "PyTorch's fused functions"})
_FILES: dict[Level, str] = {
    1: "level_1_pytorch",
    2: "level_2_torchscript",
    3: "level_3_compile",
    4: "level_4_triton",
    5: "level_5_native",
    BESIDE: "pytorch_fused",
}
_COMPILED = 3
_SCRIPTED_BELOW = (3, 14)
_COMPILERS = ("c++", "g++", "clang++", "clang", "gcc")

# Loaded when a module of the level is made; a plain dict, because compiled code reads it.
loaded: dict[Level, Operations] = {}


@dataclass(frozen=True)
class Availability:
    """Whether a level runs here; where it does not, why and how to get it. True where it does."""

    level: Level
    name: str
    reason: str | None = None
    remedy: str | None = None

    @property
    def available(self) -> bool:
        """Whether there is no reason against it."""
        return self.reason is None

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        if self.available:
            return f"level {self.level} ({self.name}): available"
        return f"level {self.level} ({self.name}): {self.reason}; {self.remedy}"


def available(level: Level, component: str | None = None, *, device: str | torch.device = "cpu") -> Availability:
    """Whether a level of a component, or of any where none is named, runs on a device here.

    Args:
        level: 1 to 5, or "torch" for PyTorch's own fused functions.
        component: a name of `heedful.levels.COMPONENTS`.
        device: "cpu", "cuda", or a device.

    Raises:
        ValueError: there is no such level, component or device.
    """
    level = check_level(level)
    kind = str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise wrong_value("device", repr(str(device)), "'cpu' or 'cuda'")
    attends = component is not None and component_class(component).attends
    problem = _problem(level, kind, attends)
    return Availability(level, NAMES[level], *(problem or ()))


def _problem(level: Level, device: str, attends: bool) -> tuple[str, str] | None:
    """Reason and remedy, None where the level runs."""
    if device == "cuda" and level != 5 and not _has_gpu():
        return "this torch finds no GPU", "a GPU and a torch built for it"
    match level:
        case 2 if sys.version_info >= _SCRIPTED_BELOW:
            return (
                "TorchScript is deprecated in PyTorch 2.13 and gone from Python 3.14",
                "Python 3.13 or older, or level 3, which replaced it",
            )
        case 3:
            return _without_compiler(device)
        case 4:
            return _without_triton(device, attends)
        case 5 if device == "cuda":
            return "its CUDA kernels are not there yet", "levels 1 to 4 run on a GPU"
        case 5:
            return _without_engine()
    return None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _without_compiler(device: str) -> tuple[str, str] | None:
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU, which is not installed", "pip install triton"
    if device == "cpu" and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), *_COMPILERS)))):
        return "torch.compile needs a C++ compiler on a CPU, and none is on the path", "install g++, or set CXX"
    return None


def _without_triton(device: str, attends: bool) -> tuple[str, str] | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed", "pip install triton"
    if device == "cpu" and not interpreting():
        return (
            "Triton compiles for GPUs, and this is a CPU",
            "a GPU; for tests and study TRITON_INTERPRET=1 in the environment runs the kernels under its interpreter",
        )
    if attends:
        from heedful.api import list_backends

        status = next((status for status in list_backends() if status.name == "triton"), None)
        if status is None:
            return "heedful has no Triton backend for attention yet", "level 4 of the components without attention"
        if not status.available:
            return f"heedful's Triton backend for attention is not available: {status.reason}", "see heedful doctor"
    return None


def _without_engine() -> tuple[str, str] | None:
    from heedful.backend.native import library

    try:
        library.engine()
    except ImportError as error:
        return str(error), "an installation of heedful that has its engine"
    return None


def interpreting() -> bool:
    """Whether Triton's kernels run under its interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def check_level(level: object) -> Level:
    """The level.

    Raises:
        ValueError: there is none such.
    """
    if isinstance(level, bool) or not isinstance(level, (int, str)) or level not in NAMES:
        raise wrong_value("level", repr(level), "1 (PyTorch) to 5 (native), or 'torch' for PyTorch's fused functions")
    return level


def component_class(name: str) -> Any:
    """The class of a component by its name.

    Raises:
        ValueError: there is none such.
    """
    from heedful.levels.catalogue import COMPONENTS

    if name not in COMPONENTS:
        raise wrong_value("component", repr(name), f"one of {', '.join(COMPONENTS)}")
    return COMPONENTS[name]


def load(level: Level) -> Operations:
    """The functions of a level."""
    if level not in loaded:
        module = importlib.import_module(f"heedful.levels.{_FILES[level]}")
        loaded[level] = cast("Operations", module)
    return loaded[level]


def create(component: str, level: Level = 5, *, device: str | torch.device | None = None, **arguments: Any) -> Any:
    """A component at a level.

    All levels of a component have the same constructor arguments, parameters, `forward` and, from the same random
    seed, the same initial weights.

    Args:
        component: a name of `heedful.levels.COMPONENTS`.
        level: 1 to 5, or "torch" for PyTorch's own fused functions.
        device: where its parameters are to be; None is torch's default device.
        arguments: what the component's class takes.

    Raises:
        ValueError, TypeError: there is no such component, level or argument.
        UnsupportedError: the level does not run here; the message says why and how to get it.
    """
    import torch

    made = component_class(component)
    where = torch.get_default_device() if device is None else torch.device(device)
    require(level, component, where)
    with where:
        module = made(**arguments)
    set_level(module, check_level(level))
    return module


Module = TypeVar("Module", bound="torch.nn.Module")


def convert(module: Module, level: Level) -> Module:
    """A copy of a module with its components at another level, sharing its parameters and buffers.

    The module itself stays as it is. Both read and train the same weights: an optimizer of the one moves the other.

    Args:
        module: a component, or any module that holds components.
        level: 1 to 5, or "torch" for PyTorch's own fused functions.

    Raises:
        TypeError: there is no component in the module.
        UnsupportedError: the level does not run here, or not on the module's device.
    """
    from itertools import chain

    from torch import nn

    from heedful.levels.base import Component

    if not isinstance(module, nn.Module):
        raise wrong_type("module", type(module).__name__, "a torch.nn.Module")
    components = [part for part in module.modules() if isinstance(part, Component)]
    if not components:
        raise wrong_type("module", f"{type(module).__name__} without any", "one that holds heedful.levels components")
    where = next((tensor.device for tensor in chain(module.parameters(), module.buffers())), "cpu")
    for part in components:
        require(level, part.component, where)
    shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    converted = copy.deepcopy(module, cast("dict[int, Any]", shared))
    set_level(converted, check_level(level))
    return converted


def require(level: Level, component: str, device: str | torch.device) -> None:
    """Refuses a level that does not run on a device here.

    Raises:
        UnsupportedError: with the reason and the remedy.
    """
    status = available(level, component, device=device)
    if not status:
        raise unsupported(
            f"level {level} ({status.name}) of {component!r} does not run here: {status.reason}. "
            f"How to get it: {status.remedy}.",
            {},
        )


def set_level(module: torch.nn.Module, level: Level) -> None:
    """Put every component in a module on a level, and compile where that is the level."""
    from heedful.levels.base import Component

    load(level)
    components = [part for part in module.modules() if isinstance(part, Component)]
    for part in components:
        part.put_on(level)
    inside: set[int] = set()
    for part in components if level == _COMPILED else ():
        # What a compiled component holds is compiled with it.
        if id(part) not in inside:
            for unit in part.units():
                unit.compile_graph()
        inside.update(map(id, part.modules()))
