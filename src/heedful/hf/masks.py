"""The mask function: a pattern in place of the mask tensor, made once a forward pass and shared by its layers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import reduce
from operator import and_
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from heedful.hf import recognise
from heedful.hf.grid import Grid
from heedful.patterns import Documents, Mask, Pattern

logger = logging.getLogger("heedful")

_logged: set[str] = set()


class PatternMask:
    """A pattern where transformers expects a bool attention mask of shape (B, 1, Lq, Lk).

    It answers what models ask of a mask without changing it (shape, dtype, `.to`, `.contiguous`). Slicing it, joining
    it with `torch.cat` or choosing by it with `torch.where` gives the bool tensor; arithmetic is refused, since a
    model that adds its mask to the scores wants another mask than this one.

    Attributes:
        pattern: which pairs of this forward pass count.
        has_documents: whether the pattern keeps packed sequences apart.
        causal: whether no query sees a key behind it.
        has_holes: whether padding may lie between real tokens.
    """

    __slots__ = (
        "_packed",
        "batch",
        "causal",
        "device",
        "has_documents",
        "has_holes",
        "k_length",
        "pattern",
        "q_length",
    )

    ndim = 4
    dtype = torch.bool
    requires_grad = False

    def __init__(
        self,
        pattern: Pattern,
        grid: Grid,
        *,
        has_documents: bool = False,
        causal: bool = False,
        has_holes: bool = False,
    ) -> None:
        self.pattern = pattern
        self.batch = grid.batch
        self.q_length = grid.q_length
        self.k_length = grid.k_length
        self.device = grid.device
        self.has_documents = has_documents
        self.causal = causal
        self.has_holes = has_holes
        self._packed: tuple[Tensor, Pattern] | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch, 1, self.q_length, self.k_length))

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def contiguous(self) -> PatternMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> PatternMask:
        """Itself: a pattern's tensors follow the query's device when it is used."""
        return self

    def packed(self, cu_seqlens: Tensor) -> Pattern:
        """The pattern inside each of the sequences that `cu_seqlens` marks; the same for all layers of a pass."""
        if self._packed is None or self._packed[0] is not cu_seqlens:
            self._packed = (cu_seqlens, self.pattern & Documents(cu_seqlens.to(torch.int32)))
        return self._packed[1]

    def dense(self) -> Tensor:
        """The bool tensor (B, 1, Lq, Lk) that this stands for, True where a query may see a key."""
        return self.pattern.dense(self.q_length, self.k_length, device=self.device).expand(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        found = self.dense()[index]
        if found.ndim < 3:
            # Who takes a row of a mask does not hand it to the attention.
            raise _no_arithmetic("[]")
        _say_dense("this model slices its attention mask")
        return found

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (torch.cat, torch.where):
            raise _no_arithmetic(getattr(function, "__name__", str(function)))
        _say_dense(f"this model uses its attention mask in torch.{function.__name__}")
        return function(*_tensors(args), **_tensors(kwargs or {}))

    def __add__(self, other: Any) -> Any:
        raise _no_arithmetic("+")

    __radd__ = __add__

    def __repr__(self) -> str:
        return f"PatternMask({self.pattern!r}, shape={tuple(self.shape)})"


def _no_arithmetic(what: str) -> TypeError:
    return TypeError(
        f'{what}: with attn_implementation="heedful" the attention mask is a pattern, not a tensor to compute with; '
        "this model computes its attention outside transformers' attention interface. heedful.hf.patch(model) takes "
        "some of these over"
    )


def _tensors(value: Any) -> Any:
    if isinstance(value, PatternMask):
        return value.dense()
    if isinstance(value, dict):
        return {name: _tensors(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_tensors(item) for item in value)
    return value


def pattern_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | PatternMask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> PatternMask | Tensor:
    """The mask function registered with transformers' `AttentionMaskInterface`.

    Args:
        batch_size, q_length, kv_length: B, Lq and Lk of the calls that the mask is for.
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: which pairs of positions count, as transformers composes it.
        attention_mask: the padding, bool (B, L), True at real tokens; or a mask made before, which is returned.
        use_vmap: how transformers evaluates `mask_function` where it has to be evaluated.
        device: where the mask's tensors are made.

    Returns:
        The pattern. What is not recognised in `mask_function` is a `heedful.Mask` in it, and logged once.

    Raises:
        ValueError: `attention_mask` is neither (B, L) nor a mask of four dimensions.
    """
    if isinstance(attention_mask, PatternMask) or (attention_mask is not None and attention_mask.ndim == 4):
        return attention_mask
    grid = Grid(batch_size, q_length, kv_length, q_offset, kv_offset, torch.device(device))
    functions = list(recognise.conjuncts(mask_function))
    has_documents = any(recognise.has_documents(function) for function in functions)
    causal = any(recognise.is_causal(function) for function in functions)
    padding = None
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask: got shape {tuple(attention_mask.shape)}; takes (batch, length) or a 4-D mask"
            )
        kept = attention_mask.to(grid.device, torch.bool)
        padding = _padding(kept, grid, causal)
        if causal:
            functions = [function for function in functions if not recognise.is_first_chunk(function, grid, kept)]
    patterns = [recognise.recognise(function, grid) or _dense(function, grid, use_vmap) for function in functions]
    if padding is not None:
        patterns.append(padding)
    return PatternMask(
        reduce(and_, patterns),
        grid,
        has_documents=has_documents,
        causal=causal,
        has_holes=isinstance(padding, Mask),
    )


def _padding(attention_mask: Tensor, grid: Grid, causal: bool) -> Pattern | None:
    """What padding takes away beyond causality, or None if nothing."""
    kept = attention_mask[:, grid.k_offset : grid.k_offset + grid.k_length]
    if grid.readable:
        seen = grid.k_length
        if causal and grid.q_start is not None:
            # A static cache's unwritten tail, which attention_mask does not reach, is out of causality's reach as well.
            seen = max(min(seen, grid.q_start + grid.q_length - grid.k_offset), 0)
        if kept.shape[-1] >= seen and bool(kept[:, :seen].all()):
            return None
    if kept.shape[-1] < grid.k_length:
        kept = torch.nn.functional.pad(kept, (0, grid.k_length - kept.shape[-1]))
    ranges = recognise.key_ranges(kept) if grid.readable else None
    if ranges is not None:
        return ranges
    _say_dense("padding that is not one run of tokens per sequence (or cannot be read while tracing)", "(B, 1, 1, Lk)")
    return Mask(kept[:, None, None, :])


def _dense(function: Callable[..., Any], grid: Grid, use_vmap: bool) -> Pattern:
    name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"
    _say_dense(f"the mask function {name} is not recognised as a pattern")
    mask = recognise.evaluate(function, grid, use_vmap)
    # Dimensions that the function does not depend on are expanded views; a mask of size 1 there says the same.
    for dim in (0, 2, 3):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return Mask(mask)


def _say_dense(reason: str, shape: str = "(B, 1, Lq, Lk)") -> None:
    if torch.compiler.is_compiling() or reason in _logged:
        return
    _logged.add(reason)
    logger.warning("heedful.hf: %s; it is passed as a bool tensor %s", reason, shape)
