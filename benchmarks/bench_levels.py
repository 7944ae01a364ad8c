"""The levels of every component, forward and forward with backward, with the same weights and inputs.

pytest benchmarks/bench_levels.py --benchmark-only
"""

import pytest
import torch

levels = pytest.importorskip("heedful.levels", reason="this heedful has no levels")

TOKENS, LENGTH, DIM, HEADS = 512, 256, 256, 4
TOLERANCE = 1e-5  # of the largest value, as heedful.levels promises in float32


def make(component):
    """A component at level 1 and its inputs."""
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, DIM)
    match component:
        case "attention":
            return levels.create(component, 1), tuple(torch.randn(2, HEADS, LENGTH, DIM // HEADS) for _ in range(3))
        case "layer_norm" | "layer_norm_gelu" | "feed_forward":
            return levels.create(component, 1, dim=DIM), (x,)
        case "decoder":
            decoder = levels.create(component, 1, vocabulary=TOKENS, dim=DIM, heads=HEADS, layers=2)
            return decoder, (torch.randint(TOKENS, (2, LENGTH)),)
        case _:
            return levels.create(component, 1, dim=DIM, heads=HEADS), (x,)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("level", levels.LEVELS)
@pytest.mark.parametrize("component", levels.COMPONENTS)
def test_level(benchmark, component, level, backward):
    state = levels.available(level, component)
    if not state:
        pytest.skip(str(state))
    first, inputs = make(component)
    module = levels.convert(first, level)
    inputs = tuple(x.requires_grad_(backward) if x.is_floating_point() else x for x in inputs)
    leaves = [*(x for x in inputs if x.requires_grad), *(first.parameters() if backward else ())]
    torch._dynamo.reset()

    def call(of=module):
        if not backward:
            with torch.no_grad():
                return (of(*inputs),)
        out = of(*inputs)
        return out, *torch.autograd.grad(out, leaves, arriving)

    arriving = torch.randn_like(first(*inputs))
    for found, wanted in zip(call(), call(first), strict=True):
        assert float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())
    benchmark.group = f"{component} {'forward and backward' if backward else 'forward'}"
    benchmark.extra_info |= {"level": level, "name": levels.LEVELS[level], "threads": torch.get_num_threads()}
    benchmark(call)
