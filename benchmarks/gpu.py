"""Attention on a CUDA device: checked against fp64, then timed beside PyTorch's own and FlexAttention, in one run.

    PYTHONPATH=src python benchmarks/gpu.py --out results.json [--only forward,window,...] [--sweep] [--seconds 420]

Needs torch and triton and no network. Every case is guarded: one that fails is reported and the rest runs. A rate is
printed only behind a green check of the same call. TFLOP/s count 4·D per attended pair (causal half), the backward 2.5
times that.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import heedful
from heedful import Causal, Documents, Full, Longformer, Mask, Padding, Pattern, SlidingWindow, attention
from heedful.measure.numerics import _forward_reference

DEVICE = "cuda"
PEERS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

results: dict[str, Any] = {"cases": [], "failures": []}
started = time.monotonic()
arguments: argparse.Namespace


def left() -> float:
    """Seconds of the run that are left."""
    return float(arguments.seconds - (time.monotonic() - started))


def guarded(section: Callable[[], None]) -> None:
    """Runs a section; what it raises is kept and printed, and the run goes on."""
    if arguments.only and section.__name__ not in arguments.only:
        return
    if left() < 5:
        results["failures"].append({"section": section.__name__, "error": "no time left"})
        print(f"== {section.__name__}: skipped, no time left", flush=True)
        return
    begun = time.monotonic()
    print(f"== {section.__name__} (at {begun - started:.0f} s)", flush=True)
    try:
        section()
    except Exception:
        failed(section.__name__)
    torch.cuda.empty_cache()
    save()


def failed(what: str) -> None:
    error = traceback.format_exc(limit=6)
    results["failures"].append({"section": what, "error": error})
    print(f"   FAILED {what}: {error[-1500:]}", flush=True)


def save() -> None:
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1, default=str))


def tensors(
    batch: int, heads: int, kv_heads: int, q_length: int, k_length: int, dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (batch, heads, q_length, dim), (batch, kv_heads, k_length, dim), (batch, kv_heads, k_length, dim)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype) for shape in shapes)
    return q, k, v


def pairs_of(pattern: Pattern, rows: Tensor, q_length: int, k_length: int) -> Tensor:
    """(B or 1, H or 1, rows, Lk), from the pattern's definition."""
    if isinstance(pattern, Mask):
        # It gives the whole of its tensor whatever the rows.
        return pattern.dense(q_length, k_length, DEVICE)[:, :, rows]
    i, j = rows.view(1, 1, -1, 1), torch.arange(k_length, device=DEVICE).view(1, 1, 1, -1)
    return pattern.pairs(i, j, q_length, k_length)


def error_of(q: Tensor, k: Tensor, v: Tensor, out: Tensor, pattern: Pattern) -> float:
    """The largest error of some rows as a share of its bound; infinite for NaN."""
    batch, heads, q_length, dim = q.shape
    group = heads // k.shape[1]
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    picked = torch.randperm(q_length, generator=generator)[:94].tolist()
    rows = torch.tensor(sorted({0, q_length - 1, *picked}), device=DEVICE)
    for b, h in {(0, 0), (batch - 1, heads - 1)}:
        visible = pairs_of(pattern, rows, q_length, k.shape[2])
        visible = visible[min(b, len(visible) - 1), min(h, visible.shape[1] - 1)].expand(len(rows), k.shape[2])
        reference, bound = _forward_reference(
            q[b, h, rows].double(), k[b, h // group].double(), v[b, h // group].double(), visible, dim**-0.5, q.dtype,
            None,
        )  # fmt: skip
        share = ((out[b, h, rows].double() - reference).abs() / bound).nan_to_num(nan=torch.inf)
        worst = max(worst, float(share.max()))
    return worst


def timed(calls: dict[str, Callable[[], object]], rounds: int = 7, budget: float = 0.15) -> dict[str, list[float]]:
    """Seconds per call of each, turn by turn; what a call raises takes it out."""
    able: dict[str, tuple[Callable[[], object], int]] = {}
    for name, call in calls.items():
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - begun) / 3
            able[name] = call, max(1, min(200, int(budget / rounds / max(seconds, 1e-6))))
        except Exception as error:
            print(f"      {name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}", flush=True)
    samples: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(rounds):
        for name, (call, count) in able.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(count):
                call()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(begin.elapsed_time(end) / 1e3 / count)
    return samples


def report(name: str, samples: dict[str, list[float]], work: float, unit: str = "TFLOP/s", **more: object) -> None:
    """One case: rates of all, and heedful's ratio to each, the median of the rounds' own."""
    ours = next((key for key in samples if key.startswith("heedful")), None)
    case: dict[str, Any] = {"case": name, "unit": unit, **more, "seconds": {}, "rate": {}, "ratio": {}}
    parts = []
    for key, values in samples.items():
        seconds = statistics.median(values)
        case["seconds"][key] = seconds
        case["rate"][key] = work / seconds / 1e12
        text = f"{key} {work / seconds / 1e12:.4g}"
        if ours and key != ours:
            ratio = statistics.median([b / a for a, b in zip(samples[ours], values, strict=True)])
            case["ratio"][key] = ratio
            text += f" (x{ratio:.2f})"
        parts.append(text)
    results["cases"].append(case)
    extra = " ".join(f"{key}={value}" for key, value in more.items())
    print(f"   {name:34s} {extra} {unit}: " + ", ".join(parts), flush=True)


def peer(name: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Callable[[], Tensor]:
    backend = PEERS[name]

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return call


def ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Callable[[], Tensor]:
    return lambda: attention(q, k, v, backend="triton", **options)


def flex(q: Tensor, k: Tensor, v: Tensor, rule: Any, with_mask: bool) -> Callable[[], Tensor]:
    """FlexAttention, compiled for this case, its block mask made in each call or once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    enable_gqa = q.shape[1] != k.shape[1]
    if rule is None:
        return lambda: compiled(q, k, v, enable_gqa=enable_gqa)
    make = torch.compile(create_block_mask, dynamic=False) if with_mask else create_block_mask
    kept = create_block_mask(rule, None, None, q.shape[2], k.shape[2], device=DEVICE, _compile=True)
    if with_mask:
        return lambda: compiled(
            q, k, v, block_mask=make(rule, None, None, q.shape[2], k.shape[2], device=DEVICE), enable_gqa=enable_gqa
        )
    return lambda: compiled(q, k, v, block_mask=kept, enable_gqa=enable_gqa)


def machine() -> None:
    properties = torch.cuda.get_device_properties(0)
    import triton

    results["machine"] = {
        "gpu": properties.name, "multiprocessors": properties.multi_processor_count, "torch": torch.__version__,
        "triton": triton.__version__, "heedful": heedful.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    large = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(large)
    samples = timed({"matmul": lambda: a @ b})
    results["machine"]["matmul_tflops"] = 2 * 8192**3 / statistics.median(samples["matmul"]) / 1e12
    samples = timed({"copy": lambda: target.copy_(large)})
    results["machine"]["copy_tbps"] = 2 * 2**31 / statistics.median(samples["copy"]) / 1e12
    print("  ", results["machine"], flush=True)


CHECKED_LENGTH = 700


def checked_patterns(length: int) -> dict[str, Pattern]:
    from heedful import BigBird, BlockSparse, Chunked, Dilated, Global, Prefix

    generator = torch.Generator().manual_seed(1)
    blocks = (torch.rand(1, 4, 11, 11, generator=generator) < 0.3).to(DEVICE)
    mask = (torch.rand(2, 1, length, length, generator=generator) < 0.3).to(DEVICE)
    ends = torch.tensor([0, 100, 100, 513, length], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([3, 90], dtype=torch.int32, device=DEVICE)
    patterns = [
        Full(), Causal(), Causal(0), SlidingWindow(100), SlidingWindow(200, 0), Dilated(40, 3), Chunked(130),
        Prefix(70) | Causal(), Global((0, 5, 6, 300)), Longformer(90, 3), BigBird(64, 3, 1, 1), BlockSparse(blocks, 64),
        Documents(ends), Documents(ends, within=Causal()), Padding(starts, starts + 400),
        Padding(starts, starts + 400) & Causal(), Mask(mask), SlidingWindow(50) & Chunked(70),
    ]  # fmt: skip
    return {repr(pattern): pattern for pattern in patterns}


def check_task(task: tuple[str, torch.dtype, int, str]) -> tuple[str, float, str]:
    """One case in a process of its own, since compiling is most of it: a name, its largest error, what it raised."""
    kind, dtype, dim, name = task
    what = f"{kind} {dtype} d{dim} {name}"
    try:
        torch.manual_seed(0)
        length = CHECKED_LENGTH
        pattern = checked_patterns(length)[name]
        q, k, v = tensors(2, 4, 2, length, length, dim, dtype)
        options: dict[str, Any] = {}
        if kind == "features":
            options = {
                "softcap": 20.0, "sinks": torch.randn(4, device=DEVICE),
                "alibi_slopes": torch.rand(4, device=DEVICE) / 8,
                "bias": torch.randn(2, 1, length, length, device=DEVICE).to(dtype),
            }  # fmt: skip
        if kind == "forward":
            error = 0.0
            # The second time it goes past triton's own look at its arguments; other lengths must be right then too.
            for _ in range(2):
                error = max(error, error_of(q, k, v, attention(q, k, v, pattern=pattern, backend="triton"), pattern))
            if not pattern.schedule.slots:
                q, k, v = q[:, :, :613], k[:, :, :431].contiguous(), v[:, :, :431]
                error = max(error, error_of(q, k, v, attention(q, k, v, pattern=pattern, backend="triton"), pattern))
            return what, error, ""
        leaves = [t.requires_grad_() for t in (q, k, v, *(t for t in options.values() if isinstance(t, Tensor)))]
        out = attention(q, k, v, pattern=pattern, backend="triton", **options)
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, leaves, grad)
        wide = [t.detach().double().requires_grad_() for t in leaves]
        names = [key for key, value in options.items() if isinstance(value, Tensor)]
        wide_options = options | dict(zip(names, wide[3:], strict=True))
        reference = attention(*wide[:3], pattern=pattern, backend="reference", **wide_options)
        wanted = torch.autograd.grad(reference, wide, grad.double())
        # Relative to the largest of each: a rounding of P and dS is 2^-9 of it.
        worst = max(
            float((a.detach().double() - b).abs().max() / (b.abs().max() + 1e-9))
            for a, b in zip((out, *found), (reference, *wanted), strict=True)
        )
        return what, worst / (0.02 if dtype != torch.float32 else 1e-4), ""
    except Exception:
        return what, float("inf"), traceback.format_exc(limit=5)[-1200:]


def pool() -> Any:
    """Processes that compile side by side; what they compile, this one finds in triton's cache."""
    global _pool
    if _pool is None:
        import concurrent.futures
        import multiprocessing
        import os

        _pool = concurrent.futures.ProcessPoolExecutor(
            max(2, min(12, (os.cpu_count() or 4) - 2)), mp_context=multiprocessing.get_context("spawn")
        )
    return _pool


_pool: Any = None


def mapped(function: Callable[[Any], Any], tasks: list[Any]) -> Iterator[Any]:
    """What the processes return, as far as they live."""
    global _pool
    from concurrent.futures.process import BrokenProcessPool

    try:
        yield from pool().map(function, tasks)
    except BrokenProcessPool:
        _pool = None
        failed(f"a process died in {function.__name__}")


def correctness() -> None:
    """Patterns, dtypes, features and gradients at sizes that fill several tiles, against fp64."""
    names = list(checked_patterns(CHECKED_LENGTH))
    tasks = [("forward", torch.bfloat16, 128, name) for name in names]
    tasks += [("forward", dtype, 64, name) for dtype in (torch.float16, torch.float32) for name in names[:6]]
    tasks += [("forward", torch.bfloat16, dim, name) for dim in (64, 80, 96, 192, 256) for name in names[:2]]
    tasks += [("gradients", torch.bfloat16, 128, name) for name in names]
    tasks += [("gradients", torch.float16, dim, name) for dim in (64, 80) for name in names[:2]]
    tasks += [("gradients", torch.float32, 64, names[1]), ("gradients", torch.bfloat16, 256, names[1])]
    tasks += [("features", torch.bfloat16, 64, name) for name in (names[1], names[9])]
    bad = 0
    for what, error, raised in mapped(check_task, tasks):
        results.setdefault("correctness", {})[what] = error
        if not error <= 1:
            bad += 1
            results["failures"].append({"section": "correctness", "error": f"{what}: {error} {raised}"})
            print(f"   WRONG {what}: {error:.3g} times the bound {raised[-300:]}", flush=True)
    print(f"   {len(tasks)} cases, {bad} bad", flush=True)


def forward() -> None:
    for dim in (64, 128):
        for causal in (False, True):
            for length in (1024, 4096, 16384):
                heads, batch = 2048 // dim, max(1, 16384 // length)
                q, k, v = tensors(batch, heads, heads, length, length, dim)
                pattern = Causal() if causal else Full()
                error = error_of(q, k, v, attention(q, k, v, pattern=pattern, backend="triton"), pattern)
                calls = {"heedful": ours(q, k, v, causal=causal)}
                calls |= {name: peer(name, q, k, v, is_causal=causal) for name in ("flash", "cudnn")}
                work = 4 * dim * batch * heads * length**2 / (2 if causal else 1)
                report(f"forward d{dim} {'causal' if causal else 'full'} {length}", timed(calls), work,
                       error=round(error, 3))  # fmt: skip
                if left() < 30:
                    return


def short() -> None:
    """Where PyTorch's own choice might be the faster: short sequences, float32, wide heads."""
    torch.backends.cuda.matmul.allow_tf32 = False
    cases = [(dim, torch.bfloat16, length) for dim in (64, 128) for length in (128, 256, 512, 1024, 2048)]
    cases += [(256, torch.bfloat16, 1024), (256, torch.bfloat16, 4096)]
    cases += [(64, torch.float32, 512), (64, torch.float32, 2048), (128, torch.float32, 2048)]
    for dim, dtype, length in cases:
        for causal in (False, True):
            heads, batch = 2048 // dim, max(1, 16384 // length)
            q, k, v = tensors(batch, heads, heads, length, length, dim, dtype)
            calls = {
                "heedful": ours(q, k, v, causal=causal),
                "sdpa": functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal),
            }
            work = 4 * dim * batch * heads * length**2 / (2 if causal else 1)
            name = f"short d{dim} {'causal' if causal else 'full'} {str(dtype)[6:]} {length}"
            report(name, timed(calls, rounds=5, budget=0.05), work)
            if left() < 30:
                return


def flex_forward() -> None:
    for dim, length in ((128, 4096), (64, 4096)):
        heads, batch = 2048 // dim, max(1, 16384 // length)
        q, k, v = tensors(batch, heads, heads, length, length, dim)
        for causal in (False, True):
            rule = (lambda b, h, i, j: j <= i) if causal else None
            calls = {"heedful": ours(q, k, v, causal=causal), "flex": flex(q, k, v, rule, False)}
            work = 4 * dim * batch * heads * length**2 / (2 if causal else 1)
            report(f"forward d{dim} {'causal' if causal else 'full'} {length} flex", timed(calls), work)
            if left() < 30:
                return


def window() -> None:
    """A causal window of 1024 keys, GQA 32 to 8."""
    for length in (16384, 65536):
        q, k, v = tensors(1, 32, 8, length, length, 128)
        pattern = SlidingWindow(1023, 0)
        error = error_of(q, k, v, attention(q, k, v, pattern=pattern, backend="triton"), pattern)
        rule = lambda b, h, i, j: (j <= i) & (i - j <= 1023)  # noqa: E731
        calls = {"heedful": ours(q, k, v, pattern=pattern), "flex": flex(q, k, v, rule, False)}
        pairs = 32 * (1024 * length - 1023 * 1024 / 2)
        report(f"window 1024 {length}", timed(calls), 4 * 128 * pairs, error=round(error, 3))
        if left() < 40:
            return
        calls = {"heedful": ours(q, k, v, pattern=pattern), "flex with mask": flex(q, k, v, rule, True)}
        report(f"window 1024 {length} with mask", timed(calls, rounds=3), 4 * 128 * pairs)
        if left() < 40:
            return


def sparse() -> None:
    """Other patterns at 16k, their time beside that of full attention."""
    from heedful import BigBird, Dilated

    length = 16384
    q, k, v = tensors(1, 16, 16, length, length, 128)
    ends = torch.arange(0, length + 1, 1024, dtype=torch.int32, device=DEVICE)
    cases = {
        "full": Full(),
        "longformer": Longformer(256, 16),
        "bigbird": BigBird(64, 3, 2, 3),
        "documents causal": Documents(ends, within=Causal()),
        "dilated": Dilated(64, 8),
    }
    samples = timed({name: ours(q, k, v, pattern=pattern) for name, pattern in cases.items()})
    for name, values in samples.items():
        seconds = statistics.median(values)
        error = error_of(q, k, v, attention(q, k, v, pattern=cases[name], backend="triton"), cases[name])
        density = float(cases[name].density(length, length))
        rate = 4 * 128 * 16 * length**2 * density / seconds / 1e12
        results["cases"].append({"case": f"sparse {name}", "seconds": seconds, "density": density, "rate": rate})
        print(
            f"   {name:20s} {seconds * 1e3:.3f} ms density {density:.4f} {rate:.1f} TFLOP/s error {error:.3f}",
            flush=True,
        )


def decode() -> None:
    """One query, GQA 32 to 8, 16k keys: bytes of keys and values per second, in sets that do not fit the cache."""
    for batch in (1, 16):
        length = 16384
        sets = [tensors(batch, 32, 8, 1, length, 128) for _ in range(8 if batch == 1 else 2)]

        def rotated(
            call: Callable[[Tensor, Tensor, Tensor], object], sets: list[tuple[Tensor, Tensor, Tensor]] = sets
        ) -> Callable[[], object]:
            state = {"n": 0}

            def run() -> object:
                state["n"] += 1
                return call(*sets[state["n"] % len(sets)])

            return run

        q, k, v = sets[0]
        error = error_of(q, k, v, attention(q, k, v, backend="triton"), Full())
        calls: dict[str, Callable[[], object]] = {
            "heedful": rotated(lambda q, k, v: attention(q, k, v, backend="triton")),
            "flash": rotated(lambda q, k, v: _with("flash", q, k, v)),
            "cudnn": rotated(lambda q, k, v: _with("cudnn", q, k, v)),
        }
        work = 2.0 * batch * 8 * length * 128 * 2
        samples = timed({name: graphed(call, len(sets)) for name, call in calls.items()}, rounds=7, budget=0.1)
        samples = {name: [value / len(sets) for value in values] for name, values in samples.items()}
        report(f"decode batch {batch}", samples, work, "TB/s", error=round(error, 3))


def _with(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(PEERS[name]):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def graphed(call: Callable[[], object], times: int) -> Callable[[], object]:
    """The call, several times, as a CUDA graph: launches out of the figure."""
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            for _ in range(times):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph.replay
    except Exception as error:
        print(f"      not captured: {type(error).__name__}: {str(error).splitlines()[0][:160]}", flush=True)

        def plain() -> None:
            for _ in range(times):
                call()

        return plain


def overhead() -> None:
    """Microseconds of Python until a call returns, launch included, on inputs that take the device less."""
    q, k, v = tensors(1, 8, 8, 16, 16, 64)
    calls: dict[str, Callable[[], object]] = {
        "heedful": ours(q, k, v),
        "heedful causal": ours(q, k, v, causal=True),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    found = {}
    for name, call in calls.items():
        for _ in range(50):
            call()
        torch.cuda.synchronize()
        best = []
        for _ in range(7):
            begun = time.perf_counter()
            for _ in range(200):
                call()
            best.append((time.perf_counter() - begun) / 200)
            torch.cuda.synchronize()
        found[name] = 1e6 * statistics.median(best)
    results["overhead_us"] = found
    print("  ", {name: round(value, 2) for name, value in found.items()}, flush=True)


def backward() -> None:
    for dim, causal, length in ((128, False, 4096), (128, True, 4096), (128, False, 16384), (64, False, 4096)):
        heads, batch = 2048 // dim, max(1, 16384 // length)
        q, k, v = (t.requires_grad_() for t in tensors(batch, heads, heads, length, length, dim))
        grad = torch.randn_like(q)
        work = 2.5 * 4 * dim * batch * heads * length**2 / (2 if causal else 1)
        outs = {"heedful": attention(q, k, v, causal=causal, backend="triton")}
        for name in ("flash", "cudnn"):
            outs[name] = peer(name, q, k, v, is_causal=causal)()
        found = {name: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True) for name, out in outs.items()}
        off = max(
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(found["heedful"], found["flash"], strict=True)
        )
        calls = {
            name: functools.partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
            for name, out in outs.items()
        }
        report(f"backward d{dim} {'causal' if causal else 'full'} {length}", timed(calls), work, off=f"{off:.2e}")
        if left() < 30:
            return


SWEPT = {
    "d64 full": (64, Full(), 4096), "d64 causal": (64, Causal(), 4096), "d128 full": (128, Full(), 4096),
    "d128 causal": (128, Causal(), 4096), "d128 window": (128, SlidingWindow(1023, 0), 16384),
    "d256 causal": (256, Causal(), 4096),
}  # fmt: skip
FORWARD_TILES = [
    (rows, columns, warps, stages, descriptors)
    for rows, columns, warps, depths in (
        (128, 128, 8, (2, 3)), (128, 64, 8, (2, 3, 4)), (128, 64, 4, (2, 3)), (64, 64, 4, (2, 3, 4)),
        (64, 128, 4, (2, 3)), (128, 32, 4, (3, 4)),
    )
    for stages in depths
    for descriptors in (True, False)
]  # fmt: skip
QUERY_TILES = [
    (128, 64, 8, 2, False), (128, 64, 8, 3, False), (128, 128, 8, 1, False), (128, 128, 8, 2, False),
    (64, 64, 4, 2, False), (64, 128, 4, 2, False), (64, 64, 4, 3, False), (128, 32, 8, 3, False),
]  # fmt: skip
KEY_TILES = [
    (64, 128, 8, 2, False), (32, 128, 8, 2, False), (32, 128, 8, 3, False), (64, 64, 4, 2, False),
    (32, 64, 4, 3, False), (64, 64, 8, 2, False), (128, 128, 8, 1, False), (32, 128, 4, 2, False),
    (64, 128, 8, 1, False), (128, 64, 8, 2, False), (16, 128, 4, 3, False),
]  # fmt: skip


def with_tiles(kind: str, numbers: tuple[Any, ...] | None) -> None:
    """Has the forward, the gradient of queries or that of keys use these tiles; None gives the choice back."""
    from heedful.backend.triton import gradients, launch, tuning

    if kind == "forward":
        launch.forward_tiles = tuning.forward_tiles if numbers is None else lambda *_: tuning.Tiles(*numbers)
        launch._forward.cache_clear()
    else:
        own = tuning.backward_tiles

        def chosen(*args: Any) -> Any:
            return tuning.Tiles(*numbers) if numbers is not None and args[-1] == (kind == "keys") else own(*args)

        gradients.backward_tiles = chosen
        gradients._backward.cache_clear()


def swept_call(kind: str, name: str, length: int | None) -> Callable[[], object]:
    from heedful.backend.triton import gradients, launch

    dim, pattern, own_length = SWEPT[name]
    length = length or own_length
    heads, batch = 2048 // dim, max(1, 16384 // length)
    if length < 1024:
        heads = batch = 1
    q, k, v = tensors(batch, heads, heads, length, length, dim)
    code, scale = pattern.schedule.encode(), dim**-0.5
    if kind == "forward":
        return lambda: launch.forward(q, k, v, (), code, scale, False)
    out, lse = launch.forward(q, k, v, (), code, scale, False)
    grad = torch.randn_like(out)
    return lambda: gradients.backward(
        grad, q, k, v, out, lse, (), code, scale, None, None, 0.0, 0.0, None, None, None, False, False
    )


def compile_task(task: tuple[str, str, tuple[Any, ...]]) -> None:
    kind, name, numbers = task
    try:
        with_tiles(kind, numbers)
        swept_call(kind, name, 256)()
        torch.cuda.synchronize()
    except Exception:
        pass


def swept(kind: str, names: list[str], options: list[tuple[Any, ...]]) -> dict[str, dict[tuple[Any, ...], float]]:
    """TFLOP/s of every choice for every case, the best first."""
    list(mapped(compile_task, [(kind, name, numbers) for name in names for numbers in options]))
    table: dict[str, dict[tuple[Any, ...], float]] = {}
    for name in names:
        dim, pattern, length = SWEPT[name]
        density = float(pattern.density(length, length))
        work = 4 * dim * (2048 // dim) * max(1, 16384 // length) * length**2 * density
        work *= 1 if kind == "forward" else 2.5
        rates: dict[tuple[Any, ...], float] = {}
        call = None
        for numbers in options:
            if left() < 20:
                break
            try:
                with_tiles(kind, numbers)
                call = call or swept_call(kind, name, None)
                call()
                torch.cuda.synchronize()
            except Exception as error:
                torch.cuda.synchronize()
                print(f"      {kind} {name} {numbers}: {type(error).__name__} {str(error)[:80]}", flush=True)
                continue
            samples = timed({"x": call}, rounds=3, budget=0.03)
            if samples:
                rates[numbers] = work / statistics.median(samples["x"]) / 1e12
        with_tiles(kind, None)
        table[name] = dict(sorted(rates.items(), key=lambda item: -item[1]))
        best = ", ".join(f"{numbers} {rate:.0f}" for numbers, rate in list(table[name].items())[:5])
        print(f"   {kind} {name}: {best}", flush=True)
    results.setdefault("sweep", {})[kind] = {
        name: {str(numbers): rate for numbers, rate in rates.items()} for name, rates in table.items()
    }
    return table


def best_of(table: dict[str, dict[tuple[Any, ...], float]], names: list[str]) -> tuple[Any, ...]:
    """The choice with the largest product of rates."""
    scores = {
        numbers: functools.reduce(lambda a, name: a * table[name].get(numbers, 0.0), names, 1.0)
        for numbers in table[names[0]]
    }
    return max(scores, key=lambda numbers: scores[numbers])


def sweep() -> None:
    """Tile sizes for the table in heedful/backend/triton/tuning.py; the sections after it use the best."""
    from heedful.backend.triton import launch, tuning

    table = swept("forward", list(SWEPT), FORWARD_TILES)
    arch = launch.device_limits(0)[0]
    for dim in (64, 128):
        best = best_of(table, [f"d{dim} full", f"d{dim} causal"])
        tuning.overrides[arch, torch.bfloat16, dim, dim, 0, 0, False, True] = tuning.Tiles(*best)
        print(f"   d{dim} best {best}", flush=True)
    tuning.forward_tiles.cache_clear()
    launch._forward.cache_clear()


def sweep_backward() -> None:
    from heedful.backend.triton import gradients, tuning

    names = ["d64 full", "d128 full", "d128 causal"]
    own = tuning.backward_tiles
    for kind, options in (("queries", QUERY_TILES), ("keys", KEY_TILES)):
        table = swept(kind, names, options)
        best = {64: best_of(table, ["d64 full"]), 128: best_of(table, ["d128 full", "d128 causal"])}
        results.setdefault("best", {})[kind] = best
        print(f"   {kind} best {best}", flush=True)

        def chosen(*args: Any, kind: str = kind, best: Any = best, before: Any = own) -> Any:
            plain = args[1] == torch.bfloat16 and args[2] in best and not args[4] and not args[5]
            return tuning.Tiles(*best[args[2]]) if plain and args[6] == (kind == "keys") else before(*args)

        own = tuning.backward_tiles = gradients.backward_tiles = chosen
        gradients._backward.cache_clear()


def sweep_decode() -> None:
    from heedful.backend.triton import launch

    rows = {}
    own = launch._splits
    for batch in (1, 16):
        sets = [tensors(batch, 32, 8, 1, 16384, 128) for _ in range(8 if batch == 1 else 2)]
        work = 2.0 * batch * 8 * 16384 * 128 * 2
        for columns, warps, stages in (
            (64, 4, 2),
            (64, 4, 3),
            (64, 4, 4),
            (128, 4, 2),
            (128, 4, 3),
            (128, 8, 2),
            (64, 2, 4),
        ):
            for chunk in (256, 512, 1024, 2048):
                if left() < 20:
                    break
                try:
                    with_tiles("forward", (16, columns, warps, stages, False))
                    launch._splits = lambda p, m, keys, step, chunk=chunk: (-(-keys // chunk), chunk)
                    calls = [functools.partial(launch.forward, *s, (), (), 128**-0.5, False) for s in sets]
                    replay = graphed(lambda: [call() for call in calls], 1)  # noqa: B023
                    samples = timed({"x": replay}, rounds=3, budget=0.03)
                    rate = work * len(sets) / statistics.median(samples["x"]) / 1e12
                    rows[f"batch {batch} {columns} {warps} {stages} chunk {chunk}"] = rate
                except Exception as error:
                    print(f"      {columns, warps, stages, chunk}: {str(error)[:100]}", flush=True)
        best = sorted(((rate, key) for key, rate in rows.items() if key.startswith(f"batch {batch} ")), reverse=True)
        print("  ", [(key, round(rate, 2)) for rate, key in best[:5]], flush=True)
    launch._splits = own
    with_tiles("forward", None)
    results.setdefault("sweep", {})["decode"] = rows


def main() -> None:
    global arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="a JSON file for all results")
    parser.add_argument("--only", type=lambda text: text.split(","), help="sections, by name")
    parser.add_argument("--sweep", action="store_true", help="also measure tile sizes")
    parser.add_argument("--seconds", type=float, default=420, help="how long all may take")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and torch sees none")
    torch.manual_seed(0)
    if arguments.sweep:
        sections = [machine, correctness, overhead, sweep, forward, sweep_backward, backward, decode,
                    sweep_decode, sparse, short, flex_forward, window]  # fmt: skip
    else:
        sections = [machine, correctness, overhead, forward, backward, decode, sparse, short, flex_forward, window]
    for section in sections:
        guarded(section)
    results["took_seconds"] = time.monotonic() - started
    save()
    if _pool is not None:
        _pool.shutdown(cancel_futures=True)
    print(f"took {results['took_seconds']:.0f} s; {len(results['failures'])} failures", flush=True)


if __name__ == "__main__":
    main()
