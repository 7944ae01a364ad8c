"""Level 4's kernels: their numbers under Triton's interpreter, and machine code for GPUs that need not be there.

Triton decides when it is imported whether kernels are compiled or interpreted, so that the tests of numbers, in
interpreted_kernels.py, run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def test_numbers_under_the_interpreter() -> None:
    cases = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_kernel_compiles_to_machine_code(architecture: int, dtype: str) -> None:
    from heedful.levels.triton_kernels import launch
    from heedful.levels.triton_kernels.compilation import compile_for, specimens

    try:
        from triton import knobs

        assembler = knobs.nvidia.ptxas.path
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"this Triton brings no ptxas: {error}")
    assert assembler
    found = compile_for(architecture, dtype)
    assert all(code.startswith(b"\x7fELF") for code in found.values())
    launched = {value for value in vars(launch).values() if hasattr(value, "arg_names")}
    assert launched == {kernel for _, kernel, _, _ in specimens(dtype)}
