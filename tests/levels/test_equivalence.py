"""Every level of a component computes the same: outputs and gradients, pair by pair and against fp64."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn

import heedful
from heedful import levels

# Within this share of the largest value, in float32.
TOLERANCE = 1e-5
RUNNING = tuple(level for level in (1, 2, 3, 5, "torch") if levels.available(level))
X = ((2, 13, 24),)
HEADS = ((2, 3, 11, 8), (2, 3, 17, 8), (2, 3, 17, 8))
CASES = {
    "attention": ("attention", {"causal": True}, HEADS),
    "attention, not causal, scale": ("attention", {"scale": 0.7}, HEADS),
    "one query": ("attention", {"causal": True}, ((1, 2, 1, 8), (1, 2, 5, 8), (1, 2, 5, 8))),
    "multi-head attention": ("multi_head_attention", {"dim": 24, "heads": 3}, X),
    "multi-head attention, causal, no RoPE": (
        "multi_head_attention", {"dim": 24, "heads": 3, "causal": True, "rope": False}, X,
    ),
    "layer norm": ("layer_norm", {"dim": 239}, ((5, 239),)),
    "layer norm + GELU": ("layer_norm_gelu", {"dim": 113}, ((3, 5, 113),)),
    "feed-forward, GELU": ("feed_forward", {"dim": 24, "hidden": 37}, X),
    "feed-forward, SwiGLU": ("feed_forward", {"dim": 24, "hidden": 37, "activation": "swiglu"}, X),
    "transformer block": ("transformer_block", {"dim": 24, "heads": 3, "hidden": 40}, X),
    "decoder": ("decoder", {"vocabulary": 19, "dim": 24, "heads": 3, "layers": 2, "hidden": 40}, ((2, 7),)),
}  # fmt: skip
# A compilation takes seconds: the parts of these are in the others.
UNCOMPILED = {"attention, not causal, scale", "one query", "multi-head attention, causal, no RoPE", "layer norm",
              "multi-head attention", "feed-forward, GELU", "decoder"}  # fmt: skip


@functools.cache
def first(case: str) -> nn.Module:
    torch.manual_seed(1)
    component, arguments, _ = CASES[case]
    module = levels.create(component, 1, **arguments)
    for name, parameter in module.named_parameters():
        if "norm" in name or component.startswith("layer_norm"):
            nn.init.normal_(parameter)
    return module


@functools.cache
def inputs(case: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    component, arguments, shapes = CASES[case]
    if component == "decoder":
        return [torch.randint(arguments["vocabulary"], shapes[0], generator=generator)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def answers(module: nn.Module, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    out = module(*tensors)
    named = {f"input {i}": x for i, x in enumerate(tensors) if x.requires_grad} | dict(module.named_parameters())
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    gradients = torch.autograd.grad(out, list(named.values()), upstream)
    return {"output": out.detach(), **dict(zip(named, gradients, strict=True))}


@functools.cache
def exact(case: str) -> dict[str, torch.Tensor]:
    doubled = levels.create(CASES[case][0], 1, **CASES[case][1]).double()
    doubled.load_state_dict(first(case).state_dict())
    return answers(doubled, [x.double() if x.is_floating_point() else x for x in inputs(case)])


def compare(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], what: str) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        apart = (value.double() - other[name].double()).abs().max() / other[name].double().abs().max()
        assert apart <= TOLERANCE, f"{what}, {name}: {float(apart):.2g} of the largest value"


@pytest.mark.parametrize("case", CASES)
def test_levels_agree_with_fp64_and_with_each_other(case) -> None:
    running = [level for level in RUNNING if level != 3 or case not in UNCOMPILED]
    found = {level: answers(levels.convert(first(case), level), inputs(case)) for level in running}
    for level, answer in found.items():
        compare(answer, exact(case), f"level {level} and fp64")
    for one, other in itertools.combinations(running, 2):
        compare(found[one], found[other], f"levels {one} and {other}")


@pytest.mark.parametrize("level", [level for level in RUNNING if level != 3])
@pytest.mark.parametrize("case", ["attention", "transformer block", "feed-forward, SwiGLU", "layer norm + GELU"])
def test_fp64_at_every_level(case, level) -> None:
    component, arguments, _ = CASES[case]
    doubled = levels.create(component, level, **arguments).double()
    doubled.load_state_dict(first(case).state_dict())
    one = answers(doubled, [x.double() for x in inputs(case)])
    for name, value in exact(case).items():
        torch.testing.assert_close(one[name], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("level", [level for level in RUNNING if level != 3])
def test_multi_head_attention_is_what_heedful_nn_and_sdpa_make_of_its_weights(level) -> None:
    module = levels.create("multi_head_attention", level, dim=24, heads=3, causal=True, base=500.0).double()
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in module.qkv(x).chunk(3, -1))
    # Its angles are float32, so that positions this low leave errors of some 1e-7.
    q, k = heedful.nn.RotaryEmbedding(8, base=500.0)(q, k)
    attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    wanted = module.out(attended.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_block_is_two_residual_branches_behind_norms() -> None:
    torch.manual_seed(0)
    block = levels.create("transformer_block", 5, dim=16, heads=2, hidden=24, causal=True)
    torch.manual_seed(0)
    attention = levels.create("multi_head_attention", 1, dim=16, heads=2, causal=True)
    torch.testing.assert_close(block.attention.qkv.weight, attention.qkv.weight)
    x = torch.randn(1, 7, 16)
    middle = x + attention(nn.functional.layer_norm(x, (16,)))
    up, down = block.feed_forward.up, block.feed_forward.down
    wanted = middle + down(nn.functional.gelu(up(nn.functional.layer_norm(middle, (16,)))))
    torch.testing.assert_close(block(x), wanted, rtol=1e-5, atol=1e-5)
