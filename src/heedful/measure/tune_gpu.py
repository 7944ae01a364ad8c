"""Which tiles are the fastest on this machine's GPU, for what has a row of its own in the table of tiles."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from .checks import Check, all_passed
from .collect import Progress, collect
from .machine import environment
from .numerics import check_backward, check_forward
from .timing import compare_samples, take_turns
from .tune import geometric_mean

if TYPE_CHECKING:
    from torch import Tensor

    from heedful import Pattern
    from heedful.backend.triton.work import Work

# Other tiles replace the shipped ones where they save so much in both of two measurements.
GAIN = 1.03
SECONDS = 0.06
# So many of the fastest are measured again, beside the shipped tiles.
FINALISTS = 3
Numbers = tuple[int, int, int, int, bool]

_WIDE = [(128, 128, 8, (2, 3)), (128, 64, 8, (2, 3, 4)), (128, 64, 4, (2, 3)), (64, 64, 4, (2, 3, 4)),
         (64, 128, 4, (2, 3)), (128, 32, 4, (3, 4)), (64, 32, 4, (2, 3))]  # fmt: skip
FORWARD: tuple[Numbers, ...] = tuple(
    (rows, columns, warps, stages, descriptors)
    for rows, columns, warps, depths in _WIDE
    for stages, descriptors in product(depths, (True, False))
)
FEW_ROWS: tuple[Numbers, ...] = tuple(
    (16, columns, warps, stages, False) for columns, warps, stages in product((64, 128), (2, 4, 8), (2, 3, 4))
)
QUERIES: tuple[Numbers, ...] = tuple(
    (rows, columns, warps, stages, descriptors)
    for rows, columns, warps, depths in ((128, 64, 8, (2, 3)), (128, 128, 8, (1, 2)), (64, 64, 4, (2, 3)),
                                         (64, 128, 4, (2,)), (128, 32, 8, (3,)))
    for stages, descriptors in product(depths, (True, False))
)  # fmt: skip
KEYS: tuple[Numbers, ...] = tuple(
    (rows, columns, warps, stages, descriptors)
    for rows, columns, warps, depths in ((64, 128, 8, (1, 2)), (32, 128, 8, (2, 3)), (64, 64, 4, (2,)),
                                         (32, 64, 4, (3,)), (128, 128, 8, (1,)), (32, 128, 4, (2,)), (128, 64, 8, (2,)))
    for stages, descriptors in product(depths, (True, False))
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of the table of tiles, and the calls that decide it; kind is "forward", "queries" or "keys"."""

    kind: str
    name: str
    head_dim: int
    candidates: tuple[Numbers, ...]
    patterns: tuple[str, ...]
    q_length: int = 4096
    k_length: int = 4096
    group: int = 1
    batch: int = 4
    few: int = 0
    """Rows of a program's head, where they are few, as `forward_tiles` takes them."""
    dense: bool = True

    def key(self, arch: int) -> tuple[Any, ...]:
        """What the tiles are asked for by."""
        import torch

        common = arch, torch.bfloat16, self.head_dim, self.head_dim
        if self.kind == "forward":
            return (*common, self.few, 0, False, self.dense)
        return (*common, 0, False, self.kind == "keys")


ROWS = (
    Row("forward", "forward d64, full and causal", 64, FORWARD, ("full", "causal")),
    Row("forward", "forward d128, full and causal", 128, FORWARD, ("full", "causal")),
    Row("forward", "forward d256, full and causal", 256, FORWARD, ("full", "causal")),
    Row("forward", "forward d64, window", 64, FORWARD, ("window",), 16384, 16384, batch=1, dense=False),
    Row("forward", "forward d128, window", 128, FORWARD, ("window",), 16384, 16384, batch=1, dense=False),
    Row("forward", "decoding d128, groups of 4", 128, FEW_ROWS, ("full",), 1, 16384, 4, 16, 4),
    Row("queries", "gradient of queries d64", 64, QUERIES, ("full", "causal")),
    Row("queries", "gradient of queries d128", 128, QUERIES, ("full", "causal")),
    Row("keys", "gradient of keys d64", 64, KEYS, ("full", "causal")),
    Row("keys", "gradient of keys d128", 128, KEYS, ("full", "causal")),
)


def measure_tiles(progress: Progress, rows: Sequence[Row] = ROWS) -> dict[str, Any]:
    """Compile and time every candidate of every row.

    Returns:
        JSON-serialisable: environment, interrupted, table (what is stored), rates (of every candidate: the geometric
        mean of its calls' ratios to the shipped tiles), and notes, one line for each row.
    """
    from heedful.backend.triton import tuned, tuning
    from heedful.backend.triton.work import device_limits, kernels

    # What is measured against is what is shipped, here and in the processes that compile.
    os.environ["HEEDFUL_GPU_TUNING"] = "off"
    kernels()
    tuning.overrides.clear()
    _forget()
    arch = device_limits(0)[0]
    progress.begin("compiling")
    _compile_ahead(rows)
    progress.advance()
    entries: list[dict[str, Any]] = []
    rates: dict[str, dict[str, float]] = {}
    notes: list[str] = []

    def run(row: Row) -> None:
        best, found, note = _best(row, arch)
        rates[row.name] = {str(numbers): ratio for numbers, ratio in found.items()}
        notes.append(f"{row.name}: {note}")
        if best is not None:
            entries.append({"of": tuned.encoded_key(row.key(arch)), "tiles": list(best)})

    _, interrupted = collect(rows, run, progress, lambda row: row.name)
    table = {"version": tuned.TABLE_VERSION, **tuned.identity(), "entries": entries}
    return {
        "environment": environment(),
        "interrupted": interrupted,
        "table": table,
        "rates": rates,
        "notes": notes,
    }


def _best(row: Row, arch: int) -> tuple[Numbers | None, dict[Numbers, float], str]:
    """The tiles that win twice, None where the shipped ones stay; every candidate's ratio; and a line about it."""
    shipped = [_work(row, pattern) for pattern in row.patterns]
    rates: dict[Numbers, float] = {}
    for numbers in row.candidates:
        ratio = _ratio(row, arch, numbers, shipped)
        if ratio is not None:
            rates[numbers] = ratio
    rates = dict(sorted(rates.items(), key=lambda item: -item[1]))
    for numbers, first in list(rates.items())[:FINALISTS]:
        again = _ratio(row, arch, numbers, shipped)
        if again is None or min(first, again) < GAIN:
            continue
        with _tiles(row.key(arch), numbers):
            right = all_passed([check for pattern in row.patterns for check in _checks(row, pattern)])
        if right:
            return numbers, rates, f"{numbers} is {min(first, again):.2f} times as fast as the shipped tiles"
    best = next(iter(rates.items()), None)
    beside = "" if best is None else f"; the best of the others, {best[0]}, has {best[1]:.2f} of their rate"
    return None, rates, f"the shipped tiles stay{beside}"


def _ratio(row: Row, arch: int, numbers: Numbers, shipped: Sequence[Work]) -> float | None:
    """How many times as fast as the shipped tiles, the geometric mean over the calls; None where they cannot run."""
    import torch

    from .gpu import sampler

    sample = sampler(torch.device("cuda"))
    ratios = []
    for pattern, theirs in zip(row.patterns, shipped, strict=True):
        try:
            with _tiles(row.key(arch), numbers):
                ours = _work(row, pattern)
            samples = take_turns([theirs.run, ours.run], seconds=SECONDS, sample=sample)
        except Exception:
            # Too much shared memory, or more than the compiler can do.
            return None
        ratios.append(compare_samples(*samples).ratio)
    return geometric_mean(ratios)


@contextmanager
def _tiles(key: tuple[Any, ...], numbers: Numbers) -> Iterator[None]:
    """The table of tiles with other ones in a row."""
    from heedful.backend.triton import tuning

    tuning.overrides[key] = tuning.Tiles(*numbers)
    _forget()
    try:
        yield
    finally:
        del tuning.overrides[key]
        _forget()


def _forget() -> None:
    """What was made of the table."""
    from heedful import clear_caches
    from heedful.backend.triton import gradients, launch, tuning

    caches: list[Any] = [tuning.forward_tiles, tuning.backward_tiles, launch._forward, gradients._backward]
    for cache in caches:
        cache.cache_clear()
    clear_caches()


def _pattern(name: str) -> Pattern:
    from heedful import Causal, Full, SlidingWindow

    return {"full": Full(), "causal": Causal(), "window": SlidingWindow(1023, 0)}[name]


def _inputs(row: Row) -> list[Tensor]:
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    heads = max(row.group, 2048 // row.head_dim)
    shapes = (heads, row.q_length), (heads // row.group, row.k_length), (heads // row.group, row.k_length)
    return [
        torch.randn(row.batch, *shape, row.head_dim, device="cuda", generator=generator).to(torch.bfloat16)
        for shape in shapes
    ]


def _work(row: Row, name: str) -> Work:
    """The kernel of a row's call, with the tiles that the table has now."""
    import torch

    from heedful.backend.triton import gradients, launch

    q, k, v = _inputs(row)
    code, scale = _pattern(name).schedule.encode(), row.head_dim**-0.5
    forward = launch.forward_work(q, k, v, (), code, scale, False)
    if row.kind == "forward":
        return forward
    forward.run()
    out, lse = forward.results
    work = gradients.backward_work(
        torch.randn_like(out), q, k, v, out, lse, (), code, scale, None, None, 0.0, 0.0, None, None, None, False, False
    )
    return work._replace(launches=(work.launches[{"queries": 1, "keys": 2}[row.kind]],))


def _checks(row: Row, name: str) -> list[Check]:
    import torch

    from heedful import attention

    q, k, v = (tensor.requires_grad_(row.kind != "forward") for tensor in _inputs(row))
    pattern = _pattern(name)
    out = attention(q, k, v, pattern=pattern, backend="triton")
    if row.kind == "forward":
        return check_forward(row.name, q, k, v, out, pattern=pattern)
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    with torch.no_grad():
        return check_backward(row.name, q, k, v, grad, gradients, pattern=pattern)


def _compile_ahead(rows: Sequence[Row]) -> None:
    """Side by side, since compiling is most of it; what is compiled is found on disk."""
    tasks = [(row, numbers) for row in rows for numbers in row.candidates]
    count = max(1, min(14, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, tasks, chunksize=4))


def _compile(task: tuple[Row, Numbers]) -> None:
    from heedful.backend.triton.work import device_limits

    row, numbers = task
    small = replace(row, q_length=min(row.q_length, 512), batch=1) if row.kind != "forward" else replace(row, batch=1)
    try:
        with _tiles(row.key(device_limits(0)[0]), numbers):
            for pattern in row.patterns:
                _work(small, pattern).run()
    except Exception:
        return
