"""Calls like one seen before, from the front door to the launch past torch's dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from heedful.backend.base import Shortcut
from heedful.backend.native.backend import slopes_of
from heedful.backend.native.gradient import Plan, apply_plain_eagerly
from heedful.backend.triton.gradients import backward_work
from heedful.backend.triton.kept import Kept
from heedful.backend.triton.launch import forward_work
from heedful.backend.triton.work import Work
from heedful.dropout import draw_seed
from heedful.problem import Attention, Call, Problem

_count_modes = torch._C._len_torch_dispatch_stack

# Up to so many queries a call is taken for a step of decoding, whose keys are more each time.
_STEP = 16


def is_step(problem: Problem) -> bool:
    """Whether a call may be a step of decoding, whose keys are more each time: its forms serve all lengths."""
    return (
        problem.q_length <= _STEP
        and not problem.schedule.slots
        and problem.features <= {"lse", "softcap", "sinks"}
        and not problem.empty
    )


@functools.lru_cache(maxsize=64)
def _kept_for_steps(device: int, single: bool, *_kind: Hashable) -> Kept:
    return Kept(device, single)


forget = _kept_for_steps.cache_clear


def without_gradient(call: Call, by_operator: Shortcut | None) -> Shortcut:
    """Calls with any feature but weights and gradients; `by_operator` runs them where torch's modes look on, None where
    none do."""
    code, scale, blhd = call.problem.schedule.encode(), call.scale, call.blhd
    softcap, dropout_p = call.softcap or 0.0, call.dropout_p
    with_lse = "lse" in call.problem.features
    single = call.query.dtype == torch.float32
    device = call.query.get_device()
    if is_step(call.problem):
        kept = _kept_for_steps(device, single, tuple(code), scale, blhd, softcap, call.problem.features)
    else:
        kept = Kept(device, single)
    if not call.problem.features - {"lse"}:

        def make_plain(query: Tensor, key: Tensor, value: Tensor, *operands: Tensor) -> Work:
            work = forward_work(query, key, value, operands, code, scale, blhd)
            return work if with_lse else without_lse(work)

        def run_three(q: Tensor, k: Tensor, v: Tensor, operands: tuple[Tensor, ...]) -> Tensor | Attention:
            if by_operator is not None and _count_modes():
                return by_operator(q, k, v, operands)
            if kept.place > 0:
                out: Tensor | None = kept.run_one(q, k, v, kept.place)
                if out is not None:
                    kept.credit += 1
                    return out
            return kept.run_anew((q, k, v), make_plain)[0]

        if not (call.problem.schedule.slots or with_lse or single):
            return run_three

        def run_plain(q: Tensor, k: Tensor, v: Tensor, operands: tuple[Tensor, ...]) -> Tensor | Attention:
            if by_operator is not None and _count_modes():
                return by_operator(q, k, v, operands)
            found = kept.run([q, k, v, *operands], make_plain)
            return Attention(found[0], found[1], None) if with_lse else found[0]

        return run_plain

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: tuple[Tensor, ...],
        bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor | Attention:
        if by_operator is not None and _count_modes():
            return by_operator(q, k, v, operands, bias, alibi_slopes, sinks)
        extras = bias, slopes_of(alibi_slopes), sinks, draw_seed(q.device) if dropout_p else None
        there = [extra is not None for extra in extras]
        count = len(operands)

        def make(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Work:
            given = iter(rest[count:])
            bias, slopes, sinks, seed = (next(given) if is_there else None for is_there in there)
            work = forward_work(
                query, key, value, rest[:count], code, scale, blhd, bias, slopes, sinks, softcap, dropout_p, seed
            )
            return work if with_lse else without_lse(work)

        found = kept.run([q, k, v, *operands, *(extra for extra in extras if extra is not None)], make)
        return Attention(found[0], found[1], None) if with_lse else found[0]

    return run


def without_lse(work: Work) -> Work:
    """A forward whose log-sum-exp nobody asked for."""
    out, lse = work.results
    return work._replace(results=(out,), unread=(lse,))


def with_gradient(call: Call) -> Shortcut:
    """Calls with nothing but gradients."""
    code, scale, blhd = call.problem.schedule.encode(), call.scale, call.blhd
    device = call.query.get_device()
    single = call.query.dtype == torch.float32
    kept, kept_backward = Kept(device, single), Kept(device, single)
    operators: Any = torch.ops.heedful_triton

    def forward(
        query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], *same: Any
    ) -> tuple[Tensor, Tensor]:
        if _count_modes():
            return operators.attention_forward(query, key, value, operands, *same)  # type: ignore[no-any-return]

        def make(query: Tensor, key: Tensor, value: Tensor, *operands: Tensor) -> Work:
            return forward_work(query, key, value, operands, code, scale, blhd)

        out, lse = kept.run([query, key, value, *operands], make)
        return out, lse

    def backward(
        grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
        operands: Sequence[Tensor], *same: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if _count_modes():
            return operators.attention_backward(  # type: ignore[no-any-return]
                grad_out, query, key, value, out, lse, operands, *same
            )

        def make(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                 *operands: Tensor) -> Work:  # fmt: skip
            return backward_work(
                grad_out, query, key, value, out, lse, operands, code, scale, None, None, 0.0, 0.0, None, None, None,
                False, False,
            )  # fmt: skip

        return tuple(kept_backward.run([grad_out, query, key, value, out, lse, *operands], make))

    plan = Plan(forward, backward, list(code), scale, blhd)
    return lambda q, k, v, operands: apply_plain_eagerly(q, k, v, plan, *operands)
