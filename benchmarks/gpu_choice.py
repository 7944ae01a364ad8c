"""Triton beside PyTorch's SDPA on a CUDA device, for calls that both can run: what prefer.py of the backend decides by.

    PYTHONPATH=src python benchmarks/gpu_choice.py [--only TEXT] [--out results.json] [--seconds 0.1] [--compile]

Both behind heedful's own door, so a ratio has in it what either costs before its launch. --compile only compiles.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import heedful
from heedful.measure.gpu import sampler
from heedful.measure.timing import compare_samples, take_turns

DEVICE = torch.device("cuda")


def call(
    q_length: int,
    k_length: int,
    *,
    dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "bfloat16",
    batch: int | None = None,
    heads: int | None = None,
    group: int = 1,
    **options: Any,
) -> dict[str, Any]:
    heads = heads or max(group, 2048 // dim)
    batch = batch or max(1, min(64, 16384 // max(q_length, k_length)))
    return {
        "q": (batch, heads, q_length, dim), "k": (batch, heads // group, k_length, dim),
        "v": (batch, heads // group, k_length, value_dim or dim), "dtype": dtype, "options": options,
    }  # fmt: skip


def calls() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for causal in (False, True):
        kind = "causal" if causal else "full"
        for dim, value_dim in ((64, 128), (128, 64), (192, 128), (96, 64)):
            found[f"D {dim} Dv {value_dim} {kind}"] = call(2048, 2048, dim=dim, value_dim=value_dim, causal=causal)
        for dim in (320, 512):
            found[f"D {dim} {kind}"] = call(1024, 1024, dim=dim, causal=causal)
        for length in (512, 2048):
            found[f"float32 {length} {kind}"] = call(length, length, dtype="float32", dim=64, causal=causal)
            found[f"float32 grouped {length} {kind}"] = call(
                length, length, dtype="float32", dim=64, group=4, causal=causal
            )
        for dim in (64, 128, 256):
            for length in (128, 4096):
                found[f"D {dim} {length} {kind}"] = call(length, length, dim=dim, causal=causal)
    for dtype in ("bfloat16", "float32"):
        for causal in (False, True):
            kind = f"{'causal' if causal else 'full'} {dtype}"
            found[f"bias {kind}"] = call(2048, 2048, dtype=dtype, dim=64, bias=True, causal=causal)
            found[f"bias of a row {kind}"] = call(2048, 2048, dtype=dtype, dim=64, bias="row", causal=causal)
            found[f"bias, gradients {kind}"] = call(
                1024, 1024, dtype=dtype, dim=64, bias=True, causal=causal, gradients=True
            )
            found[f"bias 256 {kind}"] = call(256, 256, dtype=dtype, dim=64, bias=True, causal=causal)
            found[f"bias D 128 4096 {kind}"] = call(4096, 4096, dtype=dtype, bias=True, causal=causal)
            found[f"bias, gradients D 128 4096 {kind}"] = call(
                4096, 4096, dtype=dtype, bias=True, causal=causal, gradients=True
            )
            found[f"gradients {kind}"] = call(1024, 1024, dtype=dtype, dim=64, gradients=True, causal=causal)
    found["gradients D 64 Dv 128"] = call(1024, 1024, dim=64, value_dim=128, gradients=True)
    for dim, group in ((64, 1), (128, 1), (128, 4)):
        for length in (197, 577, 1001, 3001, 8001):
            for causal in (False, True):
                kind = f"D {dim} group {group} {'causal' if causal else 'full'}"
                found[f"a text's length {length} {kind}"] = call(length, length, dim=dim, group=group, causal=causal)
    for queries in (1, 4, 16, 64):
        for keys in (256, 1024, 4096, 16384):
            for group, batch in ((1, 1), (1, 4), (4, 1), (4, 16)):
                name = f"few {queries} queries {keys} keys group {group} batch {batch}"
                found[name] = call(queries, keys, heads=32, group=group, batch=batch)
    return found


def sides(what: dict[str, Any]) -> dict[str, Callable[[], object]]:
    dtype = getattr(torch, what["dtype"])
    q, k, v = (torch.randn(what[name], device=DEVICE, dtype=torch.float32).to(dtype) for name in "qkv")
    options = dict(what["options"])
    gradients = options.pop("gradients", False)
    leaves = [q, k, v]
    if "bias" in options:
        heads, rows = (1, 1) if options["bias"] == "row" else q.shape[1:3]
        options["bias"] = torch.randn(1, heads, rows, k.shape[2], device=DEVICE).to(dtype)
        leaves.append(options["bias"])
    for leaf in leaves:
        leaf.requires_grad_(gradients)

    def run(name: str) -> object:
        out = heedful.attention(q, k, v, backend=name, **options)
        return torch.autograd.grad(out, leaves, torch.ones_like(out)) if gradients else out

    return {name: functools.partial(run, name) for name in ("sdpa", "triton")}


def compile_one(name: str) -> None:
    try:
        sides(calls()[name])["triton"]()
        torch.cuda.synchronize()
    except Exception:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="calls whose names contain this")
    parser.add_argument("--out", type=Path, help="a JSON file for all results")
    parser.add_argument("--seconds", type=float, default=0.1, help="time for each call")
    parser.add_argument("--compile", action="store_true", help="compile what is needed, and time nothing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_choice.py needs a CUDA device, and torch sees none")
    chosen = {name: what for name, what in calls().items() if arguments.only is None or arguments.only in name}
    if arguments.compile:
        with ProcessPoolExecutor(8, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_one, chosen))
        return
    results = []
    for name, what in chosen.items():
        row: dict[str, Any] = {"name": name, **what}
        try:
            both = sides(what)
            samples = take_turns(list(both.values()), seconds=arguments.seconds, sample=sampler(DEVICE, ahead=False))
            timing = compare_samples(*samples)
            row |= timing.to_json()
            sdpa, triton = (statistics.median(times) * 1e6 for times in samples)
            print(f"{name:50s} sdpa {sdpa:9.1f} us, triton {triton:9.1f} us, ratio {timing.ratio:.2f}", flush=True)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:200]
            print(f"{name:50s} {row['error']}", flush=True)
        results.append(row)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(results, indent=1, default=str))


if __name__ == "__main__":
    main()
