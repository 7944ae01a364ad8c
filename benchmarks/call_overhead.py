"""What a call costs beside its arithmetic, by each way of reaching the engine from Python: µs on a tiny input, one
thread, each way timed turn by turn with F.scaled_dot_product_attention.

    python benchmarks/call_overhead.py

The operator is registered from C++ (bridge/). The others are what it was chosen over: ctypes straight to the C
interface, which torch.compile and autograd cannot see, and an operator registered from Python around that. Calls on
numpy arrays go through ctypes too, by structures that are filled in once.
"""

from __future__ import annotations

import datetime

import torch
from torch import Tensor
from torch.nn import functional

from heedful.backend.native import library
from heedful.measure.machine import cpu_model
from heedful.measure.timing import interleave
from heedful.numpy import Context

SCALE = 8**-0.5


library.load_operators()
operator = torch.ops.heedful.attention_forward.default


def through_ctypes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    library.attention_forward(query, key, value, out, lse, (), (), SCALE)
    return out, lse


through_python_operator = torch.library.custom_op("heedful_overhead::forward", through_ctypes, mutates_args=())


def main() -> None:
    torch.set_num_threads(1)
    query, key, value = (torch.randn(1, 1, 8, 8) for _ in range(3))
    context, arrays = Context(1), [tensor.transpose(1, 2).numpy() for tensor in (query, key, value)]
    ways = {
        "torch.ops.heedful.attention_forward": lambda: operator(query, key, value, [], (), SCALE, False),
        "ctypes": lambda: through_ctypes(query, key, value),
        "torch.library.custom_op around ctypes": lambda: through_python_operator(query, key, value),
        "heedful.numpy.attention": lambda: context.attention(*arrays),
    }

    def sdpa() -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value)

    print(f"{datetime.date.today()}, {cpu_model()}, torch {torch.__version__}, 1 thread, (1, 1, 8, 8) float32\n")
    print("| way | µs | SDPA beside it, µs | share of SDPA's time (quartiles) |\n|---|---|---|---|")
    for name, call in ways.items():
        torch.testing.assert_close(torch.as_tensor(call()[0]).reshape(1, 1, 8, 8), sdpa())
        with torch.no_grad():
            seen = interleave(sdpa, call, seconds=3, max_rounds=1000)
        print(
            f"| {name} | {seen.candidate_seconds * 1e6:.1f} | {seen.baseline_seconds * 1e6:.1f} "
            f"| {1 / seen.ratio:.2f} ({1 / seen.ratio_high:.2f}–{1 / seen.ratio_low:.2f}) |"
        )


if __name__ == "__main__":
    main()
