"""heedful.ops.swiglu and geglu, and their modules."""

from __future__ import annotations

import math

import pytest
import torch
from operation_checks import DTYPES, OperationChecks
from torch.nn import functional

from heedful.nn import GEGLU, GatedMLP, SwiGLU
from heedful.ops import geglu, swiglu

SPAN = 4.0  # of random gates


def silu_parts(x):
    """silu, its slope, and how many roundings both may be off, in units of their largest terms."""
    s, rest, grown = torch.sigmoid(x), torch.sigmoid(-x), 8 + 2 * x.abs()
    return x * s, s * (1 + x * rest), grown * x.abs() * s, grown * s * (1 + x.abs() * rest) + s * x.abs()


def gelu_parts(x):
    """The exponential of -x² / 2 is off by x² / 2 roundings, the rest by some more."""
    below, density = torch.special.ndtr(x), torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    grown = 16 + x.square()
    slope = below + x * density
    return x * below, slope, grown * x.abs() * below, grown * (below + x.abs() * density)


def gelu_tanh_parts(x):
    rate = 2 * math.sqrt(2 / math.pi)
    t, steep = rate * (x + 0.044715 * x**3), rate * (1 + 3 * 0.044715 * x.square())
    s, rest, grown = torch.sigmoid(t), torch.sigmoid(-t), 12 + 4 * t.abs()
    term = s * x.abs() * steep
    return x * s, s * (1 + x * steep * rest), grown * x.abs() * s, grown * (s + term * rest) + term


class GatedChecks(OperationChecks):
    def make(self, variant, shape, dtype):
        gate, up = (SPAN * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
        parameters = {"approximate": "tanh"} if "tanh" in variant else {}
        if "packed" not in variant:
            return {"gate": gate, "up": up, **parameters}
        last = "gate last" in variant
        return {"gate": torch.cat((up, gate) if last else (gate, up), -1), "gate_first": not last, **parameters}

    def errors(self, variant, call, upstream):
        gate, up, packed = call["gate"], call.get("up"), call.get("up") is None
        if packed:
            first, second = gate.chunk(2, -1) if gate.shape[-1] else (gate, gate)
            gate, up = (first, second) if call["gate_first"] else (second, first)
        parts = silu_parts if self.name == "swiglu" else gelu_tanh_parts if "tanh" in variant else gelu_parts
        _, _, value_error, slope_error = parts(gate)
        arriving = upstream[0].abs()
        of_gate, of_up = arriving * up.abs() * slope_error, arriving * value_error
        sizes = {"gate": of_gate, "up": of_up}
        if packed:
            sizes = {"gate": torch.cat((of_gate, of_up) if call["gate_first"] else (of_up, of_gate), -1)}
        return [up.abs() * value_error], sizes

    def reference_errors(self, variant, call, upstream):
        """PyTorch takes 1 + erf, 1 + tanh and 1 - s from rounded ones, which is lost to the tails."""
        gate, up, packed = call["gate"], call.get("up"), call.get("up") is None
        if packed:
            first, second = gate.chunk(2, -1) if gate.shape[-1] else (gate, gate)
            gate, up = (first, second) if call["gate_first"] else (second, first)
        arriving, value = upstream[0].abs(), 4 * gate.abs()
        slope = 4 * (1 + gate.abs()) ** (4 if "tanh" in variant else 1)
        sizes = {"gate": arriving * up.abs() * slope, "up": arriving * value}
        if packed:
            halves = (sizes["gate"], sizes["up"])
            sizes = {"gate": torch.cat(halves if call["gate_first"] else halves[::-1], -1)}
        return sizes | {"output 0": up.abs() * value}

    def operator_calls(self):
        activation = 0 if self.name == "swiglu" else 2
        gate, up, grad, x = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 8)
        turned = torch.randn(4, 8, 3).transpose(1, 2)[:, ::2]
        return [
            ("gated", (gate, up, activation)),
            ("gated", (turned, torch.randn(1, 3).expand(2, 3)[None, :, :1].expand(turned.shape), activation)),
            ("gated_packed", (x, activation, True)),
            ("gated_packed", (turned, activation, False)),
            ("gated_backward", (grad, gate, up, activation)),
            ("gated_packed_backward", (grad, x, activation, True)),
            ("gated_packed_backward", (torch.randn(turned[..., :4].shape), turned, activation, False)),
        ]


class TestSwiglu(GatedChecks):
    name = "swiglu"
    variants = ("two", "packed", "packed, gate last")


class TestGeglu(GatedChecks):
    name = "geglu"
    variants = ("two", "two, tanh", "packed", "packed, gate last, tanh")


GELUS = [
    (geglu, {}, functional.gelu),
    (geglu, {"approximate": "tanh"}, lambda x: functional.gelu(x, approximate="tanh")),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("function", "parameters", "activation"), [(swiglu, {}, functional.silu), *GELUS])
def test_far_out(function, parameters, activation, dtype):
    """Infinities, NaN, and arguments whose exponential is out of range."""
    values = [-torch.inf, torch.inf, torch.nan, 0.0, -0.0, -90.0, -104.0, -800.0, 30.0, 90.0, 800.0, 60000.0]
    gate = torch.tensor(values).to(dtype)
    found = function(gate, torch.ones_like(gate), **parameters).double()
    wanted = activation(gate.double())
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(found, wanted, rtol=8 * eps, atol=8 * tiny, equal_nan=True)
    finite = gate.where(gate.isfinite(), 0.0).requires_grad_()
    (slope,) = torch.autograd.grad(function(finite, torch.ones_like(finite), **parameters).sum(), finite)
    assert torch.allclose(slope.double(), (finite > 0).double() + 0.5 * (finite == 0), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_tails_keep_their_precision(dtype):
    """PyTorch's 1 + erf loses them: at -6 its float32 GELU is 0."""
    gate = torch.linspace(-12, 0, 2001).to(dtype)
    found = geglu(gate, torch.ones_like(gate)).double()
    wanted = gate.double() * torch.special.erfc(gate.double() / -math.sqrt(2)) / 2
    eps = torch.finfo(dtype).eps
    assert (((found - wanted) / wanted).abs().nan_to_num() <= (8 + gate.double().square()) * eps).all()


def test_packed_halves_are_the_two():
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    for function in (swiglu, geglu):
        wanted = function(gate, up)
        assert torch.equal(function(torch.cat((gate, up), -1)), wanted)
        assert torch.equal(function(torch.cat((up, gate), -1), gate_first=False), wanted)


@pytest.mark.parametrize(
    ("arguments", "parameters", "error", "text"),
    [
        (
            (torch.ones(4, dtype=torch.int64),),
            {},
            TypeError,
            "gate takes a floating tensor, got a tensor of torch.int64",
        ),
        (([1.0],), {}, TypeError, "gate takes a floating tensor"),
        ((torch.ones(4), 2.0), {}, TypeError, "up takes a floating tensor"),
        ((torch.ones(3),), {}, ValueError, r"gate takes \(..., 2 n\) without up, got shape \(3,\)"),
        ((torch.ones(()),), {}, ValueError, r"gate takes \(..., 2 n\) without up"),
        ((torch.ones(4), torch.ones(3)), {}, ValueError, "up takes gate's shape, dtype and device"),
        ((torch.ones(4), torch.ones(4).half()), {}, ValueError, "up takes gate's shape, dtype and device"),
        ((torch.ones(4), torch.ones(4, device="meta")), {}, ValueError, "up takes gate's shape, dtype and device"),
        ((torch.ones(4), torch.ones(4)), {"gate_first": False}, ValueError, "gate_first takes True where"),
    ],
)
@pytest.mark.parametrize("function", [swiglu, geglu])
def test_bad_input(function, arguments, parameters, error, text):
    with pytest.raises(error, match=text):
        function(*arguments, **parameters)


@pytest.mark.parametrize("approximate", ["erf", None, True])
def test_bad_approximation(approximate):
    with pytest.raises(ValueError, match="approximate takes 'none' or 'tanh'"):
        geglu(torch.ones(4), approximate=approximate)
    with pytest.raises(ValueError, match="approximate takes 'none' or 'tanh'"):
        GEGLU(approximate)


def test_the_operators_refuse_what_does_not_fit():
    ops = torch.ops.heedful
    with pytest.raises(RuntimeError, match="up: takes the shape and dtype of gate"):
        ops.gated(torch.ones(3), torch.ones(2), 0)
    with pytest.raises(RuntimeError, match="activation: is 3, takes a heedful_activation"):
        ops.gated(torch.ones(3), torch.ones(3), 3)
    with pytest.raises(RuntimeError, match="x: takes an even size"):
        ops.gated_packed(torch.ones(3), 0, True)
    with pytest.raises(RuntimeError, match="grad_out: takes the shape and dtype of gate"):
        ops.gated_packed_backward(torch.ones(3), torch.ones(4), 0, True)


def test_activation_modules():
    gate, up = torch.randn(3, 6), torch.randn(3, 6)
    assert torch.equal(SwiGLU()(gate, up), swiglu(gate, up))
    assert torch.equal(SwiGLU(gate_first=False)(gate), swiglu(gate, gate_first=False))
    assert torch.equal(GEGLU("tanh")(gate, up), geglu(gate, up, approximate="tanh"))
    assert torch.equal(GEGLU(gate_first=False)(gate, up), geglu(gate, up))
    assert repr(SwiGLU()) == "SwiGLU()"
    assert repr(GEGLU("tanh", gate_first=False)) == "GEGLU(approximate='tanh', gate_first=False)"


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_mlp_is_that_of_transformers(activation):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    act = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[activation]
    peer = llama.LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, hidden_act=act, num_attention_heads=2))
    module = GatedMLP(12, 20, activation)
    module.load_state_dict(peer.state_dict())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(module(x), peer(x))
    with pytest.raises(ValueError, match="activation takes 'silu', 'gelu' or 'gelu_tanh'"):
        GatedMLP(12, 20, "relu")
