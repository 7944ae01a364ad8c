"""`cross_entropy`: of logits, in one pass over them, and one more for their gradient."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heedful.checks import what
from heedful.errors import wrong_type, wrong_value
from heedful.ops._catalogue import Argument, Case, Cost, Inputs, Operation, Slower, tensor_bytes
from heedful.ops._dispatch import (
    applied,
    computed_dtype,
    fake,
    is_differentiated_again,
    needs_gradient,
    operator,
    runs_in_engine,
    through,
)

REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of logits and classes: lse - (1 - e)·s[target] - e·mean(s), where s are the logits after
    softcap·tanh(input / softcap), lse = log Σ exp(s) and e is label_smoothing.

    As torch.nn.functional.cross_entropy, but that it makes no copy of the logits, and that the result is in float32
    where the input is of 16 bits. `linear_cross_entropy` needs no logits at all.

    Args:
        input: logits, (C,) or (N, C), any strides, floating.
        target: int64 of shape () or (N,), from 0 to C - 1, or ignore_index; moved to input's device.
        ignore_index: a target whose row has no loss and no gradient of it.
        reduction: "none"; "sum"; or "mean" over the rows that are not ignored, NaN where there are none.
        label_smoothing: from 0 to 1.
        softcap: a positive number, as in Gemma 2; None for none.
        return_lse: whether log Σ exp(s) of every row is returned too, ignored ones included: for a z-loss, and to weigh
            results of parts of the classes. It has a gradient.

    Returns:
        The loss, float32 (float64 for float64): () or, not reduced, target's shape; with return_lse also the lse, of
        target's shape.

    Raises:
        TypeError: input is not floating, or target not int64, such as class probabilities.
        ValueError: shapes do not fit, or another argument is none of these.
        RuntimeError: a target is not a class.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015, for smoothing.
    """
    if not isinstance(input, Tensor) or not input.is_floating_point():
        raise no_floats("input", input)
    if input.ndim not in (1, 2) or input.shape[-1] == 0:
        raise wrong_value("input", f"shape {tuple(input.shape)}", "(C,) or (N, C) with C of at least 1")
    target = check_terms(target, input.shape[:-1], input.device, ignore_index, reduction, label_smoothing, softcap)
    terms = (ignore_index, float(label_smoothing), 0.0 if softcap is None else float(softcap))
    logits, targets = (input, target) if input.ndim == 2 else (input[None], target[None])
    return of_rows(logits, targets, target.shape, reduction, return_lse, *terms)


def reference(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    if softcap is not None:
        input = softcap * torch.tanh(input / softcap)
    loss = functional.cross_entropy(
        input, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    ).to(computed_dtype(input.dtype))
    return (loss, torch.logsumexp(input.to(computed_dtype(input.dtype)), -1)) if return_lse else loss


def of_rows(
    logits: Tensor, target: Tensor, shape: torch.Size, reduction: str, return_lse: bool, *terms: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Of (N, C) logits, with checked arguments; what is per row gets this shape."""
    if not runs_in_engine("cross_entropy", logits):
        losses, lse = composed(logits, target, *terms)
    elif not needs_gradient(logits):
        losses, lse = _forward(logits, target, *terms)
    elif reduction == "none" or return_lse:
        losses, lse = _apply(logits, target, *terms)
    else:
        found: Tensor = _apply_reduced(logits, target, reduction, *terms)
        return found
    loss = reduced(losses.view(shape), target, terms[0], reduction)
    return (loss, lse.view(shape)) if return_lse else loss


def composed(
    logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Losses and lse of each row of (N, C) logits."""
    s = logits.to(computed_dtype(logits.dtype))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    losses = functional.cross_entropy(s, target, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing)
    return losses, torch.logsumexp(s, -1)


def reduced(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (target != ignore_index).sum()


def no_floats(name: str, got: object) -> TypeError:
    return wrong_type(name, f"a tensor of {got.dtype}" if isinstance(got, Tensor) else what(got), "a floating tensor")


def check_terms(
    target: Tensor,
    shape: torch.Size,
    device: torch.device,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float | None,
) -> Tensor:
    """The target, on the input's device."""
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        got = f"a tensor of {target.dtype}" if isinstance(target, Tensor) else what(target)
        raise wrong_type("target", got, "an int64 tensor of classes")
    if target.shape != shape:
        raise wrong_value("target", f"shape {tuple(target.shape)}", f"input's leading sizes, {tuple(shape)}")
    if not isinstance(ignore_index, (int, torch.SymInt)) or isinstance(ignore_index, bool):
        raise wrong_type("ignore_index", what(ignore_index), "an int")
    if reduction not in REDUCTIONS:
        raise wrong_value("reduction", what(reduction), "'none', 'mean' or 'sum'")
    for name, number in (("label_smoothing", label_smoothing), ("softcap", softcap)):
        if number is not None and not isinstance(number, (float, int, Real, torch.SymFloat)):
            raise wrong_type(name, what(number), "a number")
    if label_smoothing is None or not 0 <= label_smoothing <= 1:
        raise wrong_value("label_smoothing", label_smoothing, "a number from 0 to 1")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise wrong_value("softcap", softcap, "a positive finite number, or None for none")
    return target if target.device == device else target.to(device)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        losses, lse = _forward(logits, target, ignore_index, smoothing, softcap)
        ctx.save_for_backward(logits, target, lse)
        ctx.terms = ignore_index, smoothing, softcap
        ctx.set_materialize_grads(False)
        return losses, lse

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, lse = ctx.saved_tensors
        if grad_losses is None and grad_lse is None:
            return (None,) * 5
        if is_differentiated_again():
            found = through(lambda x: composed(x, target, *ctx.terms), (logits,), grad_losses, grad_lse)
            return *found, None, None, None, None
        if grad_losses is None:
            grad_losses = lse.new_zeros(1).expand_as(lse)
        return _backward(grad_losses, grad_lse, logits, target, lse, *ctx.terms), None, None, None, None


class _Reduced(torch.autograd.Function):
    """The mean or the sum, without nodes of their own in the graph: 10 of 60 us."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, reduction: str, *terms: Any) -> Tensor:
        losses, lse = _forward(logits, target, *terms)
        loss: Tensor = losses.sum()
        count = (target != terms[0]).sum() if reduction == "mean" else None
        ctx.save_for_backward(logits, target, lse, count)
        ctx.reduction, ctx.terms = reduction, terms
        return loss if count is None else loss / count

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, lse, count = ctx.saved_tensors
        if is_differentiated_again():

            def composition(x: Tensor) -> Tensor:
                return reduced(composed(x, target, *ctx.terms)[0], target, ctx.terms[0], ctx.reduction)

            return *through(composition, (logits,), grad_loss), None, None, None, None, None
        grad_losses = (grad_loss if count is None else grad_loss / count).expand(target.shape)
        return _backward(grad_losses, None, logits, target, lse, *ctx.terms), None, None, None, None, None


_apply, _apply_reduced = applied(_CrossEntropy), applied(_Reduced)
_forward = operator("cross_entropy")
_backward = operator("cross_entropy_backward")


@fake("cross_entropy")
def _fake_forward(
    logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, softcap: float
) -> tuple[Tensor, Tensor]:
    dtype = computed_dtype(logits.dtype)
    return logits.new_empty(logits.shape[0], dtype=dtype), logits.new_empty(logits.shape[0], dtype=dtype)


@fake("cross_entropy_backward")
def _fake_backward(
    grad_losses: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
) -> Tensor:
    return torch.empty_like(logits)


@fake("cross_entropy_part_")
def _fake_part(*arguments: Any) -> None:
    return None


@fake("cross_entropy_part_backward_")
def _fake_part_backward(*arguments: Any) -> None:
    return None


def _cost(inputs: Inputs, backward: bool) -> Cost:
    logits = inputs["input"]
    return Cost(5 * logits.numel(), (2 if backward else 1) * tensor_bytes(logits))


def _case(name: str, rows: int, classes: int, **parameters: Any) -> Case:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        logits, target = torch.randn(rows, classes).to(dtype), torch.randint(classes, (rows,))
        return {"input": logits, "target": target, **parameters}

    return Case(name, inputs)


TERMS = (
    Argument("ignore_index", "int, default -100", "a target whose row does not count"),
    Argument("reduction", '"none", "mean" or "sum"', "what becomes of the rows' losses; mean over those that count"),
    Argument("label_smoothing", "number, default 0", "share of the loss that is over all classes evenly"),
    Argument("softcap", "number or None", "logits become softcap tanh(logits / softcap)"),
    Argument("return_lse", "bool, default False", "return each row's log-sum-exp too"),
)
OUTPUTS = (
    Argument("loss", "() or as target", "the loss, float32 (float64 for float64)"),
    Argument("lse", "as target", "the log-sum-exp of every row, with return_lse"),
)

_SMALL_LOGITS = 131072

OPERATIONS = (
    Operation(
        name="cross_entropy",
        summary="Cross entropy of logits and classes without a copy of the logits",
        formula="logsumexp(s) - (1 - e) s[target] - e mean(s), s = softcap tanh(input / softcap), e = label_smoothing",
        source="Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2015",
        inputs=(
            Argument("input", "(C) or (N, C)", "logits"),
            Argument("target", "() or (N), int64", "the classes"),
        ),
        parameters=TERMS,
        outputs=OUTPUTS,
        gradients=("input",),
        complexity="n logits: 5n FLOP and n numbers forward, 5n FLOP and 2n numbers backward",
        cost=_cost,
        function=cross_entropy,
        reference=reference,
        operators=(
            "cross_entropy",
            "cross_entropy_backward",
            "cross_entropy_part_",
            "cross_entropy_part_backward_",
        ),
        cases=(
            _case("(64, 1000)", 64, 1000),
            _case("(128, 32000)", 128, 32000),
            _case("(128, 32000) smoothed", 128, 32000, label_smoothing=0.1),
            _case("(128, 32000) softcap", 128, 32000, softcap=30.0),
            _case("(1024, 32000)", 1024, 32000),
        ),
        module="CrossEntropyLoss",
        slower=(
            Slower(
                "torch.nn.functional.cross_entropy, whose loss of 16-bit logits is rounded to 16 bits",
                f"fewer than {_SMALL_LOGITS} logits, and no cap or lse",
                lambda call, _: (
                    call["input"].numel() < _SMALL_LOGITS and call.get("softcap") is None and not call.get("return_lse")
                ),
            ),
        ),
    ),
)
