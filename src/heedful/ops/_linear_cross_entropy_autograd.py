"""The gradients of `linear_cross_entropy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heedful.ops import _cross_entropy
from heedful.ops._dispatch import computed_dtype, is_differentiated_again, through
from heedful.ops._linear_cross_entropy_operators import backward, forward, with_gradients


def composed(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    return _cross_entropy.composed(functional.linear(hidden, weight, bias), target, *terms)


class PerRow(torch.autograd.Function):
    """Losses and log-sum-exps, whose gradients come row by row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *terms: Any
    ) -> tuple[Tensor, Tensor]:
        losses, lse = forward(hidden, weight, bias, target, *terms)
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
                lambda h, w, b: composed(h, w, b, target, *ctx.terms), (hidden, weight, bias), grad_losses, grad_lse
            )
            return *found, None, None, None, None
        if grad_losses is None:
            grad_losses = lse.new_zeros(1).expand_as(lse)
        asked = ctx.needs_input_grad[:3]
        grads = backward(grad_losses, grad_lse, hidden, weight, bias, target, lse, *ctx.terms, *asked)
        return *(grad if wanted else None for grad, wanted in zip(grads, asked, strict=True)), None, None, None, None


class Reduced(torch.autograd.Function):
    """The mean or the sum, whose gradients are known but for one factor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mean: bool, *terms: Any
    ) -> Tensor:
        ones = torch.ones((), dtype=computed_dtype(hidden.dtype))
        each = ones / (target != terms[0]).sum() if mean else ones
        asked = ctx.needs_input_grad[:3]
        losses, *grads = with_gradients(hidden, weight, bias, target, each.expand(target.shape), *terms, *asked)
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
                losses, _ = composed(h, w, b, target, *ctx.terms)
                return _cross_entropy.reduced(losses, target, ctx.terms[0], kind)

            return *through(composition, (hidden, weight, bias), grad_loss), None, None, None, None, None
        if torch.compiler.is_compiling() or float(grad_loss) != 1:
            grads = [(grad * grad_loss).to(grad.dtype) for grad in grads]
        asked = ctx.needs_input_grad[:3]
        found = (grad if wanted else None for grad, wanted in zip(grads, asked, strict=True))
        return *found, None, None, None, None, None
