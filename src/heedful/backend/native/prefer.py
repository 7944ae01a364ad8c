"""Where the engine is measured to be faster than PyTorch's SDPA, for problems that both can run.

Measured by benchmarks/sweep.py; docs/performance/log.md has the figures. What SDPA would need a dense mask for is the
engine's: building the mask alone costs more than many a call.
"""

from __future__ import annotations

import torch

from heedful.backend.native import library
from heedful.backend.sdpa import lower
from heedful.problem import Problem, known

# Below so many query-key pairs a call is its overhead, and SDPA's is smaller. In 16 bit SDPA catches up later.
FEW_PAIRS = {torch.float32: 8192, torch.float64: 8192, torch.bfloat16: 512, torch.float16: 256}
# With so few queries to a head of its own keys, SDPA multiplies them where they lie, and packing them costs more than
# it saves, as long as they come from the cache.
FEW_QUERIES = {"avx2": 4, "avx512": 1, "avx512_bf16": 1}
CACHED_BYTES = 32 << 20


try:
    _TIER = library.isa_names()[library.isa_selected()]
except ImportError:
    _TIER = ""  # No engine, and nobody asks.


def native_is_faster(problem: Problem) -> bool:
    """Whether to run a problem on the engine rather than on SDPA.

    Depends on the problem and the instruction set alone, not on the number of threads: the choice decides the bits of
    the result.
    """
    if lower(problem).dense:
        return True
    if _TIER == "portable":
        # Without fused multiply-adds the engine reaches a third of what PyTorch's own libraries do.
        return False
    if known(problem.pairs < FEW_PAIRS[problem.dtype]):
        return False
    if problem.dtype.itemsize < 4 or problem.heads != problem.kv_heads:
        return True
    key_bytes = problem.batch * problem.kv_heads * problem.k_length * problem.head_dim * 2 * problem.dtype.itemsize
    return not (known(problem.q_length <= FEW_QUERIES[_TIER]) and known(key_bytes <= CACHED_BYTES))
