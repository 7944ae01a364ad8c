"""The functions and classes of heedful.compat.ma_core that its guide does not show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerance import expected

from heedful import Causal, Full, SlidingWindow
from heedful.compat import ma_core


def test_tensors() -> None:
    tensor = ma_core.create_tensor([2, 3, 4, 5], "CPU")
    assert tensor.shape() == ma_core.TensorShape(batch_size=2, sequence_length=3, num_heads=4, head_dim=5)
    assert (tensor.size(), tensor.nbytes(), tensor.empty()) == (120, 480, False)
    assert tensor.shape().total_elements() == 120
    assert not tensor.to_numpy().any()
    tensor.fill(2.5)
    assert (tensor.to_numpy() == 2.5).all()
    tensor.zero()
    values = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    tensor.copy_from_numpy(values.T.copy().T)
    copied = tensor.to_numpy()
    assert copied.dtype == np.float32
    np.testing.assert_array_equal(copied, values.astype(np.float32))
    copied[:] = 0
    assert tensor.to_numpy().any()
    assert ma_core.create_tensor([0, 3, 4, 5]).empty()
    with pytest.raises(RuntimeError, match="size mismatch"):
        tensor.copy_from_numpy(values[0])


@pytest.mark.parametrize("shape", [[], [1], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, -1]])
def test_wrong_tensors(shape) -> None:
    with pytest.raises(RuntimeError, match=r"4 dimensions, \[batch, seq, heads, dim\]"):
        ma_core.create_tensor(shape)
    with pytest.raises(RuntimeError, match="device takes 'cpu', got 'mps'"):
        ma_core.create_random_tensor([1, 2, 3, 4], device="mps")


def test_random_tensors() -> None:
    values = ma_core.create_random_tensor([2, 100, 4, 16], mean=3.0, std=0.5).to_numpy()
    assert abs(values.mean() - 3) < 0.05
    assert abs(values.std() - 0.5) < 0.05


@pytest.mark.parametrize(("length", "window"), [(1, 1), (8, 2), (4, 4), (4, 10), (50, 7), (0, 1)])
def test_sliding_window_patterns(length, window) -> None:
    pattern = ma_core.create_sliding_window_pattern(length, window)
    pairs = sum(abs(i - j) <= window for i in range(length) for j in range(length))
    assert pattern.nnz() == pairs
    assert pattern.empty() == (pairs == 0)
    assert pattern.shape.sequence_length == length
    assert pattern.device is ma_core.Device.CPU
    lines = ma_core.get_pattern_statistics(pattern).splitlines()
    sparsity = 1 - pairs / length**2 if length else 0
    assert [line.strip() for line in lines] == [
        "Pattern Statistics:",
        f"Total elements: {length**2}",
        f"Non-zero elements: {pairs}",
        f"Sparsity ratio: {sparsity:.4f}",
    ]
    with pytest.raises(ValueError, match="seq_len takes"):
        ma_core.create_sliding_window_pattern(-1, 2)
    with pytest.raises(TypeError):
        ma_core.create_sliding_window_pattern(5, 2.5)


@pytest.mark.parametrize(
    ("pattern", "engine", "pytorch"),
    [
        (Full(), lambda *t: ma_core.compute_dense_attention(*t), lambda *t: ma_core.pytorch_dense_attention(*t)),
        (
            Causal(),
            lambda *t: ma_core.compute_dense_attention(*t, use_causal_mask=True),
            lambda *t: ma_core.pytorch_dense_attention(*t, True),
        ),
        (
            SlidingWindow(3),
            lambda *t: ma_core.compute_sparse_attention(*t, window_size=3),
            lambda *t: ma_core.pytorch_sparse_attention(*t, 3),
        ),
    ],
)
def test_attention(pattern, engine, pytorch) -> None:
    tensors = [torch.randn(2, 37, 4, 16) for _ in range(3)]
    wanted = expected(*(t.transpose(1, 2) for t in tensors), pattern=pattern)
    found = engine(*map(ma_core.pytorch_to_ma_core, tensors))
    back = ma_core.ma_core_to_pytorch(found, "cpu", torch.float64)
    assert back.dtype == torch.float64
    wanted.out.check(back.float().transpose(1, 2))
    wanted.out.check(pytorch(*tensors).transpose(1, 2))


def test_the_bridge_copies() -> None:
    tensor = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    converted = ma_core.pytorch_to_ma_core(tensor.transpose(1, 2).float())
    converted.fill(0)
    assert tensor.any()
    again = ma_core.ma_core_to_pytorch(converted, "cpu", torch.float32)
    again.fill_(1)
    assert not converted.to_numpy().any()


def test_the_rest() -> None:
    assert ma_core.add(2**60, -1) == 2**60 - 1
    assert len({ma_core.Device.CPU, ma_core.Device.MPS, ma_core.Device.CUDA, ma_core.Device.ROCm}) == 4
    for name in ma_core.__all__:
        assert hasattr(ma_core, name)
    assert ma_core.create_attention_layer("sparse", window_size=3).pattern == SlidingWindow(3)
