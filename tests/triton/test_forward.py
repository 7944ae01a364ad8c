"""Outputs and log-sum-exps of Triton's kernels: patterns, dtypes, sizes, layouts, heads."""

from __future__ import annotations

import pytest
import torch
from inputs import MEMORY, all_features, attention_inputs, pattern_examples

from heedful import Causal, Chunked, Dilated, Full, Longformer, Padding, SlidingWindow, attention
from heedful.backend.triton.launch import forward_work

CHUNKS = Chunked(400) & Causal()
SHIFTED = SlidingWindow(900, 30, offset=torch.tensor([1500], dtype=torch.int32))
EXAMPLES = range(len(pattern_examples(2, 2, 5, 7)))


@pytest.mark.parametrize("index", EXAMPLES)
@pytest.mark.parametrize("lengths", [(70, 113)])
def test_patterns(verify, index, lengths) -> None:
    q, k, v = attention_inputs(heads=2, kv_heads=1, q_length=lengths[0], k_length=lengths[1], dtype=torch.float16)
    verify(q, k, v, pattern=pattern_examples(2, 2, *lengths)[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [Causal(), Longformer(9, 3)], ids=repr)
def test_dtypes(verify, dtype, pattern) -> None:
    verify(*attention_inputs(heads=2, q_length=70, k_length=91, head_dim=32, dtype=dtype), pattern=pattern)


@pytest.mark.parametrize(("q_length", "k_length"), [(1, 1), (1, 239), (3, 113), (113, 3), (65, 64), (129, 128)])
def test_sizes(verify, q_length, k_length) -> None:
    verify(*attention_inputs(batch=1, q_length=q_length, k_length=k_length, kv_heads=1), causal=True)


@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(1, 1), (16, 48), (80, 80), (96, 33), (33, 96), (64, 128), (256, 16)]
)
def test_head_dims(verify, head_dim, value_dim) -> None:
    q, k, v = attention_inputs(
        batch=1, heads=2, q_length=33, k_length=70, head_dim=head_dim, value_dim=value_dim, dtype=torch.bfloat16
    )
    verify(q, k, v, pattern=SlidingWindow(20))


def test_head_dim_512(verify) -> None:
    verify(*attention_inputs(batch=1, heads=1, q_length=17, k_length=40, head_dim=512, dtype=torch.float16))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_memory(verify, memory, layout) -> None:
    q, k, v = attention_inputs(heads=2, q_length=40, k_length=70, head_dim=16, dtype=torch.float16, memory=memory)
    verify(q, k, v, causal=True, layout=layout)


def test_grouped_heads(verify) -> None:
    for kv_heads in (1, 3):
        verify(*attention_inputs(heads=6, kv_heads=kv_heads, q_length=5, k_length=70), causal=True)


def test_rows_without_keys(verify) -> None:
    q, k, v = attention_inputs(q_length=90, k_length=33)
    found = verify(q, k, v, pattern=Causal())
    assert (found.out[:, :, :57] == 0).all()
    assert (found.lse[:, :, :57] == -torch.inf).all()


def test_keys_that_nobody_attends_to_may_hold_anything(verify) -> None:
    q, k, v = attention_inputs(q_length=40, k_length=100)
    stop = torch.tensor([33, 70], dtype=torch.int32)
    for item, end in enumerate(stop):
        k[item, :, end:] = torch.nan
        v[item, :, end:] = torch.inf
    found = verify(q, k.nan_to_num(0), v.nan_to_num(0, 0, 0), pattern=Padding(0 * stop, stop))
    again = verify.func(q, k, v, pattern=Padding(0 * stop, stop), **verify.keywords)
    assert torch.equal(found.out, again.out)


def test_keys_beyond_what_any_query_sees_may_hold_anything(verify) -> None:
    """Whole tiles are loaded only where every key of theirs is some query's."""
    q, k, v = attention_inputs(heads=2, q_length=40, k_length=100, head_dim=64, dtype=torch.float16)
    found = verify(q, k, v, pattern=Causal(0))
    k[:, :, 40:] = torch.nan
    v[:, :, 40:] = torch.nan
    again = verify.func.__globals__["run"](q, k, v, pattern=Causal(0), **verify.keywords)
    assert torch.equal(found.out, again.out)


def test_an_attended_nan_spreads(verify) -> None:
    q, k, v = attention_inputs(q_length=20, k_length=20)
    k[0, 1, 4, 3] = torch.nan
    found = verify.func.__globals__["run"](q, k, v, pattern=Causal(), **verify.keywords)
    assert found.out[0, 1, 4:].isnan().all()
    assert not found.out[1].isnan().any()


@pytest.mark.parametrize("k_length", [600, 1500])
@pytest.mark.parametrize("pattern", [Full(), Causal(), SlidingWindow(300, 0), Longformer(40, 3), CHUNKS], ids=repr)
def test_few_queries_over_split_keys(verify, pattern, k_length) -> None:
    q, k, v = attention_inputs(batch=1, heads=4, kv_heads=1, q_length=2, k_length=k_length, dtype=torch.float16)
    verify(q, k, v, pattern=pattern)
    verify(q, k, v, pattern=pattern, **all_features(1, 4, 2, k_length, torch.float16))


@pytest.mark.parametrize("pattern", [Full(), Causal(), SlidingWindow(1000, 0), SHIFTED], ids=repr)
def test_many_queries_over_split_keys(verify, pattern) -> None:
    q, k, v = attention_inputs(batch=1, heads=1, q_length=70, k_length=2100, head_dim=16, dtype=torch.float16)
    verify(q, k, v, pattern=pattern)
    found = forward_work(q, k, v, pattern.operands(70, 2100), pattern.schedule.encode(), 0.25, False)
    assert len(found.launches) == 2


def test_strided_sub_problems(verify) -> None:
    for offset in (None, 0, -3, torch.tensor([2, 5], dtype=torch.int32)):
        verify(*attention_inputs(heads=1, q_length=70, k_length=83), pattern=Dilated(7, 4, offset=offset))


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_split_calls_wait_for_what_is_before_them(captured) -> None:
    """Their kernels are launched while earlier ones run; what these write has to be there all the same."""
    q, k, v = (t.cuda() for t in attention_inputs(
        batch=1, heads=8, kv_heads=2, q_length=1, k_length=4096, head_dim=128, dtype=torch.float16
    ))  # fmt: skip
    fresh = torch.randn(20, *k.shape, device="cuda", dtype=torch.float16)
    given = torch.empty_like(k)

    def step() -> torch.Tensor:
        return attention(q, k.copy_(given), v, causal=True, backend="triton") + 1

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph, stream=stream):
                out = step()
        found = []
        for keys in fresh:
            given.copy_(keys)
            if captured:
                graph.replay()
                found.append(out.clone())
            else:
                found.append(step())
    stream.synchronize()
    for keys, row in zip(fresh, found, strict=True):
        wanted = torch.nn.functional.scaled_dot_product_attention(q, keys, v, enable_gqa=True)
        torch.testing.assert_close(row - 1, wanted, atol=2e-3, rtol=1e-2)
