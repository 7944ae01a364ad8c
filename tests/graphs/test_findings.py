"""What broke a capture: the module, the operation, the line."""

import pytest
import torch
from fake_device import FakeDevice
from torch import nn

from heedful.graphs import CaptureError, capture
from heedful.graphs.watch import run_watched


class Breaks(FakeDevice):
    """A device whose captures fail at an operator, as CUDA's do where one waits for the device."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def capture(self, run, device, pool, generators):
        from torch.utils._python_dispatch import TorchDispatchMode

        class Refuse(TorchDispatchMode):
            def __torch_dispatch__(mode, func, types, args=(), kwargs=None):
                if self.operator in str(func):
                    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with …")
                return func(*args, **(kwargs or {}))

        with Refuse():
            return super().capture(run, device, pool, generators)


class Reading(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x


class Choosing(nn.Module):
    def forward(self, x):
        return x[x > 0].sum() + x


def net(inner):
    return nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"inner": inner})["inner"], nn.ReLU())


@pytest.mark.parametrize(
    ("inner", "operator", "what"),
    [
        (Reading(), "_local_scalar_dense", "aten._local_scalar_dense.default reads numbers of a tensor"),
        (Choosing(), "index", "aten.index.Tensor gives a tensor whose shape depends on data"),
    ],
)
def test_the_error_names_module_operation_and_line(inner, operator, what):
    with pytest.raises(CaptureError) as caught:
        capture(net(inner), torch.ones(2, 3), device=Breaks(operator))
    text = str(caught.value)
    name = type(inner).__name__
    assert text.startswith("Sequential on inputs (2, 3) torch.float32 cannot be captured: RuntimeError: CUDA error: op")
    assert "Compile with" not in text
    assert f"  it broke in 1 ({name})\n" in text
    assert f"    1 ({name}): {what}" in text
    assert "test_findings.py:" in text
    assert caught.value.where == f"1 ({name})"
    assert [finding.module for finding in caught.value.findings] == [f"1 ({name})"]
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_where_no_operator_explains_it():
    calls = []

    def waits(x):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("operation not permitted")
        return x + 1

    with pytest.raises(CaptureError, match=r"no operator of PyTorch explains it: look for torch.cuda.synchronize\(\)"):
        capture(waits, torch.ones(1), device=FakeDevice())


def test_many_findings_are_cut():
    def reads(x):
        return x + sum(
            [
                x[0].item(),
                x[1].item(),
                x[2].item(),
                x[3].item(),
                x[4].item(),
                x[5].item(),
                x[6].item(),
            ]
        )

    with pytest.raises(CaptureError, match="and 2 more"):
        capture(reads, torch.ones(7), device=Breaks("_local_scalar_dense"))


def findings(function, device_type="meta"):
    return run_watched(function, device_type, ())[1]


def test_work_on_the_cpu_and_copies():
    there = torch.zeros(3, device="meta")
    (found,) = findings(lambda: torch.ones(3).to("meta"))
    assert found.operation == "aten._to_copy.default"
    assert "copies from the CPU" in found.why
    (found,) = findings(lambda: torch.ones(3) + 1)
    assert found.why == "computes on cpu: a graph would keep what came out at the capture"
    assert findings(lambda: there * 2 + 1) == ()
    assert findings(lambda: there[torch.zeros(2, dtype=torch.long, device="meta")]) == ()


def test_a_copy_to_the_cpu():
    (found,) = list(findings(lambda: torch.ones(3).to("meta"), "cpu"))
    assert found.why == "copies to meta, which waits for the device"


def test_what_was_there_before_is_listed_once():
    table = torch.arange(5.0)
    outside, _ = run_watched(lambda: (table[:2] + table[3:]) * (torch.zeros(2) + 1), "cpu", ())
    assert [tensor.untyped_storage().data_ptr() for tensor in outside] == [table.untyped_storage().data_ptr()]


def test_compiled_modules_get_no_hooks():
    module = nn.Linear(3, 3)
    module.compile(backend="eager")
    fast = capture(module, torch.ones(2, 3), device=FakeDevice())
    with torch.no_grad():
        torch.testing.assert_close(fast(torch.ones(2, 3)), module(torch.ones(2, 3)))
    assert not module._forward_hooks
