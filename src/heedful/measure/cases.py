"""Random attention calls, reproducible one by one: shapes, types, patterns and features that SDPA can express."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from heedful import Pattern

HEAD_DIMS = (32, 40, 48, 64, 64, 64, 72, 80, 96, 112, 128, 128, 160, 192, 256)
GROUPS = (1, 1, 1, 2, 4, 8)
MAX_HEADS = 32
LONGEST = 4096
# SDPA's dense arithmetic of one call is kept below this, so that hundreds of cases fit into minutes. Its half
# precision is the slowest: without instructions for it some shapes run at 0.4 GFLOP/s.
WORK_LIMIT = {"float32": 6e9, "bfloat16": 6e9, "float64": 3e9, "float16": 1.5e9}
DTYPE_WEIGHTS = {"float32": 8, "bfloat16": 6, "float16": 4, "float64": 2}


class Tensors(NamedTuple):
    """The tensors of a case: query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), bias or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Case:
    """One call. family names the pattern's kind, seed draws its parameters and the tensors."""

    index: int
    seed: int
    family: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    q_length: int
    k_length: int
    head_dim: int
    value_dim: int
    gradients: bool
    bias: bool

    @property
    def dense_flops(self) -> float:
        """Floating-point operations of all pairs: two products forward, five more for gradients."""
        pairs = self.batch * self.heads * self.q_length * self.k_length
        return 2.0 * pairs * (self.head_dim + self.value_dim) * (3.5 if self.gradients else 1.0)

    @property
    def name(self) -> str:
        """The case in one line."""
        heads = f"{self.heads}/{self.kv_heads}" if self.heads != self.kv_heads else str(self.heads)
        dim = str(self.head_dim) if self.head_dim == self.value_dim else f"{self.head_dim}|{self.value_dim}"
        lengths = f"{self.q_length}×{self.k_length}"
        return (
            f"#{self.index} {self.family} {self.dtype} B {self.batch} H {heads} {lengths} D {dim}"
            f"{' bias' if self.bias else ''}{' fwd+bwd' if self.gradients else ''}"
        )

    def make_pattern(self) -> Pattern | None:
        """The pattern; None is every pair."""
        return FAMILIES[self.family].build(random.Random(f"pattern {self.seed}"), self)

    def make_tensors(self) -> Tensors:
        """Normally distributed tensors; query, key and value ask for gradients where the case does."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)

        def draw(heads: int, length: int, dim: int) -> Tensor:
            tensor = torch.randn(self.batch, heads, length, dim, generator=generator)
            return tensor.to(dtype).requires_grad_(self.gradients)

        query = draw(self.heads, self.q_length, self.head_dim)
        key = draw(self.kv_heads, self.k_length, self.head_dim)
        value = draw(self.kv_heads, self.k_length, self.value_dim)
        return Tensors(query, key, value, self._make_bias(generator, dtype) if self.bias else None)

    def _make_bias(self, generator: Generator, dtype: Any) -> Tensor:
        import torch

        # One of the shapes that models use: positions by head, positions alone, keys alone.
        rng = random.Random(f"bias {self.seed}")
        shapes = [(1, 1, self.q_length, self.k_length), (self.batch, 1, 1, self.k_length)]
        if self.heads * self.q_length * self.k_length <= LONGEST**2:
            shapes.append((1, self.heads, self.q_length, self.k_length))
        return torch.randn(rng.choice(shapes), generator=generator).to(dtype)

    def to_json(self) -> dict[str, Any]:
        """A plain dict of the fields and the name."""
        return {"name": self.name, **asdict(self)}


class Family(NamedTuple):
    """A kind of pattern: how often it is drawn, how one is built, whether it takes as many queries as keys, and the
    group that charts show it in."""

    weight: int
    build: Callable[[random.Random, Case], Pattern | None]
    group: str
    square: bool = False


def draw_cases(count: int, seed: int = 0) -> Iterator[Case]:
    """The first `count` cases of a seed; the first n of more cases are the n cases."""
    for index in range(count):
        yield _draw(index, seed)


def _draw(index: int, seed: int) -> Case:
    rng = random.Random(f"{seed} {index}")
    family = _weighted(rng, {name: family.weight for name, family in FAMILIES.items()})
    dtype = _weighted(rng, DTYPE_WEIGHTS)
    kv_heads = rng.choice((1, 2, 4, 8, 12))
    group = rng.choice([group for group in GROUPS if group * kv_heads <= MAX_HEADS])
    q_length, k_length = _lengths(rng, FAMILIES[family].square)
    head_dim = rng.choice(HEAD_DIMS)
    value_dim = rng.choice(HEAD_DIMS) if rng.random() < 0.12 else head_dim
    gradients, bias = rng.random() < 1 / 3, rng.random() < 0.12
    batch = rng.randint(1, 4)
    tensor_seed = rng.getrandbits(31)

    def case() -> Case:
        heads = kv_heads * group
        return Case(
            index, tensor_seed, family, dtype, batch, heads, kv_heads, q_length, k_length, head_dim, value_dim,
            gradients, bias,
        )  # fmt: skip

    while case().dense_flops > WORK_LIMIT[dtype]:
        if batch > 1:
            batch -= 1
        elif kv_heads > 1:
            kv_heads //= 2
        elif group > 1:
            group //= 2
        else:
            q_length, k_length = -(-q_length * 3 // 4), -(-k_length * 3 // 4)
    return case()


def _weighted(rng: random.Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _lengths(rng: random.Random, square: bool) -> tuple[int, int]:
    kind = "square" if square else rng.choices(("square", "decode", "cross"), (5, 3, 2))[0]
    if kind == "square":
        length = _log_uniform(rng, 1, LONGEST)
        return length, length
    if kind == "decode":
        return rng.choice((1, 1, 1, 2, 4, 7, 16)), _log_uniform(rng, 16, LONGEST)
    return _log_uniform(rng, 1, LONGEST), _log_uniform(rng, 1, LONGEST)


def _window(rng: random.Random, case: Case) -> Pattern:
    from heedful import SlidingWindow

    left = _log_uniform(rng, 1, max(2, case.k_length // 2))
    return SlidingWindow(left, rng.choice((left, left, 0)))


def _causal_window(rng: random.Random, case: Case) -> Pattern:
    from heedful import SlidingWindow

    return SlidingWindow(_log_uniform(rng, 1, max(2, case.k_length // 2)), 0)


def _causal(rng: random.Random, case: Case) -> Pattern:
    from heedful import Causal

    return Causal()


def _top_left(rng: random.Random, case: Case) -> Pattern:
    from heedful import Causal

    return Causal(0)


def _longformer(rng: random.Random, case: Case) -> Pattern:
    from heedful import Longformer

    return Longformer(_log_uniform(rng, 1, max(2, case.k_length // 4)), rng.randint(1, 16))


def _bigbird(rng: random.Random, case: Case) -> Pattern:
    from heedful import BigBird

    size = rng.choice((16, 32, 64, 64, 128))
    return BigBird(size, rng.choice((1, 3, 5)), rng.randint(0, 2), rng.randint(0, 4), seed=case.seed)


def _block_sparse(rng: random.Random, case: Case) -> Pattern:
    import torch

    from heedful import BlockSparse

    size = rng.choice((16, 32, 64, 64, 128))
    shape = (1, rng.choice((1, case.heads)), -(-case.q_length // size), -(-case.k_length // size))
    generator = torch.Generator().manual_seed(case.seed)
    return BlockSparse(torch.rand(shape, generator=generator) < rng.choice((0.05, 0.2, 0.5, 0.9)), size)


def _documents(rng: random.Random, case: Case) -> Pattern:
    import torch

    from heedful import Documents, Full

    count = rng.randint(1, 12)
    cuts = sorted(rng.randint(0, case.q_length) for _ in range(count - 1))
    within = rng.choice((Full(), _causal(rng, case), _causal_window(rng, case)))
    return Documents(torch.tensor([0, *cuts, case.q_length], dtype=torch.int32), within=within)


def _padding(rng: random.Random, case: Case) -> Pattern:
    import torch

    from heedful import Padding

    lengths = torch.tensor([rng.randint(1, case.k_length) for _ in range(case.batch)], dtype=torch.int32)
    return Padding(0, lengths) if rng.random() < 0.5 else Padding(case.k_length - lengths, case.k_length)


def _mask(rng: random.Random, case: Case) -> Pattern:
    import torch

    from heedful import Mask

    generator = torch.Generator().manual_seed(case.seed)
    shape = (1, 1, case.q_length, case.k_length)
    return Mask(torch.rand(shape, generator=generator) < rng.choice((0.01, 0.1, 0.5, 0.9)))


def _dilated(rng: random.Random, case: Case) -> Pattern:
    from heedful import Dilated

    step = rng.randint(2, 8)
    return Dilated(_log_uniform(rng, 1, max(2, case.k_length // (2 * step))), step)


def _chunked(rng: random.Random, case: Case) -> Pattern:
    from heedful import Chunked

    return Chunked(_log_uniform(rng, 4, max(8, case.k_length)))


def _prefix_causal(rng: random.Random, case: Case) -> Pattern:
    from heedful import Causal, Prefix

    return Prefix(rng.randint(1, case.k_length)) | Causal()


def _sinks_and_window(rng: random.Random, case: Case) -> Pattern:
    from heedful import Causal, Global

    return (_window(rng, case) | Global(rng.randint(1, 8))) & Causal()


def _padded_causal(rng: random.Random, case: Case) -> Pattern:
    return _padding(rng, case) & _causal(rng, case)


def _chunked_causal(rng: random.Random, case: Case) -> Pattern:
    return _chunked(rng, case) & _causal(rng, case)


def _dilated_or_near(rng: random.Random, case: Case) -> Pattern:
    return _dilated(rng, case) | _window(rng, case)


def _causal_blocks(rng: random.Random, case: Case) -> Pattern:
    return _block_sparse(rng, case) & _causal(rng, case)


FAMILIES: dict[str, Family] = {
    "full": Family(20, lambda rng, case: None, "full"),
    "causal": Family(20, _causal, "causal"),
    "causal top-left": Family(3, _top_left, "causal"),
    "window": Family(8, _window, "window"),
    "causal window": Family(8, _causal_window, "window"),
    "Longformer": Family(5, _longformer, "global tokens"),
    "prefix | causal": Family(4, _prefix_causal, "global tokens"),
    "BigBird": Family(5, _bigbird, "blocks, masks"),
    "block sparse": Family(6, _block_sparse, "blocks, masks"),
    "documents": Family(6, _documents, "documents, padding", square=True),
    "padding": Family(6, _padding, "documents, padding"),
    "mask": Family(6, _mask, "blocks, masks"),
    "dilated": Family(5, _dilated, "dilated, chunked"),
    "chunked": Family(5, _chunked, "dilated, chunked"),
    "(window | global) & causal": Family(3, _sinks_and_window, "combinations"),
    "padding & causal": Family(5, _padded_causal, "combinations"),
    "chunked & causal": Family(3, _chunked_causal, "combinations"),
    "dilated | window": Family(3, _dilated_or_near, "combinations"),
    "block sparse & causal": Family(3, _causal_blocks, "combinations"),
}
