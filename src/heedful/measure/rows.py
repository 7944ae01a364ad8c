"""One workload run: the numerical check of the call first, and only behind a green one the interleaved timing."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .checks import Check, all_passed
from .machine import affinity, last_level_cache_bytes
from .numerics import check_backward, check_forward
from .peaks import Peaks
from .timing import Comparison, interleave, pinned_threads, rotation
from .workloads import Target, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from heedful import Pattern

# Against the forward's two products the backward has five; a training step has all seven.
PRODUCTS = {"forward": 1.0, "decode": 1.0, "overhead": 1.0, "backward": 2.5, "training": 3.5}
ROTATED_BYTES_LIMIT = 512 << 20
# Rows on one thread are timed on so many as well, for this share of the time.
MORE_THREADS, MORE_SHARE = 2, 0.3
PEERS = frozenset({"flex", "onnxruntime", "openvino"})
Call = Callable[..., "Tensor"]


@dataclass(frozen=True)
class Outcome:
    """What running a workload gave: no comparison without green checks, and then a note that says why."""

    backend: str | None = None
    comparison: Comparison | None = None
    checks: list[Check] = field(default_factory=list)
    note: str = ""
    extra_bytes: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dict that from_json understands."""
        return {
            "backend": self.backend,
            "comparison": self.comparison.to_json() if self.comparison else None,
            "checks": [check.to_json() for check in self.checks],
            "note": self.note,
            "extra_bytes": self.extra_bytes,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Outcome:
        """The Outcome that to_json was called on."""
        comparison = value["comparison"]
        checks = [
            Check(c["name"], float(c["measured"]), c["limit"], c["derivation"], c["at_least"]) for c in value["checks"]
        ]
        return cls(
            value["backend"],
            Comparison(**comparison) if comparison else None,
            checks,
            value["note"],
            value["extra_bytes"],
        )


@dataclass(frozen=True)
class Row:
    """A workload with its outcome and the ceiling it is held against."""

    workload: Workload
    outcome: Outcome
    threads: int
    density: float
    peak: float | None
    more: Outcome | None = None
    more_peak: float | None = None

    @property
    def rate_unit(self) -> str:
        """GB/s where reading the cache is the work, else GFLOP/s; empty where neither makes sense."""
        if self.workload.kind in ("overhead", "memory", "training memory", "model"):
            return ""
        return "GB/s" if self.workload.kind == "decode" else "GFLOP/s"

    @property
    def work(self) -> float:
        """Bytes of keys and values (decode) or floating-point operations of the pairs that count, per call."""
        w = self.workload
        if w.kind == "decode":
            itemsize = {"float32": 4, "float64": 8}.get(w.dtype, 2)
            return 2.0 * w.batch * w.key_heads * w.key_length * w.head_dim * itemsize
        pairs = w.batch * w.heads * w.q_length * w.key_length * self.density
        return 4.0 * pairs * w.head_dim * PRODUCTS.get(w.kind, 0.0)

    def rate(self, seconds: float) -> float:
        """Work per second."""
        return self.work / seconds

    @property
    def peak_share(self) -> float | None:
        """heedful's rate over the measured ceiling."""
        return self._share(self.outcome, self.peak)

    def _share(self, outcome: Outcome, peak: float | None) -> float | None:
        if outcome.comparison is None or peak is None or not self.rate_unit:
            return None
        return self.rate(outcome.comparison.candidate_seconds) / peak

    def reached(self, target: Target | None) -> bool | None:
        """Whether a target is kept; None without a target or without a figure."""
        outcome = self.outcome
        if target is None or not all_passed(outcome.checks):
            return None
        if target.unit == "extra_mebibytes":
            extra = outcome.extra_bytes
            return None if extra is None else target.reached(math.nan, self.density, extra / 2**20 / self.threads)
        if outcome.comparison is None:
            return None
        timing = outcome.comparison
        extra_microseconds = (timing.candidate_seconds - timing.baseline_seconds) * 1e6
        return target.reached(timing.ratio, self.density, extra_microseconds)

    def to_json(self) -> dict[str, Any]:
        """Everything that the table shows, as plain data."""
        w, timing = self.workload, self.outcome.comparison
        return {
            "name": w.name,
            "title": w.title,
            "kind": w.kind,
            "baseline": w.baseline,
            "threads": self.threads,
            "density": self.density,
            "rate_unit": self.rate_unit,
            "baseline_rate": self.rate(timing.baseline_seconds) if timing and self.rate_unit else None,
            "rate": self.rate(timing.candidate_seconds) if timing and self.rate_unit else None,
            "peak_share": self.peak_share,
            "targets": {
                label: None if target is None else {"text": target.describe(self.density), "reached": reached}
                for label, target, reached in (
                    ("first", w.first, self.reached(w.first)),
                    ("goal", w.goal, self.reached(w.goal)),
                )
            },
            **self.outcome.to_json(),
            "checks": [check.to_json() for check in self._checks()],
            "more_threads": None if self.more is None else self._more_json(self.more),
        }

    def _checks(self) -> list[Check]:
        return self.outcome.checks + (self.more.checks if self.more else [])

    def _more_json(self, more: Outcome) -> dict[str, Any]:
        """The row again on MORE_THREADS threads; scaling is the speed-up over one."""
        one, many = self.outcome.comparison, more.comparison
        return {
            "threads": MORE_THREADS,
            "comparison": many.to_json() if many else None,
            "peak_share": self._share(more, self.more_peak),
            "scaling": one.candidate_seconds / many.candidate_seconds if one and many else None,
        }


def run_row(workload: Workload, *, peaks: Peaks | None, threads: int | None, seconds: float) -> Row:
    """Run one workload.

    Args:
        workload: what to run.
        peaks: the machine's ceilings, None if they could not be measured.
        threads: replaces the thread count of the rows that use one; rows about more threads keep theirs.
        seconds: time for the interleaved rounds.
    """
    from .isolated import NEEDS_OWN_PROCESS, run_isolated

    count = threads if threads is not None and workload.threads == 1 else workload.threads
    pattern = workload.make_pattern()
    density = 1.0 if pattern is None else pattern.density(workload.q_length, workload.key_length)
    if workload.baseline in PEERS or workload.kind in NEEDS_OWN_PROCESS:
        outcome = run_isolated(workload, threads=count, seconds=seconds)
    else:
        outcome = run_here(workload, threads=count, seconds=seconds)
    peak = None
    more, more_peak = None, None
    if threads is None and _runs_on_more(workload):
        more = run_here(workload, threads=MORE_THREADS, seconds=MORE_SHARE * seconds)
    if peaks is not None:
        peak, more_peak = (_ceiling(workload, peaks, cores) for cores in (count, MORE_THREADS))
    return Row(workload, outcome, count, density, peak, more, more_peak)


def _ceiling(workload: Workload, peaks: Peaks, cores: int) -> float | None:
    if workload.kind == "decode":
        return peaks.read_bandwidth.get(cores)
    return peaks.flops_of(workload.dtype, cores)


def _runs_on_more(workload: Workload) -> bool:
    """Whether a row is worth a second run: against SDPA, here, on one thread, with work to share."""
    allowed = affinity()
    return (
        workload.baseline == "sdpa"
        and workload.threads == 1
        and workload.kind in ("forward", "backward", "training", "decode")
        and (len(allowed) if allowed is not None else os.cpu_count() or 1) >= MORE_THREADS
    )


def run_here(workload: Workload, *, threads: int, seconds: float) -> Outcome:
    """Check and time a workload in this process."""
    try:
        with pinned_threads(threads):
            if workload.kind in ("backward", "training"):
                return _with_gradients(workload, threads, seconds)
            return compare_forward(workload, threads, seconds, sdpa_call(workload))
    except ValueError as error:
        return Outcome(note=f"not run: {error}")


def make_inputs(workload: Workload, *, gradients: bool = False) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Several random (q, k, v), (B, H, L, D), so many that a decode never finds its cache in the processor's."""
    import torch

    w = workload
    dtype = getattr(torch, w.dtype)
    generator = torch.Generator().manual_seed(0)
    size = 2 * w.batch * w.key_heads * w.key_length * w.head_dim * dtype.itemsize
    wanted = 4 * last_level_cache_bytes() if w.kind == "decode" else 0
    sets = max(2, min(math.ceil(wanted / size), ROTATED_BYTES_LIMIT // size))

    def draw(heads: int, length: int) -> Tensor:
        shape = (w.batch, heads, length, w.head_dim)
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_(gradients)

    return [
        (draw(w.heads, w.q_length), draw(w.key_heads, w.key_length), draw(w.key_heads, w.key_length))
        for _ in range(sets)
    ]


def sdpa_call(workload: Workload) -> Call:
    """PyTorch's own call for a workload: is_causal for causal, no mask for full, else the boolean mask.

    The mask is built outside of the timed call.
    """
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    pattern = workload.make_pattern()
    grouped = workload.key_heads != workload.heads
    if workload.pattern == "full":
        return lambda q, k, v: sdpa(q, k, v, enable_gqa=grouped)
    if workload.pattern == "causal" and workload.q_length == workload.key_length:
        return lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=grouped)
    assert pattern is not None
    mask = pattern.dense(workload.q_length, workload.key_length)
    return lambda q, k, v: sdpa(q, k, v, attn_mask=mask, enable_gqa=grouped)


def heedful_call(pattern: Pattern | None) -> Call:
    """heedful's call for a workload, which chooses its backend as it does for a user."""
    from heedful import attention

    return lambda q, k, v: attention(q, k, v, pattern=pattern)


def compare_forward(workload: Workload, threads: int, seconds: float, baseline: Call) -> Outcome:
    """Check heedful's forward on one input, then time it against a baseline on rotated inputs."""
    import torch

    import heedful

    pattern = workload.make_pattern()
    inputs = make_inputs(workload)
    ours, sdpa = heedful_call(pattern), sdpa_call(workload)
    scaling = workload.baseline == "heedful on 1 thread"
    with torch.no_grad():
        q, k, v = inputs[0]
        backend = heedful.explain(q, k, v, pattern=pattern).backend
        out = ours(q, k, v)
        checks = check_forward(workload.name, q, k, v, out, pattern=pattern, sdpa_out=sdpa(q, k, v))
        if workload.baseline in PEERS:
            checks.append(_same_work(workload.baseline, baseline(q, k, v), out))
        if not all_passed(checks):
            return Outcome(backend, checks=checks, note="numerical check failed: no speed-up is reported")
        base, candidate = rotation(baseline, inputs), rotation(ours, inputs)
        if scaling:
            base, candidate = on_threads(1, rotation(ours, inputs)), on_threads(threads, candidate)
        timing = interleave(base, candidate, seconds=seconds)
    return Outcome(backend, timing, checks)


def _same_work(name: str, theirs: Tensor, ours: Tensor) -> Check:
    """Whether a peer computes the same thing at all; how exactly is its own affair."""
    difference = (theirs.double() - ours.double()).square().mean().sqrt() / ours.double().square().mean().sqrt()
    return Check(f"{name}: relative RMS difference", float(difference), 0.02, "a few roundings of bf16 (2^-8 each)")


def on_threads(threads: int, call: Callable[[], object]) -> Callable[[], object]:
    """The call under another thread count of torch's; the caller restores it."""
    import torch

    def run() -> object:
        torch.set_num_threads(threads)
        return call()

    return run


def _with_gradients(workload: Workload, threads: int, seconds: float) -> Outcome:
    """Backward alone (the graph is kept) or a whole training step."""
    import torch

    import heedful

    pattern = workload.make_pattern()
    inputs = make_inputs(workload, gradients=True)
    grad_out = torch.randn(inputs[0][0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0][0].dtype)
    ours, sdpa = heedful_call(pattern), sdpa_call(workload)
    backend = heedful.explain(*inputs[0], pattern=pattern).backend
    if backend == "reference" and workload.q_length > 4096:
        return Outcome(backend, note="not run: only the reference backend has this gradient, at O(L²) in fp64")

    def step(call: Call) -> Callable[..., object]:
        return lambda q, k, v: torch.autograd.grad(call(q, k, v), (q, k, v), grad_out)

    dq, dk, dv = torch.autograd.grad(ours(*inputs[0]), inputs[0], grad_out)
    q, k, v = (tensor.detach() for tensor in inputs[0])
    checks = check_backward(workload.name, q, k, v, grad_out, (dq, dk, dv), pattern=pattern)
    if not all_passed(checks):
        return Outcome(backend, checks=checks, note="numerical check failed: no speed-up is reported")

    def side(call: Call) -> Callable[[], object]:
        if workload.kind == "training":
            return rotation(step(call), inputs)
        graphs = [(call(*tensors), tensors) for tensors in inputs]
        return rotation(lambda out, t: torch.autograd.grad(out, t, grad_out, retain_graph=True), graphs)

    if workload.baseline == "heedful on 1 thread":
        base, candidate = on_threads(1, side(ours)), on_threads(threads, side(ours))
    else:
        base, candidate = side(sdpa), side(ours)
    return Outcome(backend, interleave(base, candidate, seconds=seconds), checks)
