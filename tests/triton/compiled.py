"""Compiles kernels to machine code without a device: each line of the output is a case with its registers and spills.

python compiled.py 90 [words of cases...]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from heedful import BigBird, Causal, Documents, Full, Longformer, SlidingWindow
from heedful.backend.triton import gradients, kernels, launch

ENDS = torch.tensor([0, 512, 2048], dtype=torch.int32)
CASES: dict[str, tuple[Any, int, torch.dtype]] = {
    f"{name} d{dim} {str(dtype).removeprefix('torch.')}": (pattern, dim, dtype)
    for name, pattern, dim, dtype in (
        ("full", Full(), 128, torch.bfloat16),
        ("full", Full(), 64, torch.float16),
        ("causal", Causal(), 64, torch.bfloat16),
        ("causal", Causal(), 128, torch.float16),
        ("causal", Causal(), 80, torch.bfloat16),
        ("causal", Causal(), 256, torch.bfloat16),
        ("window", SlidingWindow(1023, 0), 128, torch.bfloat16),
        ("longformer", Longformer(256, 16), 128, torch.bfloat16),
        ("bigbird", BigBird(64, 3, 2, 3), 128, torch.bfloat16),
        ("documents", Documents(ENDS, within=Causal()), 128, torch.bfloat16),
        ("causal", Causal(), 128, torch.float32),
        ("bias", Full(), 128, torch.bfloat16),
    )
}


class Offline(CudaDriver):
    """A driver of a device that is not there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, which is where spills go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)


def main() -> None:
    arch, words = int(sys.argv[1]), sys.argv[2:]
    triton.runtime.driver.set_active(Offline(arch))
    case = ""

    def compile_only(device, one) -> None:
        found = one.function.warmup(
            *one.arguments, *one.constants, grid=one.grid, num_warps=one.warps, num_stages=one.stages,
            launch_pdl=one.dependent,
        )  # fmt: skip
        registers, stack = usage(found.asm["cubin"])
        print(json.dumps({
            "case": case, "kernel": one.function.__name__, "registers": registers, "stack": stack,
            "shared": found.metadata.shared, "warps": one.warps, "stages": one.stages,
        }), flush=True)  # fmt: skip

    kernels.launch = compile_only
    launch.device_limits = gradients.device_limits = lambda index: (arch, 132)
    for case, (pattern, dim, dtype) in CASES.items():
        if words and not any(word in case for word in words):
            continue
        # Enough heads that keys are not split; nothing is ever written or read.
        length = 2048
        q, k, v = (torch.empty(1, 144, length, dim, dtype=dtype) for _ in range(3))
        operands, code = pattern.operands(length, length), pattern.schedule.encode()
        bias = torch.empty(1, 1, length, length, dtype=dtype) if "bias" in case else None
        out, lse = launch.forward(q, k, v, operands, code, dim**-0.5, False, bias)
        gradients.backward(
            out, q, k, v, out, lse, operands, code, dim**-0.5, bias, None, 0.0, 0.0, None, None, None, False, False
        )
        if "full" in case:
            launch.forward(q[:, :8, :1], k[:, :8], v[:, :8], operands, code, dim**-0.5, False)


if __name__ == "__main__":
    main()
