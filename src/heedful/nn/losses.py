"""`CrossEntropyLoss` and `LinearCrossEntropyLoss`: PyTorch's, without copies of the logits or without logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from heedful.errors import wrong_value
from heedful.ops import cross_entropy, linear_cross_entropy
from heedful.patterns.arguments import integer

REDUCTIONS = ("none", "mean", "sum")


class CrossEntropyLoss(nn.Module):
    """`heedful.ops.cross_entropy` of logits (C,) or (N, C) and int64 targets () or (N,).

    Args:
        ignore_index: a target whose row does not count.
        reduction: "none", "mean" or "sum".
        label_smoothing: from 0 to 1.
        softcap: a positive number, or None.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise wrong_value("reduction", repr(reduction), "'none', 'mean' or 'sum'")
        if not 0 <= label_smoothing <= 1:
            raise wrong_value("label_smoothing", label_smoothing, "a number from 0 to 1")
        if softcap is not None and not softcap > 0:
            raise wrong_value("softcap", softcap, "a positive number, or None for none")
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.softcap = label_smoothing, softcap

    @property
    def terms(self) -> dict[str, Any]:
        """The operation's keyword arguments."""
        names = ("ignore_index", "reduction", "label_smoothing", "softcap")
        return {name: getattr(self, name) for name in names}

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss, float32 (float64 for float64 logits): (), or target's shape with reduction="none"."""
        loss = cross_entropy(input, target, **self.terms)
        assert isinstance(loss, Tensor)
        return loss

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return ", ".join(f"{name}={value!r}" for name, value in self.terms.items())


class LinearCrossEntropyLoss(CrossEntropyLoss):
    """A last layer and its loss in one, by `heedful.ops.linear_cross_entropy`; its state_dict is that of nn.Linear.

    Args:
        in_features: of the layer's input.
        out_features: classes.
        bias: whether the layer has one.
        ignore_index, reduction, label_smoothing, softcap: as in `CrossEntropyLoss`.

    Raises:
        ValueError: an argument is none of these.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, softcap=softcap
        )
        self.in_features = integer("in_features", in_features, 1)
        self.out_features = integer("out_features", out_features, 1)
        layer = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of input (..., in_features) and int64 target (...)."""
        loss = linear_cross_entropy(input, self.weight, target, linear_bias=self.bias, **self.terms)
        assert isinstance(loss, Tensor)
        return loss

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {super().extra_repr()}"
