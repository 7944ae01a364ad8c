"""heedful.ops.rope."""

from __future__ import annotations

import pytest
import torch
from operation_checks import DTYPES, OperationChecks, in_memory

from heedful.ops import rope


def tables(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = 6 * torch.rand(shape)
    return angles.cos(), angles.sin()


class TestRope(OperationChecks):
    name = "rope"
    variants = (
        "halves",
        "interleaved",
        "blhd, per item",
        "blhd, positions",
        "positions per item, interleaved",
        "partial",
    )
    shapes = ((1, 1, 1, 2), (2, 3, 5, 8), (1, 2, 7, 226), (2, 1, 3, 478))
    strided = (3, 2, 5, 34)
    small = (2, 1, 3, 4)
    large = (2, 3, 41, 1000)
    empty = ((0, 2, 3, 4), (2, 0, 3, 4))

    def make(self, variant, shape, dtype):
        batch, length, half = shape[0], shape[1 if "blhd" in variant else 2], shape[-1] // 2
        call = {"x": torch.randn(shape).to(dtype), "interleaved": "interleaved" in variant}
        if "blhd" in variant:
            call["layout"] = "blhd"
        if variant == "partial":
            half = max(half // 2, 1)
        if "positions" in variant:
            cos, sin = tables(length + 20, half)
            positions = torch.randint(length + 20, (batch, length) if "per item" in variant else (length,))
            return call | {"cos": cos.to(dtype), "sin": sin.to(dtype), "positions": positions}
        cos, sin = tables(*((batch,) if "per item" in variant else ()), length, half)
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        return call | {"cos": cos.to(kept), "sin": sin.to(kept)}

    def errors(self, variant, call, upstream):
        """Two products and their difference, each rounded; none cancels against itself in |a||c| + |b||s|."""
        turned = {n: v.abs() if isinstance(v, torch.Tensor) and n != "positions" else v for n, v in call.items()}
        sizes = []
        for tensor in (call["x"], upstream[0]):
            plus = self.operation.reference(**{**turned, "x": tensor.abs(), "sin": -turned["sin"]})
            minus = self.operation.reference(**{**turned, "x": tensor.abs()})
            sizes.append(3 * torch.maximum(plus.abs(), minus.abs()))
        return sizes[:1], {"x": sizes[1]}

    def operator_calls(self):
        x, (cos, sin) = torch.randn(2, 3, 5, 6), tables(5, 3)
        rows = torch.randint(5, (2, 1, 5))
        return [
            ("rope", (x, cos, sin, None, False, False)),
            ("rope", (x.transpose(1, 2), *(t[:, None, :2].contiguous() for t in (cos, sin)), None, True, True)),
            ("rope", (x, cos, sin, rows, True, False)),
            ("rope_", (x, cos, sin, rows.int(), False, False)),
        ]


def complex_turn(x, positions, interleaved, half):
    """By multiplication with e^(i p ω), in double."""
    frequencies = 100.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    turns = torch.polar(torch.ones((), dtype=torch.float64), positions.double()[..., None] * frequencies)
    kept, x = x[..., 2 * half :].double(), x[..., : 2 * half].double()
    pairs = x.unflatten(-1, (half, 2)) if interleaved else x.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat((turned, kept), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [3, 16, 20])
def test_is_a_complex_product(interleaved, half):
    x = torch.randn(2, 3, 7, 43, dtype=torch.float64)
    angles = torch.arange(30, dtype=torch.float64)[:, None] * 100.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(30, (2, 7))
    found = rope(x, cos, sin, positions=positions, interleaved=interleaved)
    torch.testing.assert_close(found, complex_turn(x, positions[:, None], interleaved, half))
    offsets = torch.tensor([3, 20])
    found = rope(x, cos, sin, offset=offsets, interleaved=interleaved)
    where = offsets[:, None, None] + torch.arange(7)
    torch.testing.assert_close(found, complex_turn(x, where, interleaved, half))
    for offset in (0, 23):
        wanted = complex_turn(x, offset + torch.arange(7), interleaved, half)
        torch.testing.assert_close(rope(x, cos, sin, offset=offset, interleaved=interleaved), wanted)
        turned = rope(x.transpose(1, 2), cos, sin, offset=offset, interleaved=interleaved, layout="blhd")
        torch.testing.assert_close(turned.transpose(1, 2), wanted)
        torch.testing.assert_close(rope(x[0], cos, sin, offset=offset, interleaved=interleaved), wanted[0])


def test_the_gradient_turns_back():
    x, (cos, sin) = torch.randn(2, 3, 5, 8, requires_grad=True), tables(5, 4)
    out = rope(x, cos, sin)
    (found,) = torch.autograd.grad(out, x, out.detach())
    torch.testing.assert_close(found, x.detach())


def test_gradients_of_tables(caplog):
    from heedful.ops import _dispatch

    _dispatch._said.clear()
    x, (cos, sin) = torch.randn(2, 3, 5, 8, dtype=torch.float64), tables(5, 4)
    cos, sin = cos.double().requires_grad_(), sin.double().requires_grad_()
    with caplog.at_level("WARNING", "heedful"):
        assert torch.autograd.gradcheck(lambda c, s: rope(x, c, s), (cos, sin))
    assert caplog.text.count("gradients of cos and sin") == 1


@pytest.mark.parametrize("memory", ["contiguous", "transposed", "sliced", "last-strided"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype, memory, interleaved):
    x, (cos, sin) = in_memory(torch.randn(2, 3, 5, 75).to(dtype), memory), tables(5, 36)
    wanted = rope(x, cos, sin, interleaved=interleaved)
    version = x._version
    assert rope(x, cos, sin, interleaved=interleaved, inplace=True) is x
    assert torch.equal(x, wanted)
    assert x._version > version


def test_in_place_is_refused():
    x, (cos, sin) = torch.randn(2, 3, 5, 8), tables(5, 4)
    with pytest.raises(ValueError, match="inplace=True would overwrite x, which a gradient needs"):
        rope(x.clone().requires_grad_(), cos, sin, inplace=True)
    with pytest.raises(ValueError, match="memory of its own"):
        rope(x[:1].expand(2, 3, 5, 8), cos, sin, inplace=True)
    with torch.no_grad():
        rope(x.clone().requires_grad_(), cos, sin, inplace=True)


def test_in_place_compiles():
    x, (cos, sin) = torch.randn(2, 3, 5, 8), tables(5, 4)
    wanted = rope(x, cos, sin) + 1

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x):
        return rope(x, cos, sin, inplace=True) + 1

    assert torch.equal(function(x), wanted)
    assert torch.equal(x + 1, wanted)


X, TABLE = torch.ones(2, 3, 5, 8), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("arguments", "parameters", "error", "text"),
    [
        ((X.long(), TABLE, TABLE), {}, TypeError, "x takes a floating tensor, got a tensor of torch.int64"),
        ((X, 1.0, TABLE), {}, TypeError, "cos takes a floating tensor"),
        ((X[0, 0], TABLE, TABLE), {}, ValueError, r"x takes \(B, H, L, D\) or \(H, L, D\)"),
        ((X, torch.ones(5, 5), TABLE), {}, ValueError, r"cos takes \(P, R\) or \(B, L, R\) with 2 R from 2 to 8"),
        ((X, TABLE, TABLE[:4]), {}, ValueError, "sin takes cos's"),
        ((X, TABLE, TABLE), {"layout": "bld"}, ValueError, "layout takes 'bhld' or 'blhd'"),
        ((X, TABLE, TABLE), {"offset": 1}, ValueError, "cos takes at least 6"),
        ((X, TABLE, TABLE), {"offset": 1.0}, TypeError, "offset takes an int or an int tensor"),
        ((X, TABLE, TABLE), {"offset": torch.ones(3).long()}, ValueError, "offset takes ints, 1 or 2 of them"),
        ((X, TABLE[None], TABLE[None]), {"offset": 1}, ValueError, "offset takes 0 where cos has a row for each"),
        ((X, TABLE[None, :4], TABLE[None, :4]), {}, ValueError, r"cos takes \(P, R\) or \(2, 5, R\)"),
        ((X, TABLE, TABLE), {"positions": torch.ones(5)}, TypeError, "positions takes an int64 or int32 tensor"),
        ((X, TABLE, TABLE), {"positions": torch.ones(4).long()}, ValueError, r"positions takes \(5,\) or \(2, 5\)"),
        ((X, TABLE, TABLE), {"positions": torch.ones(5).long(), "offset": 2}, ValueError, "offset takes 0"),
        ((X, TABLE[None], TABLE[None]), {"positions": torch.ones(5).long()}, ValueError, r"cos takes \(P, R\) where"),
    ],
)
def test_bad_input(arguments, parameters, error, text):
    with pytest.raises(error, match=text):
        rope(*arguments, **parameters)


@pytest.mark.parametrize("position", [-1, 5])
def test_positions_beyond_the_tables(position):
    with pytest.raises(RuntimeError, match=f"positions: has {position}, takes 0 to 4, the rows of cos"):
        rope(X, TABLE, TABLE, positions=torch.tensor([0, 1, position, 0, 0]))


def test_the_operator_refuses_what_does_not_fit():
    operator = torch.ops.heedful.rope
    with pytest.raises(RuntimeError, match="cos: does not broadcast to x's leading sizes"):
        operator(X, torch.ones(4, 4), torch.ones(4, 4), None, False, False)
    with pytest.raises(RuntimeError, match=r"cos: takes \(..., R\) with 2 R up to x's last size"):
        operator(X, torch.ones(5, 5), torch.ones(5, 5), None, False, False)
    with pytest.raises(RuntimeError, match="sin: takes the shape and dtype of cos"):
        operator(X, TABLE, TABLE[:1], None, False, False)
    with pytest.raises(RuntimeError, match="positions: has dtype code 0, takes int32 or int64"):
        operator(X, TABLE, TABLE, torch.ones(5), False, False)
