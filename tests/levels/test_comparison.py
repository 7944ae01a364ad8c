"""`compare_optimization_levels`: the check comes first, and what is counted is what ran."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from heedful import levels
from heedful.measure.memory import extra_peak
from heedful.measure.operators import profile_call
from heedful.measure.peaks import Peaks

PEAKS = Peaks({"float32": 1e11}, {1: 1e10})
SHAPE = (3, 40, 16)


def compare(modules, shape=SHAPE, **options):
    return levels.compare_optimization_levels(modules, shape, threads=1, seconds=0.0, peaks=PEAKS, **options)


def test_every_figure_of_equal_levels() -> None:
    first = levels.create("multi_head_attention", 1, dim=16, heads=2)
    found = compare({"plain": first, "native": levels.convert(first, 5)})
    assert found.equivalent
    assert list(found) == ["plain", "native"]
    assert found["plain"].forward_speedup == (1.0, 1.0, 1.0)
    for result in found.values():
        assert result.note is None
        assert result.forward_seconds > 0
        assert result.backward_seconds > 0
        assert result.peak_bytes is None or result.peak_bytes >= 0
        assert result.forward_share > 0
        assert {check.passed for check in result.checks} == {True}
    # Scores, mask and softmax are one operator, and its output lies as the projection reads it.
    before, after = found["plain"].forward_profile, found["native"].forward_profile
    assert after.calls < before.calls
    assert after.copies < before.copies
    assert after.made_bytes < before.made_bytes
    assert "heedful::attention_forward" in {operator.name for operator in after.operators}
    text = str(found)
    assert "plain" in text
    assert "✓" in text
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["results"][1]["equivalent"] is True


def test_a_difference_is_found_in_output_and_in_gradients_and_nothing_is_timed() -> None:
    class Off(nn.Module):
        def __init__(self, inner, factor, gradient_factor) -> None:
            super().__init__()
            self.inner, self.factor, self.gradient_factor = inner, factor, gradient_factor

        def forward(self, x):
            x = x * self.gradient_factor + (x * (1 - self.gradient_factor)).detach()
            return self.inner(x) * self.factor

    first = levels.create("feed_forward", 1, dim=16, hidden=8)
    found = compare({"right": first, "output": Off(first, 1.0001, 1.0), "gradient": Off(first, 1.0, 1.0001)})
    assert not found.equivalent
    assert found["right"].forward_seconds is not None
    for name in ("output", "gradient"):
        assert found[name].forward_seconds is None
        assert "differs" in found[name].note
    assert found["gradient"].checks[0].passed
    assert "✗" in str(found)
    assert json.dumps(found.to_json(), allow_nan=False)


def test_other_modules_and_several_inputs() -> None:
    found = compare({"torch": nn.Linear(16, 3), "same": nn.Linear(16, 3)})
    assert not found.equivalent
    assert found.flops == (2.0 * 120 * 48, 4.0 * 120 * 48)
    first = levels.create("attention", 1, causal=True)
    heads = (2, 3, 10, 8)
    found = compare({"1": first, "5": levels.convert(first, 5)}, [heads, heads, heads])
    assert found.equivalent
    assert found.flops[0] == 4 * 2 * 3 * 8 * 55


def test_tokens_as_inputs() -> None:
    decoder = levels.create("decoder", 1, vocabulary=11, dim=16, heads=2, layers=1)
    tokens = torch.randint(11, (2, 9))
    found = compare({"1": decoder, "5": levels.convert(decoder, 5)}, (2, 9), inputs=[tokens])
    assert found.equivalent
    assert found["5"].backward_seconds > 0


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (({}, SHAPE), {}, "implementations takes"),
        (({"a": len}, SHAPE), {}, r"implementations\['a'\] takes"),
        (({"a": nn.Identity()}, ()), {}, "input_shape takes"),
        (({"a": nn.Identity()}, (0, 3)), {}, "input_shape takes"),
        (({"a": nn.Identity()}, 3), {}, "input_shape takes"),
        (({"a": nn.Identity()}, SHAPE), {"dtype": torch.int8}, "dtype takes"),
        (({"a": nn.Identity()}, SHAPE), {"inputs": [torch.zeros(3)]}, "inputs takes"),
        (({"a": nn.Identity()}, SHAPE), {"threads": 10**6}, "threads must be"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        levels.compare_optimization_levels(*arguments, **options)


def test_operators_are_counted_once_and_views_not_at_all() -> None:
    x, linear = torch.randn(8, 6), nn.Linear(6, 4)
    with torch.no_grad():
        # A product with its bias; a transposed copy; two elementwise operators, one with a number.
        found = profile_call(lambda: torch.relu(linear(x).t().contiguous()[1:] * 2))
    assert {operator.name: operator.calls for operator in found.operators} == {
        "aten::addmm": 1, "aten::clone": 1, "aten::mul": 1, "aten::relu": 1,
    }  # fmt: skip
    assert (found.calls, found.copies) == (4, 1)
    assert 2 * 128 + 2 * 96 <= found.made_bytes <= 2 * 128 + 2 * 96 + 64


def test_extra_peak_sees_what_a_call_takes_and_gives_back() -> None:
    size = 64 << 20
    found = extra_peak(lambda: torch.ones(size // 4).sum())
    if found is None:
        pytest.skip("this system does not let a process reset its peak")
    assert 0.95 * size < found < 1.1 * size
    torch.ones(size // 4).sum()
    assert 0.95 * size < extra_peak(lambda: torch.ones(size // 4).sum()) < 1.1 * size
