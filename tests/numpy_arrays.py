"""Numpy arrays as callers have them, and what `heedful.numpy.attention` should make of them."""

from __future__ import annotations

import numpy as np
import torch
from tolerance import Expected, expected

MEMORY = ("contiguous", "bhsd", "sliced", "expanded", "last-strided", "reversed")


def array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float32", memory: str = "contiguous"):
    """Standard normal values of this shape, with strides as `memory` says."""
    if memory == "bhsd" and len(shape) > 2:
        turned = (*shape[:-3], shape[-2], shape[-3], shape[-1])
        return rng.standard_normal(turned).astype(dtype).swapaxes(-2, -3)
    if memory == "sliced":
        larger = rng.standard_normal([size + 3 for size in shape]).astype(dtype)
        return larger[tuple(slice(1, size + 1) for size in shape)]
    if memory == "expanded":
        return np.broadcast_to(rng.standard_normal((1, *shape[1:])).astype(dtype), shape)
    if memory == "last-strided":
        return rng.standard_normal((*shape[:-1], 2 * shape[-1])).astype(dtype)[..., ::2]
    if memory == "reversed":
        return rng.standard_normal(shape).astype(dtype)[tuple(slice(None, None, -1) for _ in shape)]
    return rng.standard_normal(shape).astype(dtype)


def in_torch(x) -> torch.Tensor:
    """(S, D), (S, H, D) or (B, S, H, D) as a tensor (B, H, S, D)."""
    tensor = torch.from_numpy(np.array(x))
    if tensor.ndim == 2:
        return tensor[None, None]
    return (tensor if tensor.ndim == 4 else tensor[None]).transpose(1, 2)


def wanted(q, k, v, **options: object) -> Expected:
    """The fp64 reference and its bounds; options as `tolerance.expected`, arrays or tensors."""
    given = {
        name: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    return expected(in_torch(q), in_torch(k), in_torch(v), **given)


def check(found, reference: Expected) -> None:
    """An `Attention` against the reference."""
    reference.out.check(in_torch(found.out), "out")
    reference.lse.check(torch.from_numpy(found.lse).reshape(reference.lse.value.shape), "lse")
    if found.weights is not None:
        reference.weights.check(torch.from_numpy(found.weights).reshape(reference.weights.value.shape), "weights")
