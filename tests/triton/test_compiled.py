"""Machine code of the main kernels, made without a device: what spills may not grow unseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of a thread's stack, which is where spills go, as triton 3.6 and its ptxas leave them.
STACKS = {
    80: {
        "full": {"attention_forward": 0, "query_gradient": 0, "key_value_gradients": 16},
        "longformer": {"attention_forward": 8, "query_gradient": 0, "key_value_gradients": 8},
    },
    86: {"full": {"attention_forward": 0, "query_gradient": 0, "key_value_gradients": 16}},
    90: {
        "full": {"attention_forward": 0, "query_gradient": 0, "key_value_gradients": 0},
        "longformer": {"attention_forward": 0, "query_gradient": 0, "key_value_gradients": 120},
        # The spills are of the loop that takes out what is no finite number.
        "bias": {"find_nonfinite": 0, "attention_forward": 0, "query_gradient": 0, "key_value_gradients": 400},
    },
}
# Of a block, in KiB.
SHARED_MEMORY = {80: 163, 86: 99, 90: 227}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", STACKS)
def test_registers_and_spills(arch) -> None:
    here = Path(__file__)
    found = subprocess.run(
        [sys.executable, str(here.with_name("compiled.py")), str(arch), *(f"{name} d128" for name in STACKS[arch])],
        cwd=here.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    seen = set()
    for line in found.stdout.splitlines():
        kernel = json.loads(line)
        name = kernel["case"].split()[0]
        limit = STACKS[arch][name].get(kernel["kernel"], 0)
        assert kernel["stack"] <= limit, line
        assert kernel["registers"] <= 255, line
        assert kernel["shared"] <= SHARED_MEMORY[arch] * 1024, line
        seen.add((name, kernel["kernel"]))
    assert {(name, kernel) for name, kernels in STACKS[arch].items() for kernel in kernels} <= seen
