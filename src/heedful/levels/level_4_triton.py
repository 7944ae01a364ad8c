"""Level 4, Triton: kernels written by hand, in Python, block by block.

Over level 3: the writer decides what one program of the GPU holds in its registers, what it reads again instead of
keeping, and in which order sums are taken. A row is normalised, activated and written without leaving the chip, and
the backward recomputes it. Nothing has to be guessed by a compiler, and nothing changes when a shape does.

Lesson: for elementwise chains and rows a compiler comes as far; a kernel by hand pays where the algorithm differs, as
in attention, which is heedful's Triton backend here. Off a GPU only Triton's interpreter runs these, thousands of
times slower: to read, to step through and to test them.
"""

from __future__ import annotations

from torch import Tensor

from heedful.api import attention as heedful_attention
from heedful.levels.preallocated import Preallocated
from heedful.levels.triton_kernels import launch
from heedful.levels.triton_kernels.launch import gelu, layer_norm, rope, swiglu

__all__ = ["Cache", "attention", "gelu", "layer_norm", "layer_norm_gelu", "rope", "swiglu"]


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    return heedful_attention(q, k, v, causal=causal, scale=scale, backend="triton")


def layer_norm_gelu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return launch.layer_norm(x, weight, bias, eps, activate=True)


class Cache(Preallocated):
    """A buffer that is filled in place; the kernel reads the part that is filled."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return attention(q, *self.append(k, v), True, scale)
