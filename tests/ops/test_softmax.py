"""heedful.ops.softmax and heedful.nn.Softmax."""

from __future__ import annotations

import pytest
import torch
from operation_checks import DTYPES
from row_errors import RowChecks, of_sum

import heedful
from heedful.nn import Softmax
from heedful.ops import softmax


class TestSoftmax(RowChecks):
    name = "softmax"
    variants = ("plain", "scale", "bool mask", "shared bool mask", "float mask", "shared float mask", "cap", "all")
    shapes = ((), (1,), (3,), (113,), (2, 3, 5), (7, 239))

    def make(self, variant, shape, dtype):
        call = {"x": (3 * torch.randn(shape)).to(dtype)}
        if variant in ("scale", "all"):
            call["scale"] = -0.7
        if variant in ("cap", "all"):
            call["softcap"] = 2.0
        if variant in ("bool mask", "shared bool mask", "all"):
            mask = torch.rand(shape[-1:] if variant.startswith("shared") else shape) < 0.7
            if variant == "bool mask" and len(shape) > 1 and len(mask):
                mask[0] = False
            call["mask"] = mask
        if variant == "float mask":
            call["mask"] = torch.randn(shape).to(dtype)
        if variant == "shared float mask":
            # Of another dtype, and one number for a row where there are several.
            shared = shape[:1] + (1,) * (len(shape) - 1) if len(shape) > 1 else shape
            call["mask"] = torch.randn(shared).to(torch.float32 if dtype != torch.float64 else dtype)
        return call

    def errors(self, variant, call, upstream):
        x, scale, cap, mask = call["x"], call.get("scale", 1.0), call.get("softcap"), call.get("mask")
        scores = scale * x
        off, slope = scores.abs(), torch.ones_like(x)
        if cap:
            capped = torch.tanh(scores / cap)
            slope = 1 - capped.square()
            scores = cap * capped
            off = slope * off + 8 * scores.abs()
        if mask is not None:
            scores = scores.where(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            off = off + scores.nan_to_num(neginf=0.0).abs()
        p = self.operation.reference(**call).detach()
        total = of_sum(x.shape[-1] if x.ndim else 1)
        far = (scores - scores.amax(-1, keepdim=True)).where(p > 0, 0.0) if x.numel() else scores
        each = off + 2 * far.abs() + 4
        relative = each + (p * each).sum(-1, keepdim=True) + total + 4
        # The backward has p as it was rounded.
        g = upstream[0].abs()
        arriving, kept = (p * g).sum(-1, keepdim=True), relative + self.rounding
        small = self.subnormal
        d = p * (g + arriving)
        d_off = d * (kept + total + 4) + p * (p * g * kept).sum(-1, keepdim=True)
        d_off = d_off + small * (g + arriving + p * g.sum(-1, keepdim=True))
        sizes = {"x": abs(scale) * (slope * d_off + 10 * d)}
        if "mask" in self.leaves(call):
            sizes["mask"] = (d_off + 8 * d).sum_to_size(mask.shape)
        return [p * relative], sizes

    def operator_calls(self):
        x, grad, mask = torch.randn(3, 5), torch.randn(3, 5), torch.rand(5) < 0.7
        turned = torch.randn(4, 3, 5).transpose(0, 2)[:, ::2]
        return [
            ("softmax", (x, None, 1.0, 0.0)),
            ("softmax", (x, mask, 1.0, 2.0)),
            ("softmax", (turned, torch.randn(5, 1, 4), 0.5, 0.0)),
            ("softmax", (torch.randn(1, 4).expand(3, 4), None, 1.0, 0.0)),
            ("softmax_backward", (grad, torch.softmax(x, -1), None, 0.5, 0.0, True)),
            ("softmax_backward", (grad, torch.softmax(x, -1), x, 0.5, 2.0, False)),
        ]

    @pytest.mark.parametrize("wide", [(5, 3, 20011), (20011, 3), (130, 64)], ids=str)
    def test_items_of_all_kinds(self, wide):
        self.compare("bool mask", self.make("bool mask", wide, torch.float32))

    @pytest.mark.parametrize("mask_shape", [(7,), (1, 7), (5, 1), (3, 1, 7), (1, 5, 1), (1, 1, 1), (3, 5, 7)], ids=str)
    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_masks_that_broadcast(self, mask_shape, kind):
        mask = torch.rand(mask_shape) < 0.7 if kind == "bool" else torch.randn(mask_shape, dtype=torch.float64)
        self.compare("mask", {"x": torch.randn(3, 5, 7, dtype=torch.float64), "mask": mask})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_out(dtype):
    rows = [[90.0, 800.0, -800.0, 801.0], [-torch.inf, 1.0, 2.0, -torch.inf], [-1e4, -1e4, -1e4, -2e4]]
    x = torch.tensor(rows).to(dtype)
    wanted = torch.softmax(x.double(), -1)
    tiny = torch.finfo(torch.float32).smallest_normal
    torch.testing.assert_close(softmax(x).double(), wanted, rtol=8 * torch.finfo(dtype).eps, atol=tiny)
    for bad in (torch.nan, torch.inf):
        found = softmax(torch.tensor([[bad, -torch.inf, -torch.inf], [1.0, 2.0, 3.0]]).to(dtype))
        assert found[0].isnan().all() if bad == torch.inf else found[0].isnan().any()
        assert found[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "input"])
def test_rows_of_which_nothing_is_left(dtype, kind):
    x = torch.randn(3, 40).to(dtype)
    keep = torch.ones(3, 40, dtype=torch.bool)
    keep[1] = False
    keep[2, 1:] = False
    mask = None
    if kind == "bool":
        mask = keep
    elif kind == "float":
        mask = torch.zeros(3, 40).to(dtype).masked_fill(~keep, -torch.inf)
    else:
        x = x.masked_fill(~keep, -torch.inf)
    x.requires_grad_()
    for scores in (x, x.detach()):
        out = softmax(scores, mask=mask)
        assert (out[1] == 0).all()
        assert out[2, 0] == 1
        assert (out[2, 1:] == 0).all()
        torch.testing.assert_close(out[0], torch.softmax(x[0], -1), check_dtype=False)
    (grad,) = torch.autograd.grad(softmax(x, mask=mask), x, torch.randn(3, 40).to(dtype))
    assert (grad[1:] == 0).all()
    assert grad[0].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_masked_may_hold_anything(bad):
    x = torch.randn(2, 20)
    mask = torch.ones(20, dtype=torch.bool)
    mask[3] = False
    wanted = softmax(x, mask=mask)
    x[:, 3] = bad
    assert torch.equal(softmax(x, mask=mask), wanted)


def test_is_what_attention_does():
    q, k = torch.randn(2, 3, 17, 8), torch.randn(2, 3, 23, 8)
    bias = torch.randn(3, 17, 23)
    found = heedful.attention(q, k, k, bias=bias, scale=0.3, softcap=1.5, return_weights=True)
    torch.testing.assert_close(softmax(q @ k.mT, 0.3, bias, 1.5), found.weights)
    causal = torch.ones(17, 23, dtype=torch.bool).tril(23 - 17)
    found = heedful.attention(q, k, k, causal=True, scale=0.3, softcap=1.5, return_weights=True)
    torch.testing.assert_close(softmax(q @ k.mT, 0.3, causal, 1.5), found.weights)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.ones(3, dtype=torch.int64),), TypeError, "x takes a floating tensor, got a tensor of torch.int64"),
        (([1.0],), TypeError, "x takes a floating tensor"),
        ((torch.ones(3), "1"), TypeError, "scale takes a number"),
        ((torch.ones(3), torch.inf), ValueError, "scale takes a finite number"),
        ((torch.ones(3), 1.0, torch.ones(3, dtype=torch.int64)), TypeError, "mask takes a boolean or floating tensor"),
        ((torch.ones(3), 1.0, True), TypeError, "mask takes a boolean or floating tensor, or None, got True"),
        ((torch.ones(2, 3), 1.0, torch.ones(2)), ValueError, r"mask takes one that broadcasts to x's, \(2, 3\)"),
        ((torch.ones(1, 3), 1.0, torch.ones(2, 3)), ValueError, "mask takes one that broadcasts to x's"),
        ((torch.ones(3), 1.0, torch.ones(1, 3)), ValueError, "mask takes one that broadcasts to x's"),
        ((torch.ones(3), 1.0, torch.ones(3, device="meta")), ValueError, "mask takes one on x's device"),
        ((torch.ones(3), 1.0, None, 0.0), ValueError, "softcap takes a positive finite number"),
        ((torch.ones(3), 1.0, None, "2"), TypeError, "softcap takes a number"),
    ],
)
def test_bad_input(arguments, error, text):
    with pytest.raises(error, match=text):
        softmax(*arguments)


def test_the_operators_refuse_what_does_not_fit():
    ops = torch.ops.heedful
    with pytest.raises(RuntimeError, match="mask: takes a shape that broadcasts"):
        ops.softmax(torch.ones(2, 3), torch.ones(2), 1.0, 0.0)
    with pytest.raises(RuntimeError, match="mask: has dtype code 6, takes bool, x's or 0"):
        ops.softmax(torch.ones(3), torch.ones(3, dtype=torch.int64), 1.0, 0.0)
    with pytest.raises(RuntimeError, match="softcap: takes a positive finite number"):
        ops.softmax(torch.ones(3), None, 1.0, -1.0)
    with pytest.raises(RuntimeError, match="x: softcap takes it"):
        ops.softmax_backward(torch.ones(3), torch.ones(3), None, 1.0, 1.0, False)


def test_module():
    x, mask = torch.randn(4, 8), torch.rand(4, 8) < 0.5
    module = Softmax(0.5, softcap=3.0)
    assert torch.equal(module(x), softmax(x, 0.5, None, 3.0))
    assert torch.equal(module(x, mask), softmax(x, 0.5, mask, 3.0))
    assert repr(module) == "Softmax(scale=0.5, softcap=3.0)"
    assert not module.state_dict()
