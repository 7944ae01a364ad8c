"""Rows that need a process of their own: peers that compile per case or bring a runtime, and peak memory.

`python -m heedful.measure.isolated NAME THREADS SECONDS` runs one row and prints its Outcome as JSON on the last line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from .numerics import check_backward, check_forward
from .rows import Call, Outcome, compare_forward, heedful_call, make_inputs, sdpa_call
from .timing import pinned_threads
from .workloads import TABLE, Workload

if TYPE_CHECKING:
    from torch import Tensor

NEEDS_OWN_PROCESS = frozenset({"memory", "training memory", "model"})
TIME_LIMIT = 900


def run_isolated(workload: Workload, *, threads: int, seconds: float) -> Outcome:
    """Run a row of the table in a fresh process; what goes wrong there becomes the row's note."""
    command = [sys.executable, "-m", "heedful.measure.isolated", workload.name, str(threads), str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(note=f"not run: took longer than {TIME_LIMIT} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Outcome(note=f"not run: {last}")
    return Outcome.from_json(json.loads(done.stdout.strip().splitlines()[-1]))


def run_in_this_process(workload: Workload, *, threads: int, seconds: float) -> Outcome:
    """What the fresh process does."""
    if workload.kind in ("memory", "training memory"):
        return _memory(workload, threads)
    if workload.kind == "model":
        from .model_row import compare_decoding

        return compare_decoding(workload, threads, seconds)
    from .peers import make_peer

    with pinned_threads(threads):
        try:
            peer = make_peer(workload, threads)
        except ImportError as error:
            return Outcome(note=f"not run: {error.name or workload.baseline} is not installed")
        return compare_forward(workload, threads, seconds, peer)


def _memory(workload: Workload, threads: int) -> Outcome:
    """Memory that a call or a training step takes above its inputs and what it returns, at its peak."""
    import torch

    import heedful

    from .memory import peak_bytes, reset_peak

    pattern, training = workload.make_pattern(), workload.kind == "training memory"
    q, k, v = make_inputs(workload, gradients=training)[0]
    grad_out = torch.ones_like(q, requires_grad=False)

    def run(call: Call, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        out = call(q, k, v)
        return [out, *torch.autograd.grad(out, (q, k, v), grad_out[:, :, : q.shape[2]])] if training else [out]

    def extra(call: Call) -> tuple[int, list[Tensor]]:
        reset_peak()
        before = peak_bytes()
        made = run(call, q, k, v)
        return peak_bytes() - before - sum(tensor.numel() * tensor.element_size() for tensor in made), made

    with pinned_threads(threads), torch.set_grad_enabled(training):
        # The first call of a process loads code and starts the pool, which is no property of the pattern.
        run(heedful_call(pattern), *(tensor[:, :, :64] for tensor in (q, k, v)))
        backend = heedful.explain(q, k, v, pattern=pattern).backend
        ours, (out, *gradients) = extra(heedful_call(pattern))
        theirs, _ = extra(sdpa_call(workload))
        with torch.no_grad():
            checks = check_forward(workload.name, q, k, v, out, pattern=pattern)
            if training:
                dq, dk, dv = gradients
                checks += check_backward(workload.name, q, k, v, grad_out, (dq, dk, dv), pattern=pattern)
    note = f"extra memory {max(ours, 0) / 2**20:.1f} MiB; SDPA with its mask {theirs / 2**20:.0f} MiB"
    return Outcome(backend, None, checks, note, float(max(ours, 0)))


def main() -> None:
    """Entry point of the fresh process."""
    name, threads, seconds = sys.argv[1:]
    workload = next(row for row in TABLE if row.name == name)
    outcome = run_in_this_process(workload, threads=int(threads), seconds=float(seconds))
    sys.stdout.write("\n" + json.dumps(outcome.to_json()) + "\n")


if __name__ == "__main__":
    main()
