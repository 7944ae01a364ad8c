"""Every operation against the reference on the tiers below the one in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from heedful.backend.native import library

OTHERS = [n for i, n in enumerate(library.isa_names()) if library.isa_runnable(i) and i < library.isa_selected()]


@pytest.mark.skipif(bool(os.environ.get("HEEDFUL_ISA")), reason="HEEDFUL_ISA chooses the tier")
@pytest.mark.parametrize("tier", OTHERS)
def test_operations_on_tier(tier):
    checks = "test_against_the_reference or test_far_out"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", checks]
    environment = {**os.environ, "HEEDFUL_ISA": tier}
    result = subprocess.run(
        [*command, str(Path(__file__).parent)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-3000:]
