"""Generation with a cache: the same tokens at every level, and the tokens that the whole sequence gives without one."""

from __future__ import annotations

import functools

import pytest
import torch

import heedful
from heedful import levels

RUNNING = tuple(level for level in (1, 2, 3, 5, "torch") if levels.available(level))
NEW = 9


@functools.cache
def first() -> levels.Decoder:
    torch.manual_seed(4)
    return levels.create("decoder", 1, vocabulary=31, dim=24, heads=3, layers=2, hidden=40, max_length=40)


@functools.cache
def prompt() -> torch.Tensor:
    return torch.randint(31, (3, 5), generator=torch.Generator().manual_seed(5))


@functools.cache
def without_a_cache() -> torch.Tensor:
    tokens = prompt()
    with torch.no_grad():
        for _ in range(NEW):
            tokens = torch.cat((tokens, first()(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


@functools.cache
def at(level: levels.ladder.Level) -> levels.Decoder:
    return levels.convert(first(), level)


@pytest.mark.parametrize("level", RUNNING)
def test_every_level_generates_the_same_tokens_and_its_cache_gives_the_same_logits(level) -> None:
    decoder = levels.convert(first(), level)
    assert torch.equal(decoder.generate(prompt(), NEW), without_a_cache())
    with torch.no_grad():
        wanted = first()(without_a_cache())
        cache = decoder.new_cache(3, 14)
        # The shapes that generation has compiled already.
        parts = [decoder(without_a_cache()[:, :5], cache)]
        parts += [decoder(without_a_cache()[:, i : i + 1], cache) for i in range(5, 14)]
    apart = (torch.cat(parts, 1) - wanted).abs().max() / wanted.abs().max()
    assert apart <= 1e-5


def test_several_tokens_at_once_behind_a_cache() -> None:
    for level in (1, 5, "torch"):
        decoder = at(level)
        with torch.no_grad():
            cache = decoder.new_cache(3)
            decoder(prompt()[:, :2], cache)
            torch.testing.assert_close(decoder(prompt()[:, 2:], cache), first()(prompt())[:, 2:])


def test_sampling_follows_the_generator_and_the_temperature() -> None:
    def drawn(seed: int, temperature: float) -> torch.Tensor:
        return at(5).generate(prompt(), 20, temperature=temperature, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(0, 1.0), drawn(0, 1.0))
    assert not torch.equal(drawn(0, 1.0), drawn(1, 1.0))
    assert torch.equal(drawn(0, 1e-4), at(1).generate(prompt(), 20))


def test_generation_refuses_what_it_cannot_do() -> None:
    decoder = at(5)
    assert torch.equal(decoder.generate(prompt(), 0), prompt())
    with pytest.raises(ValueError, match="together with max_new_tokens"):
        decoder.generate(prompt(), 36)
    with pytest.raises(ValueError, match="tokens"):
        decoder.generate(prompt()[:, :0], 3)
    with pytest.raises(ValueError, match="temperature"):
        decoder.generate(prompt(), 3, temperature=-1.0)
    with pytest.raises(TypeError, match=r"tokens takes torch\.int64"):
        decoder(prompt().float())
    with pytest.raises(ValueError, match="tokens"):
        decoder(prompt()[0])


def test_the_native_cache_refuses_gradients_by_name() -> None:
    decoder = at(5)
    with pytest.raises((heedful.UnsupportedError, ValueError), match="grad"):
        decoder(prompt(), decoder.new_cache(3))


def test_a_decoder_learns() -> None:
    decoder = levels.create("decoder", 5, vocabulary=7, dim=16, heads=2, layers=1, hidden=32, max_length=16)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.02)
    tokens = torch.arange(12).remainder(7).expand(4, 12)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(decoder(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < losses[0]
    assert decoder.generate(tokens[:1, :3], 5)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
