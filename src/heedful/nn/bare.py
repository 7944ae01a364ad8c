"""Attention modules without weights of their own: queries, keys and values in, the output out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from heedful.api import attention
from heedful.errors import wrong_type, wrong_value
from heedful.patterns import Causal, Pattern, SlidingWindow
from heedful.patterns.arguments import integer


class MACoreAttention(nn.Module):
    """Attention over (B, S, H, D) tensors: full, causal, or within a window.

    Args:
        sparse: whether each query sees a window only.
        window_size: the window's radius, on both sides and inclusive: query i sees key j where |i - j| <= window_size,
            2 · window_size + 1 keys. Used, and checked, with `sparse` alone.
        use_causal_mask: whether queries see no later keys; together with `sparse`, the window's past half.
        fallback_training: whether training may run on whichever backend is fastest, as evaluation does; False
            insists on heedful's engine there. Gradients are the same.

    Raises:
        TypeError, ValueError: `window_size` is not a positive int.
    """

    def __init__(
        self, sparse: bool = False, window_size: int = 64, use_causal_mask: bool = False, fallback_training: bool = True
    ) -> None:
        super().__init__()
        self.sparse = sparse
        self.window_size = integer("window_size", window_size, 1) if sparse else window_size
        self.use_causal_mask = use_causal_mask
        self.fallback_training = fallback_training

    @property
    def pattern(self) -> Pattern | None:
        """What the arguments mean as a pattern; None is every key."""
        if self.sparse:
            return SlidingWindow(self.window_size, 0 if self.use_causal_mask else self.window_size)
        return Causal() if self.use_causal_mask else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(query keyᵀ / sqrt(D)) value for each head, over the keys of the pattern.

        Args:
            query, key, value: (B, S, H, D), no size of 0.

        Returns:
            (B, S, H, D), contiguous.

        Raises:
            ValueError: the shapes are not the same four sizes of at least 1.
            UnsupportedError: without `fallback_training`, where the engine cannot run the call.
        """
        _check_shapes(query, key, value, "(B, S, H, D)")
        backend = None
        if self.training and not self.fallback_training:
            backend = "triton" if query.is_cuda else "native"
        return attention(query, key, value, pattern=self.pattern, layout="blhd", backend=backend).contiguous()

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}"


class SparseAttention(nn.Module):
    """Attention of one head over (B, S, model_dim) tensors within a window, without projections.

    To replace torch.nn.MultiheadAttention, whose projections and heads this has not, take
    `heedful.nn.MultiheadAttention` with `pattern=heedful.SlidingWindow(window_size)`.

    Args:
        window_size: the window's radius, on both sides and inclusive: query i sees key j where |i - j| <= window_size,
            2 · window_size + 1 keys.
        use_ma_core: False runs on PyTorch's own attention, through a dense mask, instead of heedful's fastest backend.

    Raises:
        TypeError, ValueError: `window_size` is not a positive int.
    """

    def __init__(self, window_size: int = 3, use_ma_core: bool = True) -> None:
        super().__init__()
        self.window_size = integer("window_size", window_size, 1)
        self.use_ma_core = use_ma_core

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ / sqrt(model_dim)) v over the keys of the window.

        Args:
            q, k, v: (B, S, model_dim), no size of 0.

        Returns:
            (B, S, model_dim), contiguous.

        Raises:
            ValueError: the shapes are not the same three sizes of at least 1.
        """
        _check_shapes(q, k, v, "(B, S, model_dim)")
        backend = None if self.use_ma_core else "sdpa"
        heads = (tensor.unsqueeze(2) for tensor in (q, k, v))
        out = attention(*heads, pattern=SlidingWindow(self.window_size), layout="blhd", backend=backend)
        return out.squeeze(2).contiguous()

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, use_ma_core={self.use_ma_core}"


def create_attention_layer(attention_type: str = "dense", **options: Any) -> MACoreAttention:
    """A `MACoreAttention`: "dense", or "sparse", which "auto" means too.

    Args:
        attention_type: "dense", "sparse" or "auto".
        options: the other arguments of `MACoreAttention`.

    Raises:
        ValueError: `attention_type` is none of these.
        TypeError: an option is `sparse` or none of `MACoreAttention`'s.
    """
    if attention_type not in ("dense", "sparse", "auto"):
        raise wrong_value("attention_type", repr(attention_type), "'dense', 'sparse' or 'auto'")
    return MACoreAttention(sparse=attention_type != "dense", **options)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, axes: str) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise wrong_type(name, f"a {type(tensor).__name__}", f"a torch.Tensor {axes}")
        if tensor.dim() != axes.count(",") + 1:
            raise wrong_value(name, f"shape {tuple(tensor.shape)}", axes)
        if tensor.shape != query.shape:
            raise wrong_value(name, f"size mismatch: shape {tuple(tensor.shape)}", f"query's {tuple(query.shape)}")
    if 0 in query.shape:
        raise wrong_value("query", f"shape {tuple(query.shape)}", f"{axes} with sizes of at least 1")
