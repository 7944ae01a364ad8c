"""heedful.ops.rms_norm and add_rms_norm, heedful.nn.RMSNorm and AddRMSNorm."""

from __future__ import annotations

import math

import pytest
import torch
from operation_checks import DTYPES
from row_errors import RowChecks, of_rows, of_sum, over_rows
from torch import nn
from torch.nn import functional

from heedful.nn import AddRMSNorm, RMSNorm
from heedful.ops import add_rms_norm, rms_norm

EPS = 1e-3


class TestRmsNorm(RowChecks):
    name = "rms_norm"
    variants = ("no weight", "weight", "float32 weight", "two dimensions")
    large = (70, 1031)
    with_residual = False

    def make(self, variant, shape, dtype):
        call = {"x": (3 * torch.randn(shape)).to(dtype), "eps": EPS}
        if self.with_residual:
            call["residual"] = torch.randn(shape).to(dtype)
        if variant == "no weight":
            return call
        kept = dtype if variant != "float32 weight" or dtype == torch.float64 else torch.float32
        return call | {"weight": torch.randn(shape[-2:] if variant == "two dimensions" else shape[-1:]).to(kept)}

    def errors(self, variant, call, upstream):
        weight = call.get("weight")
        dims = tuple(range(-weight.ndim, 0)) if weight is not None else (-1,)
        x, w = call["x"], 1.0 if weight is None else weight
        # In add_rms_norm what is normed was rounded.
        rounded = 4 * self.rounding if self.with_residual else 0.0
        if self.with_residual:
            x = x + call["residual"]
        columns = math.prod(x.shape[dim] for dim in dims)
        off, g = of_sum(columns) / 2 + 6 + rounded, upstream[0].abs()
        r = (x.square().mean(dims, keepdim=True) + EPS).rsqrt()
        normed = x.abs() * r
        direct, back = r * (g * w).abs(), normed * r * (g * w * normed).abs().mean(dims, keepdim=True)
        sizes = {"x": (direct + 3 * back) * off + (upstream[1].abs() if self.with_residual else 0.0)}
        if weight is not None:
            sizes["weight"] = over_rows(g * normed, w) * (off + of_rows(x.numel() // columns))
        outputs = [normed * (w if weight is None else w.abs()) * off]
        if not self.with_residual:
            return outputs, sizes
        return [*outputs, x.abs()], sizes | {"residual": sizes["x"]}

    def operator_calls(self):
        x, weight, grad = torch.randn(3, 5), torch.rand(5), torch.randn(3, 5)
        turned = torch.randn(4, 3, 5).transpose(0, 2)[:, ::2]
        return [
            ("rms_norm", (x, None, EPS)),
            ("rms_norm", (turned, torch.rand(4), EPS)),
            ("rms_norm", (torch.randn(1, 4).expand(3, 4), None, EPS)),
            ("rms_norm_backward", (grad, None, x, weight, EPS, True)),
            ("rms_norm_backward", (grad, grad, x, None, EPS, False)),
        ]

    @pytest.mark.parametrize("wide", [(5, 3, 20011), (20011, 3), (3, 70, 300), (1, 70001), (130, 64)], ids=str)
    def test_items_of_all_kinds(self, wide):
        self.compare("weight", self.make("weight", wide, torch.float32))


class TestAddRmsNorm(TestRmsNorm):
    name = "add_rms_norm"
    with_residual = True

    def operator_calls(self):
        x, residual = torch.randn(3, 5), torch.randn(3, 5)
        turned = torch.randn(4, 3, 5).transpose(0, 2)[:, ::2]
        return [
            ("add_rms_norm", (x, residual, torch.rand(5), EPS)),
            ("add_rms_norm", (turned, torch.randn(5, 2, 4), None, EPS)),
        ]

    @pytest.mark.parametrize("which", [0, 1])
    def test_one_result_alone(self, which):
        call = {
            name: call.requires_grad_()
            for name, call in self.leaves(self.make("weight", (4, 33), torch.float64)).items()
        }
        grad = torch.randn(4, 33, dtype=torch.float64)
        wanted = self.operation.reference(**call, eps=EPS)[which]
        found = add_rms_norm(**call, eps=EPS)[which]
        for a, b in zip(
            torch.autograd.grad(found, list(call.values()), grad, allow_unused=True),
            torch.autograd.grad(wanted, list(call.values()), grad, allow_unused=True),
            strict=True,
        ):
            if b is None:
                assert a is None
            else:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_eps_is_that_of_pytorch(dtype):
    """Rows so small that eps decides."""
    x = torch.full((2, 8), 1e-4).to(dtype) * torch.arange(1, 9).to(dtype)
    wanted = functional.rms_norm(x, (8,))
    torch.testing.assert_close(rms_norm(x), wanted, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_out(dtype):
    for row in ([torch.inf, 1.0, 2.0], [torch.nan, 1.0, 2.0], [0.0, -0.0, 0.0]):
        x = torch.tensor([row, [1.0, 2.0, 3.0]]).to(dtype)
        found = rms_norm(x, eps=1e-6)
        torch.testing.assert_close(found, functional.rms_norm(x, (3,), eps=1e-6), equal_nan=True)
        assert found[1].isfinite().all()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.ones(3, dtype=torch.int64),), TypeError, "x takes a floating tensor, got a tensor of torch.int64"),
        (([1.0],), TypeError, "x takes a floating tensor"),
        ((torch.tensor(1.0),), ValueError, "x takes a tensor of 1 dimension or more"),
        ((torch.ones(3), 2.0), TypeError, "weight takes a floating tensor, or None, got 2.0"),
        ((torch.ones(3), torch.ones(3, dtype=torch.int64)), TypeError, "weight takes a floating tensor"),
        ((torch.ones(2, 3), torch.ones(2)), ValueError, r"weight takes the shape of the last dimensions of x \(2, 3\)"),
        ((torch.ones(2, 3), torch.ones(1, 2, 3)), ValueError, "weight takes the shape of the last"),
        ((torch.ones(2, 3), torch.tensor(1.0)), ValueError, "weight takes the shape of the last"),
        ((torch.ones(3), torch.ones(3, device="meta")), ValueError, "weight takes one on x's device, cpu"),
        ((torch.ones(3), None, "1"), TypeError, "eps takes a number"),
        ((torch.ones(3), None, -1.0), ValueError, "eps takes 0 or more"),
    ],
)
def test_bad_input(arguments, error, text, residual):
    x, *rest = arguments
    with pytest.raises(error, match=text):
        add_rms_norm(x, x, *rest) if residual else rms_norm(x, *rest)


def test_bad_residual():
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"residual takes a tensor of x's dtype, torch.float32, got a tensor of"):
        add_rms_norm(x, x.double())
    with pytest.raises(TypeError, match="residual takes a tensor"):
        add_rms_norm(x, 1.0)
    with pytest.raises(ValueError, match=r"residual takes x's shape, \(2, 3\), got shape \(3,\)"):
        add_rms_norm(x, torch.ones(3))
    with pytest.raises(ValueError, match="residual takes one on x's device"):
        add_rms_norm(x, x.to("meta"))


def test_the_operators_refuse_what_does_not_fit():
    ops = torch.ops.heedful
    with pytest.raises(RuntimeError, match="weight: takes one dimension of 3 elements"):
        ops.rms_norm(torch.ones(2, 3), torch.ones(2), EPS)
    with pytest.raises(RuntimeError, match="weight: has dtype code 3, takes x's or 0"):
        ops.rms_norm(torch.ones(2, 3), torch.ones(3).double(), EPS)
    with pytest.raises(RuntimeError, match="x: has no dimension"):
        ops.rms_norm(torch.tensor(1.0), None, EPS)
    with pytest.raises(RuntimeError, match="residual: takes the shape and dtype of x"):
        ops.add_rms_norm(torch.ones(2, 3), torch.ones(3), None, EPS)
    with pytest.raises(RuntimeError, match="added: takes the shape and dtype of x"):
        ops.rms_norm_backward(torch.ones(3), torch.ones(2), torch.ones(3), None, EPS, False)


@pytest.mark.parametrize("shape", [8, (4, 8)])
@pytest.mark.parametrize("affine", [True, False])
def test_modules_stand_for_those_of_pytorch(shape, affine):
    theirs = nn.RMSNorm(shape, eps=1e-4, elementwise_affine=affine)
    if affine:
        nn.init.normal_(theirs.weight)
    ours, added = (kind(shape, eps=1e-4, elementwise_affine=affine) for kind in (RMSNorm, AddRMSNorm))
    for module in (ours, added):
        module.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    normed, total = added(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, theirs(total))
    with pytest.raises(ValueError, match="shape"):
        ours(torch.randn(3, 7))
    assert repr(ours) == repr(theirs)
