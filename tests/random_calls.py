"""Random calls of `heedful.attention` over its whole argument space, each of which prints as one line of shell."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable

import torch
from comparison import OUTPUTS, Compared, check
from hypothesis import strategies as st
from inputs import DTYPES, MEMORY, tensor
from pattern_cases import Sizes, bigbird, block_sparse, compositions, documents, mask, positional
from torch import Tensor

from heedful import Pattern
from heedful.arguments import resolve_pattern
from heedful.patterns.base import And, Or

Draw = Callable[[st.SearchStrategy], object]

LENGTHS = (0, 1, 1, 2, 3, 3, 5, 8, 8, 13, 13, 17, 33, 70, 150)
DIMS = (1, 2, 3, 7, 8, 8, 16, 16, 33, 64)


@dataclasses.dataclass(frozen=True)
class Example:
    """A call by what makes its tensors; `check` makes them, runs it and compares everything with the reference.

    bias is the shape of one, in q's dtype or float32, with `excluded` of it -inf; slopes "H" or "BH" is their shape.
    With `poison`, queries without a key are NaN, and keys and values that no query of their batch item attends to.
    """

    q_length: int = 1
    k_length: int = 1
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    value_dim: int = 1
    dtype: torch.dtype = torch.float32
    memory: tuple[str, str, str] = ("contiguous",) * 3
    layout: str = "bhld"
    size: float = 1.0
    seed: int = 0
    pattern: Pattern | None = None
    causal: bool = False
    scale: float | None = None
    softcap: float | None = None
    bias: tuple[int, ...] | None = None
    excluded: float = 0.0
    slopes: str = ""
    sinks: bool = False
    wide: bool = False
    dropout_p: float = 0.0
    poison: bool = False
    weights: bool | str = False
    through: tuple[str, ...] = ()
    backend: str | None = None

    def check(self) -> Compared:
        """Raises AssertionError where a result is out of bounds."""
        torch.manual_seed(self.seed)
        sizes = (
            (self.batch, self.heads, self.q_length, self.head_dim),
            (self.batch, self.kv_heads, self.k_length, self.head_dim),
            (self.batch, self.kv_heads, self.k_length, self.value_dim),
        )
        q, k, v = (tensor(shape, self.dtype, memory) for shape, memory in zip(sizes, self.memory, strict=True))
        q = q if self.size == 1.0 else (q.double() * self.size).to(self.dtype)
        options: dict[str, object] = {"pattern": self.pattern, "causal": self.causal}
        kind = torch.float32 if self.wide else self.dtype
        if self.bias is not None:
            values = torch.randn(self.bias).masked_fill(torch.rand(self.bias) < self.excluded, -math.inf)
            options["bias"] = values.to(kind)
        if self.slopes:
            options["alibi_slopes"] = torch.rand((self.batch, self.heads)[2 - len(self.slopes) :]).to(kind)
        if self.sinks:
            options["sinks"] = torch.randn(self.heads).to(kind)
        if self.poison:
            seen = self._seen(options)
            unused = ~seen.any(2).any(1)[:, None, :, None]
            q, k, v = (
                t.masked_fill(where, math.nan)
                for t, where in ((q, ~seen.any(3, keepdim=True)), (k, unused), (v, unused))
            )
        return check(
            q, k, v, **options, scale=self.scale, softcap=self.softcap, dropout_p=self.dropout_p, layout=self.layout,
            weights=self.weights, through=self.through, backend=self.backend,
        )  # fmt: skip

    def _seen(self, options: dict[str, object]) -> Tensor:
        """Which pairs count, (B, H, Lq, Lk)."""
        seen = resolve_pattern(self.pattern, self.causal).dense(self.q_length, self.k_length)
        if "bias" in options:
            seen = seen & (options["bias"] != -math.inf)
        return seen.expand(self.batch, self.heads, -1, -1)

    def __repr__(self) -> str:
        differing = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"Example({', '.join(f'{f.name}={spelled(getattr(self, f.name))}' for f in differing)})"

    @property
    def line(self) -> str:
        """A shell command that runs this example alone."""
        code = f"import torch; from heedful import *; from random_calls import Example; {self!r}.check()"
        return f"PYTHONPATH=tests:tests/patterns .venv/bin/python -c {shlex.quote(code)}"


def spelled(value: object) -> str:
    """Source text of an argument, a pattern's tensors with all their elements."""
    if isinstance(value, Tensor):
        return f"torch.tensor({value.tolist()}, dtype={value.dtype}).reshape({tuple(value.shape)})"
    if isinstance(value, (And, Or)):
        return f" {'&' if isinstance(value, And) else '|'} ".join(f"({spelled(part)})" for part in value.parts)
    if isinstance(value, Pattern):
        return f"{type(value).__name__}({', '.join(spelled(argument) for argument in value.arguments)})"
    return repr(value)


@st.composite
def examples(draw: Draw) -> Example:
    """Mostly tiny calls: a fault that needs a large one is the work of tests with chosen sizes."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    kv_heads, group = pick(1, 1, 2, 3), pick(1, 1, 2, 3, 8)
    s = Sizes(pick(1, 1, 2, 3), kv_heads * group, pick(*LENGTHS), pick(*LENGTHS))
    leaves = st.one_of(*positional(s), documents(s), bigbird(s), block_sparse(s), mask(s))
    pattern = draw(compositions(leaves, most=3))[0] if pick(True, True, False) else None
    head_dim = pick(*DIMS)
    featured = pick(True, True, False)
    chosen = {name: featured and pick(False, False, True) for name in ("softcap", "bias", "slopes", "sinks", "dropout")}
    bias = tuple(
        size if pick(True, False) else 1 for size in (s.batch, s.heads, s.q_length, s.k_length)
    )[pick(0, 0, 1, 2, 3) if s.batch == 1 else 0 :]  # fmt: skip
    through = tuple(name for name in OUTPUTS if pick(True, False)) if pick(True, False) else ()
    return Example(
        q_length=s.q_length,
        k_length=s.k_length,
        batch=s.batch,
        heads=s.heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=pick(head_dim, head_dim, *DIMS),
        dtype=pick(*DTYPES),
        memory=tuple(pick("contiguous", *MEMORY) for _ in range(3)) if pick(True, False) else ("contiguous",) * 3,
        layout=pick("bhld", "bhld", "blhd"),
        size=pick(1.0, 1.0, 1.0, 1e-3, 30.0),
        seed=draw(st.integers(0, 999)),
        pattern=pattern,
        causal=pick(False, False, True),
        scale=pick(None, None, 0.3, -1.0, 0.0),
        softcap=pick(0.5, 5.0, 1e4) if chosen["softcap"] else None,
        bias=bias if chosen["bias"] else None,
        excluded=pick(0.0, 0.1, 0.9) if chosen["bias"] else 0.0,
        slopes=pick("H", "BH") if chosen["slopes"] else "",
        sinks=chosen["sinks"],
        wide=pick(True, False),
        dropout_p=pick(0.1, 0.5, 0.9) if chosen["dropout"] else 0.0,
        poison=pick(False, True),
        weights=pick(False, False, True, "sparse") if "weights" not in through else pick(True, True, "sparse"),
        through=through,
        backend=pick("native", "native", None),
    )
