"""The bench table as data: what is run, against what, and how fast it should be.

The targets are multiples of PyTorch 2.13 in the same process; `first` is what a first release must reach and `goal`
what the machine's limits allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from heedful import Pattern

Kind = Literal["forward", "backward", "training", "decode", "overhead", "memory", "training memory", "model"]
Baseline = Literal["sdpa", "flex", "onnxruntime", "openvino", "heedful on 1 thread"]
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Target:
    """What a row should reach.

    speedup: ratio to the baseline; density_speedup: ratio times the pattern's density; extra_microseconds: time above
    the baseline's; extra_mebibytes: memory above inputs and outputs, per thread.
    """

    value: float
    unit: Literal["speedup", "density_speedup", "extra_microseconds", "extra_mebibytes"] = "speedup"

    def reached(self, ratio: float, density: float, extra: float) -> bool:
        """Whether a row keeps this target; extra is in the target's own unit."""
        if self.unit.startswith("extra_"):
            return extra <= self.value
        return ratio >= (self.value / density if self.unit == "density_speedup" else self.value)

    def describe(self, density: float) -> str:
        """The target as the table shows it."""
        if self.unit == "extra_microseconds":
            return f"+{self.value:g} µs"
        if self.unit == "extra_mebibytes":
            return f"≤ {self.value:g} MiB"
        return f"{self.value / density if self.unit == 'density_speedup' else self.value:.3g}×"


@dataclass(frozen=True)
class Workload:
    """One row. kv_heads 0 means as many as heads, k_length 0 as many keys as queries."""

    kind: Kind
    pattern: str
    dtype: str
    batch: int
    heads: int
    q_length: int
    head_dim: int
    first: Target | None = None
    goal: Target | None = None
    kv_heads: int = 0
    k_length: int = 0
    baseline: Baseline = "sdpa"
    threads: int = 1
    quick: bool = True

    @property
    def name(self) -> str:
        """The row's unique name, which --only looks into."""
        return self.title if self.baseline == "sdpa" else f"{self.title} vs {self.baseline}"

    @property
    def title(self) -> str:
        """What is run, without what it is compared with."""
        shape = f"({self.batch},{self.heads},{self.q_length},{self.head_dim})"
        if self.kind == "decode":
            shape = f"q 1, heads {self.heads}/{self.key_heads}, Lk {self.key_length}, D {self.head_dim}"
        if self.kind == "model":
            shape = f"token through a 4-layer Llama, context {self.key_length}"
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return f"{self.kind} {self.pattern} {self.short_dtype} {shape}{threads}"

    @property
    def short_dtype(self) -> str:
        """fp32, bf16, fp16 or fp64."""
        return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}[self.dtype]

    @property
    def key_heads(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def key_length(self) -> int:
        """Number of keys."""
        return self.k_length or self.q_length

    def make_pattern(self) -> Pattern | None:
        """The pattern object, None for full attention."""
        return PATTERNS[self.pattern]()


def _causal() -> Pattern:
    from heedful import Causal

    return Causal()


def _window() -> Pattern:
    from heedful import SlidingWindow

    return SlidingWindow(128)


def _longformer() -> Pattern:
    from heedful import Longformer

    return Longformer(256, 16)


def _bigbird() -> Pattern:
    from heedful import BigBird

    return BigBird(block_size=64, window_blocks=3, global_blocks=2, random_blocks=3, seed=0)


PATTERNS: dict[str, Callable[[], Pattern | None]] = {
    "full": lambda: None,
    "causal": _causal,
    "window ±128": _window,
    "Longformer": _longformer,
    "BigBird": _bigbird,
}
FULL, CAUSAL, WINDOW = "full", "causal", "window ±128"
FP32, BF16, FP16 = "float32", "bfloat16", "float16"
LONG: Shape = (1, 8, 2048, 64)
LONG_128: Shape = (1, 8, 2048, 128)
SHORT: Shape = (2, 8, 512, 64)
SPARSE: Shape = (1, 4, 8192, 64)


def _row(kind: Kind, pattern: str, dtype: str, shape: Shape, first: float, goal: float) -> Workload:
    return Workload(kind, pattern, dtype, *shape, Target(first), Target(goal))


def _sparse(pattern: str) -> Workload:
    first, goal = Target(0.6, "density_speedup"), Target(0.8, "density_speedup")
    return Workload("forward", pattern, FP32, *SPARSE, first, goal)


def _decode(dtype: str, k_length: int, first: float | None, goal: float | None, threads: int = 1) -> Workload:
    shape = (1, 32, 1, 128)
    low, high = (None if speedup is None else Target(speedup) for speedup in (first, goal))
    return Workload("decode", FULL, dtype, *shape, low, high, kv_heads=8, k_length=k_length, threads=threads)


def _memory(kind: Kind) -> Workload:
    return Workload(kind, WINDOW, FP32, *SPARSE, None, Target(4, "extra_mebibytes"), quick=False)


def _scaling(kind: Kind, pattern: str, dtype: str) -> Workload:
    return Workload(kind, pattern, dtype, *LONG, Target(1.9), Target(1.95), baseline="heedful on 1 thread", threads=2)


def _peer(
    baseline: Baseline, pattern: str, dtype: str, shape: Shape, first: Target | None, goal: Target | None
) -> Workload:
    return Workload("forward", pattern, dtype, *shape, first, goal, baseline=baseline, quick=False)


def _model(context: int, first: float) -> Workload:
    shape = (1, 32, 1, 64)
    return Workload("model", CAUSAL, BF16, *shape, Target(first), kv_heads=8, k_length=context, quick=False)


TABLE: tuple[Workload, ...] = (
    _row("forward", FULL, FP32, LONG, 1.2, 1.3),
    _row("forward", FULL, FP32, LONG_128, 1.17, 1.24),
    _row("forward", CAUSAL, FP32, LONG, 1.45, 1.58),
    _row("forward", CAUSAL, FP32, SHORT, 1.9, 2.3),
    _row("forward", FULL, BF16, LONG, 2.3, 2.7),
    _row("forward", FULL, BF16, LONG_128, 2.25, 2.4),
    _row("forward", CAUSAL, BF16, LONG, 2.5, 3.2),
    _row("forward", CAUSAL, BF16, SHORT, 3.4, 5.0),
    _row("forward", FULL, FP16, LONG, 1.9, 2.1),
    _row("forward", WINDOW, FP32, SPARSE, 36, 42),
    _row("forward", WINDOW, BF16, SPARSE, 60, 75),
    _sparse("Longformer"),
    _sparse("BigBird"),
    _decode(BF16, 4096, 30, 42),
    _decode(FP16, 4096, None, None),
    _decode(FP32, 4096, 4, 7),
    _decode(BF16, 16384, 18, 27, threads=2),
    Workload("overhead", FULL, FP32, 1, 1, 8, 8, Target(2, "extra_microseconds"), Target(0, "extra_microseconds")),
    _scaling("forward", FULL, FP32),
    _scaling("forward", CAUSAL, BF16),
    _scaling("backward", FULL, FP32),
    _scaling("backward", CAUSAL, BF16),
    _row("backward", FULL, FP32, LONG, 1.2, 1.35),
    _row("backward", CAUSAL, FP32, LONG, 1.4, 1.65),
    _row("backward", FULL, BF16, LONG, 1.75, 2.0),
    _row("backward", CAUSAL, BF16, LONG, 1.9, 2.4),
    Workload("training", WINDOW, FP32, *SPARSE, Target(25), Target(40), quick=False),
    _peer("flex", WINDOW, FP32, SPARSE, Target(2), Target(2.6)),
    _peer("onnxruntime", FULL, FP32, LONG, None, None),
    _peer("openvino", FULL, FP32, LONG, None, None),
    _peer("openvino", FULL, BF16, LONG, Target(1.15), Target(1.3)),
    _peer("openvino", CAUSAL, BF16, LONG, Target(2), Target(2.5)),
    _memory("memory"),
    _memory("training memory"),
    _model(4096, 1.5),
    _model(16384, 3),
)


def select_rows(*, quick: bool, only: str | None) -> list[Workload]:
    """The rows that a run shows: all or the quick ones, and of those the ones whose name holds `only`."""
    return [row for row in TABLE if (row.quick or not quick) and (only is None or only in row.name)]
