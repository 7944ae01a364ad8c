"""The examples of pytorch_custom_ops's guide, their import lines changed.

Not run: its shell commands, which build and install it, and the timings in its tables; `benchmarks/` has files of the
names that it gives to pytest.
"""

from __future__ import annotations

from typing import Any

import torch
from tolerance import expected

import heedful
from heedful.compat import pytorch_custom_ops

PARAMETRIC_SWISH = """
import torch
from heedful.compat.pytorch_custom_ops import parametric_swish, ParametricSwish

# Function interface
x = torch.randn(4, 8, requires_grad=True)
output = parametric_swish(x, beta=1.5)

# Module interface
activation = ParametricSwish(beta=2.0)
output = activation(x)

# Supports autograd
loss = output.sum()
loss.backward()
print(x.grad)  # Gradients computed correctly
"""

FUSED_ATTENTION = """
import torch
from heedful.compat.pytorch_custom_ops import fused_attention, FusedAttention

# Function interface
batch_size, seq_len, d_model = 2, 16, 64
query = torch.randn(batch_size, seq_len, d_model, requires_grad=True)
key = torch.randn(batch_size, seq_len, d_model, requires_grad=True)
value = torch.randn(batch_size, seq_len, d_model, requires_grad=True)

output, attention_weights = fused_attention(query, key, value)

# Module interface
attention = FusedAttention()
output, weights = attention(query, key, value)
"""


def run(example: str) -> dict[str, Any]:
    """The names that there are after an example."""
    names: dict[str, Any] = {}
    exec(compile(example, "example", "exec"), names)
    return names


def test_parametric_swish(capsys):
    names = run(PARAMETRIC_SWISH)
    x = names["x"].detach().double().requires_grad_()
    wanted = x * torch.sigmoid(2.0 * x)
    wanted.sum().backward()
    torch.testing.assert_close(names["output"].double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(names["x"].grad.double(), x.grad, rtol=1e-6, atol=1e-6)
    assert capsys.readouterr().out == f"{names['x'].grad}\n"


def test_fused_attention():
    names = run(FUSED_ATTENTION)
    assert torch.equal(names["attention_weights"], names["weights"])
    leaves = [names[name] for name in ("query", "key", "value")]
    upstream = torch.randn_like(names["output"]), torch.randn_like(names["weights"])
    gradients = torch.autograd.grad((names["output"], names["weights"]), leaves, upstream)
    wanted = expected(
        *(leaf.detach().unsqueeze(1) for leaf in leaves),
        grad_out=upstream[0].unsqueeze(1),
        grad_weights=upstream[1].unsqueeze(1),
    )
    wanted.out.check(names["output"].unsqueeze(1), "out")
    wanted.weights.check(names["weights"].unsqueeze(1), "weights")
    for name, gradient in zip("qkv", gradients, strict=True):
        wanted.gradients[name].check(gradient.unsqueeze(1), name)


def test_the_names_are_the_real_things():
    for name in pytorch_custom_ops.__all__:
        home = heedful.nn if name[0].isupper() else heedful.ops
        assert getattr(pytorch_custom_ops, name) is getattr(home, name)
