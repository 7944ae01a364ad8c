"""The specification as a backend: every feature and pattern, in fp64, at the cost of dense matrices."""

from __future__ import annotations

import torch

from heedful import dropout
from heedful.backend.base import Backend
from heedful.backend.reference.formula import attend
from heedful.problem import FEATURES, Attention, Call, Problem


class ReferenceBackend(Backend):
    """Plain PyTorch in fp64 over the pattern's dense mask; derivatives of any order by autograd."""

    name = "reference"
    devices = frozenset({"cpu", "cuda", "xpu", "meta"})
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
    max_head_dim = None
    features = frozenset(FEATURES) - {"gradient", "cache", "sparse_weights"}
    gradient = True

    def notes(self, problem: Problem) -> list[str]:
        size = f"{problem.q_length} x {problem.k_length}"
        return [
            f"everything runs dense: fp64 matrices of {size} for every batch item and head, for checking, not speed"
        ]

    def run(self, call: Call) -> Attention:
        problem, query = call.problem, call.query
        shape = (problem.batch, problem.heads, problem.q_length, problem.k_length)
        kept = None
        if call.dropout_p:
            mask = dropout.keep_mask(dropout.draw_seed(query.device), call.dropout_p, shape)
            kept = mask.double() / (1 - call.dropout_p)
        out, lse, weights = attend(
            query,
            call.key,
            call.value,
            call.pattern.dense(problem.q_length, problem.k_length, query.device),
            scale=call.scale,
            softcap=call.softcap,
            bias=call.bias,
            alibi_slopes=call.alibi_slopes,
            sinks=call.sinks,
            kept=kept,
        )
        statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
        return Attention(
            out.to(query.dtype),
            lse.to(statistics) if "lse" in problem.features else None,
            weights.to(query.dtype) if "weights" in problem.features else None,
        )
