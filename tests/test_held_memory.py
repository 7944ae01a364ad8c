"""What is remembered of a call keeps none of its tensors alive."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from inputs import all_features
from torch import Tensor

import heedful
from heedful import Causal, KVCache, Mask, Padding, SlidingWindow, flash_attn
from heedful.choose import UNAVAILABLE
from heedful.errors import UnsupportedError
from heedful.hf.forward import attention_forward

LENGTH, DIM = 70, 32
# One for the object that asks.
ALONE = 1


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    heedful.clear_caches()
    yield
    heedful.clear_caches()


def held(storages: list[torch.UntypedStorage]) -> int:
    return sum(torch._C._storage_Use_Count(storage._cdata) > ALONE for storage in storages)


def held_after(call: Callable[[Tensor, Tensor, Tensor], object], *, blhd: bool = False, gradient: bool = False) -> int:
    """How many of q, k and v still have somebody else after two calls."""
    shapes = [(1, LENGTH, heads, DIM) if blhd else (1, heads, LENGTH, DIM) for heads in (4, 2, 2)]
    tensors = [torch.randn(shape, requires_grad=gradient) for shape in shapes]
    storages = [tensor.untyped_storage() for tensor in tensors]
    for _ in range(2):
        call(*tensors)
    del tensors
    if held(storages):
        # Cycles that only the collector finds are nobody's; it takes its time.
        gc.collect()
    return held(storages)


PATTERNS = {
    "full": None,
    "causal": Causal(),
    "window": SlidingWindow(9, 0),
    "padding": Padding(torch.tensor([3], dtype=torch.int32), 60),
    "mask": Mask(torch.rand(1, 1, LENGTH, LENGTH) < 0.5),
    "tensor": torch.rand(1, 1, LENGTH, LENGTH) < 0.5,
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("name", ["sdpa", "native", "reference", None])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention(pattern, name, layout, gradient) -> None:
    if name in UNAVAILABLE:
        pytest.skip(UNAVAILABLE[name])
    features = all_features(1, 4, LENGTH, LENGTH, torch.float32)
    extras = [{}, {"return_lse": True}, {"return_weights": True}, features, *({k: v} for k, v in features.items())]
    for options in extras:

        def call(q: Tensor, k: Tensor, v: Tensor, options: dict[str, object] = options) -> object:
            return heedful.attention(q, k, v, pattern=PATTERNS[pattern], layout=layout, backend=name, **options)

        try:
            assert held_after(call, blhd=layout == "blhd", gradient=gradient) == 0, options
        except UnsupportedError:
            continue


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("kind", [{}, {"block_size": 16}, {"window": 30}], ids=repr)
def test_caches(kind, layout) -> None:
    step = torch.randn(1, 1, 4, DIM) if layout == "blhd" else torch.randn(1, 4, 1, DIM)
    storages = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> None:
        cache = KVCache(**kind)
        heedful.attention(q, k, v, causal=True, cache=cache, layout=layout)
        for _ in range(3):
            heedful.attention(step, step[..., :2, :] if layout == "blhd" else step[:, :2],
                              step[..., :2, :] if layout == "blhd" else step[:, :2],
                              causal=True, cache=cache, layout=layout)  # fmt: skip
        storages.extend([cache.slices()[0].untyped_storage()] if cache.is_plain else [])

    assert held_after(call, blhd=layout == "blhd") == 0
    gc.collect()
    assert held(storages) == 0


@pytest.mark.parametrize("gradient", [False, True])
def test_doors(gradient) -> None:
    module = torch.nn.Module()
    ends = torch.tensor([0, 30, LENGTH], dtype=torch.int32)
    doors: dict[str, tuple[bool, Callable[[Tensor, Tensor, Tensor], object]]] = {
        "sdpa": (False, lambda q, k, v: heedful.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)),
        "hf": (False, lambda q, k, v: attention_forward(module, q, k, v, None)),
        "flash": (True, lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(9, 0))),
        "varlen": (
            True,
            lambda q, k, v: flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], ends, ends, 40, 40, causal=True),
        ),
    }
    for name, (blhd, call) in doors.items():
        assert held_after(call, blhd=blhd, gradient=gradient) == 0, name


def test_activated() -> None:
    heedful.activate()
    try:
        call = torch.nn.functional.scaled_dot_product_attention
        assert held_after(lambda q, k, v: call(q, k, v, is_causal=True, enable_gqa=True)) == 0
        mask = torch.rand(LENGTH, LENGTH) < 0.5
        assert held_after(lambda q, k, v: call(q, k, v, mask, enable_gqa=True)) == 0
    finally:
        heedful.deactivate()
