"""heedful.ops.parametric_swish and heedful.nn.ParametricSwish."""

from __future__ import annotations

import pytest
import torch
from operation_checks import DTYPES, OperationChecks, in_memory
from torch.nn import functional

from heedful.nn import ParametricSwish
from heedful.ops import parametric_swish


class TestParametricSwish(OperationChecks):
    name = "parametric_swish"
    variants = ("number", "scalar", "one", "per channel", "per middle channel", "float32 betas")

    def make(self, variant, shape, dtype):
        call = {"x": (4 * torch.randn(shape)).to(dtype)}
        if variant == "number":
            return call | {"beta": 1.5}
        if variant in ("scalar", "one"):
            return call | {"beta": (torch.randn(1) if variant == "one" else torch.randn(())).to(dtype)}
        dim = len(shape) // 2 if variant == "per middle channel" else -1
        kept = dtype if variant != "float32 betas" or dtype == torch.float64 else torch.float32
        return call | {"beta": torch.randn(shape[dim]).to(kept), "dim": dim}

    def parts(self, call):
        """t = βx, its sigmoid, and a function that sums over what shares a beta."""
        x, beta, dim = call["x"], call["beta"], call.get("dim", -1)
        several = isinstance(beta, torch.Tensor) and beta.numel() > 1
        per_element = beta.view(-1, *(1,) * (x.ndim - 1 - dim % x.ndim)) if several else beta
        shape = per_element.shape if several else (1,) * x.ndim
        t = per_element * x
        return t, torch.sigmoid(t), lambda terms: terms.sum_to_size(shape).reshape(beta.shape)

    def errors(self, variant, call, upstream):
        """t is off by u|t|, which moves the sigmoid by (1 - s)|t|u of itself; and a few roundings."""
        x, arriving = call["x"], upstream[0].abs()
        t, s, sums = self.parts(call)
        rest, grown = torch.sigmoid(-t), 6 + 2 * t.abs()
        sizes = {"x": arriving * (s + t.abs() * s * rest) * grown}
        if isinstance(call["beta"], torch.Tensor):
            sizes["beta"] = sums(arriving * x.square() * s * rest * grown)
        return [x.abs() * s * grown], sizes

    def reference_errors(self, variant, call, upstream):
        """PyTorch takes 1 - s from a rounded s."""
        if not isinstance(call["beta"], torch.Tensor):
            return {}
        _, s, sums = self.parts(call)
        return {"beta": sums(upstream[0].abs() * call["x"].square() * s)}

    def operator_calls(self):
        x, betas, grad = torch.randn(3, 5), torch.rand(5), torch.randn(3, 5)
        turned = torch.randn(4, 3, 5).transpose(0, 2)[:, ::2]
        needs = torch.randn(3, 5).requires_grad_()
        return [
            ("parametric_swish", (x, None, 1.5, 1)),
            ("parametric_swish", (x, betas, 1.0, 1)),
            ("parametric_swish", (turned, None, 1.0, 0)),
            ("parametric_swish", (torch.randn(1, 4).expand(3, 4), None, 1.0, 0)),
            ("parametric_swish_", (x, None, 1.5, 1)),
            ("parametric_swish_backward", (grad, x, None, 1.5, 1, True)),
            ("parametric_swish_backward", (grad, x, betas, 1.0, 1, True)),
            ("parametric_swish_backward", (grad, needs.detach(), betas, 1.0, 1, False)),
        ]

    @pytest.mark.parametrize("wide", [(5, 3, 70001), (70001, 3), (3, 70, 300), (1, 90000)], ids=str)
    @pytest.mark.parametrize("dim", [-2, -1])
    def test_betas_of_large_inputs(self, wide, dim):
        beta = torch.rand(wide[dim]) + 0.5
        self.compare("per channel", {"x": torch.randn(wide), "beta": beta, "dim": dim})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_out(dtype):
    """Infinities, NaN, and arguments whose exponential is out of range."""
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0, -0.0, -90.0, -104.0, -800.0, 90.0, 800.0]).to(dtype)
    for beta in (1.0, -3.0, 0.0):
        found = parametric_swish(x, beta).double()
        wanted = x.double() * torch.sigmoid(beta * x.double())
        tiny = torch.finfo(dtype).smallest_normal
        torch.testing.assert_close(found, wanted, rtol=8 * torch.finfo(dtype).eps, atol=8 * tiny, equal_nan=True)


def test_is_silu_at_one_and_half_at_zero():
    x = torch.randn(1000, dtype=torch.float64)
    torch.testing.assert_close(parametric_swish(x), functional.silu(x))
    assert torch.equal(parametric_swish(x, 0.0), x / 2)


@pytest.mark.parametrize("memory", ["contiguous", "transposed", "sliced", "last-strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype, memory):
    x = in_memory(torch.randn(5, 4, 37).to(dtype), memory)
    wanted = parametric_swish(x, 2.0)
    version = x._version
    assert parametric_swish(x, 2.0, inplace=True) is x
    assert torch.equal(x, wanted)
    assert x._version > version


def test_in_place_is_refused_where_a_gradient_needs_the_input():
    x, beta = torch.randn(3), torch.rand(1, requires_grad=True)
    with pytest.raises(ValueError, match="inplace=True would overwrite x, which a gradient needs"):
        parametric_swish(x.clone().requires_grad_(), inplace=True)
    with pytest.raises(ValueError, match="inplace=True would overwrite x"):
        parametric_swish(x, beta, inplace=True)
    with pytest.raises(ValueError, match="memory of its own"):
        parametric_swish(torch.randn(1).expand(3), inplace=True)
    with torch.no_grad():
        parametric_swish(x, beta, inplace=True)


def test_overwriting_what_a_gradient_keeps_is_noticed():
    w = torch.randn(3, requires_grad=True)
    x = torch.randn(3)
    out = (w * x).sum()
    parametric_swish(x, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_in_place_compiles():
    x = torch.randn(40)
    wanted = parametric_swish(x, 2.0) + 1

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x):
        return parametric_swish(x, 2.0, inplace=True) + 1

    assert torch.equal(function(x), wanted)
    assert torch.equal(x + 1, wanted)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.ones(3, dtype=torch.int64),), TypeError, "x takes a floating tensor, got a tensor of torch.int64"),
        (([1.0],), TypeError, "x takes a floating tensor"),
        ((torch.ones(3), "2"), TypeError, "beta takes a number or a tensor, got '2'"),
        ((torch.ones(3), True), TypeError, "beta takes a number or a tensor"),
        ((torch.ones(3), torch.ones(3, dtype=torch.int64)), TypeError, "beta takes a number or a floating tensor"),
        ((torch.ones(2, 3), torch.ones(2)), ValueError, r"beta takes one element, or \(3,\) for dimension 1"),
        ((torch.ones(2, 3), torch.ones(2, 3)), ValueError, "beta takes one element"),
        ((torch.ones(3), torch.ones(1, device="meta")), ValueError, "beta takes one on x's device, cpu"),
    ],
)
def test_bad_input(arguments, error, text):
    with pytest.raises(error, match=text):
        parametric_swish(*arguments)


def test_the_operator_refuses_what_does_not_fit():
    operator = torch.ops.heedful.parametric_swish
    with pytest.raises(RuntimeError, match=r"betas: has 2 elements, takes 1 or 3 in one dimension"):
        operator(torch.ones(2, 3), torch.ones(2), 1.0, 1)
    with pytest.raises(RuntimeError, match="dim: is 2, takes a dimension of x"):
        operator(torch.ones(2, 3), None, 1.0, 2)
    with pytest.raises(RuntimeError, match="x: has dtype code 6, takes float32"):
        operator(torch.ones(3, dtype=torch.int64), None, 1.0, 0)
    with pytest.raises(RuntimeError, match="grad_out: takes the shape and dtype of x"):
        torch.ops.heedful.parametric_swish_backward(torch.ones(3), torch.ones(2), None, 1.0, 0, False)


@pytest.mark.parametrize("dim", [2, -3, 1.0])
def test_bad_dim(dim):
    with pytest.raises(ValueError, match="dim takes an int from -2 to 1"):
        parametric_swish(torch.ones(2, 3), torch.ones(3), dim=dim)


def test_module():
    x = torch.randn(4, 8)
    assert torch.equal(ParametricSwish(beta=2.0)(x), parametric_swish(x, 2.0))
    assert not list(ParametricSwish(beta=2.0).parameters())
    module = ParametricSwish(0.5, learnable=True, num_parameters=8)
    assert module.beta.shape == (8,)
    module(x).sum().backward()
    assert module.beta.grad.shape == (8,)
    assert (module.beta.grad != 0).all()
    again = ParametricSwish(learnable=True, num_parameters=8)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))
    assert repr(module) == "ParametricSwish(beta=0.5, num_parameters=8, learnable=True)"
    with torch.no_grad():
        module.beta.add_(1)
    module.reset_parameters()
    assert (module.beta == 0.5).all()
    with pytest.raises(ValueError, match="num_parameters takes 1 without learnable=True"):
        ParametricSwish(num_parameters=8)
