"""The names of `umfa`, the Python package of Universal Metal Flash Attention, on the CPU.

    from heedful.compat import umfa

What differs: arrays may have several heads and any strides; precisions default to the arrays' own (umfa rounds to
fp16); `intermediate_precision` is fp32, which the engine always keeps, and others are refused; a bool mask is True
where a query attends, and masks broadcast to (B, H, Sq, Sk).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from heedful.numpy import (
    Context,
    MFAContext,
    MFAError,
    attention,
    flash_attention_forward,
    get_version,
    is_metal_available,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Context",
    "MFAContext",
    "MFAError",
    "MetalSDPA",
    "attention",
    "flash_attention_forward",
    "get_version",
    "is_metal_available",
]


class MetalSDPA:
    """A callable in the place of `torch.nn.functional.scaled_dot_product_attention`, for torch tensors, with gradients.

    query is (L, E), (N, L, E) or (N, H, L, E), key and value likewise; with is_causal the first query meets the first
    key, as there. Returns a tensor of query's shape, with value's last size.
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        from heedful.api import attention as of_tensors
        from heedful.patterns import Causal

        leading = (None,) * (4 - query.ndim)
        q, k, v = (tensor[leading] for tensor in (query, key, value))
        return of_tensors(q, k, v, pattern=Causal(0) if is_causal else None)[(0,) * len(leading)]
