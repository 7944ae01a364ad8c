"""CUDA tensors on kernels written in Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

from heedful.backend.base import Shortcut
from heedful.backend.native.backend import NativeBackend, settings_of, slopes_of
from heedful.backend.triton.plan import FAR
from heedful.dropout import draw_seed
from heedful.problem import Attention, Call, Problem

_LARGEST_HEAD_DIM_WITH_GRADIENT = 256

_count_modes = torch._C._len_torch_dispatch_stack
_are_transforms_active = torch._C._are_functorch_transforms_active


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

    def run(self, call: Call) -> Attention:
        features = call.problem.features
        seen_by_torch = torch.compiler.is_compiling() or _count_modes() or _are_transforms_active()
        if seen_by_torch or features & {"gradient", "weights", "sparse_weights"}:
            return super().run(call)
        settings = settings_of(call, self.operators)
        if len(settings.parts) > 1:
            return super().run(call)
        # Past torch's dispatcher, which takes 10 µs to come back to Python.
        from heedful.backend.triton import shortcuts
        from heedful.backend.triton.launch import forward

        problem = call.problem
        if call.pages is None and call.query_offset is None and shortcuts.is_step(problem):
            extras = (None, None, call.sinks) if features - {"lse"} else ()
            found = shortcuts.without_gradient(call, None)(call.query, call.key, call.value, (), *extras)
            return found if isinstance(found, Attention) else Attention(found, None, None)
        out, lse = forward(
            call.query, call.key, call.value,
            call.pattern.operands(problem.q_length, problem.k_length, call.query.device), settings.schedule, call.scale,
            call.blhd, call.bias, slopes_of(call.alibi_slopes), call.sinks, settings.softcap, call.dropout_p,
            draw_seed(call.query.device) if call.dropout_p else None, call.pages, call.query_offset,
        )  # fmt: skip
        return Attention(out, lse if "lse" in features else None, None)

    def shortcut(self, call: Call) -> Shortcut | None:
        if call.pages is not None or call.query_offset is not None:
            return None
        by_operator = super().shortcut(call)
        if len(settings_of(call, self.operators).parts) > 1 or by_operator is None:
            return by_operator
        from heedful.backend.triton import shortcuts

        features = call.problem.features
        if features == {"gradient"}:
            return shortcuts.with_gradient(call)
        if features <= {"bias", "alibi", "softcap", "sinks", "dropout", "lse"}:
            return shortcuts.without_gradient(call, by_operator)
        return by_operator

    def forget(self) -> None:
        from heedful.backend.triton import shortcuts

        shortcuts.forget()
