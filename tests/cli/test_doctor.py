"""`heedful doctor` and what the command line says about itself."""

import json

import pytest
from typer.testing import CliRunner

import heedful
from heedful.backend.native import library
from heedful.cli import app
from heedful.cli.diagnosis import openmp_problems, thread_problems


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_version():
    done = invoke("--version")
    assert done.exit_code == 0
    assert done.stdout == f"heedful {heedful.__version__}\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ["doctor", "bench", "demo", "tune", "--version"]),
        (("doctor",), ["--json"]),
        (("bench",), ["--quick", "--json", "--plot", "--markdown", "--update", "--threads", "--only"]),
        (("demo",), ["--quick", "--json", "--report"]),
    ],
)
def test_help_names_every_option(command, words):
    done = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [*command, "--help"])
    assert done.exit_code == 0
    for word in words:
        assert word in done.output


def test_json_schema():
    done = invoke("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 0, report["problems"]
    assert report.keys() == {
        "environment", "engine", "tuning", "torch", "transformers", "gpu", "openmp_runtimes", "backends", "problems",
    }  # fmt: skip
    assert report["engine"]["version"] == library.version()
    assert [tier["selected"] for tier in report["engine"]["tiers"]].count(True) == 1
    assert all(tier["runnable"] for tier in report["engine"]["tiers"] if tier["selected"])
    assert {backend["name"] for backend in report["backends"]} >= {"native", "sdpa", "reference"}
    for problem in report["problems"]:
        assert problem.keys() == {"severity", "what", "remedy"}


def test_text_has_every_section():
    done = invoke("doctor")
    assert done.exit_code == 0, done.output
    for label in ("CPU", "caches", "torch threads", "OpenMP", "transformers", "GPU", "engine", "tiers", "reference"):
        assert label in done.output


def test_an_engine_that_does_not_load_exits_with_1_and_the_remedy(monkeypatch):
    def fail():
        raise ImportError("no such library")

    monkeypatch.setattr(library, "version", fail)
    done = invoke("doctor")
    assert done.exit_code == 1
    assert "no such library" in done.output
    assert "remedy: in a source tree run make build" in done.output


def test_a_tier_of_no_engine_is_a_warning(monkeypatch):
    monkeypatch.setenv("HEEDFUL_ISA", "avx1024")
    done = invoke("doctor", "--json")
    assert done.exit_code == 0
    assert any("avx1024" in problem["what"] for problem in json.loads(done.stdout)["problems"])


def test_two_openmp_runtimes_are_a_warning():
    assert openmp_problems(None) == openmp_problems(["/a/libgomp.so.1"]) == []
    (problem,) = openmp_problems(["/a/libgomp.so.1", "/b/libiomp5.so"])
    assert problem.severity == "warning"
    assert "/b/libiomp5.so" in problem.what


def test_threads_without_cpus_are_warnings():
    limits = {"torch_threads": 4, "cgroup_quota_cpus": 1.5, "affinity": [0, 1]}
    quota, affinity = thread_problems(limits)
    assert quota.remedy == "set OMP_NUM_THREADS=1"
    assert affinity.remedy == "set OMP_NUM_THREADS=2"
    assert thread_problems({"torch_threads": 2, "cgroup_quota_cpus": None, "affinity": None}) == []


def gpu_of(monkeypatch, **changes):
    """What doctor's text says of GPUs, on a machine with one that is made up."""
    from types import SimpleNamespace

    import torch

    from heedful.measure import machine

    properties = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: changes.get("count", 1))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", changes.get("memory", lambda index: (60 * 2**30, 80 * 2**30)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(machine, "_triton", lambda: changes.get("triton", {"version": "3.6.0", "reason": None}))
    backend = {"name": "triton", "available": True, "reason": None}
    monkeypatch.setattr(machine, "_gpu_backend", lambda: changes.get("backend", backend))
    from heedful.cli.diagnosis import _gpu

    found = machine.gpu()
    json.dumps(found)
    return found, _gpu(found)


def test_a_gpu_is_shown(monkeypatch):
    found, lines = gpu_of(monkeypatch, count=2)
    assert lines == [
        "0: H100, capability 9.0, 132 multiprocessors, 60.0 GiB of 80.0 GiB free",
        "1: H100, capability 9.0, 132 multiprocessors, 60.0 GiB of 80.0 GiB free",
        "driver 580.65.06, torch for CUDA 13.0, Triton 3.6.0, heedful's kernels run here",
    ]
    assert found["why_none"] is None


def test_what_is_missing_on_a_gpu_is_said(monkeypatch):
    def busy(index):
        raise RuntimeError("device is busy")

    _, lines = gpu_of(
        monkeypatch,
        memory=busy,
        triton={"version": None, "reason": "ImportError: no"},
        backend={"name": "triton", "available": False, "reason": "triton is not installed"},
    )
    assert lines == [
        "0: H100, capability 9.0, 132 multiprocessors, unknown of 80.0 GiB free",
        "driver 580.65.06, torch for CUDA 13.0, no Triton: ImportError: no, "
        "heedful's kernels do not: triton is not installed",
    ]


def test_without_a_gpu_there_is_one_line(monkeypatch):
    import torch

    from heedful.cli.diagnosis import _gpu
    from heedful.measure import machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    found = machine.gpu()
    (line,) = _gpu(found)
    assert line.startswith("none usable (torch is ")
    assert found["devices"] == []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert _gpu(machine.gpu()) == ["Apple GPU (MPS): PyTorch's own attention runs there"]


def test_the_drivers_version(monkeypatch):
    from heedful.measure import machine

    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 13"
    monkeypatch.setattr(machine, "_read", lambda path: text)
    assert machine.driver_version() == "580.65.06"
    monkeypatch.setattr(machine, "_read", lambda path: None)
    assert machine.driver_version() is None
