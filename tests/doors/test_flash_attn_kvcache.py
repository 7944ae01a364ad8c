"""heedful.flash_attn.flash_attn_with_kvcache: sequence by sequence against plain lists of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from flash_oracle import sequence, turned
from torch import Tensor

import heedful
from heedful.choose import BACKENDS
from heedful.flash_attn import flash_attn_with_kvcache
from heedful.problem import Call

HEADS, KV_HEADS, DIM, VALUE_DIM, BATCH = 6, 3, 32, 24, 3
ROOM = 45
LENGTHS = [7, 0, 31]
MEMORY = ("whole", "run", "places", "pages 4", "pages 1", "pages 45")


@dataclass
class Caches:
    """Three sequences of some lengths in a cache of random numbers or, where nobody may look, of NaN."""

    k: Tensor
    v: Tensor
    options: dict[str, Tensor]

    def __init__(self, memory: str, lengths: list[int], starts: list[int], dtype: torch.dtype) -> None:
        self.options = {}
        self.size = ROOM
        places = list(range(BATCH))
        caches = BATCH if memory == "whole" else BATCH + 3
        self.table: list[list[int]] | None = None
        if memory.startswith("pages"):
            self.size = int(memory.split()[1])
            columns = -(-ROOM // self.size)
            caches = BATCH * columns + 2
            order = torch.randperm(caches).tolist()
            self.table = [[order.pop() for _ in range(columns)] for _ in range(BATCH)]
            self.options["block_table"] = torch.tensor(self.table, dtype=torch.int32)
        elif memory != "whole":
            places = [4, 0, 5] if memory == "places" else [2, 3, 4]
            self.options["cache_batch_idx"] = torch.tensor(places, dtype=torch.int32)
        self.places = places
        self.k = torch.full((caches, self.size, KV_HEADS, DIM), torch.nan, dtype=dtype)
        self.v = torch.full((caches, self.size, KV_HEADS, VALUE_DIM), torch.nan, dtype=dtype)
        for item, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            for j in range(start, length):
                for cache in (self.k, self.v):
                    cache[self.at(item, j)] = torch.randn(cache.shape[2:]).to(dtype)

    def at(self, item: int, position: int) -> tuple[int, int]:
        if self.table is not None:
            return self.table[item][position // self.size], position % self.size
        return self.places[item], position

    def held(self, item: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        places = [self.at(item, j) for j in range(start, stop)]
        return tuple(
            torch.stack([cache[at] for at in places]) if places else cache.new_empty(0, *cache.shape[2:])
            for cache in (self.k, self.v)
        )


def check(
    memory: str = "whole",
    *,
    count: int = 1,
    new: int | None = 1,
    lengths: list[int] | int | None = None,
    starts: list[int] | None = None,
    rotary: int = 0,
    interleaved: bool = True,
    dtype: torch.dtype = torch.float32,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alibi: str | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
) -> None:
    given = LENGTHS if lengths is None else lengths
    before = [given] * BATCH if isinstance(given, int) else list(given)
    begins = [0] * BATCH if starts is None else starts
    caches = Caches(memory, before, begins, dtype)
    slopes = {None: None, "heads": torch.rand(HEADS), "items": torch.rand(BATCH, HEADS)}[alibi]
    q = torch.randn(BATCH, count, HEADS, DIM).to(dtype)
    padding = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    k = v = cos = sin = None
    if new is not None:
        k, v = torch.randn(BATCH, new, KV_HEADS, DIM).to(dtype), torch.randn(BATCH, new, KV_HEADS, VALUE_DIM).to(dtype)
    if rotary:
        angle = torch.rand(ROOM + 40, rotary // 2) * 6
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    seqlens = given if isinstance(given, int) else torch.tensor(given, dtype=torch.int32)
    old_k, old_v = caches.k.clone(), caches.v.clone()
    tensors = q, caches.k, caches.v, k, v, cos, sin, seqlens
    options = {
        "cache_leftpad": padding,
        "softmax_scale": scale,
        "causal": causal,
        "window_size": window,
        "softcap": softcap,
        "rotary_interleaved": interleaved,
        "alibi_slopes": slopes,
        "num_splits": num_splits,
        **caches.options,
    }
    out, lse = flash_attn_with_kvcache(*tensors, **options, return_softmax_lse=True)
    # It writes the same again.
    alone = flash_attn_with_kvcache(*tensors, **options)
    assert out.shape == (BATCH, count, HEADS, VALUE_DIM)
    assert lse.shape == (BATCH, HEADS, count)
    for item in range(BATCH):
        own_q = q[item]
        if new is not None:
            positions = torch.arange(before[item], before[item] + new)
            own_k = turned(k[item], cos, sin, positions, interleaved) if rotary else k[item]
            for n, position in enumerate(positions.tolist()):
                at = caches.at(item, position)
                torch.testing.assert_close(caches.k[at], own_k[n])
                assert torch.equal(caches.v[at], v[item, n])
                old_k[at], old_v[at] = caches.k[at], caches.v[at]
            if rotary:
                each = torch.arange(before[item], before[item] + count)
                if not causal and window == (-1, -1):
                    each = torch.full_like(each, before[item])
                own_q = turned(own_q, cos, sin, each, interleaved)
        keys, values = caches.held(item, begins[item], before[item] + (new or 0))
        own = slopes[item] if alibi == "items" else slopes
        wanted = sequence(
            own_q[None],
            keys[None],
            values[None],
            causal=causal,
            window=window,
            slopes=own,
            scale=scale,
            softcap=softcap,
        )
        wanted.out.check(out[item][None].transpose(1, 2), f"out of item {item}")
        wanted.out.check(alone[item][None].transpose(1, 2), f"out of item {item}, without its log-sum-exp")
        wanted.lse.check(lse[item][None], f"lse of item {item}")
    # Nothing but the new positions was written.
    assert torch.equal(caches.k.nan_to_num(), old_k.nan_to_num())
    assert torch.equal(caches.v.nan_to_num(), old_v.nan_to_num())


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("lengths", [LENGTHS, 0, 17], ids=str)
@pytest.mark.parametrize(("count", "new"), [(1, 1), (1, None), (5, 5), (5, 2), (3, None), (2, 6)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_and_new_keys(memory, lengths, count, new, causal):
    check(memory, lengths=lengths, count=count, new=new, causal=causal)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("window", [(6, -1), (5, 0), (-1, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("alibi", [None, "heads", "items"])
def test_windows_and_alibi(memory, window, alibi):
    for count in (1, 4):
        for lengths in (LENGTHS, 20):
            check(memory, count=count, new=count, lengths=lengths, window=window, alibi=alibi, softcap=2.0, scale=0.4)


@pytest.mark.parametrize("memory", ["whole", "places", "pages 4"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rotary(memory, interleaved, rotary, dtype):
    options = {"rotary": rotary, "interleaved": interleaved, "dtype": dtype}
    for lengths in (LENGTHS, 11):
        check(memory, lengths=lengths, **options)
        check(memory, lengths=lengths, count=4, new=4, causal=True, **options)
        check(memory, lengths=lengths, count=5, new=3, window=(7, -1), **options)
        check(memory, lengths=lengths, count=5, new=3, **options)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("starts", [[2, 0, 17], [0, 0, 5]], ids=str)
def test_left_padding(memory, starts):
    for count, new in ((1, 1), (4, 4), (2, None)):
        check(memory, starts=starts, count=count, new=new, causal=True, alibi="items")
        check(memory, starts=starts, count=count, new=new, rotary=32 if new else 0, window=(4, 1))
    check(memory, lengths=20, starts=[3, 3, 3], causal=True, count=2, new=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("memory", ["whole", "pages 4"])
def test_dtypes(dtype, memory):
    check(memory, dtype=dtype, causal=True)
    check(memory, dtype=dtype, count=3, new=3, causal=True, num_splits=4)


def test_without_lengths_all_of_the_cache_is_attended_to():
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 20, 2, 16), torch.randn(2, 20, 2, 16)
    wanted = sequence(q, k, v, causal=True)
    wanted.out.check(flash_attn_with_kvcache(q, k, v, causal=True).transpose(1, 2))
    table = torch.tensor([[2, 0], [1, 3]])
    k, v = (torch.randn(4, 5, 2, 16) for _ in range(2))
    whole = [cache[table].flatten(1, 2) for cache in (k, v)]
    for given in (table, table.int()):
        sequence(q, *whole).out.check(flash_attn_with_kvcache(q, k, v, block_table=given).transpose(1, 2))


def test_step_by_step_is_the_whole():
    q, k, v = torch.randn(2, 30, 4, 16), torch.randn(2, 30, 2, 16), torch.randn(2, 30, 2, 16)
    caches = torch.full((2, 2, 40, 2, 16), torch.nan)
    wanted = sequence(q, k, v, causal=True)
    outs, held = [], 0
    for count in (12, 1, 1, 5, 1, 10):
        part = slice(held, held + count)
        outs.append(
            flash_attn_with_kvcache(q[:, part], *caches, k[:, part], v[:, part], cache_seqlens=held, causal=True)
        )
        held += count
    wanted.out.check(torch.cat(outs, 1).transpose(1, 2))


@pytest.mark.parametrize("lengths", [5, torch.tensor([5, 3])], ids=["alike", "apart"])
def test_caches_with_heads_first_and_float32_tables(lengths):
    q, k, v = (torch.randn(2, 1, heads, 32).bfloat16() for heads in (4, 2, 2))
    angle = torch.rand(9, 16)
    options = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "cache_seqlens": lengths}
    plain = [torch.randn(2, 9, 2, 32).bfloat16() for _ in range(2)]
    turned_around = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in plain]
    wanted = flash_attn_with_kvcache(q, *plain, k, v, **options)
    assert torch.equal(flash_attn_with_kvcache(q, *turned_around, k, v, **options), wanted)
    assert all(torch.equal(a, b) for a, b in zip(plain, turned_around, strict=True))
    own = turned(k[0], angle.cos(), angle.sin(), torch.tensor([5]), True)
    assert torch.equal(plain[0][0, 5], own[0])


@pytest.mark.parametrize("memory", ["whole", "places", "pages 4"])
@pytest.mark.parametrize("lengths", [LENGTHS, 17], ids=str)
def test_the_engine_reads_the_cache_where_it_lies(memory, lengths, monkeypatch):
    """What reaches the backend are views of the caller's memory."""
    seen: list[Call] = []
    backend = type(BACKENDS["native"])
    run, shortcut = backend.run, backend.shortcut
    monkeypatch.setattr(backend, "run", lambda self, call: seen.append(call) or run(self, call))
    monkeypatch.setattr(backend, "shortcut", lambda self, call: seen.append(call) or shortcut(self, call))
    heedful.clear_caches()
    caches = Caches(memory, [lengths] * BATCH if isinstance(lengths, int) else lengths, [0] * BATCH, torch.bfloat16)
    q = torch.randn(BATCH, 20, HEADS, DIM).bfloat16()
    seqlens = torch.tensor(lengths if isinstance(lengths, list) else [lengths] * BATCH, dtype=torch.int32)
    flash_attn_with_kvcache(q, caches.k, caches.v, cache_seqlens=seqlens, causal=True, **caches.options)
    assert seen
    for call in seen:
        for tensor, cache in ((call.key, caches.k), (call.value, caches.v)):
            assert tensor.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()


def test_gradients_are_refused_when_they_are_asked_for():
    q, k, v = torch.randn(1, 1, 2, 8, requires_grad=True), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    new = torch.randn(1, 1, 2, 8, requires_grad=True)
    out, lse = flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=3, return_softmax_lse=True)
    assert not k.requires_grad
    for result in (out, lse):
        assert result.requires_grad
        with pytest.raises(RuntimeError, match="flash_attn_with_kvcache has no backward pass"):
            result.sum().backward()
    with torch.no_grad():
        assert not flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=3).requires_grad


def test_under_inference_mode_and_autocast():
    q, k, v, new = (torch.randn(2, n, 4, 16) for n in (1, 9, 9, 1))
    wanted = flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=5)
    with torch.inference_mode():
        assert torch.equal(flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=5), wanted)
    for lengths in (5, torch.tensor([5, 3])):
        wanted = flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=lengths)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=lengths)
        assert torch.equal(found, wanted)


def test_in_a_compiled_function():
    q, k, v, new = (torch.randn(2, n, 4, 16) for n in (1, 9, 9, 1))

    @torch.compile(backend="aot_eager")
    def step(q: Tensor, new: Tensor, seqlens: Tensor) -> Tensor:
        return 2 * flash_attn_with_kvcache(q * 1.0, k, v, new, new, cache_seqlens=seqlens, causal=True)

    for lengths in ([2, 7], [3, 8]):
        seqlens = torch.tensor(lengths, dtype=torch.int32)
        found = step(q, new, seqlens)
        assert torch.equal(found, 2 * flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=seqlens, causal=True))


def arguments(**changed: Any) -> dict[str, Any]:
    given = {
        "q": torch.randn(2, 1, 4, 16),
        "k_cache": torch.zeros(2, 9, 2, 16),
        "v_cache": torch.zeros(2, 9, 2, 16),
        "k": torch.randn(2, 1, 2, 16),
        "v": torch.randn(2, 1, 2, 16),
        "cache_seqlens": torch.tensor([3, 5], dtype=torch.int32),
    }
    return given | changed


TABLE = torch.zeros(2, 3, dtype=torch.int32)
COS = torch.ones(12, 8)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"q": torch.randn(2, 4, 16)}, "q takes 4 dimensions"),
        ({"q": [1]}, "q takes a torch.Tensor"),
        ({"q": torch.ones(2, 1, 4, 16, dtype=torch.int64)}, "q takes float16"),
        ({"k_cache": torch.zeros(2, 9, 2, 8)}, "k_cache takes q's head dim"),
        ({"k_cache": torch.zeros(2, 9, 3, 16), "v_cache": torch.zeros(2, 9, 3, 16)}, "k_cache takes a number of heads"),
        ({"k_cache": torch.zeros(2, 9, 2, 16).bfloat16()}, "k_cache takes q's dtype"),
        ({"v_cache": torch.zeros(2, 8, 2, 16)}, "v_cache takes k_cache's"),
        (
            {"k_cache": torch.zeros(1, 9, 2, 16), "v_cache": torch.zeros(1, 9, 2, 16)},
            "k_cache takes at least q's batch",
        ),
        ({"v": None}, "v takes a tensor"),
        ({"k": None}, "k takes a tensor"),
        ({"k": torch.randn(2, 1, 2, 16).half()}, "k takes q's dtype"),
        ({"k": torch.randn(3, 1, 2, 16), "v": torch.randn(3, 1, 2, 16)}, "k takes .2, new keys"),
        ({"v": torch.randn(2, 1, 2, 8)}, "v takes .2, new keys"),
        ({"cache_seqlens": None}, "cache_seqlens takes the sequences' lengths"),
        ({"cache_seqlens": 9}, "cache_seqlens takes lengths from 0 to 8"),
        ({"cache_seqlens": -1}, "cache_seqlens takes lengths from 0 to 8"),
        ({"cache_seqlens": torch.tensor([3, 9])}, "cache_seqlens takes lengths from 0 to 8"),
        ({"cache_seqlens": torch.tensor([3, -2])}, "cache_seqlens takes lengths from 0 to 8"),
        ({"cache_seqlens": torch.tensor([3])}, "cache_seqlens takes .2,., a number for each"),
        ({"cache_seqlens": torch.tensor([3.0, 4.0])}, "cache_seqlens takes an int32 tensor"),
        ({"cache_seqlens": [3, 4]}, "cache_seqlens takes an int32 tensor"),
        ({"cache_batch_idx": torch.tensor([0, 2])}, "cache_batch_idx takes 0 to 1"),
        ({"cache_batch_idx": TABLE[:, 0], "block_table": TABLE}, "cache_batch_idx takes None with a block_table"),
        ({"cache_leftpad": torch.tensor([4, 0])}, "cache_leftpad takes 0 to the sequence's cache_seqlens, 3"),
        ({"cache_leftpad": torch.tensor([0, -1])}, "cache_leftpad takes 0 to"),
        ({"block_table": TABLE[0]}, "block_table takes"),
        ({"block_table": [[0, 1, 2]] * 2}, "block_table takes an int32 tensor"),
        ({"block_table": TABLE.float()}, "block_table takes an int32 tensor"),
        ({"block_table": TABLE + 2}, "block_table takes blocks from 0 to 1"),
        ({"block_table": TABLE - 1}, "block_table takes blocks from 0 to 1"),
        ({"softmax_scale": float("nan")}, "softmax_scale takes a finite number"),
        ({"softmax_scale": "1"}, "softmax_scale takes a number"),
        ({"softcap": float("inf")}, "softcap takes a finite number"),
        ({"softcap": None}, "softcap takes a number"),
        ({"window_size": 3}, "window_size takes two ints"),
        ({"window_size": (3, 2.5)}, "window_size takes two ints"),
        ({"rotary_cos": COS}, "rotary_sin takes a tensor"),
        ({"rotary_cos": COS, "rotary_sin": COS[:, :4]}, "rotary_sin takes"),
        ({"rotary_cos": COS.repeat(1, 2), "rotary_sin": COS.repeat(1, 2)}, "rotary_cos takes"),
        ({"rotary_cos": COS.half(), "rotary_sin": COS.half()}, "rotary_cos takes q's dtype"),
        ({"rotary_cos": COS[:5], "rotary_sin": COS[:5]}, "rotary_cos takes 6, as many"),
        ({"rotary_cos": COS, "rotary_sin": COS, "k": None, "v": None}, "rotary_cos takes None"),
        ({"alibi_slopes": torch.rand(3)}, "alibi_slopes takes shape"),
        ({"alibi_slopes": torch.rand(4).double()}, "alibi_slopes takes a float32 tensor"),
        ({"num_splits": -1}, "num_splits takes an int from 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named_and_the_cache_stays(changed, says):
    flash_attn_with_kvcache(**arguments())
    given = arguments(**changed)
    before = {name: tensor.clone() for name, tensor in given.items() if isinstance(tensor, Tensor)}
    with pytest.raises((ValueError, TypeError), match=f"^{says}"):
        flash_attn_with_kvcache(**given)
    for name, tensor in before.items():
        assert torch.equal(given[name], tensor)
