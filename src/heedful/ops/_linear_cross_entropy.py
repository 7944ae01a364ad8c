"""`linear_cross_entropy`: the loss of a language model's last layer without its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heedful.errors import wrong_value
from heedful.ops import _cross_entropy
from heedful.ops._catalogue import Argument, Case, Cost, Inputs, Operation, tensor_bytes
from heedful.ops._dispatch import applied, computed_dtype, needs_gradient, runs_in_engine
from heedful.ops._linear_cross_entropy_autograd import PerRow, Reduced, composed
from heedful.ops._linear_cross_entropy_operators import forward


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
    - Logits of up to 1 MiB are made whole, and go through `cross_entropy`.

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
        losses, lse = composed(hidden, linear_weight, linear_bias, targets, *terms)
    elif _stays_whole(hidden, linear_weight):
        logits = functional.linear(hidden, linear_weight, linear_bias)
        return _cross_entropy.of_rows(logits, targets, target.shape, reduction, return_lse, *terms)
    elif not needs_gradient(hidden, linear_weight, linear_bias):
        losses, lse = forward(hidden, linear_weight, linear_bias, targets, *terms)
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


_apply, _apply_reduced = applied(PerRow), applied(Reduced)

# Logits of so many bytes stay in a core's cache: parts would save nothing there.
_WHOLE_BYTES = 1 << 20


def _stays_whole(hidden: Tensor, weight: Tensor) -> bool:
    # A traced call may come with other sizes later.
    return (
        not torch.compiler.is_compiling() and hidden.shape[0] * weight.shape[0] * weight.element_size() <= _WHOLE_BYTES
    )


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
        ),
        module="LinearCrossEntropyLoss",
    ),
)
