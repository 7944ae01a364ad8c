"""The engine writes every element of its outputs and not a byte beside them, and needs little memory beside them.

The outputs straight through its C interface: torch's shim allocates those of the operators where torch's own poisoning
does not reach.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from inputs import attention_inputs
from torch import Tensor

from heedful.backend.native import library
from heedful.backend.native.structures import (
    EngineBackward,
    EngineFeatures,
    EngineSchedule,
    EngineTensor,
    EngineWeights,
)

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


def call(function: str, structure: type, tensors: dict[str, Tensor], features: EngineFeatures | None = None) -> None:
    """Calls a function of the engine with these tensors, null for those that are left out."""
    arguments = structure()
    for name, tensor in tensors.items():
        setattr(arguments, name, EngineTensor.of(tensor))
    arguments.scale, arguments.schedule = 0.3, EngineSchedule.of(CAUSAL, ())
    if features is not None:
        arguments.features = features
    status = getattr(library.engine(), function)(arguments, None)
    assert status == 0, library.engine().heedful_error_message()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 3), (3, 1), (13, 113), (113, 5), (239, 523)], ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (7, 9), (64, 64), (80, 33), (256, 256)], ids=str)
@pytest.mark.parametrize("blhd", [False, True], ids=["bhld", "blhd"])
def test_gradients_are_written_whole_and_alone(dtype, lengths, dims, blhd):
    (q_length, k_length), (head_dim, value_dim) = lengths, dims
    query, key, value = attention_inputs(
        batch=1, heads=2, kv_heads=1, q_length=q_length, k_length=k_length, head_dim=head_dim, value_dim=value_dim,
        dtype=dtype,
    )  # fmt: skip
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    bias, slopes = torch.randn(1, 2, 1, k_length).to(dtype), torch.rand(1, 2).to(dtype)
    features = EngineFeatures()
    features.bias, features.alibi_slopes = EngineTensor.of(bias), EngineTensor.of(slopes)
    out = torch.empty(1, 2, q_length, value_dim, dtype=dtype)
    lse = torch.empty(1, 2, q_length, dtype=statistics)
    library.attention_forward(query, key, value, out, lse, CAUSAL, (), 0.3, bias=bias, alibi_slopes=slopes)
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    turned = {name: (b, n, h, d) if blhd else (b, h, n, d) for name, (b, h, n, d) in shapes.items()}
    made = {f"grad_{name}": guarded(dtype, *shape) for name, shape in turned.items()}
    seen = {name: tensor.transpose(1, 2) if blhd else tensor for name, (tensor, _) in made.items()}
    rest = {
        "delta": guarded(statistics, 1, 2, q_length),
        "grad_bias": guarded(statistics, 1, 2, 1, k_length),
        "grad_slopes": guarded(statistics, 1, 2, q_length),
    }
    given = {"query": query, "key": key, "value": value, "out": out, "lse": lse, "grad_out": torch.randn_like(out)}
    seen |= {name: tensor for name, (tensor, _) in rest.items()}
    call("heedful_attention_backward", EngineBackward, given | seen, features)
    for name, (tensor, memory) in (made | rest).items():
        assert not tensor.isnan().any(), name
        assert untouched(memory), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 3), (3, 1), (13, 113), (113, 5), (61, 523)], ids=str)
def test_weights_are_written_whole_and_alone(dtype, lengths):
    q_length, k_length = lengths
    query, key, value = attention_inputs(heads=2, q_length=q_length, k_length=k_length, head_dim=16, dtype=dtype)
    lse = torch.empty(2, 2, q_length, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    library.attention_forward(query, key, value, torch.empty_like(query), lse, CAUSAL, (), 0.3)
    given = {"query": query, "key": key, "lse": lse}

    def written(dtype: torch.dtype, *shape: int, **others: Tensor) -> Tensor:
        # Whole numbers have no NaN: one that no index is.
        tensor, memory = guarded(dtype, *shape) if dtype.is_floating_point else guarded_numbers(*shape)
        (name,) = (n for n, t in others.items() if t is None)
        call("heedful_attention_weights", EngineWeights, given | others | {name: tensor})
        assert untouched(memory), name
        return tensor

    weights = written(dtype, 2, 2, q_length, k_length, weights=None)
    assert not weights.isnan().any()
    seen = torch.ones(q_length, k_length, dtype=torch.bool).tril(k_length - q_length).expand(2, 2, -1, -1)
    counts = written(torch.int64, 2, 2, q_length, counts=None)
    assert torch.equal(counts, seen.sum(-1))
    begin = counts.flatten().cumsum(0).view(counts.shape) - counts
    total = int(counts.sum())
    indices = torch.full((4, total), -1)
    values = written(dtype, total, values=None, indices=indices, row_begin=begin)
    assert torch.equal(indices, seen.nonzero().T)
    assert torch.equal(values, weights[seen])
    indices = written(torch.int64, 4, total, indices=None, values=values, row_begin=begin)
    assert torch.equal(indices, seen.nonzero().T)


def guarded_numbers(*shape: int) -> tuple[Tensor, Tensor]:
    """The same of whole numbers, -1 in place of NaN."""
    count = torch.Size(shape).numel()
    memory = torch.full((count + 2 * MARGIN,), int(SENTINEL))
    memory[MARGIN : MARGIN + count] = -1
    return memory[MARGIN : MARGIN + count].view(shape), memory


MEMORY_OF_A_STEP = """
import sys
import torch
import heedful
from heedful.measure.memory import peak_bytes, reset_peak

def step(length):
    q, k, v = (torch.randn(1, 2, length, 64, requires_grad=True) for _ in range(3))
    if not reset_peak():
        sys.exit(77)
    before = peak_bytes()
    heedful.attention(q, k, v, pattern=heedful.SlidingWindow(128), backend="native").sum().backward()
    return peak_bytes() - before

torch.set_num_threads(2)
step(64)
step(16384)
print(step(16384))
"""


def test_memory_of_a_training_step_grows_with_the_length_alone():
    done = subprocess.run([sys.executable, "-c", MEMORY_OF_A_STEP], capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("this system does not reset the peak of resident memory")
    assert done.returncode == 0, done.stderr
    # The output and the gradients of q, k and v take 8 MiB each; all pairs of one head would take 1 GiB.
    assert int(done.stdout) < 48 << 20
