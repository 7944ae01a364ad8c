"""Time and peak memory of a language model's last layer with its loss, forward and backward: heedful, eager PyTorch,
torch.compile and PyTorch's own linear_cross_entropy in parts, each in a process of its own.

Memory is what a step adds to what its process held resident before, gradients included.

    python benchmarks/linear_cross_entropy.py --rows 2048 --features 512 --classes 32000
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from heedful.measure.memory import peak_bytes, reset_peak
from heedful.ops import catalogue

OPERATION = "linear_cross_entropy"


def resident_bytes() -> int:
    """What this process holds now: the peak, begun anew."""
    if not reset_peak():
        sys.exit("this system does not let a process begin its peak anew (/proc/self/clear_refs)")
    return peak_bytes()


def in_parts(input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    loss: torch.Tensor = functional.linear_cross_entropy(input, linear_weight, target, options=options)
    return loss


def sides() -> dict[str, Callable[..., Any]]:
    operation = catalogue()[OPERATION]
    found: dict[str, Callable[..., Any]] = {
        "heedful": operation.function,
        "heedful, unreduced": lambda **call: operation.function(**call, reduction="none").mean(),
        "eager": operation.reference,
        "torch.compile": torch.compile(operation.reference),
    }
    if hasattr(functional, OPERATION):
        found["PyTorch in parts"] = in_parts
    return found


def one(options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.rows, options.features).to(dtype).requires_grad_()
    weight = (torch.randn(options.classes, options.features) * options.features**-0.5).to(dtype).requires_grad_()
    target = torch.randint(options.classes, (options.rows,))
    function = sides()[options.side]

    def step() -> float:
        hidden.grad = weight.grad = None
        loss = function(input=hidden, linear_weight=weight, target=target)
        loss.backward()
        return float(loss.detach())

    step()
    hidden.grad = weight.grad = None
    before = resident_bytes()
    loss = step()
    memory = peak_bytes() - before
    seconds = []
    for _ in range(options.repeat):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return {"loss": loss, "memory": memory, "seconds": statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=32000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--side", default="", help="only this one, in this process, as JSON")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(one(options)))
        return
    found = {}
    for side in sides():
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{side} failed: {result.stderr[-2000:]}")
        found[side] = json.loads(result.stdout.splitlines()[-1])
    tolerance = 1e-5 if options.dtype == "float32" else 2e-2
    for side, row in found.items():
        if abs(row["loss"] - found["heedful"]["loss"]) > tolerance * abs(row["loss"]):
            sys.exit(f"{side} gives {row['loss']}, heedful {found['heedful']['loss']}")
        print(
            f"{side}: {row['seconds'] * 1e3:.0f} ms ({row['seconds'] / found['heedful']['seconds']:.2f}x heedful's), "
            f"{row['memory'] / 2**20:.0f} MiB above what it held"
        )


if __name__ == "__main__":
    main()
