"""heedful.ops.layer_norm_gelu and heedful.nn.LayerNormGELU."""

from __future__ import annotations

import math

import pytest
import torch
from operation_checks import DTYPES
from row_errors import RowChecks, of_rows, of_sum, over_rows
from torch import nn
from torch.nn import functional

from heedful.nn import LayerNormGELU
from heedful.ops import layer_norm_gelu

EPS = 1e-3


def gelu_and_slopes(z, approximate):
    """GELU and its first two derivatives."""
    z = z.detach().requires_grad_()
    value = functional.gelu(z, approximate=approximate)
    (first,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    return value.detach(), first.detach(), second


class TestLayerNormGelu(RowChecks):
    name = "layer_norm_gelu"
    variants = ("alone", "weight", "weight and bias", "tanh", "bias", "float32 weight and bias", "two dimensions")
    large = (70, 1031)

    def make(self, variant, shape, dtype):
        call = {"x": (3 * torch.randn(shape) + 1).to(dtype), "eps": EPS}
        kept = torch.float32 if variant.startswith("float32") and dtype != torch.float64 else dtype
        column = shape[-2:] if variant == "two dimensions" else shape[-1:]
        if variant not in ("alone", "bias"):
            call["weight"] = (2 * torch.randn(column)).to(kept)
        if variant not in ("alone", "weight"):
            call["bias"] = torch.randn(column).to(kept)
        return call | {"approximate": "tanh"} if variant == "tanh" else call

    def errors(self, variant, call, upstream):
        given = [call[name] for name in ("weight", "bias") if name in call]
        dims = tuple(range(-given[0].ndim, 0)) if given else (-1,)
        x, g, approximate = call["x"], upstream[0].abs(), call.get("approximate", "none")
        w, b = call.get("weight", torch.ones((), dtype=x.dtype)), call.get("bias", torch.zeros((), dtype=x.dtype))
        columns = math.prod(x.shape[dim] for dim in dims)
        off = of_sum(columns)

        def mean(terms):
            return terms.mean(dims, keepdim=True)

        r = (x.var(dims, correction=0, keepdim=True) + EPS).rsqrt()
        y = (x - mean(x)) * r
        y_off = r * mean(x.abs()) * off + y.abs() * (off + 6)
        z = y * w + b
        z_off = w.abs() * y_off + (y * w).abs() + b.abs() + z.abs()
        value, first, second = gelu_and_slopes(z, approximate)
        # The exponent of e^(-z^2/2), or of the sigmoid, is rounded. The reference takes 1 + erf(z) in float64.
        function = 8 + z.square() + (5 * z.abs() * (1 + z.square() / 16) if approximate == "tanh" else 0.0)
        own = 4 * 2.0**-53 / self.roundoff
        out = first.abs() * z_off + value.abs() * function + own * z.abs()
        d = (g * first).abs()
        d_off = g * (second.abs() * z_off + (first.abs() + z.abs() * torch.exp(-z.square() / 2)) * function + own)
        dw, dw_off = d * w.abs(), d_off * w.abs()
        parts = dw + mean(dw) + y.abs() * mean(dw * y.abs())
        sizes = {
            "x": r
            * (
                dw_off
                + mean(dw_off)
                + y.abs() * mean(dw_off * y.abs() + dw * y_off)
                + y_off * mean(dw * y.abs())
                + parts * (off + 8)
            )
        }
        rows = of_rows(x.numel() // columns)
        if "weight" in call:
            sizes["weight"] = over_rows(d_off * y.abs() + d * y_off + d * y.abs() * rows, w)
        if "bias" in call:
            sizes["bias"] = over_rows(d_off + d * rows, b)
        return [out], sizes

    def operator_calls(self):
        x, weight, grad = torch.randn(3, 5), torch.rand(5), torch.randn(3, 5)
        turned = torch.randn(4, 3, 5).transpose(0, 2)[:, ::2]
        return [
            ("layer_norm_gelu", (x, None, None, EPS, False)),
            ("layer_norm_gelu", (turned, torch.rand(4), torch.rand(4), EPS, True)),
            ("layer_norm_gelu_backward", (grad, x, weight, weight, EPS, False, True)),
            ("layer_norm_gelu_backward", (grad, x, None, weight, EPS, True, False)),
        ]

    @pytest.mark.parametrize("wide", [(5, 3, 20011), (20011, 3), (130, 64)], ids=str)
    def test_items_of_all_kinds(self, wide):
        self.compare("weight and bias", self.make("weight and bias", wide, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_out(dtype):
    """Far in the lower tail the result keeps its relative precision, which 1 + erf(z) has not."""
    z = torch.linspace(-9, 9, 181, dtype=torch.float64).to(dtype)
    x = torch.tensor([[-1.0, 1.0]]).to(dtype).expand(len(z), 2)
    found = torch.stack(
        [layer_norm_gelu(row, torch.zeros(2).to(dtype), b.expand(2), 0.0)[0] for row, b in zip(x, z, strict=True)]
    )
    wide = z.double()
    wanted = wide * 0.5 * torch.special.erfc(-wide / math.sqrt(2))
    eps = torch.finfo(dtype).eps
    computed = eps if dtype == torch.float64 else torch.finfo(torch.float32).eps
    bound = (
        eps * wanted.abs()
        + 8 * computed * (8 + wide.square()) * wanted.abs()
        + torch.finfo(dtype).smallest_normal * eps
    )
    assert ((found.double() - wanted).abs() <= bound).all()
    for bad in (torch.inf, torch.nan):
        row = torch.tensor([[bad, 1.0, 2.0], [1.0, 2.0, 3.0]]).to(dtype)
        found = layer_norm_gelu(row)
        assert found[0].isnan().all()
        assert found[1].isfinite().all()


def test_a_mean_far_from_zero():
    x = torch.randn(4, 1000, dtype=torch.float64) + 1000
    wanted = layer_norm_gelu(x.float().double())
    torch.testing.assert_close(layer_norm_gelu(x.float()).double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.ones(3, dtype=torch.int64),), TypeError, "x takes a floating tensor, got a tensor of torch.int64"),
        ((torch.tensor(1.0),), ValueError, "x takes a tensor of 1 dimension or more"),
        ((torch.ones(3), torch.ones(2)), ValueError, "weight takes the shape of the last dimensions"),
        ((torch.ones(3), None, torch.ones(2)), ValueError, "bias takes the shape of the last dimensions"),
        ((torch.ones(3), None, 1.0), TypeError, "bias takes a floating tensor, or None"),
        ((torch.ones(2, 3), torch.ones(3), torch.ones(2, 3)), ValueError, r"bias takes weight's shape, \(3,\)"),
        ((torch.ones(3), None, None, "1"), TypeError, "eps takes a number"),
        ((torch.ones(3), None, None, -1), ValueError, "eps takes 0 or more"),
        ((torch.ones(3), None, None, 1e-5, "erf"), ValueError, "approximate takes 'none' or 'tanh', got 'erf'"),
    ],
)
def test_bad_input(arguments, error, text):
    with pytest.raises(error, match=text):
        layer_norm_gelu(*arguments)


def test_the_operators_refuse_what_does_not_fit():
    ops = torch.ops.heedful
    with pytest.raises(RuntimeError, match="bias: takes one dimension of 3 elements"):
        ops.layer_norm_gelu(torch.ones(2, 3), None, torch.ones(2), EPS, False)
    with pytest.raises(RuntimeError, match="grad_out: takes the shape and dtype of x"):
        ops.layer_norm_gelu_backward(torch.ones(3), torch.ones(2), None, None, EPS, False, False)


@pytest.mark.parametrize("shape", [8, (4, 8)])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_module(shape, approximate):
    x = torch.randn(2, 3, 4, 8)
    for affine, bias in ((True, True), (True, False), (False, True)):
        theirs = nn.LayerNorm(shape, 1e-4, affine, bias)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter)
        ours = LayerNormGELU(shape, 1e-4, affine, bias, approximate=approximate)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), functional.gelu(theirs(x), approximate=approximate))
        with pytest.raises(ValueError, match="shape"):
            ours(torch.randn(3, 7))
    with pytest.raises(ValueError, match="approximate takes"):
        LayerNormGELU(8, approximate="erf")
    assert repr(ours).endswith(f"approximate={approximate!r})")
