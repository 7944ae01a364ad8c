"""The examples of TorchBridge's five-level guide, with their import lines changed.

Not run: what is no code or has `...` in its place (a Triton kernel without a body, a template), CUDA C++, and the
bad half of an example, a loop over names that it does not make. Names that an example leaves out are made here.
"""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heedful import levels
from heedful.compat import torchbridge

scripted = pytest.mark.skipif(sys.version_info >= (3, 14), reason="TorchScript is gone from Python 3.14")

LEVEL_1 = """
# Good: Tensor-native operations that map to optimized kernels
scores = torch.matmul(q, k.transpose(-2, -1)) * scale
weights = F.softmax(scores, dim=-1)
output = torch.matmul(weights, v)
"""

LEVEL_2 = """
@torch.jit.script
def fused_layer_norm_activation(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    # LayerNorm + GELU fused into single kernel
    mean = x.mean(dim=-1, keepdim=True)
    var = x.var(dim=-1, unbiased=False, keepdim=True)
    normalized = (x - mean) / torch.sqrt(var + 1e-5)
    scaled = normalized * weight + bias

    # GELU activation fused in same kernel
    return scaled * 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (scaled + 0.044715 * scaled.pow(3))))
"""

LEVEL_3 = """
@torch.compile
class OptimizedAttentionBlock(nn.Module):
    def forward(self, x):
        # Automatic kernel fusion via TorchInductor + Triton
        with torch.cuda.amp.autocast():
            # Uses optimized FlashAttention when available
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
"""

COMPARISON = """
from heedful.compat.torchbridge import (
    BasicOptimizedAttention,
    CompileOptimizedAttention,
    JITOptimizedAttention,
    compare_optimization_levels,
)

# Compare attention implementations across levels
implementations = {
    'level_1_basic': BasicOptimizedAttention(dim=512, heads=8),
    'level_2_jit': JITOptimizedAttention(dim=512, heads=8),
    'level_3_compile': CompileOptimizedAttention(dim=512, heads=8),
}

results = compare_optimization_levels(implementations, input_shape=(4, 128, 512))
"""

VERIFICATION = """
from heedful.compat.torchbridge import BasicOptimizedAttention, JITOptimizedAttention

def test_computational_preservation():
    \"\"\"Ensure all optimization levels produce identical outputs\"\"\"
    basic = BasicOptimizedAttention()
    jit = JITOptimizedAttention()

    x = torch.randn(4, 128, 512)

    with torch.no_grad():
        output_basic = basic(x)
        output_jit = jit(x)

        assert torch.allclose(output_basic, output_jit, atol=1e-6)
"""


def run(example: str, **names: Any) -> dict[str, Any]:
    """The names that there are after an example, of those that it was given and its own."""
    names |= {"torch": torch, "F": F, "nn": nn, "math": math}
    exec(compile(example, "example", "exec"), names)
    return names


def test_level_1() -> None:
    q, k, v = torch.randn(3, 2, 4, 33, 16)
    output = run(LEVEL_1, q=q, k=k, v=v, scale=0.25)["output"]
    torch.testing.assert_close(levels.create("attention", 5, scale=0.25)(q, k, v), output, rtol=1e-5, atol=1e-5)


@scripted
def test_level_2(tmp_path, monkeypatch) -> None:
    # TorchScript reads the source of what it compiles, so that it has to be in a file.
    (tmp_path / "level_2_example.py").write_text(f"import math\nimport torch\n{LEVEL_2}")
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import level_2_example
    x, weight, bias = torch.randn(3, 5, 64), torch.randn(64), torch.randn(64)
    found = level_2_example.fused_layer_norm_activation(x, weight, bias)
    wanted = F.gelu(F.layer_norm(x, (64,), weight, bias), approximate="tanh")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_level_3() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    block = run(LEVEL_3, q=q, k=k, v=v)["OptimizedAttentionBlock"]()
    wanted = levels.create("attention", 5, causal=True)(q, k, v)
    torch.testing.assert_close(block(q), wanted, rtol=1e-5, atol=1e-5)


@scripted
def test_comparison(monkeypatch) -> None:
    # The example is what it is; how long it measures is not said there.
    monkeypatch.setitem(torchbridge.compare_optimization_levels.__kwdefaults__, "seconds", 0.0)
    results = run(COMPARISON)["results"]
    assert list(results) == ["level_1_basic", "level_2_jit", "level_3_compile"]
    assert results.equivalent
    assert all(result.forward_seconds > 0 for result in results.values())
    assert "level_3_compile" in str(results)


@scripted
def test_verification() -> None:
    run(VERIFICATION)["test_computational_preservation"]()


@scripted
def test_instances_share_initial_weights_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    basic = torchbridge.BasicOptimizedAttention()
    scripted = torchbridge.JITOptimizedAttention(512, 8)
    assert torch.equal(torch.rand(3), wanted)
    assert (basic.level, scripted.level) == (1, 2)
    for one, other in zip(basic.parameters(), scripted.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(torchbridge.BasicOptimizedAttention(seed=1).out.weight, basic.out.weight)
    causal = torchbridge.BasicOptimizedAttention(16, 2, causal=True)
    assert causal.causal
    x = torch.randn(1, 6, 16)
    later = x.clone()
    later[:, 4:] = 0
    torch.testing.assert_close(causal(x)[:, :4], causal(later)[:, :4])
