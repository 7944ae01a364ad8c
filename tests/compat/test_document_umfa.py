"""The examples of umfa's guide, with their import lines changed and what they leave out (inputs, timings) put in."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy_arrays import check, wanted

from heedful.compat import umfa

DROP_IN = """
import torch
import torch.nn.functional as F

from heedful.compat import umfa

# Create a drop-in replacement class
class MetalSDPA:
    def __init__(self):
        self.context = umfa.MFAContext()

    def __call__(self, query, key, value, is_causal=False):
        # Convert PyTorch tensors to numpy (zero-copy when possible)
        q_np = query.detach().cpu().numpy()
        k_np = key.detach().cpu().numpy()
        v_np = value.detach().cpu().numpy()

        # Call Metal Flash Attention
        output_np = umfa.flash_attention_forward(
            self.context, q_np, k_np, v_np,
            causal=is_causal,
            input_precision="fp16" if query.dtype == torch.float16 else "fp32"
        )

        # Convert back to PyTorch
        return torch.from_numpy(output_np)
"""

USAGE = """
# Usage example
seq_len, head_dim = 512, 64
q = torch.randn(seq_len, head_dim, dtype=torch.float16)
k = torch.randn(seq_len, head_dim, dtype=torch.float16)
v = torch.randn(seq_len, head_dim, dtype=torch.float16)

# Standard PyTorch SDPA
pytorch_output = F.scaled_dot_product_attention(q, k, v, is_causal=True)

metal_sdpa = MetalSDPA()
metal_output = metal_sdpa(q, k, v, is_causal=True)

print(f"PyTorch output shape: {pytorch_output.shape}")
print(f"Metal output shape: {metal_output.shape}")
print(f"Results are equivalent: {torch.allclose(pytorch_output, metal_output, atol=1e-3)}")
"""

MODULE = """
import torch.nn as nn

class MetalAttentionLayer(nn.Module):
    def __init__(self, d_model, num_heads=1):
        super().__init__()
        self.d_model = d_model
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads

        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

        self.metal_sdpa = MetalSDPA()

    def forward(self, x, causal=False):
        batch_size, seq_len, _ = x.shape

        q = self.q_proj(x).view(batch_size * seq_len, self.head_dim)
        k = self.k_proj(x).view(batch_size * seq_len, self.head_dim)
        v = self.v_proj(x).view(batch_size * seq_len, self.head_dim)

        attn_out = self.metal_sdpa(q, k, v, is_causal=causal)
        attn_out = attn_out.view(batch_size, seq_len, self.d_model)

        return self.out_proj(attn_out)

# Usage
layer = MetalAttentionLayer(d_model=128, num_heads=1)
layer = layer.half()  # Convert to FP16 for optimal performance
x = torch.randn(2, 256, 128, dtype=torch.float16)
output = layer(x, causal=True)
"""

CONTEXT = """
context = umfa.MFAContext()
# Use context for attention operations
context.close()  # Cleanup when done

# Or use as context manager (recommended)
with umfa.MFAContext() as ctx:
    output = umfa.flash_attention_forward(ctx, q, k, v)
"""

ONE_LINER = """
# Simple one-liner (creates and manages context internally)
output = umfa.attention(q, k, v, causal=True, input_precision="fp32")
"""

UTILITIES = """
# Check Metal availability
is_available = umfa.is_metal_available()

# Get library version
major, minor, patch = umfa.get_version()
print(f"UMFA version: {major}.{minor}.{patch}")
"""

WARMUP = """
# MFA kernels need warmup for optimal performance
with umfa.MFAContext() as ctx:
    # Warmup (5 iterations recommended)
    for _ in range(5):
        _ = umfa.flash_attention_forward(ctx, q, k, v)

    # Now benchmark/run production code
    start = time.time()
    output = umfa.flash_attention_forward(ctx, q, k, v)
    elapsed = time.time() - start
"""

PRECISION = """
# FP16 for maximum performance (recommended)
output = umfa.attention(q, k, v, input_precision="fp16")
half = output

# FP32 for maximum accuracy
output = umfa.attention(q, k, v, input_precision="fp32")
"""

REUSE = """
# Don't create new contexts repeatedly
for batch in batches:
    ctx = umfa.MFAContext()  # Expensive!
    output = umfa.flash_attention_forward(ctx, q, k, v)
    ctx.close()
first = output

# Reuse context across batches
with umfa.MFAContext() as ctx:
    for batch in batches:
        output = umfa.flash_attention_forward(ctx, q, k, v)
"""

TROUBLE = """
# Check Metal support
from heedful.compat import umfa
print(f"Metal available: {umfa.is_metal_available()}")
"""


def run(*examples: str, **names: object) -> dict[str, object]:
    scope = {"umfa": umfa, "time": time, **names}
    for example in examples:
        exec(compile(example, "example", "exec"), scope)
    return scope


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((512, 64)).astype(np.float32) for name in "qkv"}


def test_drop_in_for_sdpa(capsys):
    found = run(DROP_IN, USAGE)
    printed = capsys.readouterr().out
    assert "PyTorch output shape: torch.Size([512, 64])" in printed
    assert "Metal output shape: torch.Size([512, 64])" in printed
    assert found["metal_output"].dtype == torch.float16
    torch.testing.assert_close(found["metal_output"], found["pytorch_output"], atol=1e-3, rtol=1e-3)
    assert "Results are equivalent: True" in printed


def test_attention_layer():
    found = run(DROP_IN, MODULE)
    layer, x, output = found["layer"], found["x"], found["output"]
    assert output.shape == (2, 256, 128)
    assert output.dtype == torch.float16
    q, k, v = (project(x).view(512, 128) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    same = layer.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).view(2, 256, 128))
    torch.testing.assert_close(output, same, atol=2e-3, rtol=2e-3)


def test_context(arrays):
    found = run(CONTEXT, **arrays)
    assert found["context"].closed
    assert found["ctx"].closed
    np.testing.assert_array_equal(found["output"], umfa.attention(*arrays.values()))


def test_one_liner(arrays):
    q, k, v = arrays.values()
    found = run(ONE_LINER, **arrays)
    reference = wanted(q, k, v, causal=True)
    check(umfa.attention(q, k, v, causal=True, return_lse=True), reference)
    np.testing.assert_array_equal(found["output"], umfa.attention(q, k, v, causal=True))


def test_utilities(capsys):
    found = run(UTILITIES, TROUBLE)
    assert found["is_available"] is umfa.is_metal_available()
    major, minor, patch = (found[name] for name in ("major", "minor", "patch"))
    printed = capsys.readouterr().out
    assert f"UMFA version: {major}.{minor}.{patch}\n" in printed
    assert f"Metal available: {found['is_available']}" in printed


def test_warmup(arrays):
    found = run(WARMUP, **arrays)
    assert found["elapsed"] >= 0
    np.testing.assert_array_equal(found["output"], found["_"])


def test_precision_selection(arrays):
    found = run(PRECISION, **arrays)
    assert found["half"].dtype == np.float16
    assert found["output"].dtype == np.float32
    halves = [x.astype(np.float16) for x in arrays.values()]
    np.testing.assert_array_equal(found["half"], umfa.attention(*halves))
    np.testing.assert_array_equal(found["output"], umfa.attention(*arrays.values()))


def test_context_reuse(arrays):
    found = run(REUSE, batches=range(3), **arrays)
    np.testing.assert_array_equal(found["first"], found["output"])


@pytest.mark.parametrize("shape", [(9, 16), (3, 9, 16), (2, 3, 9, 16)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_class_of_that_name(shape, is_causal):
    q, k, v = (torch.randn(*shape[:-2], length, 16, requires_grad=True) for length in (shape[-2], 7, 7))
    found = umfa.MetalSDPA()(q, k, v, is_causal=is_causal)
    same = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(found, same)
    upstream = torch.randn_like(found)
    for got, want in zip(
        torch.autograd.grad(found, (q, k, v), upstream), torch.autograd.grad(same, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_errors_have_a_code():
    context = umfa.MFAContext()
    context.close()
    with pytest.raises(umfa.MFAError) as caught:
        umfa.flash_attention_forward(context, *[np.ones((3, 8), np.float32)] * 3)
    assert caught.value.code == 1
    assert caught.value.message == "the context is closed"
