"""Is heedful ever slower than the SDPA call that it replaces? Random calls, each checked and then timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .cases import FAMILIES, Case, Tensors, draw_cases
from .checks import Check, all_passed
from .collect import Progress, collect
from .machine import affinity, environment
from .numerics import check_backward, check_forward
from .sdpa import best_sdpa
from .timing import Comparison, interleave, pinned_threads

if TYPE_CHECKING:
    from torch import Tensor

    from heedful import Pattern

# What counts as slower: more than noise on a long call, and more than a clock can hide on a tiny one.
SLOWER, MORE_SECONDS = 1.05, 2e-6
CASE_SECONDS, SUSPECT_SECONDS = 0.5, 3.0
BUDGET_SECONDS = 300.0


def measure_sweep(count: int, *, threads: int, seed: int, command: str, progress: Progress) -> dict[str, Any]:
    """Run `count` random cases.

    Returns:
        JSON-serialisable: schema, mode, command, environment, threads, other_threads, seed, asked, interrupted and
        cases, each with its verdict: "faster", "equal", "loss" or "wrong".
    """
    allowed = affinity()
    other = max(1, min(2, len(allowed) if allowed else 2)) if threads == 1 else 1
    deadline = time.perf_counter() + BUDGET_SECONDS
    left = count

    def run(case: Case) -> dict[str, Any]:
        nonlocal left
        seconds = min(CASE_SECONDS, max(0.0, deadline - time.perf_counter()) / left)
        left -= 1
        return run_case(case, threads=threads, other_threads=other, seconds=seconds)

    with pinned_threads(threads):
        done, interrupted = collect(draw_cases(count, seed), run, progress, lambda case: case.name)
    return {
        "schema": 1,
        "mode": "sweep",
        "command": command,
        "environment": environment(),
        "threads": threads,
        "other_threads": other,
        "seed": seed,
        "asked": count,
        "interrupted": interrupted,
        "cases": done,
    }


def run_case(case: Case, *, threads: int, other_threads: int, seconds: float) -> dict[str, Any]:
    """Check one case, time it against the best SDPA call, and time a suspected loss again for longer."""
    import torch

    from heedful import attention

    pattern, tensors = case.make_pattern(), case.make_tensors()
    density = 1.0 if pattern is None else pattern.density(case.q_length, case.k_length)
    with torch.set_grad_enabled(case.gradients):
        backends = {count: _backend(tensors, pattern, count) for count in (other_threads, threads)}
        found = case.to_json() | {
            "group": FAMILIES[case.family].group,
            "pattern": repr(pattern),
            "density": density,
            "flops": case.dense_flops * density,
            "backend": backends[threads],
            "choice_depends_on_threads": len(set(backends.values())) > 1,
            "sdpa": None,
            "comparison": None,
            "repeated": False,
        }
        grad_out = torch.randn_like(tensors.query[..., :1].expand(*tensors.query.shape[:3], case.value_dim))
        wanted = grad_out if case.gradients else None
        peer = best_sdpa(pattern, *tensors[:3], bias=tensors.bias, grad_out=wanted)

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, pattern=pattern, bias=tensors.bias)

        checks = _checks(case, tensors, pattern, ours, peer.call, grad_out)
        found["checks"] = [check.to_json() for check in checks]
        if not all_passed(checks):
            return found | {"verdict": "wrong"}

        def side(call: Callable[..., Tensor]) -> Callable[[], object]:
            q, k, v = tensors[:3]
            if not case.gradients:
                return lambda: call(q, k, v)
            return lambda: torch.autograd.grad(call(q, k, v), (q, k, v), grad_out)

        timing = interleave(side(peer.call), side(ours), seconds=seconds)
        repeated = is_slower(timing)
        if repeated:
            timing = interleave(side(peer.call), side(ours), seconds=SUSPECT_SECONDS, min_rounds=9, max_rounds=1000)
    verdict = "loss" if is_slower(timing) else "faster" if timing.ratio > SLOWER else "equal"
    return found | {
        "sdpa": peer.name, "comparison": timing.to_json(), "repeated": repeated, "verdict": verdict
    }  # fmt: skip


def is_slower(timing: Comparison) -> bool:
    """Whether the candidate lost by more than 5 % and more than 2 µs."""
    return timing.ratio * SLOWER < 1 and timing.candidate_seconds - timing.baseline_seconds > MORE_SECONDS


def _backend(tensors: Tensors, pattern: Pattern | None, threads: int) -> str | None:
    """What would run the call with so many threads."""
    import torch

    import heedful

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return heedful.explain(*tensors[:3], pattern=pattern, bias=tensors.bias).backend
    finally:
        torch.set_num_threads(before)


def _checks(
    case: Case,
    tensors: Tensors,
    pattern: Pattern | None,
    ours: Callable[..., Tensor],
    sdpa: Callable[..., Tensor],
    grad_out: Tensor,
) -> list[Check]:
    import torch

    out = ours(*tensors[:3])
    q, k, v = (tensor.detach() for tensor in tensors[:3])
    with torch.no_grad():
        theirs = sdpa(q, k, v)
        # Rows without a key are NaN in some of SDPA's ways, which leaves nothing to compare an error with. With values
        # of another width than keys SDPA takes its unfused way, which nobody calls for its speed and which errs less.
        comparable = q.shape[-1] == v.shape[-1] and bool(theirs.isfinite().all())
        beside = theirs if comparable else None
        checks = check_forward(case.name, q, k, v, out.detach(), pattern=pattern, bias=tensors.bias, sdpa_out=beside)
    if case.gradients:
        gradients = torch.autograd.grad(out, tensors[:3], grad_out)
        last = (case.batch - 1, case.kv_heads - 1)
        checks += check_backward(
            case.name, q, k, v, grad_out, gradients, pattern=pattern, bias=tensors.bias, kv_head=last
        )
    return checks
