"""What operations on rows share: checks of tensors with an element for each column."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.checks import what
from heedful.errors import wrong_type, wrong_value
from heedful.ops._dispatch import computed_dtype

_EPS = {torch.float64: torch.finfo(torch.float64).eps}
_SINGLE_EPS = torch.finfo(torch.float32).eps


def check_rows(x: Tensor) -> None:
    """Refuses what is no floating tensor of one dimension or more."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else what(x)
        raise wrong_type("x", got, "a floating tensor")
    if not x.ndim:
        raise wrong_value("x", "a tensor without dimensions", "a tensor of 1 dimension or more")


def checked_column(name: str, column: Tensor, x: Tensor) -> Tensor:
    """The tensor of one or more of x's last dimensions' shape, in x's dtype or in the one that is computed in."""
    if not isinstance(column, Tensor) or not column.is_floating_point():
        got = f"a tensor of {column.dtype}" if isinstance(column, Tensor) else what(column)
        raise wrong_type(name, got, "a floating tensor, or None")
    ndim, dtype = column.ndim, column.dtype
    if ndim == 1 and column.size(0) == x.size(-1) and dtype is x.dtype and column.is_cpu and x.is_cpu:
        return column
    if not 0 < ndim <= x.ndim or column.shape != x.shape[-ndim:]:
        raise wrong_value(
            name, f"shape {tuple(column.shape)}", f"the shape of the last dimensions of x {tuple(x.shape)}"
        )
    if column.device != x.device:
        raise wrong_value(name, f"a tensor on {column.device}", f"one on x's device, {x.device}")
    if dtype is not x.dtype and dtype is not computed_dtype(x.dtype):
        return column.to(computed_dtype(x.dtype))
    return column


def checked_eps(eps: float) -> float:
    """As a float; it is added to a mean of squares."""
    if type(eps) is float and eps >= 0:
        return eps
    # torch.compile traces a float that changes as a SymFloat.
    if not isinstance(eps, (float, int, torch.SymFloat)) or isinstance(eps, bool):
        raise wrong_type("eps", what(eps), "a number")
    if not eps >= 0:
        raise wrong_value("eps", eps, "0 or more")
    return float(eps)


def default_eps(dtype: torch.dtype) -> float:
    """The machine epsilon of what a type is computed in, as torch.nn.functional.rms_norm takes it."""
    return _EPS.get(dtype, _SINGLE_EPS)
