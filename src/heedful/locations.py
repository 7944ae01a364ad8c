"""Where the C interface lies in an installation."""

from __future__ import annotations

from pathlib import Path


def get_include() -> str:
    """The folder of `heedful.h`, as in `cc -I$(python -c 'import heedful; print(heedful.get_include())')`.

    Raises:
        ImportError: the header is not there, as in a source tree that has not been built.
    """
    return _existing(Path(__file__).resolve().parent / "include", "heedful.h")


def get_library_dir() -> str:
    """The folder of `libheedful_engine.so`, which needs no Python, with `pkgconfig` and `cmake` in it.

    Raises:
        ImportError: the library is not there, as in a source tree that has not been built.
    """
    # Here, so that finding the header loads nothing.
    from heedful.backend.native import library

    return _existing(library.directory(), "libheedful_engine.so")


def _existing(folder: Path, name: str) -> str:
    if not (folder / name).exists():
        raise ImportError(
            f"heedful's {name} is not there: no {folder / name}. An installation has it (pip install .); in a source "
            "tree, make build puts it there.",
            path=str(folder / name),
        )
    return str(folder)
