"""`heedful doctor`: what is there, what is chosen, and what is wrong."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from heedful.measure import machine

from .console import output

BUILD_REMEDY = "in a source tree run make build (or pip install --force-reinstall --no-deps .)"


@dataclass(frozen=True)
class Problem:
    """Something found wrong. An error means that heedful does not work as installed; a warning, that it is slower."""

    severity: Literal["error", "warning"]
    what: str
    remedy: str


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False) -> None:
    """Show the processor, threads, libraries and backends that heedful finds, and what is wrong with them.

    Exits with 1 only if something is broken; warnings leave 0.
    """
    report = diagnose()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    if any(problem["severity"] == "error" for problem in report["problems"]):
        raise typer.Exit(1)


def diagnose() -> dict[str, Any]:
    """Everything that the command shows, as JSON-serialisable data."""
    import torch

    problems: list[Problem] = []
    engine = _engine(problems)
    tuning = _tuning(problems)
    transformers = _transformers(problems)
    environment = machine.environment()
    backends = _backends()
    # Last, when everything that heedful brings into a process has been loaded.
    runtimes = machine.openmp_runtimes()
    problems += openmp_problems(runtimes) + thread_problems(environment["threads"])
    return {
        "environment": environment,
        "engine": engine,
        "tuning": tuning,
        "torch": {
            "version": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "openmp": torch.backends.openmp.is_available(),
            "mkl": torch.backends.mkl.is_available(),
            "mkldnn": torch.backends.mkldnn.is_available(),
            "cuda": torch.version.cuda,
        },
        "transformers": transformers,
        "gpu": machine.gpu(),
        "openmp_runtimes": runtimes,
        "backends": backends,
        "problems": [asdict(problem) for problem in problems],
    }


def openmp_problems(runtimes: list[str] | None) -> list[Problem]:
    """A warning where two OpenMP runtimes share the process: each brings its own pool of threads."""
    if runtimes is None or len(runtimes) < 2:
        return []
    remedy = "find the package that brings the second one and install its build against torch's, or preload one of them"
    return [Problem("warning", f"{len(runtimes)} OpenMP runtimes are loaded: {', '.join(runtimes)}", remedy)]


def thread_problems(limits: dict[str, Any]) -> list[Problem]:
    """Warnings about threads that would wait for each other or for a CPU."""
    threads, quota, allowed = limits["torch_threads"], limits["cgroup_quota_cpus"], limits["affinity"]
    problems = []
    if quota is not None and quota < threads:
        what = f"the control group allows {quota:g} CPUs' worth of time and torch uses {threads} threads"
        problems.append(Problem("warning", what, f"set OMP_NUM_THREADS={max(1, int(quota))}"))
    if allowed is not None and len(allowed) < threads:
        what = f"{threads} torch threads share {len(allowed)} CPUs"
        problems.append(Problem("warning", what, f"set OMP_NUM_THREADS={len(allowed)}"))
    return problems


def _engine(problems: list[Problem]) -> dict[str, Any]:
    """Path, version and tiers of the engine; an error among the problems where it cannot be loaded."""
    from heedful.backend.native import library

    cap = os.environ.get("HEEDFUL_ISA")
    found: dict[str, Any] = {"path": str(library.directory()), "version": None, "isa_cap": cap, "tiers": []}
    try:
        found["version"] = library.version()
        selected = library.isa_selected()
        found["tiers"] = [
            {"name": name, "runnable": library.isa_runnable(index), "selected": index == selected}
            for index, name in enumerate(library.isa_names())
        ]
        library.load_operators()
    except (ImportError, OSError, AttributeError) as error:
        problems.append(Problem("error", f"the engine does not load: {error}", BUILD_REMEDY))
    if cap is not None and found["tiers"] and cap not in {tier["name"] for tier in found["tiers"]}:
        names = ", ".join(tier["name"] for tier in found["tiers"])
        problems.append(Problem("warning", f"HEEDFUL_ISA={cap} is no tier of this engine", f"use one of {names}"))
    return found


def _tuning(problems: list[Problem]) -> dict[str, Any]:
    """Which table of thresholds and engine constants holds, and why a stored one does not."""
    from heedful.backend.native import library, prefer
    from heedful.measure.tuning import table_path

    named = os.environ.get("HEEDFUL_TUNING")
    path = Path(named) if named and named != "off" else table_path()
    found: dict[str, Any] = {"path": str(path), "used": False, "reason": None}
    if named == "off":
        found["reason"] = "HEEDFUL_TUNING=off"
    elif not path.exists():
        found["reason"] = "not there; heedful tune measures one"
    else:
        try:
            tier = library.isa_names()[library.isa_selected()]
            found["reason"] = prefer._mismatch(json.loads(path.read_text()), tier)
        except (ImportError, OSError, ValueError) as error:
            found["reason"] = str(error)
        found["used"] = found["reason"] is None
        if not found["used"]:
            what = f"the tuning table {path} is not used: {found['reason']}"
            problems.append(Problem("warning", what, "run heedful tune again, or heedful tune --reset"))
    return found


def _transformers(problems: list[Problem]) -> dict[str, Any]:
    """Version of transformers and whether attn_implementation="heedful" is known there after import heedful.hf."""
    found: dict[str, Any] = {"version": machine.version_of("transformers"), "registered": False}
    if found["version"] is None:
        return found
    try:
        importlib.import_module("heedful.hf")
        from transformers import AttentionInterface

        found["registered"] = "heedful" in AttentionInterface().valid_keys()
    except Exception as error:  # any failure of a foreign package is a finding, not the end of the report
        problems.append(Problem("warning", f"import heedful.hf failed: {error}", "pip install 'transformers>=5.8'"))
    return found


def _backends() -> list[dict[str, Any]]:
    """Every backend with None or the reason why it cannot run here."""
    import heedful

    return [status._asdict() for status in heedful.list_backends()]


def _print(report: dict[str, Any]) -> None:
    console = output()

    def line(label: str, text: str) -> None:
        console.print(f"[bold]{label:<14}[/] {escape(text)}")

    environment, threads = report["environment"], report["environment"]["threads"]
    line("CPU", f"{environment['cpu']} ({', '.join(environment['flags']) or 'no flags of interest'})")
    line("caches", ", ".join(_cache(cache) for cache in environment["caches"]) or "unknown")
    line("cores", f"{threads['cpus']} CPUs, {threads['physical_cores'] or 'unknown number of'} physical cores")
    quota = threads["cgroup_quota_cpus"]
    line("limits", f"affinity {threads['affinity']}, cgroup quota {'none' if quota is None else f'{quota:g} CPUs'}")
    line("torch threads", f"{threads['torch_threads']}, limited by {threads['limited_by']}")
    runtimes = report["openmp_runtimes"]
    line("OpenMP", "unknown" if runtimes is None else ", ".join(runtimes) or "none loaded")
    torch = report["torch"]
    line(
        "torch",
        f"{torch['version']}, CPU capability {torch['capability']}, MKL {torch['mkl']}, oneDNN {torch['mkldnn']}",
    )
    hub = report["transformers"]
    registered = 'attn_implementation="heedful" is registered by import heedful.hf'
    missing = "not installed" if hub["version"] is None else f"{hub['version']}, heedful is not registered"
    line("transformers", f"{hub['version']}, {registered}" if hub["registered"] else missing)
    for text in _gpu(report["gpu"]):
        line("GPU", text)
    engine = report["engine"]
    line("engine", f"{engine['version'] or 'not loaded'} from {engine['path']}")
    cap = f" (capped by HEEDFUL_ISA={engine['isa_cap']})" if engine["isa_cap"] else ""
    line("tiers", (", ".join(_tier(tier) for tier in engine["tiers"]) or "unknown") + cap)
    tuning = report["tuning"]
    line("tuning", tuning["path"] if tuning["used"] else f"shipped values ({tuning['path']}: {tuning['reason']})")
    for backend in report["backends"]:
        line(f"  {backend['name']}", "available" if backend["available"] else f"not available: {backend['reason']}")
    for problem in report["problems"]:
        colour = "red" if problem["severity"] == "error" else "yellow"
        console.print(f"[bold {colour}]{problem['severity']}:[/] {escape(problem['what'])}")
        console.print(f"  remedy: {escape(problem['remedy'])}")
    if not report["problems"]:
        console.print("[green]no problems found[/]")


def _gpu(gpu: dict[str, Any]) -> list[str]:
    """A line for each device and one for what runs on them, or one that says why there is none."""
    if not gpu["devices"]:
        return [gpu["why_none"]]
    lines = [
        f"{index}: {device['name']}, capability {device['capability']}, {device['multiprocessors']} multiprocessors, "
        f"{_gibibytes(device['memory_free'])} of {_gibibytes(device['memory_total'])} free"
        for index, device in enumerate(gpu["devices"])
    ]
    triton, backend = gpu["triton"], gpu["backend"]
    what = [
        f"driver {gpu['driver'] or 'unknown'}",
        f"torch for CUDA {gpu['cuda']}",
        f"Triton {triton['version']}" if triton["version"] else f"no Triton: {triton['reason']}",
        "heedful's kernels run here" if backend["available"] else f"heedful's kernels do not: {backend['reason']}",
    ]
    return [*lines, ", ".join(what)]


def _gibibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _cache(cache: dict[str, Any]) -> str:
    size = cache["bytes"] / 1024
    text = f"{size:.0f} KiB" if size < 1024 else f"{size / 1024:g} MiB"
    kind = {"Data": "d", "Instruction": "i"}.get(cache["kind"], "")
    return f"L{cache['level']}{kind} {text}" + (f" shared by {cache['shared_by']}" if cache["shared_by"] > 1 else "")


def _tier(tier: dict[str, Any]) -> str:
    state = "selected" if tier["selected"] else "runnable" if tier["runnable"] else "not on this CPU"
    return f"{tier['name']} ({state})"
