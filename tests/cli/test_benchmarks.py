"""`pytest benchmarks/ --benchmark-only`: what it collects, saves and compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from heedful.ops import catalogue

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="runs in a source tree only")
pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


def run(directory, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, arguments)]
    # Where tests run side by side, pytest-benchmark would not measure.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=180, env=alone)


def test_every_operation_is_collected():
    done = run(ROOT, "benchmarks/", "--benchmark-only", "--collect-only")
    assert done.returncode == 0, done.stdout
    for name in catalogue():
        assert f"[{name}-" in done.stdout
    assert "bench_levels.py" in done.stdout


def test_save_and_compare(tmp_path):
    quick = ("--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2")
    chosen = ("-k", "parametric_swish-1000-beta-1-float32-forward and not compile")
    # A file by its name is collected once.
    saved = run(tmp_path, ROOT / "benchmarks/bench_parametric_swish.py", *quick, *chosen, "--benchmark-save=before")
    assert saved.returncode == 0, saved.stdout
    assert "3 passed" in saved.stdout
    (path,) = tmp_path.glob(".benchmarks/*/0001_before.json")
    data = json.loads(path.read_text())
    assert {row["extra_info"]["side"] for row in data["benchmarks"]} == {"heedful", "eager", "silu"}
    assert {row["group"] for row in data["benchmarks"]} == {"parametric_swish 1000 beta 1 float32 forward"}
    compared = run(tmp_path, ROOT / "benchmarks", *quick, *chosen, "--benchmark-compare=0001")
    assert compared.returncode == 0, compared.stdout
    assert compared.stdout.count("(0001_before)") >= 3
    assert compared.stdout.count("(NOW)") >= 3
