"""Launches that the bridge repeats have the parameters that triton would pass; shown without a device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from heedful import choose


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.skipif("native" in choose.UNAVAILABLE, reason="the engine is not built")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on PATH")
def test_what_is_launched(tmp_path) -> None:
    here = Path(__file__)
    build = ["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(here.with_name("driver_stub.c"))]
    subprocess.run(build, check=True)
    found = subprocess.run(
        [sys.executable, str(here.with_name("kept_launches.py")), str(tmp_path)],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    assert found.stdout.split() == [
        "full",
        "documents",
        "decode",
        "windowed-decode",
        "features",
        "lengths",
        "backward",
        "refusals",
        "Kept",
    ]
