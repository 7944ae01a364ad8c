"""What `heedful bench --gpu` measures: calls on a device beside their peers, behind checks against float64."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from .checks import all_passed
from .collect import Progress, collect
from .gpu_cases import BEST, COPY, FLEX_MASK, Case, Goal, make_pattern
from .gpu_peers import make_peer
from .machine import environment, gpu
from .numerics import check_backward, check_forward
from .timing import Sample, compare_samples, rotation, take_turns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CASE_SECONDS = 0.4
# A peer that is so many times its bound off computes something else.
WRONG = 10.0
# A millisecond, in which the host gets ahead of the device.
AHEAD_CYCLES = 1_500_000
# Samples of the host's length leave too few launches behind that to measure.
SAMPLE_SECONDS = 1e-2
FRONT_DOOR_GOALS = 15e-6, 6e-6
FRONT_DOOR = "front door"
# Prompts of the same model, one longer than the other: the first for compiling and loading.
NEW_LENGTHS = range(2001, 2019, 2)
_COMPILERS = 12


def why_not() -> str | None:
    """Why nothing can be measured here; None where it can."""
    import torch

    from heedful.choose import UNAVAILABLE

    if not torch.cuda.is_available():
        return "there is no CUDA device here, so there is nothing to measure"
    return UNAVAILABLE.get("triton")


def measure_gpu(
    chosen: Sequence[Case],
    *,
    command: str,
    progress: Progress,
    seconds: float = CASE_SECONDS,
    device: str = "cuda",
    front_door: bool = True,
) -> dict[str, Any]:
    """Check and time every case, and the time until a tiny call returns.

    Returns:
        JSON-serialisable: schema, mode, command, environment, device, interrupted and rows.
    """
    import torch

    where = torch.device(device)
    progress.begin("measuring the device's peaks")
    found = device_record(where)
    progress.advance()
    if where.type == "cuda":
        progress.begin("compiling")
        compile_ahead(chosen)
    progress.advance()
    jobs: list[Case | str] = [*([FRONT_DOOR] if front_door else []), *chosen]

    def run(job: Case | str) -> dict[str, Any]:
        if isinstance(job, str):
            return front_door_row(where)
        row = run_case(job, where, seconds=seconds, copy=found["copy"])
        if where.type == "cuda":
            torch.cuda.empty_cache()
        return row

    done, interrupted = collect(jobs, run, progress, lambda job: job if isinstance(job, str) else job.name)
    return {
        "schema": 1,
        "mode": "gpu",
        "command": command,
        "environment": environment(),
        "device": found,
        "interrupted": interrupted,
        "rows": done,
    }


def joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several results as one, the first's rows where several have a name; each row says which run it is of."""
    rows: dict[str, dict[str, Any]] = {}
    for number, result in enumerate(results, 1):
        for row in result["rows"]:
            rows.setdefault(row["name"], row | {"run": number})
    first = results[0]
    runs = [{key: result[key] for key in ("command", "environment", "device")} for result in results]
    return first | {"rows": list(rows.values()), "runs": runs, "interrupted": any(r["interrupted"] for r in results)}


def device_record(device: torch.device) -> dict[str, Any]:
    """Name, versions, and the device's own peaks: a matrix product in bfloat16 (FLOP/s) and a copy (bytes/s)."""
    import torch

    record = gpu()
    cuda = device.type == "cuda"
    size = 8192 if cuda else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << (31 if cuda else 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sides: list[Callable[[], object]] = [lambda: a @ b, lambda: target.copy_(source)]
    product, copy = (
        statistics.median(times)
        for times in take_turns(sides, seconds=1.0, sample=sampler(device), sample_seconds=SAMPLE_SECONDS)
    )
    return {
        "name": record["devices"][0]["name"] if cuda else "CPU",
        "driver": record["driver"],
        "cuda": record["cuda"],
        "triton": record["triton"]["version"],
        "product": 2 * size**3 / product,
        "copy": 2 * source.numel() / copy,
    }


def sampler(device: torch.device, ahead: bool = True) -> Sample:
    """Seconds per call of so many calls, by the device's own clock; `ahead` lets the host begin before the clock does,
    so that a kernel's time is no host's."""
    import torch

    if device.type != "cuda":
        from .timing import sample_on_host

        return sample_on_host

    def sample(call: Callable[[], object], repeats: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(AHEAD_CYCLES)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats

    return sample


def draw(case: Case, device: torch.device, gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v of a case."""
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def one(heads: int, length: int) -> Tensor:
        shape = case.batch, heads, length, case.head_dim
        made = torch.randn(shape, device=device, generator=generator, dtype=torch.float32).to(torch.bfloat16)
        return made.requires_grad_(gradient)

    return one(case.heads, case.q_length), one(case.kv_heads, case.k_length), one(case.kv_heads, case.k_length)


def run_case(case: Case, device: torch.device, *, seconds: float, copy: float) -> dict[str, Any]:
    """Check everybody, then time everybody turn by turn; nothing is timed where heedful's check failed."""
    import torch

    import heedful

    pattern = make_pattern(case.pattern, case.k_length, device)
    backend = "triton" if device.type == "cuda" else None
    makers: dict[str, Callable[[], Any]] = {
        "heedful": lambda: lambda q, k, v: heedful.attention(q, k, v, pattern=pattern, backend=backend)
    }
    makers |= {name: functools.partial(make_peer, name, case, device) for name in case.peers}
    backward = case.section == "backward"
    q, k, v = draw(case, device, backward)
    grad = torch.randn_like(q, requires_grad=False) if backward else None
    sides: dict[str, Callable[[], object]] = {}
    row: dict[str, Any] = {
        "section": case.section, "name": case.name, "checks": [], "shares": {}, "errors": {}, "seconds": None
    }  # fmt: skip
    for name, make in makers.items():
        try:
            call = make()
            out = call(q, k, v)
            gradients = () if grad is None else torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        except Exception as error:
            if name == "heedful":
                raise
            row["errors"][name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            continue
        what = f"{case.name}, {name}"
        with torch.no_grad():
            checks = check_forward(what, q, k, v, out, pattern=pattern)
            if grad is not None:
                checks += check_backward(what, q, k, v, grad, gradients, pattern=pattern)
        row["shares"][name] = max(float(check.measured) for check in checks)
        if name == "heedful":
            row["checks"] = [check.to_json() for check in checks]
            if not all_passed(checks):
                return row
        elif not row["shares"][name] <= WRONG:
            row["errors"][name] = f"is {row['shares'][name]:.3g} times its bound off"
            continue
        if grad is None:
            sides[name] = functools.partial(call, q, k, v)
        else:
            sides[name] = functools.partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
    times = 1
    if case.section == "decode":
        sides, times = _decoding(case, device, makers, list(sides), row)
    row["density"] = float(pattern.density(case.q_length, case.k_length))
    work = float(case.bytes)
    if case.section != "decode":
        work = 4 * case.head_dim * case.batch * case.heads * case.q_length * case.k_length * row["density"]
        work *= 2.5 if backward else 1
    found = take_turns(list(sides.values()), seconds=seconds, sample=sampler(device), sample_seconds=SAMPLE_SECONDS)
    samples = dict(zip(sides, found, strict=True))
    samples = {name: [value / times for value in values] for name, values in samples.items()}
    return row | _timed(case, samples, work, copy)


def _timed(case: Case, samples: dict[str, list[float]], work: float, copy: float) -> dict[str, Any]:
    ours = samples["heedful"]
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    ratios = {n: compare_samples(values, ours).to_json() for n, values in samples.items() if n != "heedful"}
    rate = work / seconds["heedful"]
    measured = {name: timing["ratio"] for name, timing in ratios.items()}
    if ratios:
        measured[BEST] = min(measured.values())
    measured[COPY] = rate / copy
    return {
        "unit": "TB/s" if case.section == "decode" else "TFLOP/s",
        "seconds": seconds,
        "rates": {name: work / value for name, value in seconds.items()},
        "ratios": ratios,
        "goals": [reached(goal, measured.get(goal.against)) for goal in case.goals],
    }


def reached(goal: Goal, measured: float | None) -> dict[str, Any]:
    """A goal with what was measured and how far that is: "goal", "first", "no", or None where it was not."""
    verdict = None
    if measured is not None and math.isfinite(measured):
        verdict = "goal" if measured >= goal.goal else "first" if measured >= goal.first else "no"
    return {
        "against": goal.against,
        "first": goal.first,
        "goal": goal.goal,
        "measured": measured,
        "reached": verdict,
    }


def _decoding(
    case: Case, device: torch.device, makers: dict[str, Callable[[], Any]], able: list[str], row: dict[str, Any]
) -> tuple[dict[str, Callable[[], object]], int]:
    """Each side as one CUDA graph over several sets of keys, of which none is in the device's cache when it is read."""
    import torch

    count = max(2, min(8, (1 << 29) // case.bytes)) if device.type == "cuda" else 2
    sets = [draw(case, device) for _ in range(count)]
    for tensors in sets[1:]:
        for tensor in tensors:
            tensor.normal_()
    sides: dict[str, Callable[[], object]] = {}
    for name in able:
        turn = rotation(makers[name](), sets)

        def all_sets(turn: Callable[[], object] = turn) -> None:
            for _ in range(count):
                turn()

        if device.type != "cuda":
            sides[name] = all_sets
            continue
        try:
            sides[name] = as_graph(all_sets)
        except Exception as error:
            row["errors"][name] = f"not captured: {type(error).__name__}: {error}"[:200]
            torch.cuda.synchronize()
            sides[name] = all_sets
    return sides, count


def as_graph(call: Callable[[], object]) -> Callable[[], object]:
    """A call as a CUDA graph, whose replay is one launch."""
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def front_door_row(device: torch.device) -> dict[str, Any]:
    """Host time until a tiny call returns, what of it is the driver's launch, and the same inside of a CUDA graph."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import heedful
    from heedful import Causal
    from heedful.measure.checks import Check

    cuda = device.type == "cuda"
    backend = "triton" if cuda else None
    q, k, v = (torch.randn(1, 8, 16, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    calls: dict[str, Callable[[], object]] = {
        "heedful": lambda: heedful.attention(q, k, v, causal=True, backend=backend),
        "SDPA": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    out = heedful.attention(q, k, v, causal=True, backend=backend)
    checks: list[Check] = check_forward(FRONT_DOOR, q, k, v, out, pattern=Causal())
    row: dict[str, Any] = {
        "section": FRONT_DOOR, "name": FRONT_DOOR, "checks": [check.to_json() for check in checks], "errors": {},
        "seconds": None,
    }  # fmt: skip
    if not all_passed(checks):
        return row
    seconds = {name: host_seconds(call, device) for name, call in calls.items()}
    launch = replay = None
    if cuda:
        launch = _launch_seconds(q, k, v)
        many = 50
        graph = as_graph(lambda: [calls["heedful"]() for _ in range(many)])
        replay = host_seconds(graph, device, calls=20) / many
    front = None if launch is None else seconds["heedful"] - launch
    first, goal = FRONT_DOOR_GOALS
    verdict = None if front is None else "goal" if front <= goal else "first" if front <= first else "no"
    return row | {
        "unit": "µs",
        "new_length": new_length_seconds(device),
        "seconds": seconds,
        "launch": launch,
        "front": front,
        "replay": replay,
        "goals": [
            {"against": "before the launch", "first": first, "goal": goal, "measured": front, "reached": verdict}
        ],
    }


def new_length_seconds(device: torch.device) -> dict[str, float]:
    """Seconds until the result of causal attention is there, of a length that was not seen before: the median of
    several (1, 16, length, 128) in bfloat16."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import heedful

    cuda = device.type == "cuda"
    calls: dict[str, Callable[[Tensor], object]] = {
        "heedful": lambda x: heedful.attention(x, x, x, causal=True),
        "SDPA": lambda x: scaled_dot_product_attention(x, x, x, is_causal=True),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for length in NEW_LENGTHS if cuda else range(33, 39, 2):
        x = torch.randn(1, 16, length, 128, device=device, dtype=torch.bfloat16)
        for name, call in calls.items():
            if cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call(x)
            if cuda:
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def host_seconds(call: Callable[[], object], device: torch.device, calls: int = 200, rounds: int = 25) -> float:
    """Seconds until a call returns, the device being idle when each round begins."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(20):
        call()
    found = []
    for _ in range(rounds):
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - begin) / calls)
    wait()
    # What disturbs a host only makes it slower.
    return min(found)


def _launch_seconds(q: Tensor, k: Tensor, v: Tensor) -> float | None:
    """Of the driver alone; None where calls are not repeated by the bridge."""
    from heedful import Causal
    from heedful.backend.triton.kept import Kept
    from heedful.backend.triton.launch import forward_work

    code, kept = Causal().schedule.encode(), Kept(q.get_device())
    kept.run([q, k, v], lambda q, k, v: forward_work(q, k, v, (), code, q.shape[-1] ** -0.5, False))
    return None if kept.place <= 0 else statistics.median(kept.launching([q, k, v]) for _ in range(9))


def compile_ahead(chosen: Sequence[Case]) -> None:
    """Compiles what the cases need, side by side: triton and inductor keep it on disk, where the timing finds it."""
    count = min(_COMPILERS, len(chosen), max(1, (os.cpu_count() or 2) - 2))
    if count < 2:
        return
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, chosen))


def _compile(case: Case) -> None:
    import torch

    device = torch.device("cuda")
    backward = case.section == "backward"
    for name in ("heedful", *case.peers):
        if name == FLEX_MASK:
            # Several gigabytes of scores to compile nothing that another peer does not.
            continue
        try:
            q, k, v = draw(case, device, backward)
            if name == "heedful":
                import heedful

                out = heedful.attention(
                    q, k, v, pattern=make_pattern(case.pattern, case.k_length, device), backend="triton"
                )
            else:
                out = make_peer(name, case, device)(q, k, v)
            if backward:
                out.backward(torch.ones_like(out))
            torch.cuda.synchronize()
        except Exception:  # the timing says what is wrong
            continue
