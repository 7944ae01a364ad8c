"""The examples of ma_core's integration guide, their import lines changed.

Not run: what has no code in the guide, its shell commands over files that it does not hold, and the timings in its
comments. Names that an example uses without saying what they are (query, self, model, loss, input) are made here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance import expected
from torch import nn

from heedful import Causal, Pattern, SlidingWindow
from heedful.compat.ma_core import MACoreAttention, SparseAttention

BASIC_ATTENTION_LAYER = """
from heedful.compat.ma_core import MACoreAttention

# Sparse attention (recommended for long sequences)
attention = MACoreAttention(sparse=True, window_size=64)

# Dense attention with causal masking
attention = MACoreAttention(sparse=False, use_causal_mask=True)

# Use in your model
output = attention(query, key, value)  # [batch, seq, heads, dim]
"""

DROP_IN_REPLACEMENT = """
# OLD: Standard PyTorch attention
self.attention = nn.MultiheadAttention(model_dim, num_heads=8)

# NEW: High-performance ma_core attention
from heedful.compat.ma_core import SparseAttention
self.attention = SparseAttention(window_size=32, use_ma_core=True)
"""

TRAINING_AND_INFERENCE_MODES = """
model.train()  # Uses PyTorch implementation for gradient compatibility
loss.backward()  # Gradients flow correctly

model.eval()   # Uses C++ implementation for maximum speed
with torch.no_grad():
    output = model(input)  # 2-8x faster inference
"""


def run(example: str, **names: Any) -> dict[str, Any]:
    """The names that there are after an example, of those that it was given and its own."""
    exec(compile(example, "example", "exec"), names)
    return names


def heads(batch: int = 2, length: int = 150, count: int = 4, dim: int = 16) -> list[torch.Tensor]:
    return [torch.randn(batch, length, count, dim) for _ in range(3)]


def check(output: torch.Tensor, tensors: list[torch.Tensor], pattern: Pattern) -> None:
    expected(*(t.transpose(1, 2) for t in tensors), pattern=pattern).out.check(output.transpose(1, 2))


def test_basic_attention_layer() -> None:
    query, key, value = heads()
    names = run(BASIC_ATTENTION_LAYER, query=query, key=key, value=value)
    check(names["output"], [query, key, value], Causal())


def test_the_sparse_layer_of_the_basic_example() -> None:
    tensors = heads()
    check(MACoreAttention(sparse=True, window_size=64)(*tensors), tensors, SlidingWindow(64))


def test_drop_in_replacement() -> None:
    model_dim = 64
    layer = run(DROP_IN_REPLACEMENT, self=nn.Module(), nn=nn, model_dim=model_dim)["self"].attention
    assert isinstance(layer, SparseAttention)
    tensors = [torch.randn(2, 100, model_dim) for _ in range(3)]
    check(layer(*tensors)[:, :, None], [t[:, :, None] for t in tensors], SlidingWindow(32))


class Transformer(nn.Module):
    """The model around the layer: projections, heads, a residual."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *inputs, output = self.projections
        out = self.attention(*(projection(x).view(*x.shape[:2], 4, 8) for projection in inputs))
        return x + output(out.view(x.shape))


@pytest.mark.parametrize("options", [{"sparse": True, "window_size": 8}, {"use_causal_mask": True}])
def test_training_and_inference_modes(options) -> None:
    model, x = Transformer(MACoreAttention(**options)), torch.randn(2, 40, 32)
    names = run(TRAINING_AND_INFERENCE_MODES, model=model, loss=model(x).square().mean(), input=x, torch=torch)
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if name != "projections.1.bias")
    assert not names["output"].requires_grad
    torch.testing.assert_close(names["output"], model.train()(x))
