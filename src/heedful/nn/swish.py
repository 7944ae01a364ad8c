"""`ParametricSwish`: an activation whose steepness may be learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from heedful.errors import wrong_value
from heedful.ops import parametric_swish
from heedful.ops._dispatch import needs_gradient
from heedful.ops._parametric_swish import silu_is_faster
from heedful.patterns.arguments import integer


class ParametricSwish(nn.Module):
    """x·sigmoid(βx), as `heedful.ops.parametric_swish` computes it; where torch.nn.functional.silu is faster, by that.

    Args:
        beta: the steepness, or where it is learned its first value.
        num_parameters: how many betas are learned: 1, or one for each index of dimension `dim` of the input.
        learnable: whether beta is a parameter, of shape (num_parameters,).
        dim: the dimension that several betas belong to.
        inplace: whether the input takes the result; only where no gradient is needed.

    Raises:
        ValueError: num_parameters is below 1, or not 1 without learnable=True.
    """

    beta: float | nn.Parameter

    def __init__(
        self,
        beta: float = 1.0,
        *,
        num_parameters: int = 1,
        learnable: bool = False,
        dim: int = -1,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_parameters = integer("num_parameters", num_parameters, 1)
        if num_parameters != 1 and not learnable:
            raise wrong_value("num_parameters", num_parameters, "1 without learnable=True")
        self.learnable, self.dim, self.inplace = learnable, dim, inplace
        self.initial = float(beta)
        if learnable:
            self.beta = nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
            self.reset_parameters()
        else:
            self.beta = self.initial

    def reset_parameters(self) -> None:
        """Gives every learned beta its first value again."""
        if isinstance(self.beta, nn.Parameter):
            nn.init.constant_(self.beta, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        """As x: any shape, with num_parameters at `dim` where there are several."""
        if not self.inplace and silu_is_faster(x, self.beta, needs_gradient(x)):
            return functional.silu(x)
        return parametric_swish(x, self.beta, dim=self.dim, inplace=self.inplace)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        text = f"beta={self.initial}"
        if self.learnable:
            text += f", num_parameters={self.num_parameters}, learnable=True"
        if self.dim != -1:
            text += f", dim={self.dim}"
        return text + (", inplace=True" if self.inplace else "")
