"""What benchmarks/gpu.py measured, as the tables of docs/performance/gpu.md.

    python benchmarks/gpu_table.py results.json [earlier.json ...] [--update docs/performance/gpu.md]

Of a case that several files have, the first file's figures are taken.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from heedful.measure.files import replace_block
from heedful.report.document import Grid

PEERS = {"flash": "SDPA flash", "cudnn": "SDPA cuDNN", "flex": "FlexAttention", "flex with mask": "FlexAttention, mask",
         "sdpa": "SDPA"}  # fmt: skip


def machine_line(machine: dict[str, Any]) -> str:
    return (
        f"{machine['gpu']}, {machine['date']}, torch {machine['torch']}, triton {machine['triton']}; its own peaks in "
        f"that run: matrix product of bfloat16 {machine['matmul_tflops']:.0f} TFLOP/s, copy "
        f"{machine['copy_tbps']:.2f} TB/s."
    )


def peers_of(case: dict[str, Any]) -> str:
    """Each peer's rate and heedful's ratio to it."""
    return ", ".join(
        f"{PEERS[name]} {rate:.3g} ({case['ratio'][name]:.2f}×)" for name, rate in case["rate"].items() if name in PEERS
    )


def row(case: dict[str, Any], machine: dict[str, Any], run: str) -> list[str]:
    own = next(rate for name, rate in case["rate"].items() if name not in PEERS)
    peak = machine["copy_tbps"] if case["unit"] == "TB/s" else machine["matmul_tflops"]
    return [case["case"], f"{own:.3g} {case['unit']}", f"{own / peak:.0%}", peers_of(case), run]


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown: the machine of each run, calls beside their peers, sparse patterns beside dense attention."""
    beside: dict[str, list[str]] = {}
    sparse: dict[str, list[str]] = {}
    for number, result in enumerate(results, 1):
        dense = next((case["seconds"] for case in result["cases"] if case["case"] == "sparse full"), None)
        for case in result["cases"]:
            name = case["case"]
            if not name.startswith("sparse "):
                beside.setdefault(name, row(case, result["machine"], str(number)))
            elif dense is not None:
                cells = [
                    name.removeprefix("sparse "), f"{case['seconds'] * 1e3:.3g} ms", f"{case['density']:.2%}",
                    f"{dense / case['seconds']:.1f}×", f"{case['rate']:.0f} TFLOP/s", str(number),
                ]  # fmt: skip
                sparse.setdefault(name, cells)
    lines = [f"Run {number}: {machine_line(result['machine'])}" for number, result in enumerate(results, 1)]
    overhead = results[0].get("overhead_us")
    if overhead is not None:
        lines.append(
            "Time until a tiny call returns, run 1: "
            + ", ".join(f"{name} {value:.1f} µs" for name, value in overhead.items())
            + "."
        )
    first = Grid("", ("call", "heedful", "of peak", "peers (ratio)", "run"), list(beside.values()), frozenset({0, 3}))
    second = Grid("", ("pattern", "time", "density", "to full", "rate", "run"), list(sparse.values()))
    return "\n\n".join([*lines, first.markdown(), second.markdown()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of benchmarks/gpu.py, the newest first")
    parser.add_argument("--update", type=Path, help="replace the gpu block of this Markdown file")
    arguments = parser.parse_args()
    text = tables([json.loads(path.read_text()) for path in arguments.results])
    if arguments.update is None:
        print(text)
    else:
        replace_block(arguments.update, "gpu", text)


if __name__ == "__main__":
    main()
