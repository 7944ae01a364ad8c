"""Norms: PyTorch's own modules, computed by heedful.ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heedful.errors import wrong_value
from heedful.ops import add_rms_norm, layer_norm_gelu, rms_norm


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm with its arguments and state_dict, as `heedful.ops.rms_norm` computes it."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., *normalized_shape) to the same."""
        self._check("x", x)
        if self.weight is None and len(self.normalized_shape) > 1:
            return rms_norm(x.flatten(-len(self.normalized_shape)), None, self.eps).view(x.shape)
        return rms_norm(x, self.weight, self.eps)

    def _check(self, name: str, x: Tensor) -> None:
        # Without a weight nothing else would notice.
        if self.weight is None and x.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            raise wrong_value(name, f"shape {tuple(x.shape)}", f"one that ends in {tuple(self.normalized_shape)}")


class AddRMSNorm(RMSNorm):
    """The step of a residual stream: torch.nn.RMSNorm, with its arguments and state_dict, of a sum, as
    `heedful.ops.add_rms_norm` computes it."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(..., *normalized_shape) both, to (norm of x + residual, x + residual)."""
        self._check("x", x)
        if self.weight is None and (ndim := len(self.normalized_shape)) > 1:
            normed, total = add_rms_norm(x.flatten(-ndim), residual.flatten(-ndim), None, self.eps)
            return normed.view(x.shape), total.view(x.shape)
        return add_rms_norm(x, residual, self.weight, self.eps)


class LayerNormGELU(nn.LayerNorm):
    """torch.nn.LayerNorm, with its arguments and state_dict, then torch.nn.GELU, as `heedful.ops.layer_norm_gelu`
    computes them.

    Args:
        approximate: "none" or "tanh", as of torch.nn.GELU.
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as of torch.nn.LayerNorm.

    Raises:
        ValueError: approximate is neither "none" nor "tanh".
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        approximate: str = "none",
    ) -> None:
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, bias, device=device, dtype=dtype)
        if approximate not in ("none", "tanh"):
            raise wrong_value("approximate", repr(approximate), "'none' or 'tanh'")
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """(..., *normalized_shape) to the same."""
        if self.weight is None:
            ndim = len(self.normalized_shape)
            if x.shape[-ndim:] != self.normalized_shape:
                raise wrong_value("x", f"shape {tuple(x.shape)}", f"one that ends in {tuple(self.normalized_shape)}")
            if ndim > 1:
                flat = layer_norm_gelu(x.flatten(-ndim), None, None, self.eps, self.approximate)
                return flat.view(x.shape)
        return layer_norm_gelu(x, self.weight, self.bias, self.eps, self.approximate)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"{super().extra_repr()}, approximate={self.approximate!r}"
