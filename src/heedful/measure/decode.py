"""How fast a few queries read a long cache: bytes a second, as a share of what this machine can read or compute."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from .checks import Check, all_passed
from .collect import Progress, collect
from .machine import caches, environment, last_level_cache_bytes
from .numerics import check_forward
from .peaks import measure_peaks
from .sdpa import best_sdpa
from .timing import compare_samples, pinned_threads, rotation, take_turns

if TYPE_CHECKING:
    from torch import Tensor

    from heedful import KVCache

DTYPES = ("bfloat16", "float16", "float32")
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
HEADS = ((32, 8), (32, 32), (8, 1))
CASE_SECONDS = 1.0
BLOCK_SIZE = 64
# Keys and values of one case, held up to three times: as tensors, in a contiguous and in a paged cache.
BYTES_LIMIT = 1 << 30
# A cache grows from so much below the length to as much above it, and is cropped back then, as SHARE of the length.
SLACK_SHARE = 32
# What stays in the second-level cache, as shares of it: the time between the two is arithmetic and no overhead.
RESIDENT_SHARES = (0.15, 0.6)
RESIDENT_SECONDS = 0.3
BANDWIDTH_TRIES = 3
WAYS = ("tensors", "contiguous cache", "paged cache")


@dataclass(frozen=True)
class Shape:
    """One decode: q_length queries of each batch item against k_length keys, the last at the last position."""

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    k_length: int
    batch: int = 1
    q_length: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that a call reads."""
        return 2 * self.batch * self.kv_heads * self.k_length * self.head_dim * self.itemsize

    @property
    def name(self) -> str:
        """The shape in one line."""
        return (
            f"{self.dtype} B {self.batch} q {self.q_length} H {self.heads}/{self.kv_heads} Lk {self.k_length} "
            f"D {self.head_dim}"
        )


def shapes(*, full: bool) -> list[Shape]:
    """The table's shapes: every combination, or each length for the commonest shape and each variation of that."""
    if full:
        grid = product(DTYPES, HEADS, (64, 128), LENGTHS, (1, 8), (1, 4, 16))
        every = (Shape(dtype, *heads, dim, keys, batch, q) for dtype, heads, dim, keys, batch, q in grid)
        return [shape for shape in every if shape.bytes <= BYTES_LIMIT]
    found = []
    for dtype in DTYPES:
        found += [Shape(dtype, 32, 8, 128, length) for length in LENGTHS]
        base = Shape(dtype, 32, 8, 128, 4096)
        found += [
            replace(base, heads=32, kv_heads=32),
            replace(base, heads=8, kv_heads=1),
            replace(base, head_dim=64),
            replace(base, batch=8),
            replace(base, q_length=4),
            replace(base, q_length=16),
        ]
    return found


def measure_decode(
    chosen: Sequence[Shape], *, threads: int, command: str, progress: Progress, seconds: float = CASE_SECONDS
) -> dict[str, Any]:
    """Check and time every shape.

    Returns:
        JSON-serialisable: schema, mode, command, environment, threads, read_bandwidth (bytes/s, None without the
        engine), interrupted and rows.
    """
    progress.begin("measuring memory bandwidth")
    bandwidth = _bandwidth(threads)
    progress.advance()
    resident: dict[tuple[Shape, str | None], float] = {}

    def run(shape: Shape) -> dict[str, Any]:
        backend = chosen_backend(shape)
        # What the arithmetic can do depends on the heads of a group, but not on how many groups or keys there are.
        group = replace(shape, batch=1, heads=shape.heads // shape.kv_heads, kv_heads=1, k_length=1)
        if (group, backend) not in resident:
            resident[group, backend] = resident_rate(shape, threads, backend)
        return run_shape(shape, seconds=seconds, bandwidth=bandwidth, resident=resident[group, backend])

    import torch

    with pinned_threads(threads), torch.no_grad():
        done, interrupted = collect(chosen, run, progress, lambda shape: shape.name)
    return {
        "schema": 1,
        "mode": "decode",
        "command": command,
        "environment": environment(),
        "threads": threads,
        "read_bandwidth": bandwidth,
        "interrupted": interrupted,
        "rows": done,
    }


def _bandwidth(threads: int) -> float | None:
    """Bytes a second that so many cores read at best: a ceiling, which a disturbed measurement would lower."""
    found = [measure_peaks((threads,)) for _ in range(BANDWIDTH_TRIES)]
    return max((peaks.read_bandwidth[threads] for peaks in found if peaks is not None), default=None)


def run_shape(shape: Shape, *, seconds: float, bandwidth: float | None, resident: float) -> dict[str, Any]:
    """Check and time one shape in every way, all turn by turn with SDPA over plain tensors."""
    import heedful

    pattern = heedful.Causal()
    query, contexts = _draw(shape)
    key, value = contexts[0]
    peer = best_sdpa(pattern, query, key, value)
    sides: list[Callable[[], object]] = [rotation(lambda k, v: peer.call(query, k, v), contexts)]
    theirs = peer.call(query, key, value)
    checks: list[Check] = []
    for way in WAYS:
        call, out, (all_keys, all_values) = _side(way, shape, query, contexts)
        beside = theirs if way == "tensors" else None
        checks += check_forward(
            f"{shape.name}, {way}", query, all_keys, all_values, out, pattern=pattern, sdpa_out=beside
        )
        sides.append(call)
    limit = resident if bandwidth is None else min(bandwidth, resident)
    row = asdict(shape) | {
        "name": shape.name,
        "bytes": shape.bytes,
        "sdpa": peer.name,
        "backend": chosen_backend(shape),
        "resident_rate": resident,
        "limit": limit,
        "checks": [check.to_json() for check in checks],
        "ways": None,
    }
    if not all_passed(checks):
        return row
    samples = take_turns(sides, seconds=seconds)
    ways = {}
    for way, ours in zip(WAYS, samples[1:], strict=True):
        timing = compare_samples(samples[0], ours)
        rate = shape.bytes / timing.candidate_seconds
        ways[way] = timing.to_json() | {"rate": rate, "share": rate / limit}
    sdpa_rate = shape.bytes / statistics.median(samples[0])
    return row | {"ways": ways, "sdpa_rate": sdpa_rate}


def chosen_backend(shape: Shape) -> str | None:
    """What heedful runs a shape on."""
    import torch

    import heedful

    dtype = getattr(torch, shape.dtype)
    query = torch.empty(shape.batch, shape.heads, shape.q_length, shape.head_dim, dtype=dtype)
    key = torch.empty(shape.batch, shape.kv_heads, shape.k_length, shape.head_dim, dtype=dtype)
    return heedful.explain(query, key, key, causal=True).backend


def resident_rate(shape: Shape, threads: int, backend: str | None) -> float:
    """Bytes a second of keys and values that lie in the second-level cache: the speed of the arithmetic alone.

    One core and one key head with its query heads, times the threads, on the backend that the shape runs on; from the
    difference between a longer and a shorter call, so that what a call costs at all is left out.
    """
    import torch

    import heedful

    size = max((int(c["bytes"]) for c in caches() if c["level"] == 2), default=1 << 20)
    one = replace(shape, batch=1, heads=shape.heads // shape.kv_heads, kv_heads=1)
    a_key = replace(one, k_length=1).bytes
    lengths = [max(share * size // a_key, (turn + 1) * one.q_length) for turn, share in enumerate(RESIDENT_SHARES)]
    sides = []
    for length in map(int, lengths):
        query, ((key, value), *_) = _draw(replace(one, k_length=length), sets=1)
        sides.append(lambda q=query, k=key, v=value: heedful.attention(q, k, v, causal=True, backend=backend))
    with pinned_threads(1), torch.no_grad():
        short, long = (statistics.median(times) for times in take_turns(sides, seconds=RESIDENT_SECONDS))
    return threads * a_key * (int(lengths[1]) - int(lengths[0])) / max(long - short, 1e-9)


def _draw(shape: Shape, sets: int | None = None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A query, and so many keys and values that none is found in the processor's caches when its turn comes; or as
    many as asked for."""
    import torch

    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(shape.batch, heads, length, shape.head_dim, generator=generator).to(dtype)

    query = draw(shape.heads, shape.q_length)
    key, value = draw(shape.kv_heads, shape.k_length), draw(shape.kv_heads, shape.k_length)
    if sets is None:
        wanted = 1 + math.ceil(2 * last_level_cache_bytes() / shape.bytes)
        sets = max(2, min(wanted, BYTES_LIMIT // shape.bytes))
    return query, [(key.roll(index, 2), value.roll(index, 2)) for index in range(sets)]


Held = tuple["Tensor", "Tensor"]


def _side(way: str, shape: Shape, query: Tensor, contexts: list[Held]) -> tuple[Callable[[], object], Tensor, Held]:
    """A way to decode as a call without arguments, its output once, and the keys and values behind that output."""
    import torch

    from heedful import KVCache, attention

    if way == "tensors":
        out = attention(query, *contexts[0], causal=True)
        return rotation(lambda k, v: attention(query, k, v, causal=True), contexts), out, contexts[0]
    # Every call adds its own positions, as decoding does; cropping back is rare, and lengths are right on average.
    new = shape.q_length
    slack = max(2 * new, shape.k_length // SLACK_SHARE)
    base, top = shape.k_length - slack // 2, shape.k_length + slack // 2
    caches_of = []
    for key, value in contexts:
        cache = KVCache(capacity=top + new) if way == "contiguous cache" else KVCache(block_size=BLOCK_SIZE)
        cache.append(key[:, :, :base], value[:, :, :base])
        caches_of.append((cache,))
    k_new, v_new = contexts[0][0][:, :, :new].clone(), contexts[0][1][:, :, :new].clone()

    def step(cache: KVCache) -> Tensor:
        if len(cache) + new > top:
            cache.crop(base)
        return attention(query, k_new, v_new, cache=cache, causal=True)

    out = step(caches_of[0][0])
    key, value = contexts[0]
    held = torch.cat((key[:, :, :base], k_new), 2), torch.cat((value[:, :, :base], v_new), 2)
    return rotation(step, caches_of), out, held
