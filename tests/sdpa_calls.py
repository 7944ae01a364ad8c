"""Calls of scaled_dot_product_attention over its whole argument space, compared with PyTorch's own function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import heedful
from heedful import sdpa
from heedful.backend.native import prefer

torch_sdpa = torch._C._nn.scaled_dot_product_attention

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = (1, 2, 3, 5, 8, 17, 33, 70)
MASKS = ("bool", "float", "float32", "band", "padding", "infinite", "finite", "empty rows")


@dataclass
class Call:
    """A call by what makes its tensors."""

    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    memory: str = "contiguous"
    mask: str | None = None
    mask_shape: tuple[int, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    gradients: bool = False
    mask_gradient: bool = False
    seed: int = 0

    def tensors(self) -> tuple[list[Tensor], Tensor | None]:
        """q, k, v, and the mask."""
        torch.manual_seed(self.seed)
        qkv = [in_memory(torch.randn(shape), self.memory).to(self.dtype) for shape in self.shapes]
        mask = None if self.mask is None else make_mask(self.mask, self.mask_shape, self.dtype)
        return qkv, mask


def in_memory(tensor: Tensor, memory: str) -> Tensor:
    """The same numbers with strides as `memory` says, where there are enough dimensions."""
    if memory == "strided" and tensor.ndim:
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if memory == "blhd" and tensor.ndim > 2:
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    if memory == "lbhd" and tensor.ndim == 4:
        return tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if memory == "packed" and tensor.ndim > 2:
        return torch.stack([tensor.transpose(-3, -2)] * 3, -3)[..., 1, :, :].transpose(-3, -2)
    return tensor


def make_mask(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if kind == "float":
        return torch.randn(shape).to(dtype)
    if kind == "float32":
        return torch.randn(shape)
    rows, columns = (1, 1, *shape)[-2:]
    distance = torch.arange(columns) - torch.arange(rows)[:, None]
    pairs = torch.rand(shape) < 0.6
    if kind == "band":
        pairs = ((distance <= 2) & (distance >= -5)).expand(shape) if len(shape) > 1 else pairs
    if kind == "padding":
        pairs = (torch.arange(columns) < columns - columns // 3).expand(shape) if shape else pairs
    if kind == "empty rows" and len(shape) > 1:
        pairs = pairs & (torch.arange(rows)[:, None] % 3 != 1)
    if kind in ("infinite", "finite"):
        least = -math.inf if kind == "infinite" else torch.finfo(dtype).min
        if kind == "finite" and shape:
            # The gradients of a row of nothing else are beyond what a log-sum-exp holds, PyTorch's own too.
            pairs = pairs | (torch.arange(columns) == 0)
        return torch.zeros(shape, dtype=dtype).masked_fill(~pairs, least)
    return pairs


@dataclass
class Outcome:
    error: tuple[type, str] | None = None
    out: Tensor | None = None
    gradients: list[Tensor] = field(default_factory=list)


def outcome(function: Callable[..., Tensor], call: Call, dtype: torch.dtype | None = None) -> Outcome:
    """What the function makes of the call, with gradients of everything that may have one; in another dtype if given,
    from the same numbers."""
    qkv, mask = call.tensors()
    if dtype is not None:
        qkv = [t.to(dtype) for t in qkv]
        mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    qkv = [t.detach().requires_grad_(call.gradients) for t in qkv]
    leaves = list(qkv) if call.gradients else []
    if mask is not None and call.mask_gradient and mask.is_floating_point():
        mask = mask.detach().requires_grad_()
        leaves.append(mask)
    try:
        out = function(*qkv, mask, **call.options)
    except Exception as error:
        # By position or by name is the caller's way, and passed on in one of them.
        return Outcome((type(error), re.sub(r" \(position \d+\)", "", str(error))))
    found = Outcome(None, out.detach())
    if leaves and out.requires_grad:
        torch.manual_seed(call.seed + 1)
        arriving = torch.randn(out.shape).to(call.dtype).to(out.dtype)
        found.gradients = list(torch.autograd.grad(out, leaves, arriving))
    return found


def compare(
    function: Callable[..., Tensor], call: Call, within: Callable[[], AbstractContextManager[object]] = nullcontext
) -> None:
    """Raises AssertionError where the function, called within a context, does not do what PyTorch's does outside."""
    wanted = outcome(torch_sdpa, call)
    with within():
        found = outcome(function, call)
    assert found.error == wanted.error
    if wanted.error is not None:
        return
    assert found.out.dtype == wanted.out.dtype
    assert found.out.shape == wanted.out.shape
    assert strides(found.out) == strides(wanted.out)
    if call.options.get("scale") != call.options.get("scale"):
        # NaN, with which PyTorch's kernels differ among themselves.
        torch.testing.assert_close(found.out, wanted.out, rtol=0, atol=0, equal_nan=True)
        return
    exact = outcome(torch_sdpa, call, torch.float64)
    tolerance = TOLERANCE[call.dtype]
    torch.testing.assert_close(found.out.double(), exact.out, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert len(found.gradients) == len(wanted.gradients)
    for mine, theirs, right in zip(found.gradients, wanted.gradients, exact.gradients, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        size = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        torch.testing.assert_close(
            mine.double(), right, rtol=10 * tolerance, atol=10 * tolerance * size, equal_nan=True
        )


def strides(tensor: Tensor) -> list[int]:
    """Those that mean anything."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@st.composite
def calls(draw: Callable[[st.SearchStrategy], object]) -> Call:
    """Mostly right, with a wrong argument now and then."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    seldom = lambda: draw(st.integers(0, 11)) == 0  # noqa: E731
    q_length, k_length, dim = pick(*LENGTHS), pick(*LENGTHS), pick(1, 3, 8, 16)
    value_dim = pick(dim, dim, dim, 5)
    whole = tuple(pick(1, 2, 3) for _ in range(pick(0, 1, 2, 2, 2, 3)))
    group = 1
    enable_gqa = pick(False, False, True)
    if enable_gqa and whole and pick(True, True, False):
        group = pick(1, 2, 3)
    broadcast = seldom()

    def lead(heads: int) -> tuple[int, ...]:
        sizes = (*whole[:-1], whole[-1] * heads) if whole else ()
        if broadcast:
            sizes = tuple(1 if pick(True, False) else size for size in sizes)[pick(0, 0, min(1, len(sizes))) :]
        return sizes

    shapes = ((*lead(group), q_length, dim), (*lead(1), k_length, dim), (*lead(1), k_length, value_dim))
    if seldom():
        axis = pick(0, 1)
        wrong = (*shapes[axis][:-1], dim + 1) if pick(True, False) else shapes[axis][1:]
        shapes = tuple(wrong if n == axis else shape for n, shape in enumerate(shapes))
    options: dict[str, object] = {"enable_gqa": enable_gqa}
    if pick(True, False, False):
        options["is_causal"] = True
    if pick(True, False, False):
        # PyTorch's kernel gives NaN for a causal call whose scale is not positive.
        options["scale"] = pick(0.3, 2, math.nan, *(() if "is_causal" in options else (-1.0, 0.0)))
        if seldom():
            options["scale"] = "much"
    if seldom():
        options["dropout_p"] = pick(1.0, 1.5, None)
    mask, mask_shape = None, ()
    if pick(True, False):
        mask = pick(*MASKS)
        full = (*((*whole[:-1], whole[-1] * group) if whole else ()), q_length, k_length)
        mask_shape = tuple(size if pick(True, True, False) else 1 for size in full)
        mask_shape = mask_shape[pick(0, 0, *range(len(full))) :]
        if seldom():
            mask_shape = pick((2, *mask_shape), (q_length + 1, k_length), ())
    gradients = pick(False, False, True)
    return Call(
        shapes,
        pick(torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16),
        pick("contiguous", "contiguous", "blhd", "lbhd", "packed", "strided"),
        mask,
        mask_shape,
        options,
        gradients,
        gradients and pick(True, False),
        draw(st.integers(0, 999)),
    )


@pytest.fixture
def engine_pays_always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However small a call is, and whatever the processor, it is the engine's."""
    pairs = dict.fromkeys(prefer._PAIRS, 0)
    limits = {"few_pairs": pairs, "few_pairs_gradient": pairs, "few_queries": 0, "cached_bytes": 0, "engine": {}}
    monkeypatch.setattr(prefer, "_table", limits)
    monkeypatch.setattr(prefer, "FEW_KEYS", 1 << 30)
    monkeypatch.setattr(prefer, "_table_loaded", True)
    for limit in ("FEW_PAIRS", "FEW_PAIRS_WIDE", "_FEW_PAIRS_UNDER_A_MASK", "_FEW_PAIRS_OF_A_HEAD"):
        monkeypatch.setattr(sdpa.call, limit, 0)
    heedful.clear_caches()
    yield
    heedful.clear_caches()
