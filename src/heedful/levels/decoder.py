"""`Decoder`: a small autoregressive language model that generates with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from heedful.errors import wrong_type, wrong_value
from heedful.levels.base import Component
from heedful.levels.components import LayerNorm, TransformerBlock
from heedful.levels.operations import LayerCache
from heedful.patterns.arguments import integer


class Decoder(Component):
    """A language model: embedding, causal pre-norm blocks with RoPE, a norm and a projection to the vocabulary.

    Args:
        vocabulary: number of tokens; 256 serves bytes.
        dim, heads, hidden, activation, max_length: as `TransformerBlock`.
        layers: number of blocks.
    """

    component = "decoder"
    attends = True

    def __init__(
        self,
        vocabulary: int = 256,
        dim: int = 512,
        heads: int = 8,
        layers: int = 4,
        hidden: int | None = None,
        *,
        activation: str = "swiglu",
        max_length: int = 4096,
    ) -> None:
        super().__init__()
        self.vocabulary = integer("vocabulary", vocabulary, 1)
        self.max_length = integer("max_length", max_length, 1)
        integer("layers", layers, 1)
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads, hidden, activation=activation, max_length=max_length) for _ in range(layers)
        )
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens: Tensor, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """Logits (B, L, vocabulary) of the token after each.

        Args:
            tokens: (B, L), int64.
            cache: from `new_cache`: tokens are those after the ones in it, which it holds from then on.

        Raises:
            TypeError, ValueError: tokens are of another dtype or shape.
        """
        self._check_tokens(tokens)
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[index])
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def new_cache(self, batch: int, capacity: int | None = None) -> list[LayerCache]:
        """An empty cache for a batch: one of each layer, for `capacity` positions, max_length if None."""
        room = self.max_length if capacity is None else integer("capacity", capacity, 1, self.max_length)
        return [block.attention.new_cache(batch, room) for block in self.blocks if isinstance(block, TransformerBlock)]

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The prompt and what follows: (B, L + max_new_tokens).

        Args:
            tokens: the prompt, (B, L) int64 with L ≥ 1.
            max_new_tokens: tokens to add, 0 or more.
            temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
            generator: what they are drawn from; None is torch's own.

        Raises:
            TypeError, ValueError: an argument is none of these, or the result is longer than max_length.
        """
        self._check_tokens(tokens)
        integer("max_new_tokens", max_new_tokens, 0)
        batch, length = tokens.shape
        total = length + max_new_tokens
        if length == 0 or total > self.max_length:
            raise wrong_value("tokens", f"length {length}", f"1 to {self.max_length} together with max_new_tokens")
        if not temperature >= 0:
            raise wrong_value("temperature", temperature, "0 or a positive number")
        cache = self.new_cache(batch, total)
        found, new = [tokens], tokens
        for _ in range(max_new_tokens):
            logits = self(new, cache)[:, -1]
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                weights = torch.softmax(logits.float() / temperature, -1)
                new = torch.multinomial(weights, 1, generator=generator)
            found.append(new)
        return torch.cat(found, 1)

    def units(self) -> Iterator[Component]:
        """Its blocks, which are alike: one compilation serves them all."""
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            yield block

    def flops(self, *shapes: tuple[int, ...]) -> tuple[float, float]:
        batch, length = shapes[0]
        forward = 2.0 * batch * length * self.head.weight.numel()
        backward = 2 * forward
        for block in self.units():
            both = block.flops((batch, length, self.head.in_features))
            forward, backward = forward + both[0], backward + both[1]
        return forward, backward

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dtype != torch.int64:
            raise wrong_type("tokens", tokens.dtype, "torch.int64")
        if tokens.dim() != 2:
            raise wrong_value("tokens", f"shape {tuple(tokens.shape)}", "(B, L)")
