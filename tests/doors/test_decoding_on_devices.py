"""The roads that look at no lengths, for tensors of a device, against those that do, on the CPU."""

import pytest
import torch

from heedful import flash_attn
from heedful.flash_attn import on_device, packing
from heedful.flash_attn.arguments import window_pattern
from heedful.kv_cache import for_queries
from heedful.patterns import Full


def decode(q, caches, news, where, causal, window, rotary=(None, None, True), slopes=None, softcap=None):
    within = window_pattern(window, causal)
    return on_device.attend(
        q, *caches, *news, *rotary, not isinstance(within, Full), where, slopes, for_queries(within, q.shape[1]), None,
        softcap, True,
    )  # fmt: skip


@pytest.mark.parametrize("q_length", [1, 3])
@pytest.mark.parametrize(("causal", "window"), [(True, (-1, -1)), (False, (-1, -1)), (True, (5, 0))])
@pytest.mark.parametrize("kind", ["plain", "leftpad", "index", "pages", "int"])
@pytest.mark.parametrize("rotary", [False, True])
def test_one_step(q_length, causal, window, kind, rotary):
    batch, heads, kv_heads, dim, room = 3, 4, 2, 16, 48
    q = torch.randn(batch, q_length, heads, dim)
    news = [torch.randn(batch, q_length, kv_heads, dim) for _ in range(2)]
    shape = (10, 16, kv_heads, dim) if kind == "pages" else (5, room, kv_heads, dim)
    caches = [torch.randn(shape) for _ in range(2)]
    lengths = torch.tensor([7, 40, 23], dtype=torch.int32)
    where = [12 if kind == "int" else lengths, None, None, None]
    if kind == "index":
        where[1] = torch.tensor([4, 0, 2], dtype=torch.int32)
    if kind == "leftpad":
        where[2] = torch.tensor([0, 5, 2], dtype=torch.int32)
    if kind == "pages":
        where[3] = torch.tensor([[3, 7, 0], [9, 1, 4], [2, 8, 5]], dtype=torch.int32)
    tables = (torch.rand(room, 4), torch.rand(room, 4)) if rotary else (None, None)
    slopes = torch.rand(heads)
    theirs = [cache.clone() for cache in caches]
    wanted = flash_attn.flash_attn_with_kvcache(
        q, *theirs, *news, *tables, *where, causal=causal, window_size=window, alibi_slopes=slopes,
        return_softmax_lse=True,
    )  # fmt: skip
    found = decode(q, caches, news, tuple(where), causal, window, (*tables, True), slopes)
    torch.testing.assert_close(caches, theirs)
    torch.testing.assert_close(found, wanted)


def test_without_new_keys():
    q, caches = torch.randn(2, 1, 2, 8), [torch.randn(2, 9, 2, 8) for _ in range(2)]
    for lengths in (None, torch.tensor([4, 9], dtype=torch.int32)):
        found = decode(q, caches, (None, None), (lengths, None, None, None), True, (-1, -1))
        wanted = flash_attn.flash_attn_with_kvcache(
            q, *caches, cache_seqlens=lengths, causal=True, return_softmax_lse=True
        )
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("where", "error", "text"),
    [
        ((torch.tensor([1.0, 2.0]), None, None, None), TypeError, "cache_seqlens takes an int32 tensor"),
        ((torch.tensor([1]), None, None, None), ValueError, r"cache_seqlens takes \(2,\), a number for each"),
        ((10, None, None, None), ValueError, "cache_seqlens takes lengths from 0 to 8, got 10"),
        (
            (1, torch.tensor([0, 1]), None, torch.zeros(2, 1, dtype=torch.int32)),
            ValueError,
            "cache_batch_idx takes None",
        ),
        ((1, None, torch.tensor([0]), None), ValueError, "cache_leftpad takes"),
        ((1, None, None, torch.zeros(2, dtype=torch.int32)), ValueError, "block_table takes"),
    ],
)
def test_what_is_checked(where, error, text):
    q, new = torch.randn(2, 1, 2, 8), torch.randn(2, 1, 2, 8)
    caches = [torch.zeros(2, 9, 2, 8) for _ in range(2)]
    with pytest.raises(error, match=text):
        decode(q, caches, (new, new), where, True, (-1, -1))
    assert not any(cache.any() for cache in caches)


def test_lengths_out_of_range_touch_no_other_memory():
    q, new = torch.randn(2, 1, 2, 8), torch.randn(2, 1, 2, 8)
    caches = [torch.zeros(2, 9, 2, 8) for _ in range(2)]
    lengths = torch.tensor([100, 3], dtype=torch.int32)
    decode(q, caches, (new, new), (lengths, None, None, None), True, (-1, -1))
    torch.testing.assert_close(caches[0][0, 8], new[0, 0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
def test_packed_queries_over_pages(monkeypatch, causal, alibi):
    q, pool = torch.randn(11, 4, 16), torch.randn(2, 9, 8, 2, 16)
    cu_q = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    cu_k = torch.tensor([0, 20, 23, 47], dtype=torch.int32)
    table = torch.tensor([[3, 7, 0], [8, 1, 4], [2, 6, 5]], dtype=torch.int32)
    slopes = torch.rand(3, 4) if alibi else None

    def run():
        return flash_attn.flash_attn_varlen_func(
            q, *pool, cu_q, cu_k, 7, 24, causal=causal, block_table=table, alibi_slopes=slopes, return_attn_probs=True
        )[:2]

    wanted = run()
    packing._last = None
    monkeypatch.setattr(packing, "readable", lambda array: False)
    found = run()
    packing._last = None
    torch.testing.assert_close(found, wanted)
