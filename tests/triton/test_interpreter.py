"""The tests of this folder in Triton's interpreter, which needs processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available(), reason="the others run in this process"
)
@pytest.mark.parametrize(
    "files", [("test_gradients.py",), ("test_caches.py",), ("test_forward.py", "test_features.py")], ids=" ".join
)
def test_in_the_interpreter(files) -> None:
    here = Path(__file__)
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *(str(here.with_name(f)) for f in files),
        ],
        # Two processes at a time share the cores as it is, and what torch computes here is tiny.
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
