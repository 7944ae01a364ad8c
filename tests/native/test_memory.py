"""The engine writes every element of its outputs and not a byte beside them; straight through its C interface, as
torch's shim allocates the operators' outputs where torch's own poisoning does not reach."""

from __future__ import annotations

import pytest
import torch
from inputs import attention_inputs
from torch import Tensor

from heedful.backend.native import library

CAUSAL = (1, 1, 0, 2, 1, 0, -2, 1, -1)
SENTINEL = -7.0
MARGIN = 64


def guarded(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    """A contiguous tensor of NaN, and the memory around it, which is all sentinels."""
    count = torch.Size(shape).numel()
    memory = torch.full((count + 2 * MARGIN,), SENTINEL, dtype=dtype)
    memory[MARGIN : MARGIN + count] = torch.nan
    return memory[MARGIN : MARGIN + count].view(shape), memory


def untouched(memory: Tensor) -> bool:
    return bool((memory[:MARGIN] == SENTINEL).all() and (memory[-MARGIN:] == SENTINEL).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 3), (3, 0), (13, 113), (113, 5), (239, 1023)], ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (7, 9), (64, 64), (80, 33), (256, 256)], ids=str)
@pytest.mark.parametrize("blhd", [False, True], ids=["bhld", "blhd"])
def test_outputs_are_written_whole_and_alone(dtype, lengths, dims, blhd):
    (q_length, k_length), (head_dim, value_dim) = lengths, dims
    query, key, value = attention_inputs(
        batch=1, heads=2, kv_heads=1, q_length=q_length, k_length=k_length, head_dim=head_dim, value_dim=value_dim,
        dtype=dtype,
    )  # fmt: skip
    out, around_out = guarded(dtype, *((1, q_length, 2, value_dim) if blhd else (1, 2, q_length, value_dim)))
    lse, around_lse = guarded(torch.float64 if dtype == torch.float64 else torch.float32, 1, 2, q_length)
    seen = out.transpose(1, 2) if blhd else out
    library.attention_forward(query, key, value, seen, lse, CAUSAL, (), head_dim**-0.5)
    assert not out.isnan().any()
    assert not lse.isnan().any()
    assert untouched(around_out)
    assert untouched(around_lse)


def test_outputs_between_other_elements():
    query, key, value = attention_inputs(batch=2, heads=3, q_length=25, k_length=31, head_dim=16, value_dim=20)
    memory = torch.full((2, 25, 3, 2, 20), SENTINEL)
    out = memory[..., 1, :].transpose(1, 2)
    lse = torch.full((2, 3, 25), torch.nan)
    library.attention_forward(query, key, value, out, lse, (), (), 0.25)
    assert (memory[..., 0, :] == SENTINEL).all()
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.25))
