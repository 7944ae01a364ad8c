"""What benchmarks/gpu_doors.py checks, a test each: with a GPU everything, without one nothing."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_doors.py"


def _load():
    spec = importlib.util.spec_from_file_location("gpu_doors", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checks = _load().CHECKS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
@pytest.mark.parametrize("name", checks)
def test_on_a_gpu(name):
    checks[name]()


def test_without_a_gpu_the_script_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_doors.py"])
    if not torch.cuda.is_available():
        _load().main()
        assert "needs a CUDA device, and torch sees none" in capsys.readouterr().out
