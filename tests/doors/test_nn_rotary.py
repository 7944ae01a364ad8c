"""heedful.nn.RotaryEmbedding against complex multiplication in double, and against transformers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from heedful.nn import RotaryEmbedding


def rotated(x: Tensor, positions: Tensor, *, base: float, n: int, interleaved: bool, divisor: float = 1.0) -> Tensor:
    """(B, H, L, D) by the definition: pairs as complex numbers, turned."""
    frequencies = float(base) ** (-torch.arange(0, n, 2, dtype=torch.float64) / n) / divisor
    angles = positions.double().reshape(-1, 1, positions.shape[-1], 1) * frequencies
    part, rest = x.double()[..., :n], x.double()[..., n:]
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat([turned, rest], -1)


def inputs(length: int = 13, dim: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, length, dim).to(dtype), torch.randn(2, 2, length, dim).to(dtype)


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 6])
@pytest.mark.parametrize("positions", [None, "offset", "offsets", "shared", "per item"])
def test_definition(layout, interleaved, rotary_dim, positions) -> None:
    rotary = RotaryEmbedding(16, base=500.0, rotary_dim=rotary_dim, interleaved=interleaved, layout=layout)
    q, k = inputs()
    given, where = {
        None: ({}, torch.arange(13)),
        "offset": ({"offset": 700}, torch.arange(13) + 700),
        "offsets": ({"offset": torch.tensor([3, 8], dtype=torch.int32)}, torch.arange(13) + torch.tensor([[3], [8]])),
        "shared": ({"position_ids": torch.arange(13) * 5, "offset": 2}, torch.arange(13) * 5 + 2),
        "per item": ({"position_ids": torch.stack([torch.arange(13), torch.zeros(13).long()])},) * 2,
    }[positions]
    where = given["position_ids"] if isinstance(where, dict) else where
    turn = (lambda t: t.transpose(1, 2)) if layout == "blhd" else (lambda t: t)
    for tensor, found in zip((q, k), rotary(turn(q), turn(k), **given), strict=True):
        wanted = rotated(tensor, where, base=500.0, n=rotary_dim or 16, interleaved=interleaved)
        torch.testing.assert_close(turn(found), wanted, rtol=1e-4, atol=1e-4)
        assert found.dtype == tensor.dtype


def test_linear_scaling_divides_positions() -> None:
    q, k = inputs()
    found, _ = RotaryEmbedding(16, scaling="linear", factor=4)(q, k, offset=8)
    wanted = rotated(q, torch.arange(8, 21), base=10000, n=16, interleaved=False, divisor=4.0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("length", [5, 12, 13, 40])
def test_dynamic_scaling_raises_the_base_behind_the_original_length(length, as_tensor) -> None:
    q, k = inputs(length)
    rotary = RotaryEmbedding(16, base=100.0, scaling="dynamic", factor=3, original_length=12)
    given = {"position_ids": torch.arange(length)} if as_tensor else {}
    longer = 3 * max(length, 12) / 12 - 2
    wanted = rotated(q, torch.arange(length), base=100.0 * longer ** (16 / 14), n=16, interleaved=False)
    for _ in range(2):
        torch.testing.assert_close(rotary(q, k, **given)[0], wanted, rtol=1e-5, atol=1e-5)
    # A longer call leaves nothing behind.
    short = inputs(7)
    wanted = rotated(short[0], torch.arange(7), base=100.0, n=16, interleaved=False)
    torch.testing.assert_close(rotary(*short)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_angles_are_float32_whatever_the_module_was_cast_to(dtype) -> None:
    q, k = inputs(400, dtype=dtype)
    rotary = RotaryEmbedding(16).to(dtype).half()
    found, _ = rotary(q, k)
    wanted = rotated(q, torch.arange(400), base=10000, n=16, interleaved=False)
    assert found.dtype == dtype
    # Angles up to 400 in float32 are off by 400 · 2⁻²⁴ at most, the result by its own rounding.
    bound = 400 * 2.0**-23 * 4 + torch.finfo(dtype).eps * wanted.abs()
    assert bool(((found.double() - wanted).abs() <= bound).all())
    assert not rotary.state_dict()


def test_gradients_and_relative_positions() -> None:
    rotary = RotaryEmbedding(8)
    q, k = (t.requires_grad_() for t in inputs(5, 8))
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, offset=3), (q, k), atol=1e-4)
    near, far = (rotary(q, q, offset=offset)[0] @ rotary(q, q, offset=offset)[0].mT for offset in (0, 1000))
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"interleaved": True}, *({"scaling": "dynamic", "factor": 2, "original_length": n} for n in (6, 100))],
)
def test_compile_and_export(options) -> None:
    rotary, (q, k) = RotaryEmbedding(16, **options), inputs(13, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    ids = torch.randint(0, 30, (2, 13))
    for given in ({}, {"offset": 5}, {"position_ids": ids}, {"offset": torch.tensor([2, 4])}):
        wanted = rotary(q, k, **given)
        torch.testing.assert_close(compiled(q, k, **given), wanted)
        torch.testing.assert_close(torch.export.export(rotary, (q, k), given).module()(q, k, **given), wanted)
    for length in (3, 21, 300):
        q, k = inputs(length, dtype=torch.float32)
        torch.testing.assert_close(compiled(q, k), rotary(q, k))


def test_tables_from_inference_serve_training() -> None:
    rotary, (q, k) = RotaryEmbedding(16), inputs()
    with torch.inference_mode():
        rotary(q, k)
    found, _ = rotary(q.requires_grad_(), k)
    found.sum().backward()
    for other in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert torch.equal(other(q, k)[0], found)
        assert not pickle.loads(pickle.dumps(rotary))._tables


@pytest.mark.parametrize("scaling", [None, "linear", "dynamic"])
def test_as_transformers_llama(scaling) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    parameters = {"rope_theta": 1000.0, "rope_type": scaling or "default"} | ({"factor": 2.0} if scaling else {})
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=16, rope_parameters=parameters)
    theirs = LlamaRotaryEmbedding(config)
    original = {"original_length": 16} if scaling == "dynamic" else {}
    ours = RotaryEmbedding(16, base=1000.0, scaling=scaling, factor=2.0 if scaling else 1.0, **original)
    for length in (9, 16, 33):
        q, k = inputs(length, dtype=torch.float32)
        ids = torch.arange(length)[None]
        torch.testing.assert_close(ours(q, k, ids), apply_rotary_pos_emb(q, k, *theirs(q, ids)), rtol=1e-5, atol=1e-5)


def test_as_transformers_gptj() -> None:
    pytest.importorskip("transformers")
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

    q, k = inputs(9, dtype=torch.float32)
    sin, cos = create_sinusoidal_positions(20, 6)[:9][None].split(3, -1)
    found = RotaryEmbedding(16, rotary_dim=6, interleaved=True)(q, k)
    for tensor, one in zip((q, k), found, strict=True):
        turned = apply_rotary_pos_emb(tensor[..., :6].transpose(1, 2), sin, cos).transpose(1, 2)
        torch.testing.assert_close(one, torch.cat([turned, tensor[..., 6:]], -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 7}, "head_dim"),
        ({"rotary_dim": 18}, "rotary_dim"),
        ({"rotary_dim": 5}, "rotary_dim"),
        ({"base": 0}, "base"),
        ({"base": math.nan}, "base"),
        ({"scaling": "yarn"}, "scaling"),
        ({"factor": 2}, "factor"),
        ({"scaling": "linear", "factor": 0.5}, "factor"),
        ({"scaling": "dynamic", "factor": 2}, "original_length"),
        ({"original_length": 10}, "original_length"),
        ({"layout": "bld"}, "layout"),
    ],
)
def test_wrong_constructors(options, name) -> None:
    with pytest.raises(ValueError, match=f"^{name} takes"):
        RotaryEmbedding(**{"head_dim": 16} | options)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda q, k: {"q": q[0]}, ValueError, "q"),
        (lambda q, k: {"k": k[..., 1:]}, ValueError, "k"),
        (lambda q, k: {"k": k[:, :, 1:]}, ValueError, "k"),
        (lambda q, k: {"position_ids": torch.arange(12)}, ValueError, "position_ids"),
        (lambda q, k: {"position_ids": torch.rand(13)}, TypeError, "position_ids"),
        (lambda q, k: {"position_ids": [1]}, TypeError, "position_ids"),
        (lambda q, k: {"offset": -1}, ValueError, "offset"),
        (lambda q, k: {"offset": 0.5}, TypeError, "offset"),
        (lambda q, k: {"offset": torch.arange(3)}, ValueError, "offset"),
    ],
)
def test_wrong_calls(call, error, name) -> None:
    q, k = inputs()
    with pytest.raises(error, match=f"^{name} takes"):
        RotaryEmbedding(16)(**{"q": q, "k": k} | call(q, k))


def test_what_it_shows() -> None:
    assert repr(RotaryEmbedding(16)) == "RotaryEmbedding(16, base=10000)"
    rotary = RotaryEmbedding(16, rotary_dim=8, interleaved=True, scaling="linear", factor=2)
    assert "rotary_dim=8, interleaved=True, scaling='linear', factor=2" in repr(rotary)
