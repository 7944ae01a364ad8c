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
    ("file", "words"),
    [
        ("test_forward.py", "test_patterns"),
        ("test_forward.py", "not test_patterns"),
        ("test_features.py", "test_"),
        ("test_gradients.py", "test_patterns"),
        ("test_gradients.py", "not test_patterns"),
    ],
)
def test_in_the_interpreter(file, words) -> None:
    here = Path(__file__)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here.with_name(file)), "-k", words],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
