"""`rope`: rotary position embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.checks import what
from heedful.errors import wrong_type, wrong_value
from heedful.ops._catalogue import Argument, Case, Cost, Inputs, Operation, tensor_bytes
from heedful.ops._dispatch import (
    _said,
    applied,
    computed_dtype,
    fake,
    is_differentiated_again,
    logger,
    needs_gradient,
    operator,
    runs_in_engine,
    written_in_place,
)

_LENGTH_AXIS = {"bhld": -2, "blhd": -3}


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    interleaved: bool = False,
    layout: str = "bhld",
    inplace: bool = False,
) -> Tensor:
    """x with pairs of its features turned by their position's angles: (a, b) becomes (a·cos - b·sin, b·cos + a·sin).

    Queries and keys take a call each: their heads lie in memory of their own, so that one call would save no pass.

    Args:
        x: (B, H, L, D), or (B, L, H, D) with layout="blhd"; or the same without B. Any strides, floating.
        cos: (P, R) with 2 R up to D: row p belongs to position p. A head's first 2 R features turn, the others stay. Or
            (B or 1, L or 1, R), a row for each token. Used in x's dtype or in float32 (float64 for float64 x).
        sin: as cos.
        positions: each token's row of cos: ints (L,) or (B, L), from 0 to P - 1; None is offset, offset + 1, ...
        offset: position of the first token without positions: an int, or an int tensor of one element or (B,).
        interleaved: whether a pair is features 2 r and 2 r + 1, as in GPT-J and flash-attn's interleaved, instead of r
            and R + r, as in Llama and GPT-NeoX.
        layout: "bhld" or "blhd".
        inplace: whether x itself takes the result, and is returned. Only where x needs no gradient.

    Returns:
        As x, in its dtype, with the strides of torch.empty_like(x). The gradient turns by the negated angles. Gradients
        of cos and sin are there too, for which the call runs as plain PyTorch.

    Raises:
        TypeError: x, cos or sin is no floating tensor, or positions or offset has no ints.
        ValueError: shapes do not fit, or inplace=True where x needs a gradient or its elements share memory.
        RuntimeError: a position is not in cos.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    _check(x, cos, sin, layout)
    cos, sin, rows = _aligned(x, cos, sin, positions, offset, _LENGTH_AXIS[layout])
    if inplace:
        written_in_place("x", x, needs=needs_gradient(x, cos, sin))
    if not _runs_in_engine(x, cos, sin, rows):
        out = _composed(x, cos, sin, rows, interleaved, False)
        return x.copy_(out) if inplace else out
    if inplace:
        _in_place(x, cos, sin, rows, interleaved, False)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(x)
        return x
    turn = _apply if needs_gradient(x) else _forward
    found: Tensor = turn(x, cos, sin, rows, interleaved, False)
    return found


def reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    interleaved: bool = False,
    layout: str = "bhld",
    inplace: bool = False,
) -> Tensor:
    """The same in plain PyTorch."""
    cos, sin, rows = _aligned(x, cos, sin, positions, offset, _LENGTH_AXIS[layout])
    return _composed(x, cos, sin, rows, interleaved, False)


def _composed(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    dtype = computed_dtype(x.dtype)
    if rows is not None:
        rows = rows.to(cos.device)
        cos, sin = cos[rows], sin[rows]
    cos, sin = cos.to(x.device, dtype), sin.to(x.device, dtype)
    if inverse:
        sin = -sin
    half = cos.shape[-1]
    turned = x[..., : 2 * half].to(dtype)
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    turned = turned.to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), -1)


def _check(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> None:
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = f"a tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else what(tensor)
            raise wrong_type(name, got, "a floating tensor")
    if layout not in _LENGTH_AXIS:
        raise wrong_value("layout", what(layout), "'bhld' or 'blhd'")
    if x.ndim not in (3, 4):
        axes = "(B, H, L, D) or (H, L, D)" if layout == "bhld" else "(B, L, H, D) or (L, H, D)"
        raise wrong_value("x", f"shape {tuple(x.shape)}", axes)
    if cos.ndim not in (2, 3) or not 0 < 2 * cos.shape[-1] <= x.shape[-1]:
        raise wrong_value("cos", f"shape {tuple(cos.shape)}", f"(P, R) or (B, L, R) with 2 R from 2 to {x.shape[-1]}")
    if sin.shape != cos.shape:
        raise wrong_value("sin", f"shape {tuple(sin.shape)}", f"cos's, {tuple(cos.shape)}")


def _aligned(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int | Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tables that broadcast to x; or tables and the positions, which broadcast to x's leading sizes."""
    dtype = computed_dtype(x.dtype)
    if cos.dtype != dtype and not cos.dtype == sin.dtype == x.dtype:
        cos = cos.to(dtype)
    if sin.dtype != cos.dtype:
        sin = sin.to(cos.dtype)
    length, batch = x.shape[axis], x.shape[0] if x.ndim == 4 else 1
    if positions is None and type(offset) is int:
        if cos.ndim == 2:
            if not 0 <= offset <= cos.shape[0] - length:
                got = f"{cos.shape[0]} positions"
                raise wrong_value("cos", got, f"at least {offset + length}, as many as offset and x come to")
            if cos.shape[0] != length:
                cos, sin = cos.narrow(0, offset, length), sin.narrow(0, offset, length)
            return (cos, sin, None) if axis == -2 else (cos.unsqueeze(1), sin.unsqueeze(1), None)
        if offset != 0:
            raise wrong_value("offset", offset, "0 where cos has a row for each token")
        if cos.shape[0] not in (1, batch) or cos.shape[1] not in (1, length) or x.ndim == 3:
            raise wrong_value("cos", f"shape {tuple(cos.shape)}", f"(P, R) or ({batch}, {length}, R), x being 4-D")
        return cos.unsqueeze(axis + 1 if axis == -3 else -3), sin.unsqueeze(axis + 1 if axis == -3 else -3), None
    if cos.ndim != 2:
        raise wrong_value("cos", f"shape {tuple(cos.shape)}", "(P, R) where positions or offset are tensors")
    rows = _rows(positions, offset, batch, length, cos.device)
    if rows.ndim == 2 and x.ndim == 3:
        rows = rows.view(-1)
    if axis == -3:
        return cos, sin, rows.unsqueeze(-1)
    return cos, sin, rows.unsqueeze(-2) if rows.ndim == 2 else rows


def _rows(positions: Tensor | None, offset: int | Tensor, batch: int, length: int, device: torch.device) -> Tensor:
    """Each token's row, (L,) or (B or 1, L)."""
    if positions is None:
        if not isinstance(offset, Tensor):
            # torch.compile traces an int that changes as a SymInt.
            if not isinstance(offset, (int, torch.SymInt)) or isinstance(offset, bool):
                raise wrong_type("offset", what(offset), "an int or an int tensor")
            return torch.arange(length, device=device) + offset
        if offset.is_floating_point() or offset.numel() not in (1, batch):
            raise wrong_value("offset", f"{offset.dtype} {tuple(offset.shape)}", f"ints, 1 or {batch} of them")
        return torch.arange(length, device=offset.device) + offset.reshape(-1, 1)
    if type(offset) is not int or offset != 0:
        raise wrong_value("offset", what(offset), "0 where there are positions")
    if not isinstance(positions, Tensor) or positions.dtype not in (torch.int64, torch.int32):
        got = positions.dtype if isinstance(positions, Tensor) else what(positions)
        raise wrong_type("positions", got, "an int64 or int32 tensor")
    if positions.shape not in ((length,), (1, length), (batch, length)):
        raise wrong_value("positions", f"shape {tuple(positions.shape)}", f"({length},) or ({batch}, {length})")
    return positions


def _runs_in_engine(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None) -> bool:
    if not runs_in_engine("rope", x, cos, sin) or (rows is not None and not rows.is_cpu):
        return False
    if not needs_gradient(cos, sin):
        return True
    why = "gradients of cos and sin are needed"
    if not torch.compiler.is_compiling() and ("rope", why) not in _said:
        _said.add(("rope", why))
        logger.warning("rope runs as plain PyTorch: %s (said once for calls of this kind)", why)
    return False


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, interleaved: bool, inverse: bool
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, rows)
        ctx.constants = interleaved, inverse
        out: Tensor = _forward(x, cos, sin, rows, interleaved, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        interleaved, inverse = ctx.constants
        turn = _apply if is_differentiated_again() else _forward
        return turn(grad_out, *ctx.saved_tensors, interleaved, not inverse), None, None, None, None, None


_apply = applied(_Rope)
_forward = operator("rope")
_in_place = operator("rope_")


@fake("rope")
def _fake_forward(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    return torch.empty_like(x)


@fake("rope_")
def _fake_in_place(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> None:
    return None


def _cost(inputs: Inputs, backward: bool) -> Cost:
    x, cos, sin = inputs["x"], inputs["cos"], inputs["sin"]
    rows = x.shape[_LENGTH_AXIS[inputs.get("layout", "bhld")]]
    tables = min(1.0, rows / cos.shape[-2]) * tensor_bytes(cos, sin)
    return Cost(3 * x.numel() * 2 * cos.shape[-1] // x.shape[-1], 2 * tensor_bytes(x) + int(tables))


def _case(name: str, shape: tuple[int, ...], **parameters: Any) -> Case:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        length = shape[-3 if parameters.get("layout") == "blhd" else -2]
        angles = torch.rand(max(length, 4096), shape[-1] // 2) * 6
        call = {"x": torch.randn(shape).to(dtype), "cos": angles.cos(), "sin": angles.sin(), **parameters}
        if parameters.get("positions") == "random":
            call["positions"] = torch.randint(4096, (shape[0], length))
        return call

    return Case(name, inputs)


OPERATIONS = (
    Operation(
        name="rope",
        summary="Rotary position embeddings: pairs of features turned by their position's angles",
        formula="(a cos - b sin, b cos + a sin) for each pair (a, b)",
        source="Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021",
        inputs=(
            Argument("x", "(B, H, L, D) or (B, L, H, D), or without B", "queries or keys"),
            Argument("cos", "(P, R) or (B, L, R)", "cosines of the pairs' angles"),
            Argument("sin", "as cos", "their sines"),
            Argument("positions", "(L) or (B, L), ints, or None", "each token's row of cos"),
        ),
        parameters=(
            Argument("offset", "int or int tensor (B), default 0", "the first token's position without positions"),
            Argument("interleaved", "bool, default False", "whether pairs are neighbours instead of halves"),
            Argument("layout", '"bhld" or "blhd"', "which axis of x is which"),
            Argument("inplace", "bool, default False", "write into x, where it needs no gradient"),
        ),
        outputs=(Argument("out", "as x", "x, turned"),),
        gradients=("x",),
        complexity="n elements: 3n FLOP and 2n numbers, forward and backward",
        cost=_cost,
        function=rope,
        reference=reference,
        operators=("rope", "rope_"),
        cases=(
            _case("(1, 32, 1, 64)", (1, 32, 1, 64)),
            _case("(1, 32, 128, 64)", (1, 32, 128, 64)),
            _case("(1, 128, 32, 64) blhd", (1, 128, 32, 64), layout="blhd"),
            _case("(1, 128, 32, 64) blhd interleaved", (1, 128, 32, 64), layout="blhd", interleaved=True),
            _case("(4, 16, 512, 64)", (4, 16, 512, 64)),
            _case("(4, 16, 512, 64) positions", (4, 16, 512, 64), positions="random"),
            _case("(1, 32, 2048, 128)", (1, 32, 2048, 128)),
        ),
        module="RotaryEmbedding",
    ),
)
