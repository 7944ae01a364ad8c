"""Levels as users meet them: what is available and why not, making and converting modules, copies, refusals."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import heedful
from heedful import levels
from heedful.levels import ladder

heads = functools.partial(levels.create, "multi_head_attention", 1, dim=4, heads=2)
causal = functools.partial(levels.create, "attention", 1, causal=True)
SMALL = {"dim": 16, "heads": 2, "hidden": 24}


def test_levels_that_are_not_there_say_why_and_how_to_get_them(monkeypatch) -> None:
    assert str(levels.available(1)) == "level 1 (PyTorch): available"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status = levels.available(4, "layer_norm")
    assert not status
    if "not installed" not in status.reason:
        assert "GPU" in status.reason
        assert "TRITON_INTERPRET=1" in status.remedy
    with pytest.raises(heedful.UnsupportedError, match=r"level 4 \(Triton\) of 'layer_norm' does not run here"):
        levels.create("layer_norm", 4)
    assert "CUDA kernels are not there yet" in levels.available(5, device="cuda:1").reason
    with pytest.raises(heedful.UnsupportedError, match="CUDA kernels"):
        levels.create("layer_norm", 5, device="cuda")
    if not torch.cuda.is_available():
        assert "no GPU" in levels.available(1, device="cuda").reason


def test_torchscript_is_unavailable_from_python_3_14(monkeypatch) -> None:
    monkeypatch.setattr(ladder.sys, "version_info", (3, 14, 0))
    assert "gone from Python 3.14" in levels.available(2).reason
    with pytest.raises(heedful.UnsupportedError, match=r"3\.14"):
        levels.convert(levels.create("layer_norm", 1, dim=4), 2)


def test_no_compiler_no_level_3_and_no_engine_no_level_5(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(ladder.shutil, "which", lambda _: None)
    assert "C++ compiler" in levels.available(3).reason
    monkeypatch.setattr(
        "heedful.backend.native.library.engine", lambda: (_ for _ in ()).throw(ImportError("no engine"))
    )
    assert levels.available(5).reason == "no engine"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: levels.create("attention", 6), "level takes 1 "),
        (lambda: levels.create("attention", True), "level takes 1 "),
        (lambda: levels.create("attention", "5"), "level takes 1 "),
        (lambda: levels.create("convolution", 1), "component takes one of attention, "),
        (lambda: levels.available(1, device="tpu"), "device takes"),
        (lambda: levels.create("feed_forward", 1, activation="relu"), "activation takes"),
        (lambda: levels.create("multi_head_attention", 1, dim=10, heads=3), "heads takes a divisor of dim, 10"),
        (lambda: levels.create("multi_head_attention", 1, dim=9, heads=3), "even width"),
        (lambda: levels.create("layer_norm", 1, dim=4)(torch.zeros(2, 5)), "x takes"),
        (lambda: heads()(torch.zeros(2, 4)), "x takes"),
        (lambda: heads(max_length=3)(torch.zeros(1, 4, 4)), "max_length"),
        (lambda: levels.create("attention", 1)(*torch.zeros(3, 2, 3, 4)), "q, k, v takes"),
        (lambda: causal()(*(torch.zeros(1, 1, n, 4) for n in (3, 2, 2))), "at most k's"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_converted_modules_share_their_weights_and_leave_the_first_alone() -> None:
    block = levels.create("transformer_block", 1, **SMALL)
    native = levels.convert(block, 5)
    assert (block.level, native.level, native.attention.level) == (1, 5, 5)
    assert block.attention.level == 1
    assert all(a is b for a, b in zip(block.parameters(), native.parameters(), strict=True))
    assert block.state_dict().keys() == native.state_dict().keys()
    with torch.no_grad():
        block.feed_forward.up.weight.mul_(2)
    x = torch.randn(1, 5, 16)
    torch.testing.assert_close(native(x), block(x))


def test_components_within_other_modules_are_converted() -> None:
    model = nn.Sequential(nn.Linear(3, 16), levels.create("transformer_block", 1, **SMALL), nn.Linear(16, 1))
    native = levels.convert(model, 5)
    assert native[1].level == 5
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(native(x), model(x))
    with pytest.raises(TypeError, match="components"):
        levels.convert(nn.Linear(3, 3), 5)
    with pytest.raises(TypeError, match="module takes"):
        levels.convert(3, 5)


def test_state_dicts_are_those_of_torch_and_of_every_level() -> None:
    norm = levels.create("layer_norm", 5, dim=6)
    norm.load_state_dict(nn.LayerNorm(6).state_dict())
    torch.manual_seed(0)
    one = levels.create("decoder", 1, dim=16, heads=2, layers=1)
    torch.manual_seed(0)
    other = levels.create("decoder", 5, dim=16, heads=2, layers=1)
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_copies_and_pickles_stay_at_their_level() -> None:
    x = torch.randn(1, 5, 16)
    for level in (5, "torch"):
        block = levels.create("transformer_block", level, **SMALL)
        for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert again.level == level
            torch.testing.assert_close(again(x), block(x))
    compiled = levels.create("layer_norm", 3, dim=16)
    assert "forward" in copy.deepcopy(compiled).__dict__
    assert "forward" not in levels.convert(compiled, 1).__dict__


def test_angles_keep_their_precision_when_a_module_is_cast() -> None:
    attention = levels.create("multi_head_attention", 1, dim=8, heads=1)
    table = attention.angles.clone()
    assert table.dtype == torch.float32
    assert torch.equal(attention.to(torch.bfloat16).angles, table)
    doubled = attention.double().angles
    assert doubled.dtype == torch.float64
    position, frequency = 3000, 10000.0 ** (-2 / 8)
    assert abs(float(doubled[1, position, 1]) - torch.tensor(position * frequency, dtype=torch.float64).sin()) < 1e-12
    assert attention(torch.randn(1, 3, 8, dtype=torch.float64)).dtype == torch.float64


def test_sixteen_bit_components_are_close_to_fp32() -> None:
    for level in (1, 5, "torch"):
        block = levels.create("transformer_block", 1, **SMALL)
        x = torch.randn(2, 9, 16)
        wanted = block(x)
        halved = levels.convert(copy.deepcopy(block).to(torch.bfloat16), level)
        found = halved(x.to(torch.bfloat16))
        assert found.dtype == torch.bfloat16
        assert (found.float() - wanted).abs().max() <= 2**-5 * wanted.abs().max()


def test_level_5_on_another_device_is_refused_by_name() -> None:
    norm = levels.create("layer_norm", 5, dim=4)
    with pytest.raises(heedful.UnsupportedError, match=r"level 5 \(native\) does not run on meta"):
        norm(torch.empty(2, 4, device="meta"))


@pytest.mark.parametrize("level", [1, 5])
def test_components_are_traced_whole_by_torch_compile(level) -> None:
    block = levels.create("transformer_block", level, **SMALL)
    traced = torch.compile(block, backend="eager", fullgraph=True)
    x = torch.randn(1, 5, 16)
    torch.testing.assert_close(traced(x), block(x))
