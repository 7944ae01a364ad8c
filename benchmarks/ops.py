"""Every fused operation against PyTorch, forward and forward with backward, in one process turn by turn.

Ratios are PyTorch's time divided by heedful's. Bytes are the least that the operation has to move; their share is of
what this machine reads at best.

    python benchmarks/ops.py --only parametric_swish --dtype float32 --json ops.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from heedful.measure.machine import environment
from heedful.measure.operations import Setting, measure_case
from heedful.measure.peaks import measure_peaks
from heedful.ops import catalogue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--case", default="", help="cases whose name contains this")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row")
    parser.add_argument("--forward", action="store_true", help="without backward")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    peaks = measure_peaks((options.threads,))
    bandwidth = peaks.read_bandwidth[options.threads] if peaks else None
    rows = []
    for operation in catalogue().values():
        if options.only not in operation.name:
            continue
        for case in operation.cases:
            if options.case not in case.name:
                continue
            for name in options.dtype:
                for backward in (False,) if options.forward else (False, True):
                    setting = Setting(getattr(torch, name), backward, options.threads, options.seconds)
                    row = measure_case(operation, case, setting)
                    rows.append(row)
                    share = f", {row['bytes_per_second'] / bandwidth:.0%} of reading" if bandwidth else ""
                    ratios = ", ".join(f"{peer} {c['ratio']:.2f}x" for peer, c in row["peers"].items())
                    print(
                        f"{operation.name} {case.name} {name} {row['pass']}: {row['seconds'] * 1e6:.1f} us, "
                        f"{row['bytes_per_second'] / 1e9:.1f} GB/s{share}; {ratios}",
                        flush=True,
                    )
    if options.json:
        result = {"environment": environment(), "read_bandwidth": bandwidth, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
