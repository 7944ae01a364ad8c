"""heedful's own engine as a backend: `torch.ops.heedful.attention_forward` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.backend.base import Backend, Shortcut
from heedful.backend.native import library
from heedful.patterns import Pattern
from heedful.problem import Attention, Call


class NativeBackend(Backend):
    """Tiled attention that visits only the tiles that the pattern's schedule reaches."""

    name = "native"
    devices = frozenset({"cpu"})
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
    max_head_dim = 256
    features = frozenset({"lse"})
    gradient = False

    def available(self) -> str | None:
        try:
            library.load_operators()
        except ImportError as error:
            return str(error)
        return None

    def run(self, call: Call) -> Attention:
        problem = call.problem
        operands = call.pattern.operands(problem.q_length, problem.k_length, call.query.device)
        out, lse = torch.ops.heedful.attention_forward(
            call.query, call.key, call.value, list(operands), problem.schedule.encode(), call.scale, call.blhd
        )
        return Attention(out, lse if "lse" in problem.features else None, None)

    def shortcut(self, call: Call) -> Shortcut | None:
        forward = torch.ops.heedful.attention_forward.default
        problem, scale, blhd = call.problem, call.scale, call.blhd
        code, q_length, k_length = list(problem.schedule.encode()), problem.q_length, problem.k_length
        with_lse = "lse" in problem.features

        def run(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor | Attention:
            out, lse = forward(q, k, v, pattern.operands(q_length, k_length, "cpu"), code, scale, blhd)
            return Attention(out, lse, None) if with_lse else out

        def run_static(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor | Attention:
            out, lse = forward(q, k, v, [], code, scale, blhd)
            return Attention(out, lse, None) if with_lse else out

        return run if problem.schedule.slots else run_static
