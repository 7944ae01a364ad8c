"""Every component at every level that runs here, for pytest-benchmark's tables, savings and comparisons.

pytest benchmarks/test_levels.py --benchmark-only [--benchmark-autosave --benchmark-compare]

`heedful levels` takes the levels turn by turn and is what to quote; this is for one level's time over versions.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from heedful import levels
from heedful.measure.levels import Case, cases
from heedful.measure.timing import pinned_threads

CASES = {case.name: case for case in cases(quick=True) if not case.generates}
LEVELS = (*levels.LEVELS, "torch")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with pinned_threads(1):
        yield


def modules(case: Case, level: int | str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Level 1 and the level, of the same weights."""
    if level == 4 and levels.ladder.interpreting():
        pytest.skip("Triton's interpreter has no speed to measure")
    status = levels.available(level, case.component)
    if not status:
        pytest.skip(status.reason)
    first = levels.create(case.component, 1, **case.arguments)
    return first, levels.convert(first, level)


def inputs(case: Case, first: torch.nn.Module) -> list[torch.Tensor]:
    if case.component == "decoder":
        return [torch.randint(first.vocabulary, case.shapes[0])]
    return [torch.randn(shape, requires_grad=True) for shape in case.shapes]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CASES)
def test_forward(benchmark, name, level) -> None:
    first, module = modules(CASES[name], level)
    given = inputs(CASES[name], first)
    benchmark.group = f"{name}, forward"
    with torch.no_grad():
        torch.testing.assert_close(module(*given), first(*given), rtol=1e-4, atol=1e-4)
        benchmark(module, *given)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(benchmark, name, level) -> None:
    first, module = modules(CASES[name], level)
    given = inputs(CASES[name], first)
    leaves = [x for x in (*given, *module.parameters()) if x.requires_grad]
    upstream = torch.randn_like(first(*given))

    def step(of: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(of(*given), leaves, upstream)

    for found, wanted in zip(step(module), step(first), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    benchmark.group = f"{name}, forward and backward"
    benchmark(step, module)
