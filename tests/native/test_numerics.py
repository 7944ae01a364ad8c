"""Extreme numbers: large scores, infinities and NaN, denormals, and long sums, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from comparison import check, run
from inputs import DTYPES, attention_inputs
from tolerance import Bounded, expected
from torch import Tensor

from heedful import Causal, Full, SlidingWindow

OUT = ("out",)
# Sums as long as these are no more exact in the reference than in an fp64 engine.
NARROW = DTYPES[:3]


def scaled(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.double() * factor).to(tensor.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (30.0, 1e3, 1e4))
@pytest.mark.parametrize("pattern", (Full(), Causal(), SlidingWindow(30)), ids=repr)
def test_large_scores(dtype, size, pattern):
    q, k, v = attention_inputs(kv_heads=2, q_length=90, k_length=300, head_dim=16, dtype=dtype)
    q, k = scaled(q, math.sqrt(size)), scaled(k, math.sqrt(size))
    check(q, k, v, pattern=pattern, through=("out", "lse"), weights=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", (1e4, -1e4))
def test_scores_that_are_all_large(dtype, shift):
    """Every score of a row is near the same large number, so that the result is decided by small differences."""
    q, k, v = attention_inputs(q_length=40, k_length=300, head_dim=16, dtype=dtype)
    q[..., 0], k[..., 0] = 200.0, shift / 200 * 4
    check(q, k, v, through=OUT)
    check(q, k, v, causal=True, through=OUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", (1e4, -1e4, -3e4))
def test_a_large_bias_that_all_keys_share(dtype, shift):
    q, k, v = attention_inputs(q_length=40, k_length=300, head_dim=16, dtype=dtype)
    check(q, k, v, bias=torch.full((1, 1, 1, 1), shift), through=OUT)
    check(q, k, v, bias=torch.full((4, 40, 1), shift).to(dtype), through=OUT, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_s_largest_score_comes_last(dtype):
    """What was summed before is then rescaled by a number that is as good as 0."""
    q, k, v = attention_inputs(batch=1, heads=1, q_length=30, k_length=1100, head_dim=1, dtype=dtype)
    q.fill_(1.0)
    k[0, 0, :, 0] = torch.linspace(-200, 200, 1100).to(dtype)
    check(q, k, v, scale=1.0, through=OUT)
    check(q, k.flip(2), v, scale=1.0, through=OUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("q", "k", "v"))
@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf), ids=str)
def test_what_is_not_finite_reaches_the_rows_that_attend(dtype, name, poison):
    sizes = {"heads": 2, "q_length": 300, "k_length": 300}
    tensors = dict(zip("qkv", attention_inputs(**sizes, dtype=dtype), strict=True))
    tensors[name][1, 1, 250, 3] = poison
    found = run(*tensors.values(), causal=True, through=OUT)
    rows, gradients = found.out[1, 1], found.gradients
    for result in (found.out, *gradients.values()):
        assert bool(result[0].isfinite().all())
        assert bool(result[1, 0].isfinite().all())
    # A masked key may spread within its tile, which reaches no further.
    assert bool(rows[:128].isfinite().all())
    others = [column for column in range(16) if column != 3]
    if name == "v":
        wanted = torch.full((50,), poison, dtype=dtype)
        torch.testing.assert_close(rows[250:, 3], wanted, rtol=0, atol=0, equal_nan=True)
        assert bool(rows[:, others].isfinite().all())
        assert not bool(gradients["k"][1, 1, 250].isfinite().any())
    elif name == "q":
        assert not bool(rows[250].isfinite().any())
        assert bool(rows[:250].isfinite().all())
        assert bool(rows[251:].isfinite().all())
        assert not bool(gradients["q"][1, 1, 250].isfinite().any())
        assert not bool(gradients["k"][1, 1, :250].isfinite().any())
    elif math.isnan(poison):
        assert bool(rows[250:].isnan().all())
        assert not bool(gradients["q"][1, 1, 250:].isfinite().any())
    else:
        # A score of +inf makes the weights NaN, one of -inf gives the key none.
        below = tensors["q"][1, 1, 250:, 3] * poison < 0
        assert bool(rows[250:][~below].isnan().all())
        assert bool(rows[250:][below].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_what_arrives_reaches_the_gradients_of_what_the_row_attends_to(dtype):
    q, k, v = attention_inputs(batch=2, heads=2, q_length=90, k_length=90, dtype=dtype)
    upstream = torch.randn(2, 2, 90, 16).to(dtype)
    upstream[1, 1, 40, 3] = math.nan
    found = run(q, k, v, causal=True, through=OUT, upstream={"out": upstream}).gradients
    assert bool(found["q"][1, 1, 40].isnan().all())
    assert bool(found["k"][1, 1, :41].isnan().all())
    assert bool(found["v"][1, 1, :41, 3].isnan().all())
    for gradient in found.values():
        assert bool(gradient[0].isfinite().all())
        assert bool(gradient[1, 0].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_minus_infinity_are_no_keys(dtype):
    q, k, v = attention_inputs(batch=1, heads=1, q_length=5, k_length=300, head_dim=1, dtype=dtype)
    q.fill_(1.0)
    k[0, 0, ::3] = -math.inf
    found = run(q, k, v, weights=True)
    kept = torch.arange(300) % 3 != 0
    wanted = run(q, k[:, :, kept], v[:, :, kept])
    torch.testing.assert_close(found.out, wanted.out, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert not found.weights[..., ~kept].any()
    k.fill_(-math.inf)
    found = run(q, k, v, weights=True)
    assert not found.out.any()
    assert not found.weights.any()
    assert bool((found.lse == -math.inf).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormal_inputs(dtype):
    normal = torch.finfo(dtype).smallest_normal
    q, k, v = attention_inputs(q_length=40, k_length=90, dtype=dtype)
    arriving = torch.randn(2, 4, 40, 16).to(dtype)
    small = {name: scaled(t, normal / 4) for name, t in (("q", q), ("k", k), ("v", v), ("out", arriving))}
    for tensors, upstream in (
        ((small["q"], k, v), arriving),
        ((q, small["k"], v), arriving),
        ((q, k, small["v"]), arriving),
        ((q, k, v), small["out"]),
    ):
        found = run(*tensors, causal=True, through=OUT, upstream={"out": upstream})
        wanted = expected(*tensors, causal=True, grad_out=upstream)
        # The processors' bf16 dot product reads denormals as 0: every term of a sum may be off by one of them.
        slack = 100 * normal if dtype == torch.bfloat16 else 0.0
        for name, result in (("out", found.out), ("lse", found.lse), *found.gradients.items()):
            bounded = wanted.gradients.get(name) or getattr(wanted, name)
            Bounded(bounded.value, bounded.bound + slack).check(result, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_near_the_largest_number(dtype):
    """A sum of weights times values that overflows before it is divided by the sum of weights would show."""
    q, k, v = attention_inputs(q_length=20, k_length=400, dtype=dtype)
    largest = torch.finfo(dtype).max
    v = (torch.rand(v.shape, dtype=torch.float64) * 0.001 * largest).to(dtype)
    check(q, k, v)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sums_over_100k_keys(dtype):
    q, k, v = attention_inputs(batch=1, heads=1, q_length=3, k_length=100_003, head_dim=8, dtype=dtype)
    check(q, k, v, through=("out", "lse"))
    # Values of one sign, whose partial sums grow.
    check(q, k, v.abs(), through=("out", "lse"), upstream={"out": torch.ones(1, 1, 3, 8, dtype=dtype)})


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sums_over_100k_queries(dtype):
    q, k, v = attention_inputs(batch=1, heads=2, kv_heads=1, q_length=50_001, k_length=3, head_dim=8, dtype=dtype)
    check(q, k, v, through=OUT)
    ones = {"out": torch.ones(1, 2, 50_001, 8, dtype=dtype)}
    check(q, k, v, through=OUT, upstream=ones, sinks=torch.randn(2), bias=torch.randn(1, 2, 1, 3))
