"""The specification as a backend: every feature and pattern, in fp64, at the cost of dense matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful import dropout
from heedful.backend.base import Backend
from heedful.backend.reference.formula import attend
from heedful.cache_kinds.store import gather_pages
from heedful.problem import FEATURES, Attention, Call, Problem


class ReferenceBackend(Backend):
    """Plain PyTorch in fp64 over the pattern's dense mask; derivatives of any order by autograd."""

    name = "reference"
    devices = frozenset({"cpu", "cuda", "xpu", "meta"})
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
    max_head_dim = None
    features = frozenset(FEATURES) - {"gradient"}
    gradient = True

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = super().not_supported_reasons(problem)
        if {"sparse_weights", "vmap"} <= problem.features:
            reasons.append(f"does not support {FEATURES['sparse_weights']} under {FEATURES['vmap']}")
        return reasons

    def notes(self, problem: Problem) -> list[str]:
        size = f"{problem.q_length} x {problem.k_length}"
        return [
            f"everything runs dense: fp64 matrices of {size} for every batch item and head, for checking, not speed"
        ]

    def run(self, call: Call) -> Attention:
        problem, query, key, value = call.problem, call.query, call.key, call.value
        if call.pages is not None:
            key, value = gather_pages(key, call.pages), gather_pages(value, call.pages)
        shape = (problem.batch, problem.heads, problem.q_length, problem.k_length)
        kept = None
        if call.dropout_p:
            mask = dropout.keep_mask(dropout.draw_seed(query.device), call.dropout_p, shape)
            kept = mask.double() / (1 - call.dropout_p)
        pairs = call.pattern.dense(problem.q_length, problem.k_length, query.device)
        if call.bias is not None:
            pairs = pairs & (call.bias != -torch.inf)
        out, lse, weights = attend(
            query,
            key,
            value,
            pairs,
            scale=call.scale,
            softcap=call.softcap,
            bias=call.bias,
            alibi_slopes=call.alibi_slopes,
            query_offset=call.query_offset,
            sinks=call.sinks,
            kept=kept,
        )
        statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
        returned = None
        if "weights" in problem.features:
            returned = weights.to(query.dtype)
        elif "sparse_weights" in problem.features:
            returned = _sparse(weights.to(query.dtype), pairs)
        return Attention(out.to(query.dtype), lse.to(statistics) if "lse" in problem.features else None, returned)


def _sparse(weights: Tensor, pairs: Tensor) -> Tensor:
    indices = pairs.expand(weights.shape).nonzero().T
    return torch.sparse_coo_tensor(
        indices, weights[tuple(indices)], weights.shape, is_coalesced=True, check_invariants=False
    )
