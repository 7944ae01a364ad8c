"""The fused operations of heedful.ops against PyTorch: eager, torch.compile, and its own fused functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heedful.ops._catalogue import Case, Operation

from .timing import compare_samples, pinned_threads, take_turns

COMPILED = "torch.compile"
EAGER = "eager"


@dataclass(frozen=True)
class Setting:
    """What one row is measured with."""

    dtype: torch.dtype
    backward: bool
    threads: int
    seconds: float


def sides_of(operation: Operation) -> dict[str, Callable[..., Any]]:
    """The operation's own function and what is measured beside it for every case, by name."""
    return {"heedful": operation.function, EAGER: operation.reference, COMPILED: torch.compile(operation.reference)}


def step(
    function: Callable[..., Any], call: dict[str, Any], gradients: Sequence[str], backward: bool
) -> Callable[[], Any]:
    """A call of the function with these arguments, alone or together with its backward."""
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return function(**call)

        return forward
    floating = [n for n in gradients if isinstance(call.get(n), Tensor) and call[n].is_floating_point()]
    leaves = {name: call[name].detach().requires_grad_() for name in floating}
    arguments, wanted = {**call, **leaves}, tuple(leaves.values())
    with torch.no_grad():
        found = function(**call)
    arriving = tuple(torch.randn_like(y) for y in ((found,) if isinstance(found, Tensor) else found))

    def both() -> Any:
        outputs = function(**arguments)
        return torch.autograd.grad((outputs,) if isinstance(outputs, Tensor) else outputs, wanted, arriving)

    return both


def check(operation: Operation, case: Case, setting: Setting) -> None:
    """Raises AssertionError unless all sides give what the reference gives in float64, as near as PyTorch does."""
    call = case.inputs(setting.dtype)
    wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in call.items()}
    with torch.no_grad():
        wanted, found = operation.reference(**wide), operation.function(**call)
    for y, ref in zip(*(((t,) if isinstance(t, Tensor) else t) for t in (found, wanted)), strict=True):
        eps = torch.finfo(setting.dtype).eps
        torch.testing.assert_close(y.double(), ref, rtol=16 * eps, atol=16 * eps)


def measure_case(operation: Operation, case: Case, setting: Setting, *, checked: bool = False) -> dict[str, Any]:
    """One row: seconds of every side, heedful's ratio to the best and to eager, its bytes per second.

    All sides run turn by turn in this process. checked: whether the numbers of this case and dtype were.
    """
    torch._dynamo.reset()  # past a few cases of one function it would stop to compile
    with pinned_threads(setting.threads):
        if not checked:
            check(operation, case, setting)
        call = case.inputs(setting.dtype)
        sides = {**sides_of(operation), **case.peers}
        steps = [step(side, call, operation.gradients, setting.backward) for side in sides.values()]
        samples = dict(zip(sides, take_turns(steps, seconds=setting.seconds, min_rounds=3), strict=True))
    comparisons = {
        name: compare_samples(taken, samples["heedful"]) for name, taken in samples.items() if name != "heedful"
    }
    seconds = next(iter(comparisons.values())).candidate_seconds
    cost = operation.cost(call, False)
    moved = cost.bytes + (operation.cost(call, True).bytes if setting.backward else 0)
    return {
        "operation": operation.name,
        "case": case.name,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "pass": "forward and backward" if setting.backward else "forward",
        "threads": setting.threads,
        "seconds": seconds,
        "bytes_per_second": moved / seconds,
        "peers": {name: comparison.to_json() for name, comparison in comparisons.items()},
    }
