"""CUDA tensors on kernels written in Triton."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from heedful.backend.base import Shortcut
from heedful.backend.native.backend import NativeBackend
from heedful.backend.triton.plan import FAR
from heedful.problem import Attention, Call, Problem

_LARGEST_HEAD_DIM_WITH_GRADIENT = 256


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(NativeBackend):
    """The engine's schedules and features on a GPU: tiles that the pattern does not reach are never visited."""

    name = "triton"
    devices = frozenset({"cuda"})
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32})
    max_head_dim = 512
    gradient = True
    operators = "heedful_triton"

    def available(self) -> str | None:
        if not (torch.cuda.is_available() or interpreted()):
            return "torch sees no CUDA device"
        if torch.version.hip is not None:
            return "takes NVIDIA's devices, not AMD's"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        from heedful.backend.triton import operators

        operators.register()
        return None

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = super().not_supported_reasons(problem)
        if interpreted() and problem.device_type == "cpu":
            reasons = [reason for reason in reasons if not reason.endswith("tensors, not cpu")]
        dims = problem.head_dim, problem.value_dim
        if "gradient" in problem.features and _LARGEST_HEAD_DIM_WITH_GRADIENT < max(dims) <= self.max_head_dim:
            reasons.append(
                f"has gradients for head and value dims up to {_LARGEST_HEAD_DIM_WITH_GRADIENT}, not {max(dims)}"
            )
        if max(problem.q_length, problem.k_length) >= FAR:
            reasons.append(f"takes lengths below {FAR}")
        return reasons

    def on_request_only(self, problem: Problem) -> bool:
        return problem.device_type != "cuda"

    def notes(self, problem: Problem) -> list[str]:
        return ["Triton's interpreter runs the kernels, for checking, not speed"] if interpreted() else []

    def shortcut(self, call: Call) -> Shortcut | None:
        if call.pages is not None or call.query_offset is not None:
            return None
        if call.problem.features - {"lse"}:
            return super().shortcut(call)
        from heedful.backend.triton.launch import forward

        code, scale, blhd, with_lse = (
            call.problem.schedule.encode(),
            call.scale,
            call.blhd,
            "lse" in call.problem.features,
        )

        def run(q: Tensor, k: Tensor, v: Tensor, operands: tuple[Tensor, ...]) -> Tensor | Attention:
            out, lse = forward(q, k, v, operands, code, scale, blhd)
            return Attention(out, lse, None) if with_lse else out

        return run
