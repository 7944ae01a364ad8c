"""The components: parameters and signature of each, the same at every level. What computes is the level's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from heedful.errors import wrong_value
from heedful.levels.base import Component, attention_flops, check_width, projection_flops
from heedful.levels.ladder import loaded
from heedful.levels.operations import LayerCache
from heedful.patterns.arguments import integer

ACTIVATIONS = ("gelu", "swiglu")


class Attention(Component):
    """Scaled dot-product attention: softmax(scale · q kᵀ) v.

    Args:
        causal: whether a query sees no later key; the last query meets the last key.
        scale: 1/sqrt(D) if None.
    """

    component = "attention"
    attends = True

    def __init__(self, *, causal: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.causal = bool(causal)
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, Lq, D) for q of that shape and k, v of (B, H, Lk, D).

        Raises:
            ValueError: the shapes do not fit, or a causal call has fewer keys than queries.
        """
        if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
            got = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
            raise wrong_value("q, k, v", got, "(B, H, Lq, D), (B, H, Lk, D) and (B, H, Lk, D)")
        if self.causal and q.shape[2] > k.shape[2]:
            raise wrong_value("q", f"length {q.shape[2]}", f"at most k's length, {k.shape[2]}, with causal=True")
        scale = 1 / math.sqrt(q.shape[3]) if self.scale is None else self.scale
        return self._operations(q).attention(q, k, v, self.causal, scale)

    def flops(self, *shapes: tuple[int, ...]) -> tuple[float, float]:
        return attention_flops(shapes[0], shapes[min(1, len(shapes) - 1)][2], self.causal)


class LayerNorm(Component):
    """Layer normalisation over the last dimension, with the parameters of `torch.nn.LayerNorm`."""

    component = "layer_norm"

    def __init__(self, dim: int = 512, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim = integer("dim", dim, 1)
        self.eps = float(eps)
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) of x's shape."""
        check_width(x, self.dim)
        return self._operations(x).layer_norm(x, self.weight, self.bias, self.eps)


class LayerNormGELU(LayerNorm):
    """gelu(layer_norm(x)), with the parameters of `torch.nn.LayerNorm`."""

    component = "layer_norm_gelu"

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) of x's shape."""
        check_width(x, self.dim)
        return self._operations(x).layer_norm_gelu(x, self.weight, self.bias, self.eps)


class FeedForward(Component):
    """Two projections with an activation between them.

    Args:
        dim: width of input and output.
        hidden: width between; None is 4 · dim.
        activation: "gelu"; or "swiglu", whose first projection makes a gate and what it gates, side by side.
        bias: whether the projections have one.
    """

    component = "feed_forward"

    def __init__(
        self, dim: int = 512, hidden: int | None = None, *, activation: str = "gelu", bias: bool = True
    ) -> None:
        super().__init__()
        self.dim = integer("dim", dim, 1)
        self.hidden = 4 * dim if hidden is None else integer("hidden", hidden, 1)
        if activation not in ACTIVATIONS:
            raise wrong_value("activation", repr(activation), "'gelu' or 'swiglu'")
        self.activation = activation
        self.up = nn.Linear(dim, self.hidden * (2 if activation == "swiglu" else 1), bias=bias)
        self.down = nn.Linear(self.hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) of x's shape."""
        check_width(x, self.dim)
        operations = self._operations(x)
        activate = operations.gelu if self.activation == "gelu" else operations.swiglu
        return self.down(activate(self.up(x)))  # type: ignore[no-any-return]

    def flops(self, *shapes: tuple[int, ...]) -> tuple[float, float]:
        forward = projection_flops(self, math.prod(shapes[0][:-1]))
        return forward, 2 * forward


class MultiHeadAttention(Component):
    """Self-attention of several heads, queries and keys turned by their position (RoPE).

    Args:
        dim: width of input and output.
        heads: number of heads; divides dim.
        causal: whether a position sees no later one.
        rope: whether queries and keys are turned by angles position · base^(-2i / head_dim), pairs half-split as in
            Llama.
        base: the constant of these angles.
        max_length: positions that there are angles for.
        bias: whether the projections have one.
    """

    component = "multi_head_attention"
    attends = True

    def __init__(
        self,
        dim: int = 512,
        heads: int = 8,
        *,
        causal: bool = False,
        rope: bool = True,
        base: float = 10000.0,
        max_length: int = 4096,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.dim = integer("dim", dim, 1)
        self.heads = integer("heads", heads, 1)
        self.head_dim = dim // heads
        if dim % heads or (rope and self.head_dim % 2):
            raise wrong_value("heads", heads, f"a divisor of dim, {dim}{', that leaves an even width' * rope}")
        if not base > 0:
            raise wrong_value("base", base, "a positive number")
        self.causal, self.rope, self.base = bool(causal), bool(rope), float(base)
        self.max_length = integer("max_length", max_length, 1)
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.angles = self._make_angles()

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(B, L, dim) of x's shape.

        Args:
            x: (B, L, dim).
            cache: from `new_cache`: x are the positions after those in it, which it holds from then on; causal.

        Raises:
            ValueError: x is of another shape or longer than max_length.
        """
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise wrong_value("x", f"shape {tuple(x.shape)}", f"(B, L, {self.dim})")
        batch, length, _ = x.shape
        if length > self.max_length:
            raise wrong_value("x", f"length {length}", f"at most max_length, {self.max_length}")
        operations = self._operations(x)
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if self.rope:
            cos, sin = self.angles[:, :length] if cache is None else cache.rows(self.angles, length)
            q, k = operations.rope(q, cos, sin), operations.rope(k, cos, sin)
        scale = 1 / math.sqrt(self.head_dim)
        attended = operations.attention(q, k, v, self.causal, scale) if cache is None else cache.attend(q, k, v, scale)
        return self.out(attended.transpose(1, 2).reshape(batch, length, self.dim))  # type: ignore[no-any-return]

    def new_cache(self, batch: int, capacity: int) -> LayerCache:
        """An empty cache of this level for a batch and so many positions."""
        weight = self.qkv.weight
        return loaded[self._level].Cache(
            batch, self.heads, capacity, self.head_dim, dtype=weight.dtype, device=weight.device
        )

    def flops(self, *shapes: tuple[int, ...]) -> tuple[float, float]:
        batch, length, _ = shapes[0]
        linear = projection_flops(self, batch * length)
        forward, backward = attention_flops((batch, self.heads, length, self.head_dim), length, self.causal)
        return linear + forward, 2 * linear + backward

    def _make_angles(self) -> Tensor:
        """Cosines and sines, (2, max_length, head_dim / 2), rounded once from fp64."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu") / self.head_dim
        angles = torch.arange(self.max_length, dtype=torch.float64, device="cpu")[:, None] / self.base**exponents
        weight = self.qkv.weight
        kept = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return torch.stack((angles.cos(), angles.sin())).to(weight.device, kept)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiHeadAttention:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # No buffer: a cast of the module to 16 bit would round the angles.
        self.angles = self._make_angles()
        return self


class TransformerBlock(Component):
    """A pre-norm transformer block: x + attention(norm(x)), then x + feed_forward(norm(x)).

    Args:
        dim, heads, causal, rope, max_length: as `MultiHeadAttention`.
        hidden, activation: as `FeedForward`.
    """

    component = "transformer_block"
    attends = True

    def __init__(
        self,
        dim: int = 512,
        heads: int = 8,
        hidden: int | None = None,
        *,
        activation: str = "gelu",
        causal: bool = True,
        rope: bool = True,
        max_length: int = 4096,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attention = MultiHeadAttention(dim, heads, causal=causal, rope=rope, max_length=max_length)
        self.norm2 = LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden, activation=activation)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(B, L, dim) of x's shape; cache as `MultiHeadAttention.forward`."""
        x = x + self.attention(self.norm1(x), cache)
        return x + self.feed_forward(self.norm2(x))  # type: ignore[no-any-return]

    def flops(self, *shapes: tuple[int, ...]) -> tuple[float, float]:
        both = (self.attention.flops(*shapes), self.feed_forward.flops(*shapes))
        return both[0][0] + both[1][0], both[0][1] + both[1][1]
