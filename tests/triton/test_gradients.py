"""Gradients of Triton's kernels, of all tensors and through all outputs."""

from __future__ import annotations

import pytest
import torch
from inputs import all_features, attention_inputs, pattern_examples

from heedful import Causal, Dilated, Longformer, attention

EXAMPLES = range(len(pattern_examples(2, 4, 5, 7)))


@pytest.mark.parametrize("index", EXAMPLES)
def test_patterns(verify, index) -> None:
    pattern = pattern_examples(2, 2, 37, 61)[index]
    by_head = any(operand.ndim == 4 and operand.shape[1] > 1 for operand in pattern.operands(37, 61))
    # The interpreter takes its time by the head.
    heads = 2 if by_head or index == 0 else 1
    q, k, v = attention_inputs(heads=heads, kv_heads=1, q_length=37, k_length=61)
    verify(q, k, v, pattern=pattern, through=("out", "lse"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_dtypes_and_head_dims(verify, dtype, head_dim) -> None:
    q, k, v = attention_inputs(batch=1, heads=2, q_length=33, k_length=40, head_dim=head_dim, value_dim=24, dtype=dtype)
    verify(q, k, v, pattern=Causal(), through=("out",))


@pytest.mark.parametrize("pattern", [Causal(), Longformer(9, 3), Dilated(6, 5)], ids=repr)
@pytest.mark.parametrize("through", [("out",), ("out", "lse", "weights")], ids=",".join)
def test_features(verify, pattern, through) -> None:
    q, k, v = attention_inputs(batch=1, heads=2, q_length=33, k_length=40)
    verify(q, k, v, pattern=pattern, through=through, **all_features(1, 2, 33, 40, torch.float32))


def test_dropout(verify) -> None:
    q, k, v = attention_inputs(batch=1, heads=2, q_length=33, k_length=70)
    for pattern in (Causal(), Longformer(9, 3)):
        verify(q, k, v, pattern=pattern, through=("out",), dropout_p=0.3)


@pytest.mark.parametrize(("q_length", "k_length"), [(1, 1), (3, 113), (113, 3)])
def test_sizes(verify, q_length, k_length) -> None:
    q, k, v = attention_inputs(batch=1, heads=2, q_length=q_length, k_length=k_length)
    verify(q, k, v, pattern=Causal(), through=("out",))


@pytest.mark.parametrize("memory", ["blhd", "sliced", "expanded", "last-strided"])
def test_memory(verify, memory) -> None:
    q, k, v = attention_inputs(heads=2, q_length=33, k_length=40, memory=memory, dtype=torch.float16)
    verify(q, k, v, causal=True, through=("out",))


def test_queries_without_keys_may_hold_anything(device) -> None:
    """Of 92 queries the last 33 see keys, and they alone give gradients."""
    q, k, v = (t.to(device) for t in attention_inputs(
        heads=2, q_length=92, k_length=33, head_dim=64, dtype=torch.float16
    ))  # fmt: skip
    found = []
    for filling in (0.0, torch.nan):
        q[:, :, :59] = filling
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attention(*leaves, causal=True, backend="triton")
        found.append(torch.autograd.grad(out.float().square().sum(), leaves[1:]))
    for clean, other in zip(*found, strict=True):
        assert torch.equal(clean, other)
        assert clean.abs().max() > 0
