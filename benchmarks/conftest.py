"""What `pytest benchmarks/ --benchmark-only` collects: files named bench_*.py.

A file of fused operations names them in OPERATIONS; a test that asks for `timed` runs for each case, dtype, pass and
side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import heedful
from heedful.measure.operations import COMPILED, EAGER, Setting, check, step
from heedful.measure.timing import pinned_threads
from heedful.ops import catalogue
from heedful.ops._catalogue import Case, Operation


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    # A file named on the command line is collected by pytest itself.
    if not file_path.match("bench_*.py") or parent.session.isinitpath(file_path):
        return None
    return pytest.Module.from_parent(parent, path=file_path)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # Only what stays the same between runs: one that differs is told of when it is compared.
    machine_info |= {"heedful": heedful.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "timed" not in metafunc.fixturenames:
        return
    found = [
        (operation, case, side, backward, dtype)
        for operation in map(catalogue().__getitem__, metafunc.module.OPERATIONS)
        for case in operation.cases
        for dtype in metafunc.module.DTYPES
        for backward in (False, True)
        for side in ("heedful", EAGER, COMPILED, *case.peers)
    ]
    metafunc.parametrize("timed", found, ids=[_title(*parameters, "-") for parameters in found], indirect=True)


def _title(operation: Operation, case: Case, side: str, backward: bool, dtype: torch.dtype, between: str = " ") -> str:
    words = [operation.name, case.name, str(dtype).removeprefix("torch."), "backward" if backward else "forward", side]
    return re.sub(r"[^\w.]+", between, " ".join(words)).strip(between)


@pytest.fixture(autouse=True)
def _pinned() -> Iterator[None]:
    torch.manual_seed(0)
    with pinned_threads(torch.get_num_threads()):
        yield


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[], Any]:
    """The call of one side, whose numbers were checked; calls of the same case and pass share a group."""
    operation, case, side, backward, dtype = request.param
    torch._dynamo.reset()
    check(operation, case, Setting(dtype, backward, torch.get_num_threads(), 0.0))
    functions = {"heedful": operation.function, EAGER: operation.reference, **case.peers}
    function = torch.compile(operation.reference) if side == COMPILED else functions[side]
    call = case.inputs(dtype)
    benchmark.group = _title(operation, case, "", backward, dtype)
    cost = operation.cost(call, False)
    benchmark.extra_info |= {"side": side, "flops": cost.flops, "bytes": cost.bytes, "threads": torch.get_num_threads()}
    made = step(function, call, operation.gradients, backward)
    made()
    return made
