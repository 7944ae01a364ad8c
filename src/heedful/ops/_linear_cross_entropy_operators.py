"""The operators of `linear_cross_entropy`: loops over parts of the logits, with PyTorch's products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from heedful.ops._dispatch import _missing, computed_dtype, fake, operator

# Bytes of logits at a time. A part that stays in the last cache is written and read there, but parts also have to keep
# the matrix product's sides long.
_PART_BYTES = 32 << 20
_FEWEST_CLASSES = 512
_FEWEST_ROWS = 512


def _parts(total: int, other: int, itemsize: int, fewest: int) -> Iterator[tuple[int, int]]:
    """(first, last) of parts of `total`, each of about _PART_BYTES with `other` numbers for each."""
    size = max(fewest, _PART_BYTES // max(other * itemsize, 1) // 64 * 64)
    for first in range(0, total, size):
        yield first, min(first + size, total)


def _largest_part(total: int, other: int, itemsize: int, fewest: int) -> int:
    return max((last - first for first, last in _parts(total, other, itemsize, fewest)), default=0)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor) -> Tensor:
    """hidden @ weight.T + bias in the beginning of this memory."""
    rows, classes = hidden.shape[0], weight.shape[0]
    out = memory[: rows * classes].view(rows, classes)
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def _run_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore: int, smoothing: float, softcap: float
) -> tuple[Tensor, Tensor]:
    rows, classes, dtype = hidden.shape[0], weight.shape[0], computed_dtype(hidden.dtype)
    losses, lse = hidden.new_empty(rows, dtype=dtype), hidden.new_empty(rows, dtype=dtype)
    statistics = hidden.new_empty((rows, 4), dtype=torch.float64)
    size = (classes, rows, hidden.itemsize, _FEWEST_CLASSES)
    memory = hidden.new_empty(rows * _largest_part(*size))
    for first, last in _parts(*size):
        logits = _logits(hidden, weight[first:last], None if bias is None else bias[first:last], memory)
        _add_part(logits, target, ignore, smoothing, softcap, first, classes, statistics, losses, lse)
    return losses, lse


def _run_backward(
    grad_losses: Tensor, grad_lse: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    target: Tensor, lse: Tensor, ignore: int, smoothing: float, softcap: float,
    of_hidden: bool, of_weight: bool, of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, classes = hidden.shape[0], weight.shape[0]
    size = (classes, rows, hidden.itemsize, _FEWEST_CLASSES)
    parts = len(list(_parts(*size))) if rows else 0
    grads = _Gradients(hidden, weight, (of_hidden, of_weight, of_bias), row_parts=min(rows, 1), class_parts=parts)
    memory = hidden.new_empty(rows * _largest_part(*size))
    for first, last in _parts(*size):
        logits = _logits(hidden, weight[first:last], None if bias is None else bias[first:last], memory)
        _part_slopes(grad_losses, grad_lse, logits, target, lse, ignore, smoothing, softcap, first, classes)
        grads.add(logits, slice(0, rows), slice(first, last))
    return grads.finished()


def _run_both(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, grad_losses: Tensor,
    ignore: int, smoothing: float, softcap: float, of_hidden: bool, of_weight: bool, of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, classes = hidden.shape[0], weight.shape[0]
    losses = hidden.new_empty(rows, dtype=computed_dtype(hidden.dtype))
    size = (rows, classes, hidden.itemsize, _FEWEST_ROWS)
    parts = len(list(_parts(*size)))
    grads = _Gradients(hidden, weight, (of_hidden, of_weight, of_bias), row_parts=parts, class_parts=1)
    memory = hidden.new_empty(classes * _largest_part(*size))
    for first, last in _parts(*size):
        targets = target[first:last]
        logits = _logits(hidden[first:last], weight, bias, memory)
        losses[first:last], lse = _whole_rows(logits, targets, ignore, smoothing, softcap)
        _part_slopes(grad_losses[first:last], None, logits, targets, lse, ignore, smoothing, softcap, 0, classes)
        grads.add(logits, slice(first, last), slice(0, classes))
    return losses, *grads.finished()


class _Gradients:
    """Gradients of hidden, weight and bias, from parts of the logits' gradient: all rows of some classes, or all
    classes of some rows. What gets several addends is summed in the type that is computed in."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, asked: tuple[bool, bool, bool], *, row_parts: int, class_parts: int
    ) -> None:
        self.hidden, self.weight, self.asked = hidden, weight, asked
        # Parts are of rows or of classes: it is hidden's gradient that several parts of classes add to.
        self.sums_hidden, self.sums_weight = class_parts > 1, row_parts > 1
        self.began = row_parts == 0 or class_parts == 0
        computed = computed_dtype(hidden.dtype)

        def memory(like: Tensor, asked: bool, sums: bool) -> Tensor:
            if not asked:
                return like.new_empty(0)
            dtype = computed if sums else like.dtype
            return like.new_zeros(like.shape, dtype=dtype) if self.began else like.new_empty(like.shape, dtype=dtype)

        self.of_hidden = memory(hidden, asked[0], self.sums_hidden)
        self.of_weight = memory(weight, asked[1], self.sums_weight)
        self.of_bias = weight.new_zeros(weight.shape[0] if asked[2] else 0, dtype=computed)

    def add(self, slopes: Tensor, rows: slice, classes: slice) -> None:
        of_hidden, of_weight, of_bias = self.asked
        if of_hidden:
            _product(slopes, self.weight[classes], self.of_hidden[rows], adds=self.sums_hidden and self.began)
        if of_weight:
            _product(slopes.t(), self.hidden[rows], self.of_weight[classes], adds=self.sums_weight and self.began)
        if of_bias:
            self.of_bias[classes] += slopes.sum(0, dtype=self.of_bias.dtype)
        self.began = True

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.hidden.dtype
        return self.of_hidden.to(dtype), self.of_weight.to(dtype), self.of_bias.to(dtype)


# Rows of a product that is rounded before it is added to a wider sum.
_ADDED_ROWS = 2048


def _product(a: Tensor, b: Tensor, out: Tensor, *, adds: bool) -> None:
    """a @ b to or onto out, whose dtype may be wider."""
    if out.dtype == a.dtype:
        if adds:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        return
    for first in range(0, a.shape[0], _ADDED_ROWS):
        some, product = out[first : first + _ADDED_ROWS], torch.mm(a[first : first + _ADDED_ROWS], b)
        if adds:
            some += product
        else:
            some.copy_(product)


_TERMS = "int ignore_index, float smoothing, float softcap"
_ASKED = "bool of_hidden, bool of_weight, bool of_bias"
_SCHEMAS: dict[str, Callable[..., Any]] = {
    f"linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, {_TERMS}) -> "
    "(Tensor losses, Tensor lse)": _run_forward,
    "linear_cross_entropy_backward(Tensor grad_losses, Tensor? grad_lse, Tensor hidden, Tensor weight, Tensor? bias, "
    f"Tensor target, Tensor lse, {_TERMS}, {_ASKED}) -> (Tensor, Tensor, Tensor)": _run_backward,
    "linear_cross_entropy_with_gradients(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    f"Tensor grad_losses, {_TERMS}, {_ASKED}) -> (Tensor losses, Tensor, Tensor, Tensor)": _run_both,
}


def _without_gradients(kernel: Callable[..., Any]) -> Callable[..., Any]:
    found: Callable[..., Any] = torch.no_grad()(kernel)
    return found


# The loops are opaque to tracing, so that the number of parts is nobody's constant.
if _missing is None:
    _library = torch.library.Library("heedful", "FRAGMENT")
    for _schema, _kernel in _SCHEMAS.items():
        _library.define(_schema)
        _library.impl(_schema[: _schema.index("(")], _without_gradients(_kernel), "CPU")

_whole_rows = operator("cross_entropy")
_add_part = operator("cross_entropy_part_")
_part_slopes = operator("cross_entropy_part_backward_")
forward = operator("linear_cross_entropy")
backward = operator("linear_cross_entropy_backward")
with_gradients = operator("linear_cross_entropy_with_gradients")


def _fake_gradients(
    hidden: Tensor, weight: Tensor, of_hidden: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0),
        hidden.new_empty(weight.shape[0] if of_bias else 0),
    )


@fake("linear_cross_entropy")
def _fake_forward(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype = computed_dtype(hidden.dtype)
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)


@fake("linear_cross_entropy_backward")
def _fake_backward(
    grad_losses: Tensor, grad_lse: Tensor | None, hidden: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, *others[-3:])


@fake("linear_cross_entropy_with_gradients")
def _fake_with_gradients(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=computed_dtype(hidden.dtype))
    return losses, *_fake_gradients(hidden, weight, *others[-3:])
