"""What is fastest on this machine: where SDPA beats the engine, and the engine's own constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

from .checks import all_passed
from .collect import Progress, collect
from .machine import cpu_model, environment, last_level_cache_bytes
from .numerics import check_backward, check_forward
from .timing import interleave, pinned_threads

if TYPE_CHECKING:
    from torch import Tensor

TABLE_VERSION = 2
# A value replaces the shipped one if it saves this much in both of two measurements, and a constant of the engine only
# if it costs no workload more than that.
GAIN = 1.03
DTYPES = ("float32", "float64", "bfloat16", "float16")
PAIR_LIMITS = ("few_pairs", "few_pairs_gradient")
PAIRS = tuple(2**exponent for exponent in range(2, 15))
QUERIES = (1, 2, 4, 8, 16, 32)
MAX_ROUNDS = 60
# Thresholds are measured so often, and move only if every pass says so.
PASSES = 2
Limit = TypeVar("Limit")
Cell = TypeVar("Cell", bound=Hashable)


@dataclass(frozen=True)
class Work:
    """One call that a constant is tried on: q_length queries against k_length keys of `heads` / `kv_heads` heads."""

    dtype: str
    heads: int
    kv_heads: int
    q_length: int
    k_length: int
    head_dim: int
    causal: bool = False
    gradients: bool = False

    def tensors(self) -> list[Tensor]:
        """Query, key, value and the output's gradient."""
        import torch

        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, self.dtype)
        shapes = ((self.heads, self.q_length), *((self.kv_heads, self.k_length),) * 2, (self.heads, self.q_length))
        return [torch.randn(1, *shape, self.head_dim, generator=generator).to(dtype) for shape in shapes]


FORWARD = (
    Work("float32", 8, 8, 1024, 1024, 64),
    Work("bfloat16", 8, 8, 1024, 1024, 64),
    Work("float32", 4, 4, 2048, 2048, 128, causal=True),
    Work("bfloat16", 8, 2, 2048, 2048, 128, causal=True),
)
DECODE = (
    Work("bfloat16", 32, 8, 1, 8192, 128),
    Work("float16", 32, 8, 1, 8192, 128),
    Work("float32", 32, 8, 1, 8192, 128),
    Work("float32", 8, 8, 1, 16384, 128),
)
FEW_ROWS = tuple(
    Work(dtype, 32, kv_heads, queries, 2048, 128)
    for dtype, kv_heads, queries in product(("bfloat16", "float32"), (32, 8), (1, 2, 4))
)
BACKWARD = (
    Work("float32", 4, 4, 1024, 1024, 64, gradients=True),
    Work("bfloat16", 4, 4, 1024, 1024, 64, gradients=True),
    Work("float32", 2, 2, 1024, 1024, 128, causal=True, gradients=True),
    Work("bfloat16", 4, 2, 1024, 1024, 128, causal=True, gradients=True),
)


@dataclass(frozen=True)
class Constant:
    """One of the engine's constants: the values that are tried, and the calls that they are tried on."""

    name: str
    candidates: tuple[int, ...]
    works: tuple[Work, ...]


CONSTANTS = (
    Constant("item_bytes", tuple(2**exponent for exponent in range(16, 22)), FORWARD),
    Constant("direct_rows", (1, 2, 4, 8, 16, 24), FEW_ROWS),
    Constant("prefetch_bytes", tuple(2**exponent for exponent in range(12, 19)), DECODE),
    Constant("backward_keys", (64, 128, 192, 256), BACKWARD),
    Constant("backward_rows", (24, 48, 96, 144, 192), BACKWARD),
)


def measure_tuning(*, quick: bool, progress: Progress) -> dict[str, Any]:
    """Measure a table for this machine on one thread; the choice must not depend on their number.

    Returns:
        JSON-serialisable: environment, interrupted, table (what is stored; after Ctrl-C the shipped value of what was
        not measured), and notes, one line for each thing that was measured.

    Raises:
        ImportError: where there is no engine.
    """
    from heedful.backend.native import library

    tier = library.isa_names()[library.isa_selected()]
    table = _shipped(tier)
    notes: list[str] = []
    seconds = 0.05 if quick else 0.3
    known = library.tuning()
    constants = [constant for constant in CONSTANTS if constant.name in known]

    def thresholds(name: str, dtype: str) -> None:
        table[name][dtype], note = few_pairs(name, dtype, table[name][dtype], seconds / 2)
        notes.append(note)

    def short_queries() -> None:
        shipped = table["few_queries"], table["cached_bytes"]
        table["few_queries"], table["cached_bytes"], note = few_queries(shipped, seconds)
        notes.append(note)

    def one(constant: Constant) -> None:
        value, note = best_value(constant, seconds)
        notes.append(note)
        if value is not None:
            table["engine"][constant.name] = value
            library.tune(constant.name, value)

    steps: list[tuple[str, Callable[[], None]]] = [
        *(
            (f"{name}, {dtype}", lambda name=name, dtype=dtype: thresholds(name, dtype))
            for name, dtype in product(PAIR_LIMITS, DTYPES)
        ),
        ("few_queries and cached_bytes", short_queries),
        *((constant.name, lambda constant=constant: one(constant)) for constant in constants),
    ]
    with pinned_threads(1), engine_at_rest():
        _, interrupted = collect(steps, lambda step: step[1](), progress, lambda step: step[0])
    return {"environment": environment(), "interrupted": interrupted, "table": table, "notes": notes}


def step_count() -> int:
    """How many steps `measure_tuning` tells its progress at most."""
    return len(PAIR_LIMITS) * len(DTYPES) + 1 + len(CONSTANTS)


@contextmanager
def engine_at_rest() -> Iterator[None]:
    """The engine with its own choice of every constant; what was set before comes back."""
    from heedful.backend.native import library

    before = library.tuning()
    for name in before:
        library.tune(name, 0)
    try:
        yield
    finally:
        for name, value in before.items():
            library.tune(name, value)


def few_pairs(name: str, dtype: str, shipped: int, seconds: float) -> tuple[int, str]:
    """Below how many query-key pairs SDPA's smaller overhead wins, and a line about it; `name` is the limit's."""
    gradients = name == "few_pairs_gradient"

    def measure(pairs: int) -> float:
        side = round(math.sqrt(pairs))
        sides = (side, 1), (max(1, side // 2), 4)
        works = [Work(dtype, heads, heads, side, side, 64, gradients=gradients) for side, heads in sides]
        return geometric_mean(_native_against_sdpa(work, seconds, whole=True) for work in works)

    passes = [{pairs: measure(pairs) for pairs in PAIRS} for _ in range(PASSES)]
    candidates = (shipped, 0, *PAIRS[1:], 2 * PAIRS[-1])
    threshold = settle(shipped, candidates, passes, lambda threshold, pairs: pairs < threshold)
    return threshold, f"{name} {dtype}: {threshold} (SDPA's time ÷ native's: {_shown(_together(passes))})"


def few_queries(shipped: tuple[int, int], seconds: float) -> tuple[int, int, str]:
    """Up to how many queries a head, and how many bytes of keys and values, SDPA wins in fp32; and a line about it.

    shipped and the first two of the result: few_queries, cached_bytes.
    """
    cache = last_level_cache_bytes()
    sizes = sorted({min(2**exponent << 10, 2 * cache) for exponent in range(8, 18, 2)})
    heads, dim = 8, 64

    def measure(queries: int, size: int) -> float:
        keys = size // (2 * heads * dim * 4)
        return _native_against_sdpa(Work("float32", heads, heads, queries, keys, dim), seconds / 2)

    cells = list(product(QUERIES, sizes))
    passes = [{cell: measure(*cell) for cell in cells} for _ in range(PASSES)]
    queries, cached = settle(
        shipped,
        (shipped, (0, 0), *cells),
        passes,
        lambda limits, cell: cell[0] <= limits[0] and cell[1] <= limits[1],
    )
    together = _together(passes)
    by_queries = {q: geometric_mean(together[q, size] for size in sizes if size <= cache) for q in QUERIES}
    return queries, cached, f"few_queries: {queries}, cached_bytes: {cached} (by queries: {_shown(by_queries)})"


def settle(
    shipped: Limit,
    candidates: Iterable[Limit],
    passes: Sequence[dict[Cell, float]],
    to_sdpa: Callable[[Limit, Cell], bool],
) -> Limit:
    """The limit that costs least time over all measured sizes, if it beats the shipped one in every pass.

    Every size counts the same, so that one wrong measurement moves nothing far.

    Args:
        shipped: the limit that holds without measuring.
        candidates: the limits to choose from, of equal ones the first.
        passes: by size, SDPA's time over the engine's, measured again in every pass.
        to_sdpa: whether a limit sends a size to SDPA.
    """

    def saved(limit: Limit) -> float:
        """Logarithm of the time that running the engine above the limit saves over SDPA everywhere."""
        return sum(math.log(ratio) for ratios in passes for size, ratio in ratios.items() if not to_sdpa(limit, size))

    best = max(candidates, key=saved)
    for ratios in passes:
        moved = [
            ratio if to_sdpa(shipped, size) else 1 / ratio
            for size, ratio in ratios.items()
            if to_sdpa(shipped, size) != to_sdpa(best, size)
        ]
        if not moved or geometric_mean(moved) <= GAIN:
            return shipped
    return best


def _together(passes: Sequence[dict[Cell, float]]) -> dict[Cell, float]:
    return {size: geometric_mean(ratios[size] for ratios in passes) for size in passes[0]}


def best_value(constant: Constant, seconds: float) -> tuple[int | None, str]:
    """The candidate that wins by more than 3 % twice, None where the engine's own choice stays; and a line about it."""
    from heedful.backend.native import library

    gains: dict[int, float] = {}
    for value in constant.candidates:
        try:
            library.tune(constant.name, value)
        except ValueError:  # outside of what this engine takes
            continue
        gains[value] = geometric_mean(_gains(constant, value, constant.works, seconds))
    library.tune(constant.name, 0)
    if not gains:
        return None, f"{constant.name}: no candidate within what the engine takes"
    best = max(gains, key=lambda value: gains[value])
    shown = f"gains: {_shown(gains)}"
    if gains[best] <= GAIN:
        return None, f"{constant.name}: the engine's choice stays ({shown})"
    again = list(_gains(constant, best, constant.works, 3 * seconds))
    if geometric_mean(again) <= GAIN or min(again) < 1 / GAIN:
        return None, f"{constant.name}: the engine's choice stays, {best} did not win twice ({shown})"
    if not all(_is_right(work, constant.name, best) for work in constant.works):
        return None, f"{constant.name}: the engine's choice stays, the numerical check of {best} FAILED ({shown})"
    return best, f"{constant.name}: {best}, {geometric_mean(again):.3f}× ({shown})"


def _gains(constant: Constant, value: int, works: Sequence[Work], seconds: float) -> Iterator[float]:
    """By work, the time with the engine's choice over the time with the value."""
    from heedful.backend.native import library

    for work in works:
        call = _call(work, "native")

        def with_value(value: int, call: Callable[[], object] = call) -> Callable[[], object]:
            def run() -> object:
                library.tune(constant.name, value)
                return call()

            return run

        yield interleave(with_value(0), with_value(value), seconds=seconds, max_rounds=MAX_ROUNDS).ratio
    library.tune(constant.name, 0)


def _is_right(work: Work, name: str, value: int) -> bool:
    """Whether a call with a constant at a value is within the bounds of rounding."""
    import torch

    from heedful import Causal, attention
    from heedful.backend.native import library

    q, k, v, grad_out = work.tensors()
    pattern = Causal() if work.causal else None
    library.tune(name, value)
    try:
        inputs = [tensor.requires_grad_(work.gradients) for tensor in (q, k, v)]
        out = attention(*inputs, pattern=pattern, backend="native")
        gradients = torch.autograd.grad(out, inputs, grad_out) if work.gradients else None
    finally:
        library.tune(name, 0)
    q, k, v = (tensor.detach() for tensor in inputs)
    checks = check_forward(name, q, k, v, out.detach(), pattern=pattern)
    if gradients is not None:
        checks += check_backward(name, q, k, v, grad_out, gradients, pattern=pattern)
    return all_passed(checks)


def _native_against_sdpa(work: Work, seconds: float, *, whole: bool = False) -> float:
    """SDPA's time over the engine's, both through heedful's front door."""
    calls = _call(work, "sdpa", whole=whole), _call(work, "native", whole=whole)
    return interleave(*calls, seconds=seconds, max_rounds=MAX_ROUNDS).ratio


def _call(work: Work, backend: str, *, whole: bool = False) -> Callable[[], object]:
    """A work as a call; with gradients, the backward alone, or the forward before it too if `whole`."""
    import torch

    from heedful import attention

    q, k, v, grad_out = work.tensors()
    if work.gradients:
        inputs = [tensor.requires_grad_() for tensor in (q, k, v)]

        def differentiable() -> Tensor:
            return attention(*inputs, causal=work.causal, backend=backend)

        if whole:
            return lambda: torch.autograd.grad(differentiable(), inputs, grad_out)
        out = differentiable()
        return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

    def forward() -> object:
        with torch.no_grad():
            return attention(q, k, v, causal=work.causal, backend=backend)

    return forward


def _shipped(tier: str) -> dict[str, Any]:
    """The table that holds without measuring, in the form that is stored."""
    import torch

    from heedful.backend.native.prefer import DEFAULTS

    shipped = DEFAULTS.get(tier) or {
        "few_pairs": dict.fromkeys(DTYPES, 2 * PAIRS[-1]),
        "few_pairs_gradient": dict.fromkeys(DTYPES, 2 * PAIRS[-1]),
        "few_queries": 0,
        "cached_bytes": 0,
    }
    return {
        "version": TABLE_VERSION,
        "tier": tier,
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "few_pairs": dict(shipped["few_pairs"]),
        "few_pairs_gradient": dict(shipped["few_pairs_gradient"]),
        "few_queries": shipped["few_queries"],
        "cached_bytes": shipped["cached_bytes"],
        "engine": {},
    }


def geometric_mean(values: Iterable[float]) -> float:
    """Of at least one number above 0."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _shown(ratios: dict[int, float]) -> str:
    return ", ".join(f"{size} {ratio:.2f}×" for size, ratio in ratios.items())
