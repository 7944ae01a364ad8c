"""`import flash_attn` for models whose imports are hard-wired."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# flash-attn's release that the functions follow.
VERSION = "2.8.3"

# What there is of flash_attn, and where its names come from.
_SOURCES = {
    "flash_attn": "heedful.flash_attn",
    "flash_attn.flash_attn_interface": "heedful.flash_attn.flash_attn_interface",
    "flash_attn.bert_padding": "heedful.flash_attn.bert_padding",
    "flash_attn.layers": "heedful.flash_attn.layers",
    "flash_attn.layers.rotary": "heedful.flash_attn.layers.rotary",
}


class _Finder(MetaPathFinder, Loader):
    """Finds flash_attn and its modules, whose names are those of heedful's own."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        source = _SOURCES.get(fullname)
        if source is None:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in _SOURCES)
        spec = ModuleSpec(fullname, self, origin=importlib.import_module(source).__file__, is_package=is_package)
        spec.has_location = True
        return spec

    def exec_module(self, module: ModuleType) -> None:
        source = importlib.import_module(_SOURCES[module.__name__])
        if module.__name__ == "flash_attn":
            source = importlib.import_module("flash_attn.flash_attn_interface")
            module.__dict__["__version__"] = VERSION
        names = getattr(source, "__all__", [])
        module.__doc__ = source.__doc__
        module.__dict__.update({name: getattr(source, name) for name in names}, __all__=names)


_finder: _Finder | None = None
_replaced: dict[str, ModuleType] = {}


def install(replace: bool = False) -> None:
    """Makes `import flash_attn` give heedful's functions, in this process.

    Of its modules there are `flash_attn_interface`, `bert_padding` and `layers.rotary`; importing another one raises
    ModuleNotFoundError, as where flash-attn is absent. A second call changes nothing.

    Args:
        replace: whether to take the place of a flash-attn that is installed, such as one that does not load without a
            GPU. What has been imported from it already stays as it is.

    Raises:
        RuntimeError: flash-attn is installed, and `replace` is False.
    """
    global _finder
    if _finder is not None:
        return
    present = _present()
    if present is not None and not replace:
        raise RuntimeError(
            f"flash_attn is installed ({present}), and heedful stands in for it where it is absent; "
            "install(replace=True) puts heedful in its place for this process"
        )
    _replaced.update(_take_out())
    _finder = _Finder()
    sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Undoes `install`: `import flash_attn` finds what it found before. What was imported meanwhile goes on working."""
    global _finder
    if _finder is None:
        return
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    _finder = None
    _take_out()
    sys.modules.update(_replaced)
    _replaced.clear()


def _present() -> str | None:
    """Where a flash_attn is that can be imported, None where there is none."""
    module = sys.modules.get("flash_attn")
    if module is not None:
        return str(getattr(module, "__file__", None) or module)
    spec = importlib.util.find_spec("flash_attn")
    return None if spec is None else str(spec.origin or spec.submodule_search_locations)


def _take_out() -> dict[str, ModuleType]:
    """Takes flash_attn and its modules out of what is imported."""
    names = [name for name in sys.modules if name == "flash_attn" or name.startswith("flash_attn.")]
    return {name: sys.modules.pop(name) for name in names}
