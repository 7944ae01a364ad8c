"""`MultiheadAttention`: torch.nn.MultiheadAttention with heedful's attention in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from heedful.api import attention
from heedful.errors import wrong_type
from heedful.nn import nested
from heedful.nn.masks import Allowed, add_attention_mask, add_padding_mask, append_keys, both
from heedful.patterns import Causal, Pattern

_TOP_LEFT = Causal(0)
# Whether the inputs have a batch; refuses dimensions in torch's words.
_check_dimensions: Callable[..., bool] = F._mha_shape_check  # type: ignore[attr-defined]


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, computed by heedful: one argument more, otherwise the same.

    Constructor, parameters, state_dict, initialisation and the meaning of every argument are that class's. So is the
    meaning of bool masks: **True excludes** a pair, where it attends everywhere else in heedful. Bool masks, and float
    masks where they hold -inf, save the work of what they exclude.

    What differs: a query that may attend to no key gives 0 and weights 0, where torch gives NaN or 0 depending on
    need_weights; `attn_mask` and `key_padding_mask` may be of different types; nested tensors also work where
    gradients are needed, and in the jagged layout; with is_causal=True, `add_bias_kv` and `add_zero_attn`, the
    appended keys are seen whatever need_weights is.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch.nn.MultiheadAttention.
        pattern: which queries see which keys, besides the masks of a call; may be changed later in the attribute of
            this name. None is every key.

    Raises:
        ValueError, AssertionError: where torch.nn.MultiheadAttention raises them.
        TypeError: `pattern` is not a heedful.Pattern.
    """

    pattern: Pattern | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.pattern = check_pattern(pattern)
        keep_from_being_bypassed(self)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        pattern: Pattern | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of projected queries over projected keys and values, projected once more.

        Args:
            query: (L, N, E); with batch_first (N, L, E); without a batch (L, E).
            key, value: (S, N, kdim) and (S, N, vdim), with batch_first (N, S, kdim) and (N, S, vdim), or (S, kdim)
                and (S, vdim).
            key_padding_mask: (N, S) or (S,): bool, True excludes a key, or float, added to its scores.
            need_weights: whether to return the weights too, which costs about as much again.
            attn_mask: (L, S) or (N · num_heads, L, S): bool, True excludes a pair, or float, added to its score.
            average_attn_weights: whether the weights are the mean over the heads.
            is_causal: says that attn_mask is the causal mask of torch (query i sees keys up to i), which then is not
                read, unless there is a key_padding_mask or need_weights.
            pattern: which queries see which keys, besides the module's own pattern and the masks.

        Returns:
            The output, shaped as query, and the weights, (N, L, S) or for each head (N, num_heads, L, S), without N
            for inputs without a batch; None unless need_weights.

        Raises:
            AssertionError, RuntimeError: where torch.nn.MultiheadAttention raises them.
            ValueError, TypeError: another argument is wrong; the message has its name, what it got and what it takes.
        """
        own = self.pattern
        pattern = own if pattern is None else both(own, check_pattern(pattern))
        batched = _check_dimensions(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint: it says that attn_mask is causal.")
        if query.is_nested or key.is_nested or value.is_nested:
            masks = key_padding_mask, attn_mask
            return nested.attend(self, query, key, value, pattern, masks, need_weights, average_attn_weights)
        if not batched:
            same_key, same_value = key is query, value is key
            query = query.unsqueeze(0)
            key = query if same_key else key.unsqueeze(0)
            value = key if same_value else value.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        sequence_first = batched and not self.batch_first
        self.check_sizes(query, key, value)
        q, k, v = self.project(query, key, value, sequence_first)
        batch, q_length, heads, _ = q.shape
        k_length = k.shape[1]

        allowed = Allowed(pattern, None)
        if is_causal and key_padding_mask is None and not need_weights:
            allowed = Allowed(both(pattern, _TOP_LEFT), None)
        elif attn_mask is not None:
            allowed = add_attention_mask(allowed, attn_mask, q.dtype, batch, heads, q_length, k_length)
        if key_padding_mask is not None:
            allowed = add_padding_mask(allowed, key_padding_mask, q.dtype, batch, k_length)
        appended = (self.bias_k is not None) + self.add_zero_attn
        if appended:
            k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)
            allowed = append_keys(allowed, appended, batch, heads, q_length, k_length, q.device)

        found = attention(
            q,
            k,
            v,
            pattern=allowed.pattern,
            bias=allowed.bias,
            dropout_p=self.dropout if self.training else 0.0,
            layout="blhd",
            return_weights=need_weights,
        )
        out, weights = (found, None) if isinstance(found, Tensor) else (found.out, found.weights)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        if sequence_first:
            out = out.transpose(0, 1)
        out = F.linear(out.reshape(query.shape), self.out_proj.weight, self.out_proj.bias)
        return out if batched else out.squeeze(0), weights

    def check_sizes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raises AssertionError where the inputs do not fit one another or the weights."""
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if self.in_proj_weight is None:
            if key.shape[:2] != value.shape[:2]:
                raise AssertionError(
                    f"key's sequence and batch dims {key.shape[:2]} do not match value's {value.shape[:2]}"
                )
            for name, tensor, size in (("key", key, self.kdim), ("value", value, self.vdim)):
                if tensor.shape[-1] != size:
                    raise AssertionError(f"expecting {name} of {size} features, but got {tensor.shape[-1]}")
        elif key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")

    def project(self, query: Tensor, key: Tensor, value: Tensor, sequence_first: bool) -> tuple[Tensor, ...]:
        """q (N, L, H, D), k and v (N, S, H, D), as views of as few products as the inputs allow."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and key is value:
            if query is key:
                return self._heads(query, weight, bias, 3, sequence_first)
            sizes = [self.embed_dim, 2 * self.embed_dim]
            q_weight, kv_weight = weight.split(sizes)
            q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
            (q,) = self._heads(query, q_weight, q_bias, 1, sequence_first)
            return q, *self._heads(key, kv_weight, kv_bias, 2, sequence_first)
        separate = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        weights = separate if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        projections = zip((query, key, value), weights, biases, strict=True)
        return tuple([self._heads(*projection, 1, sequence_first)[0] for projection in projections])

    def _heads(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: int, sequence_first: bool
    ) -> tuple[Tensor, ...]:
        """The parts of a projection, each (N, L, H, D)."""
        first, second, _ = x.shape
        projected = F.linear(x, weight, bias).view(first, second, parts, self.num_heads, self.head_dim)
        return (projected.transpose(0, 1) if sequence_first else projected).unbind(2)

    def _append(self, tensor: Tensor, learned: Tensor | None) -> Tensor:
        """Keys or values with the learned one behind them, then with the one of zeros, where the module has these."""
        if learned is not None:
            last = learned.view(1, 1, self.num_heads, self.head_dim).expand(tensor.shape[0], -1, -1, -1)
            tensor = torch.cat([tensor, last], 1)
        return F.pad(tensor, (0, 0, 0, 0, 0, 1)) if self.add_zero_attn else tensor

    def merge_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor
    ) -> tuple[Tensor | None, int | None]:
        # What torch.nn.TransformerEncoderLayer calls when it is about to compute everything itself.
        if self.pattern is not None:
            raise RuntimeError(
                f"a fused layer was about to ignore pattern={self.pattern} of this heedful.nn.MultiheadAttention; "
                "call torch.backends.mha.set_fastpath_enabled(False)"
            )
        return super().merge_masks(attn_mask, key_padding_mask, query)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, pattern={self.pattern}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "torch.jit.script cannot read heedful.nn.MultiheadAttention; use torch.compile or "
            "torch.export, or undo heedful.convert before scripting"
        )


def check_pattern(pattern: Any) -> Pattern | None:
    """The pattern, if it is one.

    Raises:
        TypeError: it is not; a tensor is refused because masks of True mean the opposite here.
    """
    if pattern is not None and not isinstance(pattern, Pattern):
        raise wrong_type("pattern", f"a {type(pattern).__name__}", "a heedful.Pattern (an instance) or None")
    return pattern


def keep_from_being_bypassed(module: torch.nn.MultiheadAttention) -> RemovableHandle:
    """Make torch.nn.TransformerEncoderLayer call this module in evaluation too.

    Without gradients that layer computes everything at once from its modules' weights, except where a module in it
    has hooks. The output projection is never called as a module, neither here nor in torch, so a hook on it is free.
    """
    return module.out_proj.register_forward_pre_hook(_called_by_nobody)


def _called_by_nobody(module: torch.nn.Module, inputs: Any) -> None:
    return None
