"""heedful.ops.fused_attention and heedful.nn.FusedAttention."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from operation_checks import OperationChecks, poison
from tolerance import expected
from torch.autograd import gradcheck, gradgradcheck

import heedful
from heedful.nn import FusedAttention
from heedful.ops import fused_attention


class TestFusedAttention(OperationChecks):
    name = "fused_attention"
    variants = ("flat", "heads", "cross", "grouped", "scale")
    shapes = ((1, 1, 1), (1, 3, 8), (2, 113, 33), (1, 239, 64))
    small = (2, 3, 2)
    large = (2, 300, 16)
    empty = ((0, 3, 4), (2, 0, 4))

    def make(self, variant, shape, dtype):
        batch, length, dim = shape
        heads = {"flat": (), "scale": ()}.get(variant, (2,))
        groups = (1,) if variant == "grouped" else heads
        more = 4 if variant == "cross" and length else 0
        call = {
            "q": torch.randn(batch, *heads, length, dim).to(dtype),
            "k": torch.randn(batch, *groups, length + more, dim).to(dtype),
            "v": torch.randn(batch, *groups, length + more, dim + more).to(dtype),
        }
        return call | ({"scale": 0.7} if variant == "scale" else {})

    def compare(self, variant, call):
        poison(*self.leaves(call).values())
        (out, weights), gradients, (grad_out, grad_weights) = self.run(call)
        with torch.no_grad():
            poison(out, weights)
            alone = fused_attention(**call)
        assert torch.equal(alone[0], out)
        assert torch.equal(alone[1], weights)

        def ranked(tensor):
            return tensor if tensor.ndim == 4 else tensor.unsqueeze(1)

        tensors = [ranked(call[name]) for name in "qkv"]
        wanted = expected(
            *tensors, scale=call.get("scale"), grad_out=ranked(grad_out), grad_weights=ranked(grad_weights)
        )
        wanted.out.check(ranked(out), "out")
        wanted.weights.check(ranked(weights), "weights")
        for name, gradient in gradients.items():
            assert gradient.dtype == call[name].dtype
            wanted.gradients[name].check(ranked(gradient), f"gradient of {name}")

    def operator_calls(self):
        return []

    def test_opcheck(self):
        """Its operators have tests of their own."""

    @pytest.mark.parametrize("kind", ["flat", "grouped"])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_whole(self, kind, dynamic):
        """The head dim is a constant of the call: its root scales the scores."""
        torch._dynamo.reset()
        compiled = torch.compile(fused_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for shape in ((3, 5, 17), (5, 7, 17)):
            call = self.make(kind, shape, torch.float32)
            if dynamic:
                for tensor in self.leaves(call).values():
                    torch._dynamo.mark_static(tensor, tensor.ndim - 1)
            with torch._dynamo.config.patch(error_on_recompile=dynamic):
                found, gradients, upstream = self.run(call)
                again, gradients_again, _ = self.run(call, upstream, compiled)
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
            for name in gradients:
                torch.testing.assert_close(gradients[name], gradients_again[name])

    @pytest.mark.parametrize("kind", ["flat", "grouped"])
    def test_inductor(self, kind):
        super().test_inductor(kind)

    def test_gradcheck(self, variant):
        call = self.make(variant, self.small, torch.float64)
        leaves = tuple(tensor.requires_grad_() for tensor in self.leaves(call).values())
        scale = call.get("scale")
        assert gradcheck(lambda q, k, v: fused_attention(q, k, v, scale), leaves)
        assert gradcheck(lambda q, k, v: fused_attention(q, k, v, scale)[1], leaves)
        assert gradgradcheck(lambda q, k, v: fused_attention(q, k, v, scale, backend="reference"), leaves)
        out, weights = fused_attention(*leaves, scale)
        (first,) = torch.autograd.grad(out.sum() + weights.square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match='backend="reference" has derivatives of any order'):
            first.sum().backward()


def test_is_attention_with_its_weights():
    q, k, v = (torch.randn(2, 4, 37, 16) for _ in range(3))
    found = heedful.attention(q, k, v, return_weights=True, backend="native")
    out, weights = fused_attention(q, k, v)
    assert torch.equal(out, found.out)
    assert torch.equal(weights, found.weights)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 37))


@pytest.mark.parametrize("reached", ["out", "weights", "both"])
def test_gradients_through_each_output(reached):
    leaves = [torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found, wanted = [], []
    for backend, gradients in ((None, found), ("reference", wanted)):
        out, weights = fused_attention(*leaves, backend=backend)
        loss = {"out": out.square().sum(), "weights": weights.square().sum()}
        total = sum(loss.values()) if reached == "both" else loss[reached]
        gradients += torch.autograd.grad(total, leaves, materialize_grads=True)
    for gradient, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, right)


def test_wide_heads_take_the_composition():
    q, k, v = (torch.randn(2, 5, 600) for _ in range(3))
    out, weights = fused_attention(q, k, v)
    wanted = torch.softmax(q @ k.mT / 600**0.5, -1)
    torch.testing.assert_close(weights, wanted)
    torch.testing.assert_close(out, wanted @ v)


MEMORY = """
import resource, torch
from heedful.ops import fused_attention

torch.set_num_threads(2)
dtype = torch.{dtype}
def call(length):
    q, k, v = (torch.randn(1, 4, length, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    out, weights = fused_attention(q, k, v)
    arriving = torch.ones((), dtype=dtype).expand_as(weights)
    torch.autograd.grad((out, weights), (q, k, v), (torch.ones_like(out), arriving))
call(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(2048)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / (4 * 2048**2 * dtype.itemsize))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_held_once(dtype):
    """Through forward and backward less than half of another copy, most of it inputs, outputs and their gradients."""
    found = subprocess.run(
        [sys.executable, "-c", MEMORY.format(dtype=dtype)], capture_output=True, text=True, check=True
    )
    assert float(found.stdout) < 1.5


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1.0], 1, 1), TypeError, "q takes a tensor"),
        ((torch.ones(2, 3),) * 3, ValueError, r"q takes \(B, S, D\) or \(B, H, S, D\), got shape \(2, 3\)"),
        ((torch.ones(1, 2, 3), torch.ones(1, 1, 2, 3), torch.ones(1, 2, 3)), ValueError, "k takes as many dimensions"),
        ((torch.ones(1, 2, 3).int(),) * 3, TypeError, "q takes a floating tensor, got a tensor of torch.int32"),
        ((torch.ones(1, 2, 3), torch.ones(1, 2, 3).half(), torch.ones(1, 2, 3)), TypeError, "k takes q's dtype"),
        ((torch.ones(1, 2, 3), torch.ones(1, 2, 4), torch.ones(1, 2, 3)), ValueError, "k takes q's head dim, 3"),
        ((torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 4, 3)), ValueError, "v takes k's length, 2"),
        ((torch.ones(1, 2, 3),) * 3 + (torch.inf,), ValueError, "scale takes a finite number"),
        ((torch.ones(1, 2, 3),) * 3 + ("2",), TypeError, "scale takes a number"),
        ((torch.ones(1, 2, 0),) * 3, ValueError, "q takes 1 or more, got head dim 0"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_input(arguments, error, text, backend):
    with pytest.raises(error, match=text):
        fused_attention(*arguments, backend=backend)


def test_module():
    q, k, v = (torch.randn(2, 7, 8) for _ in range(3))
    for found, wanted in zip(FusedAttention(0.3)(q, k, v), fused_attention(q, k, v, 0.3), strict=True):
        assert torch.equal(found, wanted)
    assert repr(FusedAttention(0.3)) == "FusedAttention(scale=0.3)"
    assert repr(FusedAttention()) == "FusedAttention()"
