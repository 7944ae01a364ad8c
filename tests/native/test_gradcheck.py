"""torch.autograd.gradcheck through the engine in fp64: every derivative against differences of the forward."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import attention_inputs, pattern_examples
from torch import Tensor
from torch.autograd import gradcheck

import heedful
from heedful import Causal, Full, Mask, SlidingWindow

FEATURES = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "bias": {"bias": (2, 2, 3, 5)},
    "broadcast bias": {"bias": (1, 2, 1, 5)},
    "alibi": {"alibi_slopes": (2,)},
    "alibi per batch": {"alibi_slopes": (2, 2)},
    "sinks": {"sinks": (2,)},
    "dropout": {"dropout_p": 0.4},
    "everything": {"softcap": 1.5, "bias": (2, 1, 3, 5), "alibi_slopes": (2, 2), "sinks": (2,), "dropout_p": 0.4},
}


def leaves_of(options: dict[str, object]) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Random tensors for the options that are shapes, and the other options."""
    tensors = {n: torch.randn(v, dtype=torch.float64) for n, v in options.items() if isinstance(v, tuple)}
    return tensors, {n: v for n, v in options.items() if n not in tensors}


def check_gradients(q: Tensor, k: Tensor, v: Tensor, options: dict[str, object], *, fast: bool = False) -> None:
    tensors, rest = leaves_of(options)

    def call(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The same dropout at every evaluation.
        torch.manual_seed(7)
        found = heedful.attention(
            q, k, v, **dict(zip(tensors, others, strict=True)), **rest,
            return_lse=True, return_weights=True, backend="native",
        )  # fmt: skip
        # Rows without a key have a constant lse of -inf, whose differences are NaN.
        return found.out, found.lse.masked_fill(found.lse == -math.inf, 0.0), found.weights

    inputs = tuple(t.detach().requires_grad_() for t in (q, k, v, *tensors.values()))
    assert gradcheck(call, inputs, fast_mode=fast)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    "pattern",
    (Full(), Causal(), Causal(offset=-1), SlidingWindow(1), Mask(torch.eye(5, dtype=torch.bool)[:3] != 1)),
    ids=repr,
)
def test_features(features, pattern):
    q, k, v = attention_inputs(
        heads=2, kv_heads=1, q_length=3, k_length=5, head_dim=2, value_dim=3, dtype=torch.float64
    )
    check_gradients(q, k, v, {"pattern": pattern, **FEATURES[features]})


@pytest.mark.parametrize("featured", (False, True), ids=("plain", "features"))
@pytest.mark.parametrize("index", range(len(pattern_examples(2, 2, 50, 50))))
def test_patterns(index, featured):
    for q_length, k_length in ((19, 70), (40, 21)):
        q, k, v = attention_inputs(
            heads=2, kv_heads=1, q_length=q_length, k_length=k_length, head_dim=3, value_dim=2, dtype=torch.float64
        )
        pattern = pattern_examples(2, 2, q_length, k_length)[index]
        features = {
            "softcap": 2.0, "bias": (2, 1, q_length, k_length), "alibi_slopes": (2,), "sinks": (2,), "dropout_p": 0.2,
        }  # fmt: skip
        check_gradients(q, k, v, {"pattern": pattern} | (features if featured else {}), fast=True)


@pytest.mark.parametrize("sizes", ((1, 1, 1, 1), (1, 1, 1, 7), (2, 4, 1, 9), (1, 2, 6, 1)), ids=str)
def test_sizes(sizes):
    batch, heads, q_length, k_length = sizes
    q, k, v = attention_inputs(
        batch=batch, heads=heads, q_length=q_length, k_length=k_length, head_dim=1, value_dim=2, dtype=torch.float64
    )
    check_gradients(q, k, v, {"softcap": 3.0, "sinks": (heads,)})


@pytest.mark.parametrize("layout", ("bhld", "blhd"))
def test_layout_and_strides(layout):
    q, k, v = attention_inputs(
        heads=2, q_length=3, k_length=4, head_dim=2, value_dim=3, dtype=torch.float64, memory="last-strided"
    )
    if layout == "blhd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    check_gradients(q, k, v, {"layout": layout, "causal": True})
