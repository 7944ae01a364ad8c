"""heedful.ops.cross_entropy, linear_cross_entropy and their modules."""

from __future__ import annotations

import pytest
import torch
from operation_checks import DTYPES, OperationChecks
from torch.nn import functional

from heedful.nn import CrossEntropyLoss, LinearCrossEntropyLoss
from heedful.ops import _linear_cross_entropy as linear_module
from heedful.ops import _linear_cross_entropy_operators as linear_operators
from heedful.ops import cross_entropy, linear_cross_entropy

PARAMETERS = {
    "mean": {},
    "mean, smoothed": {"label_smoothing": 0.1},
    "sum, softcap": {"reduction": "sum", "softcap": 5.0},
    "none": {"reduction": "none"},
    "lse, all": {"return_lse": True, "label_smoothing": 0.3, "softcap": 8.0},
}


def parameters(variant, rows):
    """A mean over no rows is NaN, which is a test of its own."""
    chosen = PARAMETERS[variant.removesuffix(", bias")]
    return {**chosen, **({} if rows else {"reduction": "sum"}), "ignore_index": -1}


def targets(rows, classes):
    target = torch.randint(classes, (rows,))
    if rows > 1:
        target[rows // 2] = -1
    return target


class Terms:
    """What errors are made of, for logits in float64 that are off by `off` units of roundoff."""

    def __init__(self, call, logits, off, upstream):
        target, smoothing, cap = call["target"], call.get("label_smoothing", 0.0), call.get("softcap")
        rows, classes = logits.shape
        valid = target != -1
        self.s, slope = logits, torch.ones_like(logits)
        if cap is not None:
            t = torch.tanh(logits / cap)
            self.s, slope = cap * t, 1 - t.square()
            off = slope * off + 8 * self.s.abs()
        lse = torch.logsumexp(self.s, -1, keepdim=True)
        p = torch.exp(self.s - lse)
        largest = self.s.abs().amax(-1, keepdim=True)
        lse_off = (p * off).sum(-1, keepdim=True) + 30 + 4 * largest + lse.abs()
        hit = functional.one_hot(target.clamp(min=0), classes) * valid[:, None]
        loss_off = (lse_off + (hit * off).sum(-1, keepdim=True) + off.mean(-1, keepdim=True) * smoothing).squeeze(-1)
        loss_off = (loss_off + smoothing * (8 + classes.bit_length()) * self.s.abs().mean(-1)) * valid
        losses = lse.squeeze(-1) + 2 * largest.squeeze(-1)
        reduction = call.get("reduction", "mean")
        each = valid.double() * (1 / valid.sum() if reduction == "mean" else 1.0)
        arriving = upstream[0].abs() * each
        if reduction != "none":
            loss_off = (each * (loss_off + (8 + rows) * losses)).sum()
        self.outputs = [loss_off] + ([lse_off.squeeze(-1)] if call.get("return_lse") else [])
        of_lse = upstream[1].abs() if call.get("return_lse") else torch.zeros_like(arriving)
        exponent = off + lse_off + 8 + 4 * self.s.abs() + 4 * lse.abs()
        share, loss = (arriving + of_lse)[:, None], arriving[:, None]
        size = share * p + loss * (hit + smoothing / classes)
        self.slope_off = slope * (share * p * exponent + 8 * size)
        if cap is not None:
            self.slope_off += size * (16 + 2 * off / cap)
        self.slope = slope * size


class TestCrossEntropy(OperationChecks):
    name = "cross_entropy"
    variants = tuple(PARAMETERS)
    shapes = ((1, 1), (1, 3), (3, 5), (7, 239), (2, 2113))
    strided = (5, 17)
    small = (3, 4)
    large = (37, 3001)
    empty = ((0, 3),)
    compiled_bits = False  # of sums over rows

    def make(self, variant, shape, dtype):
        logits = (3 * torch.randn(shape)).to(dtype)
        return {"input": logits, "target": targets(*shape), **parameters(variant, shape[0])}

    def errors(self, variant, call, upstream):
        terms = Terms(call, call["input"], torch.zeros_like(call["input"]), upstream)
        return terms.outputs, {"input": terms.slope_off}

    def operator_calls(self):
        logits, target, lse = torch.randn(3, 5), torch.tensor([1, -1, 4]), torch.rand(3)
        terms = (-1, 0.1, 3.0)
        return [
            ("cross_entropy", (logits, target, *terms)),
            ("cross_entropy", (torch.randn(5, 6).t()[::2], target, *terms)),
            ("cross_entropy_backward", (torch.rand(3), None, logits, target, lse, *terms)),
            ("cross_entropy_backward", (torch.rand(1).expand(3), torch.rand(3), logits, target, lse, *terms)),
            ("cross_entropy_part_", (logits, target, *terms, 0, 9, torch.zeros(3, 4).double(), lse, lse.clone())),
            ("cross_entropy_part_backward_", (torch.rand(3), None, logits, target, lse, *terms, 2, 9)),
        ]


class TestLinearCrossEntropy(OperationChecks):
    """Shapes are (N, D, C)."""

    name = "linear_cross_entropy"
    variants = ("mean", "mean, smoothed, bias", "sum, softcap", "none, bias", "lse, all, bias")
    shapes = ((1, 1, 1), (3, 5, 7), (13, 8, 239))
    strided = (5, 6, 17)
    small = (3, 2, 4)
    large = (37, 16, 2003)
    empty = ((0, 3, 4),)
    same_bits = False
    compiled_bits = False

    @pytest.fixture(autouse=True)
    def many_parts(self, monkeypatch):
        monkeypatch.setattr(linear_module, "_WHOLE_BYTES", -1)
        monkeypatch.setattr(linear_operators, "_PART_BYTES", 1)
        monkeypatch.setattr(linear_operators, "_FEWEST_CLASSES", 6)
        monkeypatch.setattr(linear_operators, "_FEWEST_ROWS", 4)

    def make(self, variant, shape, dtype):
        self.dtype = dtype
        rows, features, classes = shape
        call = {
            "input": torch.randn(rows, features).to(dtype),
            "linear_weight": torch.randn(classes, features).to(dtype),
            "target": targets(rows, classes),
            **parameters(variant, rows),
        }
        return call | ({"linear_bias": torch.randn(classes).to(dtype)} if "bias" in variant else {})

    def errors(self, variant, call, upstream):
        """16-bit logits, their gradients and parts of sums are rounded, in units of float32's roundoff `own`."""
        hidden, weight, bias = call["input"], call["linear_weight"], call.get("linear_bias")
        rows, features, classes = *hidden.shape, weight.shape[0]
        own = torch.finfo(self.dtype).eps / torch.finfo(torch.float32).eps if self.dtype.itemsize == 2 else 0.0
        logits = functional.linear(hidden, weight, bias)
        sizes = functional.linear(hidden.abs(), weight.abs(), None if bias is None else bias.abs())
        terms = Terms(call, logits, (features + 2) * sizes + own * logits.abs(), upstream)
        # Where float16 slopes are subnormal, half of the smallest is lost.
        lost = 2.0**-25 / 2.0**-24 if self.dtype == torch.float16 else 0.0
        slope_off = terms.slope_off + own * terms.slope + lost
        found = {
            "input": (slope_off + (classes + own) * terms.slope) @ weight.abs(),
            "linear_weight": (slope_off + (rows + own) * terms.slope).mT @ hidden.abs(),
            "linear_bias": (slope_off + rows * terms.slope).sum(0),
        }
        return terms.outputs, {name: size for name, size in found.items() if name in call}

    def operator_calls(self):
        hidden, weight, bias, target = torch.randn(5, 3), torch.randn(9, 3), torch.randn(9), torch.randint(9, (5,))
        terms, grad, lse = (-1, 0.1, 3.0), torch.rand(5), torch.rand(5)
        return [
            ("linear_cross_entropy", (hidden, weight, bias, target, *terms)),
            ("linear_cross_entropy", (hidden, weight, None, target, *terms)),
            (
                "linear_cross_entropy_backward",
                (grad, None, hidden, weight, bias, target, lse, *terms, True, False, True),
            ),
            (
                "linear_cross_entropy_with_gradients",
                (hidden, weight, None, target, grad, *terms, True, True, False),
            ),
        ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_is_that_of_pytorch(dtype, reduction, smoothing):
    logits, target = torch.randn(13, 50).to(dtype), torch.randint(50, (13,))
    target[4] = 7
    chosen = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": 7}
    found = cross_entropy(logits, target, **chosen)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = functional.cross_entropy(logits.double(), target, **chosen)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    one = cross_entropy(logits[0], target[0], **chosen)
    torch.testing.assert_close(one.double(), functional.cross_entropy(logits[0].double(), target[0], **chosen))


def test_far_out():
    """Infinities and NaN; classes that a bias of -inf takes out; logits far from 0."""
    logits, target = torch.randn(7, 2100), torch.zeros(7, dtype=torch.int64)
    logits[0, 1:1500] = -torch.inf
    logits[1, :2000] = -torch.inf
    target[1] = 2050
    logits[2] = -torch.inf
    logits[3, 5] = torch.nan
    logits[4, 5] = torch.inf
    logits[5] += 1e4
    logits[6] -= 1e4
    found = cross_entropy(logits, target, reduction="none")
    wanted = functional.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-3, equal_nan=True)
    _, lse = cross_entropy(logits, target, return_lse=True)
    assert lse[2] == -torch.inf
    assert lse[3].isnan()


def test_rows_that_are_ignored_have_no_gradient_whatever_they_hold():
    logits, target = torch.randn(3, 5), torch.tensor([1, -100, 2])
    logits[1] = torch.nan
    logits.requires_grad_()
    loss = cross_entropy(logits, target)
    torch.testing.assert_close(loss, functional.cross_entropy(logits[::2], target[::2]))
    loss.backward()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[0] != 0).all()


def test_the_mean_of_no_rows_is_nan():
    logits, target = torch.randn(2, 5), torch.full((2,), -100)
    assert cross_entropy(logits, target).isnan()
    assert linear_cross_entropy(torch.randn(2, 3), torch.randn(5, 3), target).isnan()
    weight = torch.randn(5, 3, requires_grad=True)
    assert linear_cross_entropy(torch.randn(2, 3), weight, target).isnan()
    assert cross_entropy(logits, target, reduction="sum") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_parts_of_real_sizes(dtype, reduction, monkeypatch):
    monkeypatch.setattr(linear_operators, "_PART_BYTES", 1 << 20)
    hidden, weight = torch.randn(700, 16).to(dtype).requires_grad_(), torch.randn(2000, 16).to(dtype).requires_grad_()
    target = torch.randint(2000, (700,))
    found = linear_cross_entropy(hidden, weight, target, reduction=reduction).mean()
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    wanted = functional.cross_entropy(h @ w.mT, target)
    near = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-4}
    torch.testing.assert_close(found.double(), wanted, **near)
    for gradient, ref in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(wanted, (h, w)), strict=True
    ):
        torch.testing.assert_close(gradient.double(), ref, **near)


def test_gradients_are_scaled_and_may_be_asked_for_twice():
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    target = torch.randint(9, (5,))
    loss = linear_cross_entropy(hidden, weight, target)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_only_gradients_that_are_asked_for(monkeypatch):
    hidden, weight, target = torch.randn(5, 3), torch.randn(9, 3), torch.randint(9, (5,))
    for wanted in (hidden, weight):
        leaf = wanted.clone().requires_grad_()
        pair = (leaf, weight) if wanted is hidden else (hidden, leaf)
        for reduction in ("mean", "none"):
            (found,) = torch.autograd.grad(linear_cross_entropy(*pair, target, reduction=reduction).mean(), leaf)
            (ref,) = torch.autograd.grad(functional.cross_entropy(pair[0] @ pair[1].mT, target), leaf)
            torch.testing.assert_close(found, ref)


def test_z_loss_by_the_lse():
    hidden, weight, target = torch.randn(2, 5, 3), torch.randn(9, 3, requires_grad=True), torch.randint(9, (2, 5))
    loss, lse = linear_cross_entropy(hidden, weight, target, return_lse=True)
    assert lse.shape == (2, 5)
    (found,) = torch.autograd.grad(loss + 0.1 * lse.square().mean(), weight)
    logits = (hidden @ weight.mT).view(10, 9)
    wanted = functional.cross_entropy(logits, target.view(-1)) + 0.1 * torch.logsumexp(logits, -1).square().mean()
    torch.testing.assert_close(found, torch.autograd.grad(wanted, weight)[0])


LOGITS, TARGET = torch.ones(3, 5), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "chosen", "error", "text"),
    [
        ((LOGITS.long(), TARGET), {}, TypeError, "input takes a floating tensor"),
        ((LOGITS[None], TARGET), {}, ValueError, r"input takes \(C,\) or \(N, C\)"),
        ((LOGITS[:, :0], TARGET), {}, ValueError, "with C of at least 1"),
        ((LOGITS, LOGITS), {}, TypeError, "target takes an int64 tensor of classes, got a tensor of torch.float32"),
        ((LOGITS, TARGET[:2]), {}, ValueError, "target takes input's leading sizes"),
        ((LOGITS, TARGET), {"ignore_index": None}, TypeError, "ignore_index takes an int"),
        ((LOGITS, TARGET), {"reduction": "avg"}, ValueError, "reduction takes 'none', 'mean' or 'sum'"),
        ((LOGITS, TARGET), {"label_smoothing": 1.5}, ValueError, "label_smoothing takes a number from 0 to 1"),
        ((LOGITS, TARGET), {"label_smoothing": "a"}, TypeError, "label_smoothing takes a number"),
        ((LOGITS, TARGET), {"softcap": 0.0}, ValueError, "softcap takes a positive finite number"),
        ((LOGITS, TARGET + 5), {}, RuntimeError, "target: has 5, takes 0 to 4, or ignore_index, -100"),
        ((LOGITS, TARGET - 1), {}, RuntimeError, "target: has -1, takes 0 to 4"),
    ],
)
def test_bad_input(arguments, chosen, error, text):
    with pytest.raises(error, match=text):
        cross_entropy(*arguments, **chosen)


@pytest.mark.parametrize(
    ("arguments", "chosen", "error", "text"),
    [
        ((LOGITS.long(), LOGITS, TARGET), {}, TypeError, "input takes a floating tensor"),
        ((LOGITS, LOGITS.half(), TARGET), {}, ValueError, "linear_weight takes input's dtype and device"),
        ((LOGITS, LOGITS[:, :4], TARGET), {}, ValueError, r"linear_weight takes \(C, D\) with D = 5"),
        ((LOGITS, LOGITS, TARGET), {"linear_bias": torch.ones(4)}, ValueError, r"linear_bias takes \(3,\)"),
        ((LOGITS, LOGITS, TARGET[:2]), {}, ValueError, "target takes input's leading sizes"),
        ((torch.ones(()), LOGITS, TARGET), {}, ValueError, r"input takes \(..., D\)"),
        ((LOGITS, LOGITS, TARGET + 3), {}, RuntimeError, "target: has 3, takes 0 to 2"),
    ],
)
def test_bad_input_of_linear(arguments, chosen, error, text):
    with pytest.raises(error, match=text):
        linear_cross_entropy(*arguments, **chosen)


def test_modules():
    hidden, target = torch.randn(2, 6, 4), torch.randint(9, (2, 6))
    module = LinearCrossEntropyLoss(4, 9, label_smoothing=0.1)
    layer = torch.nn.Linear(4, 9)
    module.load_state_dict(layer.state_dict())
    logits = layer(hidden).view(12, 9)
    wanted = functional.cross_entropy(logits, target.view(12), label_smoothing=0.1)
    torch.testing.assert_close(module(hidden, target), wanted)
    torch.testing.assert_close(CrossEntropyLoss(label_smoothing=0.1)(logits, target.view(12)), wanted)
    assert LinearCrossEntropyLoss(4, 9, bias=False).bias is None
    assert repr(module).startswith("LinearCrossEntropyLoss(4, 9, bias=True, ignore_index=-100, reduction='mean'")
    for chosen in ({"reduction": "avg"}, {"label_smoothing": 2}, {"softcap": -1.0}):
        with pytest.raises(ValueError, match=next(iter(chosen))):
            CrossEntropyLoss(**chosen)


@pytest.mark.parametrize("variant", PARAMETERS)
def test_small_logits_stay_whole(variant, monkeypatch):
    call = {"input": torch.randn(2, 6, 8), "linear_weight": torch.randn(9, 8), "linear_bias": torch.randn(9)}
    leaves = [tensor.requires_grad_() for tensor in call.values()]
    call |= {"target": torch.randint(9, (2, 6)), **PARAMETERS[variant]}

    def run():
        found = linear_cross_entropy(**call)
        found = found if isinstance(found, tuple) else (found,)
        upstream = [torch.full_like(y, 1.5) for y in found]
        return *found, *torch.autograd.grad(found, leaves, upstream)

    whole = run()
    monkeypatch.setattr(linear_module, "_WHOLE_BYTES", -1)
    for a, b in zip(whole, run(), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)
