"""What tests of the doors on a device share: inputs, comparison with fp64 or PyTorch, and that nothing waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import heedful

DEVICE = torch.device("cuda")
# Share of the norm: several roundings of the output's type, which attention's own tests bound tightly.
CLOSE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(found: Tensor, wanted: Tensor, bound: float | None = None) -> float:
    """How far off, as a share of the norm; raises beyond the bound."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert found.dtype == wanted.dtype, (found.dtype, wanted.dtype)
    bound = CLOSE.get(found.dtype, 1e-9) if bound is None else bound
    a, b = found.detach().double(), wanted.detach().double()
    assert torch.isfinite(a).equal(torch.isfinite(b)), "NaN or infinity"
    a, b = a.nan_to_num(), b.nan_to_num()
    off = float((a - b).norm() / b.norm().clamp(min=1e-30))
    assert off <= bound, f"off by {off:.2e} of the norm, at most {bound:.0e}"
    return off


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return heedful.attention(q, k, v, backend="reference", **options)


def held(lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch = len(lengths)
    return made(batch, 1, 8, 64), made(batch, 1, 2, 64), made(batch, 1, 2, 64)


def decoded(q: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    parts = [(q[n, None], key[n, None, :stop], value[n, None, :stop]) for n, stop in enumerate(lengths)]
    return torch.cat([exact(*part, causal=True, layout="blhd") for part in parts])
