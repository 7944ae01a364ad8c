"""Where Triton's kernels run: on a CUDA device where there is one, otherwise in Triton's interpreter on the CPU.

The interpreter has to be asked for before anything imports triton, and then nothing can be compiled. So without a
device these tests are skipped in a common run, and test_interpreter.py has them in a process of their own.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import pytest
import torch
from comparison import check

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
ANYWHERE = (
    "test_interpreter.py",
    "test_compiled.py",
    "test_choice.py",
    "test_plan.py",
    "test_kept.py",
    "test_tuned.py",
)


if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    _patch_language = interpreter._patch_lang

    def _patch_language_once(function: Any) -> object:
        """The interpreter goes through all of triton.language at every call inside a kernel: a third of the time."""
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return _patch_language(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = _patch_language_once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.parent.name == "triton"]
    why = None
    if importlib.util.find_spec("triton") is None:
        why = "triton is not installed"
    elif not (INTERPRETED or ON_GPU):
        why = "no CUDA device; test_interpreter.py runs it in Triton's interpreter"
    for item in here:
        if why and not (item.path.name in ANYWHERE and "not installed" not in why):
            item.add_marker(pytest.mark.skip(reason=why))
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture
def verify(device):
    """`comparison.check` of a call on Triton."""
    return functools.partial(check, backend="triton", device=device)
