"""Where the engine is measured to be faster than PyTorch's SDPA, for problems that both can run."""

from __future__ import annotations

from heedful.backend.sdpa import lower
from heedful.patterns import Full
from heedful.problem import Problem, known

# Below this many query-key pairs a call costs its overhead, and SDPA's is known.
TINY_PAIRS = 64 * 64
# With fewer queries and every key attended, reading the keys is all the work.
FEW_QUERIES = 8

_FULL = Full().schedule


def native_is_faster(problem: Problem) -> bool:
    """Whether to run a problem on the engine rather than on SDPA.

    Depends on the problem alone, not on the number of threads: the choice decides the bits of the result.
    """
    if lower(problem).dense:
        return True
    if known(problem.pairs < TINY_PAIRS):
        return False
    return not (problem.schedule == _FULL and known(problem.q_length < FEW_QUERIES))
