"""Who `heedful bench --gpu` times beside heedful, each as a call on (q, k, v) of (B, H, L, D)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .gpu_cases import CUDNN, FLASH, FLASH_ATTN, FLEX_MASK, FLEX_MASK_COMPILED, WINDOW, Case
from .rows import Call

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def make_peer(name: str, case: Case, device: torch.device) -> Call:
    """A peer's call for a case, compiled where it compiles.

    Raises:
        ImportError: it is not installed.
    """
    if name in (FLASH, CUDNN):
        return _sdpa(name, case)
    return _flash_attn(case) if name == FLASH_ATTN else _flex(name, case, device)


def _causal(case: Case) -> bool:
    return "causal" in case.name


def _sdpa(name: str, case: Case) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backend = {FLASH: SDPBackend.FLASH_ATTENTION, CUDNN: SDPBackend.CUDNN_ATTENTION}[name]
    grouped = case.heads != case.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=_causal(case), enable_gqa=grouped)

    return call


def _flex(name: str, case: Case, device: torch.device) -> Call:
    """Its block mask is made in each call or once; the rule is arithmetic, as its users write it."""
    import torch
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    # Its backward is timed several times over one forward.
    torch._functorch.config.donated_buffer = False
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    grouped = case.heads != case.kv_heads

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i + ahead) & (i + ahead - j < WINDOW)

    ahead = case.k_length - case.q_length
    rule = window if case.pattern == "window" else causal if _causal(case) else None
    if rule is None:
        return lambda q, k, v: compiled(q, k, v, enable_gqa=grouped)
    if name in (FLEX_MASK, FLEX_MASK_COMPILED):
        make: Any = torch.compile(create_block_mask, dynamic=False) if name == FLEX_MASK_COMPILED else create_block_mask
        return lambda q, k, v: compiled(
            q,
            k,
            v,
            block_mask=make(rule, None, None, case.q_length, case.k_length, device=device),
            enable_gqa=grouped,
        )
    kept: Any = create_block_mask(
        rule, None, None, case.q_length, case.k_length, device=str(device), _compile=device.type == "cuda"
    )
    return lambda q, k, v: compiled(q, k, v, block_mask=kept, enable_gqa=grouped)


def _flash_attn(case: Case) -> Call:
    package: Any = importlib.import_module("flash_attn")
    if package.__name__.startswith("heedful"):
        raise ImportError("flash_attn is heedful's own here")
    window = (WINDOW - 1, 0) if case.pattern == "window" else (-1, -1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out: Tensor = package.flash_attn_func(*turned, causal=_causal(case), window_size=window)
        return out.transpose(1, 2)

    return call
