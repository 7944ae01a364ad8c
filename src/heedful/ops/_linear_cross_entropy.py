"""`linear_cross_entropy`: the loss of a language model's last layer without its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heedful.errors import wrong_value
from heedful.ops import _cross_entropy
from heedful.ops._catalogue import Argument, Case, Cost, Inputs, Operation, tensor_bytes
from heedful.ops._dispatch import (
    _missing,
    applied,
    computed_dtype,
    fake,
    is_differentiated_again,
    needs_gradient,
    operator,
    runs_in_engine,
    through,
)

# Bytes of logits at a time. A part that stays in the last cache is written and read there, but parts also have to keep
# the matrix product's sides long.
_PART_BYTES = 32 << 20
_FEWEST_CLASSES = 512
_FEWEST_ROWS = 512


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """cross_entropy(input @ linear_weight.T + linear_bias, target, ...), whose logits never exist all at once.

    The names are those of torch.nn.functional.linear_cross_entropy. Products go through PyTorch's, a part of the logits
    at a time, which becomes its own gradient in place; results are the same bits again where PyTorch's products are.
    - "mean" and "sum" with a gradient and without return_lse: rows in parts, their gradients in the same pass. As many
      products as PyTorch takes, three; the gradients of input and weight exist from the forward on.
    - Otherwise: classes in parts, with a running log-sum-exp, and each part's logits once more in the backward, if any.
      Four products, and less memory: the parts and one float32 (N, D).

    Args:
        input: (..., D), floating: what the last layer gets.
        linear_weight: (C, D), of input's dtype.
        target: int64 (...), from 0 to C - 1, or ignore_index.
        linear_bias: (C,), of input's dtype.
        ignore_index, reduction, label_smoothing, softcap, return_lse: as in `cross_entropy`.

    Returns:
        The loss, float32 (float64 for float64): () or, not reduced, target's shape; with return_lse also the
        log-sum-exp, of target's shape. All have gradients.

    Raises:
        TypeError, ValueError, RuntimeError: as `cross_entropy`.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, for classes in parts; Hsu et
    al., "Liger Kernel", 2024, for gradients in the forward.
    """
    _check(input, linear_weight, linear_bias)
    target = _cross_entropy.check_terms(
        target, input.shape[:-1], input.device, ignore_index, reduction, label_smoothing, softcap
    )
    terms = (ignore_index, float(label_smoothing), 0.0 if softcap is None else float(softcap))
    hidden, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    if not runs_in_engine("linear_cross_entropy", hidden, linear_weight, linear_bias):
        losses, lse = _composed(hidden, linear_weight, linear_bias, targets, *terms)
    elif not needs_gradient(hidden, linear_weight, linear_bias):
        losses, lse = _forward(hidden, linear_weight, linear_bias, targets, *terms)
    elif reduction == "none" or return_lse:
        losses, lse = _apply(hidden, linear_weight, linear_bias, targets, *terms)
    else:
        loss: Tensor = _apply_reduced(hidden, linear_weight, linear_bias, targets, reduction == "mean", *terms)
        return loss
    loss = _cross_entropy.reduced(losses.view(target.shape), target, ignore_index, reduction)
    return (loss, lse.view(target.shape)) if return_lse else loss


def reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in plain PyTorch, with all logits."""
    logits = functional.linear(input, linear_weight, linear_bias).reshape(-1, linear_weight.shape[0])
    found = _cross_entropy.reference(
        logits,
        target.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        return_lse=return_lse,
    )
    loss, lse = found if isinstance(found, tuple) else (found, None)
    loss = loss.view(target.shape) if reduction == "none" else loss
    return loss if lse is None else (loss, lse.view(target.shape))


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    given = [("input", input), ("linear_weight", weight)]
    if bias is not None:
        given.append(("linear_bias", bias))
    for name, tensor in given:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise _cross_entropy.no_floats(name, tensor)
        if tensor.dtype != input.dtype or tensor.device != input.device:
            got = f"{tensor.dtype} on {tensor.device}"
            raise wrong_value(name, got, f"input's dtype and device, {input.dtype} on {input.device}")
    if input.ndim < 1:
        raise wrong_value("input", "shape ()", "(..., D)")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != input.shape[-1]:
        raise wrong_value("linear_weight", f"shape {tuple(weight.shape)}", f"(C, D) with D = {input.shape[-1]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise wrong_value("linear_bias", f"shape {tuple(bias.shape)}", f"({weight.shape[0]},), the rows of the weight")


def _composed(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *terms: Any
) -> tuple[Tensor, Tensor]:
    return _cross_entropy.composed(functional.linear(hidden, weight, bias), target, *terms)


# The operators. The loops are opaque to tracing, so that the number of parts is nobody's constant.


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


if _missing is None:
    _library = torch.library.Library("heedful", "FRAGMENT")
    for _schema, _kernel in _SCHEMAS.items():
        _library.define(_schema)
        _library.impl(_schema[: _schema.index("(")], _without_gradients(_kernel), "CPU")

_whole_rows = operator("cross_entropy")
_add_part = operator("cross_entropy_part_")
_part_slopes = operator("cross_entropy_part_backward_")
_forward = operator("linear_cross_entropy")
_backward = operator("linear_cross_entropy_backward")
_with_gradients = operator("linear_cross_entropy_with_gradients")


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


class _PerRow(torch.autograd.Function):
    """Losses and log-sum-exps, whose gradients come row by row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *terms: Any
    ) -> tuple[Tensor, Tensor]:
        losses, lse = _forward(hidden, weight, bias, target, *terms)
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.terms = terms
        ctx.set_materialize_grads(False)
        return losses, lse

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, lse = ctx.saved_tensors
        if grad_losses is None and grad_lse is None:
            return (None,) * 7
        if is_differentiated_again():
            found = through(
                lambda h, w, b: _composed(h, w, b, target, *ctx.terms), (hidden, weight, bias), grad_losses, grad_lse
            )
            return *found, None, None, None, None
        if grad_losses is None:
            grad_losses = lse.new_zeros(1).expand_as(lse)
        asked = ctx.needs_input_grad[:3]
        grads = _backward(grad_losses, grad_lse, hidden, weight, bias, target, lse, *ctx.terms, *asked)
        return *(grad if wanted else None for grad, wanted in zip(grads, asked, strict=True)), None, None, None, None


class _Reduced(torch.autograd.Function):
    """The mean or the sum, whose gradients are known but for one factor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mean: bool, *terms: Any
    ) -> Tensor:
        ones = torch.ones((), dtype=computed_dtype(hidden.dtype))
        each = ones / (target != terms[0]).sum() if mean else ones
        asked = ctx.needs_input_grad[:3]
        losses, *grads = _with_gradients(hidden, weight, bias, target, each.expand(target.shape), *terms, *asked)
        ctx.save_for_backward(hidden, weight, bias, target, *grads)
        ctx.mean, ctx.terms = mean, terms
        loss: Tensor = losses.sum() * each
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, *grads = ctx.saved_tensors
        if is_differentiated_again():
            kind = "mean" if ctx.mean else "sum"

            def composition(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
                losses, _ = _composed(h, w, b, target, *ctx.terms)
                return _cross_entropy.reduced(losses, target, ctx.terms[0], kind)

            return *through(composition, (hidden, weight, bias), grad_loss), None, None, None, None, None
        if torch.compiler.is_compiling() or float(grad_loss) != 1:
            grads = [(grad * grad_loss).to(grad.dtype) for grad in grads]
        asked = ctx.needs_input_grad[:3]
        found = (grad if wanted else None for grad, wanted in zip(grads, asked, strict=True))
        return *found, None, None, None, None, None


_apply = applied(_PerRow)
_apply_reduced = applied(_Reduced)


def _cost(inputs: Inputs, backward: bool) -> Cost:
    hidden, weight = inputs["input"], inputs["linear_weight"]
    logits = hidden.numel() // hidden.shape[-1] * weight.shape[0]
    products = 2 * logits * hidden.shape[-1]
    moved = tensor_bytes(hidden, weight, inputs.get("linear_bias"))
    return Cost(2 * products + 5 * logits, 2 * moved) if backward else Cost(products + 5 * logits, moved)


def _case(name: str, rows: int, features: int, classes: int, **parameters: Any) -> Case:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "input": torch.randn(rows, features).to(dtype),
            "linear_weight": (torch.randn(classes, features) * features**-0.5).to(dtype),
            "target": torch.randint(classes, (rows,)),
            **parameters,
        }

    # PyTorch's own, which not every version has, takes no smoothing in parts.
    has_peer = hasattr(functional, "linear_cross_entropy") and not parameters
    return Case(name, inputs, {"F.linear_cross_entropy, chunked": _torch_chunked} if has_peer else {})


def _torch_chunked(input: Tensor, linear_weight: Tensor, target: Tensor, **parameters: Any) -> Tensor:
    found: Tensor = functional.linear_cross_entropy(
        input, linear_weight, target, options=torch.nn.LinearCrossEntropyOptions(), **parameters
    )
    return found.to(computed_dtype(input.dtype))


OPERATIONS = (
    Operation(
        name="linear_cross_entropy",
        summary="Cross entropy of a last layer's logits, which exist in parts only",
        formula="cross_entropy(input @ linear_weight.T + linear_bias, target)",
        source="Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024",
        inputs=(
            Argument("input", "(..., D)", "what the last layer gets"),
            Argument("linear_weight", "(C, D)", "the last layer's weight"),
            Argument("target", "(...), int64", "the classes"),
            Argument("linear_bias", "(C) or None", "the last layer's bias"),
        ),
        parameters=_cross_entropy.TERMS,
        outputs=_cross_entropy.OUTPUTS,
        gradients=("input", "linear_weight", "linear_bias"),
        complexity=(
            "N rows, C classes: 2NCD FLOP forward, 4NCD backward (6NCD unreduced or with lse); memory of a part of the "
            "logits, 32 MiB or 512 rows (unreduced, or with lse: 512 classes), whichever is more"
        ),
        cost=_cost,
        function=linear_cross_entropy,
        reference=reference,
        operators=(
            "linear_cross_entropy",
            "linear_cross_entropy_backward",
            "linear_cross_entropy_with_gradients",
            "cross_entropy_part_",
            "cross_entropy_part_backward_",
        ),
        cases=(
            _case("(256, 64) x 1000", 256, 64, 1000),
            _case("(1024, 256) x 32000", 1024, 256, 32000),
            _case("(1024, 256) x 32000 smoothed", 1024, 256, 32000, label_smoothing=0.1),
            _case("(2048, 512) x 32000", 2048, 512, 32000),
        ),
        module="LinearCrossEntropyLoss",
    ),
)
