"""The names of `ma_core` and of its PyTorch bridge: its layers, and its engine's tensors and functions.

Layers: `from heedful.compat.ma_core import MACoreAttention, SparseAttention`. Engine:
`from heedful.compat import ma_core`. A window_size is a radius: query i sees key j where |i - j| <= window_size.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from heedful.api import attention
from heedful.errors import wrong_value
from heedful.nn.bare import MACoreAttention, SparseAttention, create_attention_layer
from heedful.patterns import Causal, Pattern, SlidingWindow

__all__ = [
    "Device",
    "MACoreAttention",
    "SparseAttention",
    "SparseTensor",
    "Tensor",
    "TensorShape",
    "add",
    "compute_dense_attention",
    "compute_sparse_attention",
    "create_attention_layer",
    "create_random_tensor",
    "create_sliding_window_pattern",
    "create_tensor",
    "get_pattern_statistics",
    "ma_core_to_pytorch",
    "pytorch_dense_attention",
    "pytorch_sparse_attention",
    "pytorch_to_ma_core",
]


class Device(enum.Enum):
    """Where a tensor lies."""

    CPU = "cpu"
    MPS = "mps"
    CUDA = "cuda"
    ROCm = "rocm"


class TensorShape(NamedTuple):
    """The four sizes of a `Tensor`."""

    batch_size: int
    sequence_length: int
    num_heads: int
    head_dim: int

    def total_elements(self) -> int:
        """Their product."""
        return self.batch_size * self.sequence_length * self.num_heads * self.head_dim


class Tensor:
    """float32 numbers (batch, seq, heads, dim) on the CPU; `data` is the torch tensor that holds them."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def shape(self) -> TensorShape:
        """Its four sizes."""
        return TensorShape(*self.data.shape)

    def size(self) -> int:
        """How many elements it has."""
        return self.data.numel()

    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.data.nbytes

    def empty(self) -> bool:
        """Whether it has none."""
        return self.size() == 0

    def zero(self) -> None:
        """Fill it with zeros."""
        self.data.zero_()

    def fill(self, value: float) -> None:
        """Fill it with a value."""
        self.data.fill_(value)

    def copy_from_numpy(self, array: Any) -> None:
        """Take over the elements of an array of as many, cast to float32.

        Raises:
            RuntimeError: it has another number of elements.
        """
        values = np.ascontiguousarray(array, dtype=np.float32)
        if values.size != self.size():
            raise RuntimeError(f"copy_from_numpy: size mismatch: takes {self.size()} elements, got {values.size}")
        self.data.copy_(torch.from_numpy(values).view(self.data.shape))

    def to_numpy(self) -> NDArray[np.float32]:
        """The elements as a new array."""
        copied: NDArray[np.float32] = self.data.numpy().copy()
        return copied


class SparseTensor(NamedTuple):
    """Which positions see which: a pattern for one sequence length."""

    shape: TensorShape
    device: Device
    pattern: Pattern

    def nnz(self) -> int:
        """How many pairs of positions see one another."""
        length = self.shape.sequence_length
        return round(self.pattern.density(length, length) * length * length)

    def empty(self) -> bool:
        """Whether there is none."""
        return self.nnz() == 0


def add(a: int, b: int) -> int:
    """a + b."""
    return a + b


def create_tensor(shape: Sequence[int], device: str = "cpu") -> Tensor:
    """A tensor of zeros, of shape (batch, seq, heads, dim).

    Raises:
        RuntimeError: `shape` is not four sizes of at least 0, or `device` not "cpu" in any case.
    """
    if len(shape) != 4 or any(size < 0 for size in shape):
        raise RuntimeError(f"shape takes 4 dimensions, [batch, seq, heads, dim], got {list(shape)}")
    if device.lower() != "cpu":
        raise RuntimeError(f"device takes 'cpu', got {device!r}")
    return Tensor(torch.zeros(tuple(shape)))


def create_random_tensor(shape: Sequence[int], mean: float = 0.0, std: float = 1.0, device: str = "cpu") -> Tensor:
    """A tensor of normally distributed numbers out of torch's generator.

    Raises:
        RuntimeError: as `create_tensor`.
    """
    tensor = create_tensor(shape, device)
    tensor.data.normal_(mean, std)
    return tensor


def create_sliding_window_pattern(seq_len: int, window_size: int) -> SparseTensor:
    """The pairs of positions below `seq_len` that are at most `window_size` apart.

    Raises:
        TypeError, ValueError: `window_size` or `seq_len` is not an int of at least 0.
    """
    if seq_len < 0:
        raise wrong_value("seq_len", seq_len, "an int of at least 0")
    return SparseTensor(TensorShape(1, seq_len, 1, seq_len), Device.CPU, SlidingWindow(window_size))


def get_pattern_statistics(pattern: SparseTensor) -> str:
    """Elements, attended ones, and the share that is left out, a line each."""
    total = pattern.shape.sequence_length**2
    sparsity = 1 - pattern.nnz() / total if total else 0.0
    return "\n".join(
        [
            "Pattern Statistics:",
            f"  Total elements: {total}",
            f"  Non-zero elements: {pattern.nnz()}",
            f"  Sparsity ratio: {sparsity:.4f}",
        ]
    )


def compute_dense_attention(query: Tensor, key: Tensor, value: Tensor, use_causal_mask: bool = False) -> Tensor:
    """Attention over every key, or with `use_causal_mask` over no later ones.

    Raises:
        ValueError, TypeError: the tensors do not fit one another.
    """
    return _attend(query, key, value, Causal() if use_causal_mask else None)


def compute_sparse_attention(query: Tensor, key: Tensor, value: Tensor, window_size: int = 64) -> Tensor:
    """Attention over the keys that are at most `window_size` away.

    Raises:
        ValueError, TypeError: the tensors do not fit one another, or `window_size` is not an int of at least 0.
    """
    return _attend(query, key, value, SlidingWindow(window_size))


def pytorch_to_ma_core(tensor: torch.Tensor) -> Tensor:
    """A copy of a torch tensor (batch, seq, heads, dim), in float32 on the CPU."""
    return Tensor(tensor.detach().to("cpu", torch.float32, copy=True).contiguous())


def ma_core_to_pytorch(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """A copy of the elements on a device, in a dtype."""
    return tensor.data.to(device, dtype, copy=True)


def pytorch_dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, use_causal_mask: bool = False
) -> torch.Tensor:
    """Attention of torch tensors (batch, seq, heads, dim) by PyTorch's own scaled_dot_product_attention."""
    pattern = Causal() if use_causal_mask else None
    return attention(query, key, value, pattern=pattern, layout="blhd", backend="sdpa").contiguous()


def pytorch_sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window_size: int = 64
) -> torch.Tensor:
    """The same over the keys that are at most `window_size` away, through a dense mask."""
    pattern = SlidingWindow(window_size)
    return attention(query, key, value, pattern=pattern, layout="blhd", backend="sdpa").contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern | None) -> Tensor:
    return Tensor(attention(query.data, key.data, value.data, pattern=pattern, layout="blhd").contiguous())
