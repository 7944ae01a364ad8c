"""Checks of arguments that need no torch: the same for tensors and for numpy arrays."""

from __future__ import annotations

import math
from numbers import Real
from typing import Protocol

from heedful.errors import wrong_type, wrong_value


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def check_shapes(query: Shaped, key: Shaped, value: Shaped) -> None:
    """Refuses query, key and value in index order (B, H, L, D) that do not fit each other."""
    batch, heads, _, head_dim = query.shape
    for name, tensor in (("k", key), ("v", value)):
        if tensor.shape[0] != batch:
            raise wrong_value(name, f"batch {tensor.shape[0]}", f"q's batch, {batch}")
    if key.shape[3] != head_dim:
        raise wrong_value("k", f"head dim {key.shape[3]}", f"q's head dim, {head_dim}")
    if value.shape[1] != key.shape[1]:
        raise wrong_value("v", f"{value.shape[1]} heads", f"as many heads as k, {key.shape[1]}")
    if value.shape[2] != key.shape[2]:
        raise wrong_value("v", f"length {value.shape[2]}", f"k's length, {key.shape[2]}")
    if heads == 0:
        raise wrong_value("q", "0 heads", "1 or more")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise wrong_value("k", f"{key.shape[1]} heads", f"a number of heads that divides q's, {heads}")
    if head_dim == 0:
        raise wrong_value("q", "head dim 0", "1 or more")


def check_scalars(
    causal: bool,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool,
    return_weights: bool | str,
    scale_name: str = "scale",
) -> None:
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(flag, (bool, int)):
            raise wrong_type(name, what(flag), "a bool")
    if not isinstance(return_weights, (bool, int)) and return_weights != "sparse":
        raise wrong_value("return_weights", repr(return_weights), "True, False or 'sparse'")
    for name, number in ((scale_name, scale), ("softcap", softcap), ("dropout_p", dropout_p)):
        if number is not None and not isinstance(number, (float, int, Real)):
            raise wrong_type(name, what(number), "a number")
    # Comparisons where math.isfinite would do, because torch.compile traces no call on a dynamic float.
    if scale is not None and not -math.inf < scale < math.inf:
        raise wrong_value(scale_name, scale, "a finite number, or None for 1/sqrt(head dim)")
    if softcap is not None and not 0 < softcap < math.inf:
        raise wrong_value("softcap", softcap, "a positive finite number, or None for none")
    if dropout_p is None or not 0 <= dropout_p < 1:
        raise wrong_value("dropout_p", dropout_p, "a probability in [0, 1)")


def shape_of(tensor: Shaped) -> tuple[int, ...]:
    return tuple(tensor.shape)


def what(value: object) -> str:
    text = repr(value)
    return f"a {type(value).__name__}" if len(text) > 60 else f"{text} ({type(value).__name__})"
