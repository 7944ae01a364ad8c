"""KVCache: step by step is what one call over the whole sequences is, whatever happens in between."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import heedful
from heedful import (
    BigBird,
    BlockSparse,
    Causal,
    Chunked,
    Dilated,
    Documents,
    Full,
    Global,
    KVCache,
    Longformer,
    Mask,
    Padding,
    Pattern,
    Prefix,
    SlidingWindow,
    attention,
    explain,
)

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 12
WINDOW = 5
KINDS: dict[str, dict[str, Any]] = {
    "contiguous": {"capacity": 2},
    "ring": {"window": WINDOW, "block_size": 4},
    "paged": {"block_size": 3},
}
PATTERNS: list[Pattern] = [
    Full(),
    Causal(),
    Causal(3),
    SlidingWindow(4, 1),
    SlidingWindow(2),
    Dilated(3, 2),
    Chunked(5),
    Prefix(3),
    Longformer(2, (0, 3)),
    Causal() & (Dilated(4, 3) | Prefix(2)),
    (SlidingWindow(1) | Global(2)) & Causal(),
    Causal() | Prefix(4),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def new(length: int, batch: int = 3, dtype: torch.dtype = torch.float32, kv_length: int | None = None):
    kv_length = length if kv_length is None else kv_length
    return (
        torch.randn(batch, HEADS, length, DIM).to(dtype),
        torch.randn(batch, KV_HEADS, kv_length, DIM).to(dtype),
        torch.randn(batch, KV_HEADS, kv_length, VALUE_DIM).to(dtype),
    )


class Model:
    """The cache's specification: a list of sequences, joined and attended to one by one."""

    def __init__(self, batch: int, window: int | None = None, starts: list[int] | None = None) -> None:
        self.keys = [torch.empty(KV_HEADS, 0, DIM) for _ in range(batch)]
        self.values = [torch.empty(KV_HEADS, 0, VALUE_DIM) for _ in range(batch)]
        self.window, self.starts = window, starts or [0] * batch

    @property
    def lengths(self) -> list[int]:
        return [key.shape[1] for key in self.keys]

    def append(self, k: Tensor, v: Tensor) -> None:
        self.keys = [torch.cat([old, more], 1) for old, more in zip(self.keys, k, strict=True)]
        self.values = [torch.cat([old, more], 1) for old, more in zip(self.values, v, strict=True)]

    def crop(self, lengths: list[int]) -> None:
        self.keys = [key[:, :length] for key, length in zip(self.keys, lengths, strict=True)]
        self.values = [value[:, :length] for value, length in zip(self.values, lengths, strict=True)]

    def reorder(self, index: list[int]) -> None:
        self.keys, self.values = [self.keys[n] for n in index], [self.values[n] for n in index]
        self.starts = [self.starts[n] for n in index]

    def attend(self, q: Tensor, pattern: Pattern | None = None, alibi_slopes: Tensor | None = None, **options: Any):
        """Output (B, H, Lq, Dv) and LSE (B, H, Lq) by the reference."""
        pattern = Full() if pattern is None else pattern
        if self.window is not None:
            pattern = pattern & SlidingWindow(self.window, None)
        found = []
        for item, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            per_item = alibi_slopes is not None and alibi_slopes.ndim == 2
            slopes = alibi_slopes[item : item + 1] if per_item else alibi_slopes
            found.append(
                attention(
                    q[item : item + 1],
                    key[None].to(q.dtype),
                    value[None].to(q.dtype),
                    pattern=pattern & Padding(self.starts[item], 2**31 - 1),
                    alibi_slopes=slopes,
                    backend="reference",
                    return_lse=True,
                    **options,
                )
            )
        return torch.cat([one.out for one in found]), torch.cat([one.lse for one in found])


def check(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_steps_are_the_whole(kind: str, pattern: Pattern) -> None:
    cache, model = KVCache(**KINDS[kind]), Model(3, KINDS[kind].get("window"))
    for length in (7, 1, 2, 16, 1, 30, 5, 1):
        q, k, v = new(length)
        model.append(k, v)
        check(attention(q, k, v, pattern=pattern, cache=cache), model.attend(q, pattern)[0])
    assert cache.lengths.tolist() == model.lengths == [63] * 3
    assert len(cache) == 63


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_of_masks_blocks_and_documents(kind: str) -> None:
    cache, model = KVCache(**KINDS[kind]), Model(2, KINDS[kind].get("window"))
    for length in (9, 1, 4):
        q, k, v = new(length, batch=2)
        model.append(k, v)
        total = model.lengths[0]
        cu_q, cu_k = torch.tensor([0, length // 2, length]), torch.tensor([0, total // 2, total])
        for pattern in (
            Mask(torch.rand(HEADS, length, total) > 0.3),
            Mask(torch.rand(2, 1, 1, total) > 0.3),
            BlockSparse(torch.rand(-(-length // 4), -(-total // 4)) > 0.3, 4),
            BigBird(2, 1, 1, 1, seed=3) & Causal(),
            Documents(cu_q, cu_k, within=Causal()) | Prefix(1),
        ):
            copied = copy.deepcopy(cache)
            check(attention(q, k, v, pattern=pattern, cache=copied), _whole(model, q, pattern))
        attention(q, k, v, cache=cache)


def _whole(model: Model, q: Tensor, pattern: Pattern) -> Tensor:
    pattern = pattern if model.window is None else pattern & SlidingWindow(model.window, None)
    return attention(q, torch.stack(model.keys), torch.stack(model.values), pattern=pattern, backend="reference")


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_masks_over_ragged_lengths_reach_to_the_longest(kind: str) -> None:
    cache, model = KVCache(**KINDS[kind]), Model(2)
    q, k, v = new(10, batch=2)
    model.append(k, v)
    attention(q, k, v, cache=cache)
    cache.crop([10, 4])
    model.crop([10, 4])
    q, k, v = new(2, batch=2)
    model.append(k, v)
    mask = torch.rand(2, HEADS, 2, 12) > 0.3
    out = attention(q, k, v, pattern=Mask(mask) & Causal(), cache=cache)
    for item, length in enumerate(model.lengths):
        one = Model(1)
        one.append(model.keys[item][None], model.values[item][None])
        check(out[item : item + 1], one.attend(q[item : item + 1], Mask(mask[item, :, :, :length]) & Causal())[0])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_history(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    batch = data.draw(st.integers(1, 4))
    starts = data.draw(st.none() | st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    cache, model = KVCache(**KINDS[kind], starts=starts), Model(batch, KINDS[kind].get("window"), starts)
    for _ in range(data.draw(st.integers(1, 8))):
        batch = len(model.keys)
        length = data.draw(st.integers(1, 16))
        extra = data.draw(st.sampled_from([0, 0, 3]))
        pattern = data.draw(st.sampled_from(PATTERNS))
        q, k, v = new(length, batch, kv_length=length + extra)
        model.append(k, v)
        if data.draw(st.booleans()):
            blhd = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
            out = attention(*blhd, pattern=pattern, causal=True, cache=cache, layout="blhd").transpose(1, 2)
        else:
            out = attention(q, k, v, pattern=pattern, causal=True, cache=cache)
        check(out, model.attend(q, pattern & Causal())[0])
        action = data.draw(st.sampled_from(["go on", "go on", "crop", "reorder", "free", "reset"]))
        if action == "crop":
            away = [data.draw(st.integers(0, min(held, 4 if kind != "ring" else length))) for held in model.lengths]
            kept = [held - n for held, n in zip(model.lengths, away, strict=True)]
            try:
                cache.crop(torch.tensor(kept) if data.draw(st.booleans()) else kept)
                model.crop(kept)
            except ValueError:
                assert kind == "ring"
        elif action == "reorder":
            index = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
            cache.reorder(torch.tensor(index))
            model.reorder(index)
        elif action == "free":
            item = data.draw(st.integers(0, batch - 1))
            cache.free(item)
            model.crop([0 if n == item else held for n, held in enumerate(model.lengths)])
            model.starts = [0 if n == item else start for n, start in enumerate(model.starts)]
        elif action == "reset":
            cache.reset()
            model.crop([0] * batch)
        assert cache.lengths.tolist() == model.lengths


@pytest.mark.parametrize("kind", KINDS)
def test_features(kind: str) -> None:
    cache, model = KVCache(**KINDS[kind], starts=[0, 2, 1]), Model(3, KINDS[kind].get("window"), [0, 2, 1])
    slopes, sinks = torch.rand(3, HEADS), torch.randn(HEADS)
    for step, length in enumerate((10, 1, 3, 1)):
        q, k, v = new(length)
        model.append(k, v)
        # Room to take two positions back is there in every kind.
        options = {"alibi_slopes": slopes, "sinks": sinks, "softcap": 3.0, "scale": 0.4}
        found = attention(q, k, v, causal=True, cache=cache, return_lse=True, **options)
        out, lse = model.attend(q, Causal(), **options)
        check(found.out, out)
        check(found.lse, lse)
        if step == 1:
            kept = [held - n for held, n in zip(model.lengths, (1, 2, 0), strict=True)]
            cache.crop(kept)
            model.crop(kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [True, "sparse"])
def test_bias_and_weights_are_as_wide_as_the_longest(kind: str, weights: Any) -> None:
    cache, model = KVCache(**KINDS[kind]), Model(3, KINDS[kind].get("window"))
    for length in (7, 2):
        q, k, v = new(length)
        model.append(k, v)
        bias = torch.randn(HEADS, length, model.lengths[0])
        options = {"pattern": Causal(), "bias": bias}
        if explain(q, k, v, cache=cache, return_weights=weights, **options).backend is None:
            pytest.skip("no backend returns such weights")
        found = attention(q, k, v, cache=cache, return_weights=weights, **options)
        check(found.out, model.attend(q, **options)[0])
        dense = found.weights.to_dense()
        assert dense.shape == (3, HEADS, length, model.lengths[0])
        values = torch.stack(model.values).repeat_interleave(HEADS // KV_HEADS, 1)
        check(dense @ values, found.out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    cache, model = KVCache(**KINDS[kind]), Model(3, KINDS[kind].get("window"))
    for length in (5, 1, 2):
        q, k, v = new(length, dtype=dtype)
        model.append(k.double(), v.double())
        out = attention(q, k, v, causal=True, cache=cache)
        assert out.dtype == dtype
        torch.testing.assert_close(out, model.attend(q, Causal())[0], atol=2e-2, rtol=2e-2)
    assert cache.key.dtype == dtype


def test_autocast_casts_what_is_kept() -> None:
    cache = KVCache()
    with torch.autocast("cpu", torch.bfloat16):
        for length in (3, 1):
            assert attention(*new(length), causal=True, cache=cache).dtype == torch.bfloat16
    assert cache.key.dtype == torch.bfloat16


def test_inference_mode_and_back() -> None:
    for options in KINDS.values():
        cache = KVCache(**options)
        with torch.inference_mode():
            attention(*new(4), cache=cache)
        attention(*new(9), cache=cache)
        cache.reorder([0, 0])
        with torch.inference_mode():
            cache.reorder([0, 1])
        attention(*new(20, batch=2), cache=cache)


@pytest.mark.parametrize("options", [*KINDS.values(), {"starts": [0, 1, 2]}], ids=[*KINDS, "starts"])
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("pattern", [None, Chunked(3), Padding(torch.tensor([0, 1, 2]), 99)])
def test_a_remembered_step_gives_the_same_bits(options: Any, layout: str, pattern: Pattern | None) -> None:
    steps = [new(length) for length in (5, 1, 1, 1, 2, 2, 1, 1)]
    if layout == "blhd":
        steps = [tuple(t.transpose(1, 2) for t in step) for step in steps]
    runs = []
    for forget in (False, False, True):
        cache, found = KVCache(**options), []
        for number, step in enumerate(steps):
            if forget:
                heedful.clear_caches()
            if number == 3:
                cache.crop(cache.lengths - torch.tensor([0, 1, 0]))
            found.append(attention(*step, pattern=pattern, causal=True, cache=cache, layout=layout, return_lse=True))
        runs.append(found)
    for first, second, alone, step in zip(*runs, steps, strict=True):
        for result in (second, alone):
            assert torch.equal(first.out, result.out)
            assert torch.equal(first.lse, result.lse)
        assert first.out.shape == (*step[0].shape[:3], VALUE_DIM)


def test_contiguous_is_written_in_place() -> None:
    cache = KVCache(capacity=32)
    attention(*new(3), cache=cache)
    memory, nbytes = cache.key.data_ptr(), cache.nbytes
    q, k, v = new(1)
    for _ in range(29):
        attention(q, k, v, causal=True, cache=cache)
    assert (cache.key.data_ptr(), cache.nbytes) == (memory, nbytes)
    assert torch.equal(cache.key[:, :, -1:], k)
    assert torch.equal(cache.value[:, :, -1:], v)
    attention(q, k, v, causal=True, cache=cache)
    assert cache.nbytes == 2 * nbytes
    assert "33 positions, room for 64 positions" in repr(cache)


def test_ring_is_bounded_and_rolls_back() -> None:
    cache = KVCache(window=WINDOW, block_size=4)
    attention(*new(1000), causal=True, cache=cache)
    attention(*new(1), causal=True, cache=cache)
    bounded = cache.nbytes
    assert bounded <= 3 * (WINDOW + 2 * 4) * KV_HEADS * (DIM + VALUE_DIM) * 4
    for _ in range(50):
        attention(*new(2), causal=True, cache=cache)
        cache.crop(-1)
    assert cache.nbytes == bounded
    assert cache.key.shape == (3, KV_HEADS, 1051, DIM)
    with pytest.raises(ValueError, match="lengths takes 0 or at least 1045 here"):
        cache.crop(-10)
    assert len(cache) == 1051


def test_pages_are_shared_until_they_are_written() -> None:
    cache = KVCache(block_size=4, blocks=8)
    attention(*new(6, batch=1), cache=cache)
    cache.reorder([0, 0, 0])
    assert "8 blocks of 4, 6 free" in repr(cache)
    before = cache.key.clone()
    attention(*new(1), causal=True, cache=cache)
    assert "8 blocks of 4, 4 free" in repr(cache)
    assert torch.equal(cache.key[:, :, :6], before)
    cache.free([0, 2])
    assert cache.lengths.tolist() == [0, 7, 0]
    assert "6 free" in repr(cache)
    cache.reset()
    assert "8 free" in repr(cache)


def test_a_full_pool_refuses_and_changes_nothing() -> None:
    cache = KVCache(block_size=4, blocks=3)
    attention(*new(4), cache=cache)
    with pytest.raises(ValueError, match="cache takes 3 blocks of 4 positions, got a call that needs 3 more"):
        attention(*new(1), cache=cache)
    assert cache.lengths.tolist() == [4, 4, 4]
    cache.free(1)
    cache.reorder([0, 2])
    cache.crop(3)
    attention(*new(1, batch=2), cache=cache)


def test_max_length() -> None:
    for options in KINDS.values():
        cache = KVCache(**options, max_length=5)
        attention(*new(4), cache=cache)
        with pytest.raises(ValueError, match="cache takes at most 5 positions"):
            attention(*new(2), cache=cache)
        attention(*new(1), cache=cache)
        assert len(cache) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_input(kind: str) -> None:
    cache = KVCache(**KINDS[kind])
    attention(*new(3), cache=cache)
    held = cache.key.clone()
    q, k, v = new(1)
    wrong = [
        (ValueError, "k takes the cache's batch, 3", new(1, batch=2)),
        (ValueError, "k takes as many heads as the cache, 2", (q, k[:, :1], v[:, :1])),
        (ValueError, "k takes the cache's head dim, 8", (q[..., :4], k[..., :4], v)),
        (ValueError, "v takes the cache's head dim, 12", (q, k, v[..., :4])),
        (TypeError, "k takes the cache's dtype", new(1, dtype=torch.float64)),
        (ValueError, "v takes k's length", (q, k, new(2)[2])),
        (TypeError, "k takes q's dtype", (q, k.double(), v)),
        (ValueError, "k takes q's device", (q, k.to("meta"), v)),
    ]
    for error, message, inputs in wrong:
        for _ in range(2):
            with pytest.raises(error, match=message):
                attention(*inputs, causal=True, cache=cache)
    with pytest.raises(ValueError, match=r"bias takes a shape that broadcasts to \(B, H, Lq, Lk\) = \(3, 4, 1, 4\)"):
        attention(q, k, v, bias=torch.zeros(1, 3), cache=cache)
    with pytest.raises(heedful.UnsupportedError):
        attention(q, k, v, softcap=2.0, cache=cache, backend="sdpa")
    with pytest.raises(ValueError, match="cache takes inputs that need none"):
        attention(q.requires_grad_(), k, v, cache=cache)
    with pytest.raises(ValueError, match="cache takes inputs that need none"):
        cache.append(k.clone().requires_grad_(), v)
    with torch.no_grad():
        attention(q, k, v, cache=cache)
    cache.crop(-1)
    assert torch.equal(cache.key, held)
    with pytest.raises(TypeError, match=r"cache takes a heedful.KVCache or None"):
        attention(q.detach(), k, v, cache=object())


def test_a_failed_first_call_leaves_the_cache_empty() -> None:
    cache = KVCache()
    with pytest.raises(heedful.UnsupportedError):
        attention(*new(3), softcap=2.0, cache=cache, backend="sdpa")
    assert repr(cache) == "KVCache(contiguous, empty)"
    assert cache.batch is None
    attention(*new(2, batch=1), cache=cache)


def test_wrong_arguments() -> None:
    for error, message, options in [
        (ValueError, "window takes an int from 0", {"window": -1}),
        (TypeError, "block_size takes an int", {"block_size": 1.5}),
        (ValueError, "blocks takes None for a contiguous cache", {"blocks": 3}),
        (ValueError, "capacity takes None for a ring cache", {"capacity": 3, "window": 2}),
        (ValueError, "capacity takes at most max_length", {"capacity": 3, "max_length": 2}),
        (ValueError, "starts takes positions of at least 0", {"starts": [-1]}),
        (TypeError, "starts takes an int", {"starts": torch.zeros(2)}),
    ]:
        with pytest.raises(error, match=message):
            KVCache(**options)
    cache = KVCache(starts=[1, 2])
    with pytest.raises(ValueError, match="k takes as many items as the cache has starts, 2"):
        attention(*new(1), cache=cache)
    with pytest.raises(ValueError, match="cache takes one that a call has filled"):
        cache.key  # noqa: B018
    attention(*new(4, batch=2), cache=cache)
    for lengths, message in [(5, "lengths takes -4 to 4"), ([1, 2, 3], "one per batch item, 2"), (-5, "-4 to 4")]:
        with pytest.raises(ValueError, match=message):
            cache.crop(lengths)
    for change in (cache.free, cache.reorder):
        with pytest.raises(ValueError, match="takes batch items from 0 to 1, got 2"):
            change([2])


def test_explain_appends_nothing() -> None:
    for options in KINDS.values():
        cache = KVCache(**options)
        q, k, v = new(3)
        assert explain(q, k, v, causal=True, cache=cache).backend is not None
        assert cache.batch is None
        attention(q, k, v, cache=cache)
        found = explain(*new(1), causal=True, cache=cache)
        assert cache.lengths.tolist() == [3, 3, 3]
        assert ("paged" in found.problem.features) == (cache.kind != "contiguous")


def test_append_alone_and_views() -> None:
    for options in KINDS.values():
        cache = KVCache(**options)
        _, k, v = new(WINDOW)
        cache.append(k[:, :, :2], v[:, :, :2])
        cache.append(k[:, :, 2:], v[:, :, 2:])
        assert torch.equal(cache.key, k)
        assert torch.equal(cache.value, v)
        assert cache.kind in repr(cache)
        q, k, v = new(2, kv_length=0)
        assert attention(q, k, v, causal=True, cache=cache).shape == (3, HEADS, 2, VALUE_DIM)
        assert len(cache) == WINDOW


def test_empty_sizes() -> None:
    for options in KINDS.values():
        cache = KVCache(**options)
        out = attention(*new(2, kv_length=0), causal=True, cache=cache)
        assert (out == 0).all()
        attention(*new(1), cache=cache)
        assert len(cache) == 1


def test_compiled_calls_run_outside_the_graph() -> None:
    torch._dynamo.reset()
    cache, model = KVCache(), Model(3)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, causal=True, cache=cache) + 1

    compiled = torch.compile(step, backend="eager")
    for length in (3, 1, 1):
        q, k, v = new(length)
        model.append(k, v)
        check(compiled(q, k, v), model.attend(2 * q, Causal())[0] + 1)
    assert len(cache) == 5
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="KVCache keeps its lengths in Python"):
        torch.compile(step, backend="eager", fullgraph=True)(*new(1))
    assert len(cache) == 5
