"""Where the catalogue says that PyTorch is faster: which calls are meant, and that what chooses leaves them to it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import heedful
from heedful.ops import catalogue

ENTRIES = [(name, slower) for name, operation in catalogue().items() for slower in operation.slower]


class Operators(TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def heedfuls(call):
    with Operators() as seen:
        call()
    return [name for name in seen.names if name.startswith("heedful.")]


def calls(name):
    """Every case of an operation in two types, and whether a gradient is needed."""
    for case in catalogue()[name].cases:
        for dtype in (torch.float32, torch.bfloat16):
            for gradient in (False, True):
                yield case.inputs(dtype), gradient


@pytest.mark.parametrize(("name", "slower"), ENTRIES, ids=[f"{name}-{slower.where}" for name, slower in ENTRIES])
def test_some_calls_are_meant_and_some_are_not(name, slower):
    found = {bool(slower.applies(call, gradient)) for call, gradient in calls(name)}
    assert found == {False, True}


MODULES = {
    "heedful.nn.ParametricSwish": lambda call: heedful.nn.ParametricSwish(call["beta"])(call["x"]),
}


def test_everything_that_chooses_is_tested():
    assert {chooser for _, slower in ENTRIES for chooser in slower.left_by} == MODULES.keys()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("beta", [1.0, 1.5])
@pytest.mark.parametrize("elements", [1, 16383, 16384, 131071, 131072])
@pytest.mark.parametrize("name", MODULES)
def test_the_choice_is_what_the_catalogue_says(name, elements, beta, gradient):
    operation, slower = next((o, s) for o, s in ENTRIES if name in s.left_by)
    call = {"x": torch.randn(elements, requires_grad=gradient), "beta": beta}
    used = heedfuls(lambda: MODULES[name](call))
    assert bool(used) != slower.applies(call, gradient)
    torch.testing.assert_close(MODULES[name](call), catalogue()[operation].reference(**call))
