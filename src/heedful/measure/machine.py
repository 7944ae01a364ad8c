"""What the process runs on and what limits it: the record that stands beside every measured number."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

OPENMP_LIBRARY = re.compile(r"/lib(gomp|omp|iomp5|omp5)\b[^/]*\.(so|dylib)[^/]*$")
FLAGS_OF_INTEREST = (
    "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "sve", "sve2", "bf16", "i8mm",
)  # fmt: skip


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is no such file."""
    entries: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        entries[name.strip()] = value.strip()
    return entries


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Every instruction-set flag that the kernel reports for the first processor."""
    info = _cpuinfo()
    return set((info.get("flags") or info.get("Features") or "").split())


def caches() -> list[dict[str, Any]]:
    """Level, kind, size in bytes and number of sharing CPUs of each cache of the first processor."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size, level, kind = (_read(index / name) for name in ("size", "level", "type"))
        if size is None or level is None or kind is None:
            continue
        shared = expand_cpu_list((_read(index / "shared_cpu_list") or "0").strip())
        scale = {"K": 1 << 10, "M": 1 << 20}.get(size.strip()[-1:], 1)
        digits = size.strip().rstrip("KM")
        found.append(
            {"level": int(level), "kind": kind.strip(), "bytes": int(digits) * scale, "shared_by": len(shared)}
        )
    return found


def last_level_cache_bytes() -> int:
    """Size of the largest cache, or 32 MiB where the system does not say."""
    return max((int(cache["bytes"]) for cache in caches()), default=32 << 20)


def expand_cpu_list(text: str) -> list[int]:
    """[0, 1, 2, 5] for the kernel's notation "0-2,5"."""
    cpus: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def affinity() -> list[int] | None:
    """CPUs that this process may run on, None where the system has no such notion."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return sorted(os.sched_getaffinity(0))


def physical_cores() -> int | None:
    """Number of distinct cores behind the online CPUs, None where the system does not say."""
    siblings = {_read(path) for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")}
    return len(siblings - {None}) or None


def cgroup_quota(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> float | None:
    """CPUs' worth of time that the control group allows (the tightest on the way up), None if unlimited."""
    limits = []
    for line in (_read(membership) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        unified = controllers == ""
        if not unified and "cpu" not in controllers.split(","):
            continue
        base = Path(root) if unified else Path(root) / controllers
        folder = base / path.lstrip("/")
        for level in (folder, *folder.parents):
            limits.append(_quota_at(level, unified))
            if level == base:
                break
    return min((limit for limit in limits if limit is not None), default=None)


def _quota_at(folder: Path, unified: bool) -> float | None:
    if unified:
        quota, _, period = (_read(folder / "cpu.max") or "max").strip().partition(" ")
    else:
        quota = (_read(folder / "cpu.cfs_quota_us") or "-1").strip()
        period = (_read(folder / "cpu.cfs_period_us") or "100000").strip()
    if quota in ("max", "-1"):
        return None
    return int(quota) / int(period or 100000)


def openmp_runtimes() -> list[str] | None:
    """Paths of the OpenMP runtimes mapped into this process, None where /proc does not exist."""
    maps = _read("/proc/self/maps")
    if maps is None:
        return None
    return find_openmp_runtimes(maps.splitlines())


def find_openmp_runtimes(map_lines: Iterable[str]) -> list[str]:
    """The distinct OpenMP libraries among the lines of a /proc/<pid>/maps file."""
    paths = {line.split(maxsplit=5)[5] for line in map_lines if len(line.split(maxsplit=5)) == 6}
    return sorted({os.path.realpath(path) for path in paths if OPENMP_LIBRARY.search(path)})


def thread_limits() -> dict[str, Any]:
    """torch's thread count and every bound on it, with a sentence that says which one binds."""
    import torch

    threads, allowed, quota = torch.get_num_threads(), affinity(), cgroup_quota()
    variables = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    binding = next((f"{name}={value}" for name, value in variables.items() if value == str(threads)), None)
    if binding is None and allowed is not None and threads == len(allowed):
        everything = len(allowed) == os.cpu_count()
        binding = f"all {threads} CPUs" if everything else f"the CPU affinity {allowed}"
    if binding is None and threads == physical_cores():
        binding = f"{threads} physical cores"
    if binding is None:
        binding = "torch.set_num_threads or the OpenMP runtime"
    return {
        "torch_threads": threads,
        "limited_by": binding,
        "cpus": os.cpu_count(),
        "physical_cores": physical_cores(),
        "affinity": allowed,
        "cgroup_quota_cpus": quota,
        "variables": variables,
    }


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def gpu() -> dict[str, Any]:
    """What accelerators this torch can use, as JSON-serialisable data.

    devices: name, capability, multiprocessors, memory in bytes; why_none: a line where there is none, otherwise None;
    driver and cuda: versions; triton and backend: whether heedful's kernels have what they need, or the reason.
    """
    import torch

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            try:
                free: int | None = torch.cuda.mem_get_info(index)[0]
            except RuntimeError:  # such as a device that another process has to itself
                free = None
            devices.append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "multiprocessors": properties.multi_processor_count,
                    "memory_total": properties.total_memory,
                    "memory_free": free,
                }
            )
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    why_none = None
    if not devices:
        on_metal = "Apple GPU (MPS): PyTorch's own attention runs there"
        why_none = on_metal if torch.backends.mps.is_available() else f"none usable (torch is {built})"
    return {
        "devices": devices,
        "why_none": why_none,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "triton": _triton(),
        "backend": _gpu_backend(),
    }


def driver_version() -> str | None:
    """Version of NVIDIA's kernel driver, None where there is none."""
    text = _read("/proc/driver/nvidia/version") or ""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found.group(1) if found else None


def _triton() -> dict[str, str | None]:
    try:
        return {"version": str(importlib.import_module("triton").__version__), "reason": None}
    except Exception as error:  # whatever a package that is broken raises
        return {"version": None, "reason": f"{type(error).__name__}: {error}"}


def _gpu_backend() -> dict[str, Any]:
    """Whether heedful's backend for CUDA tensors can run in this process."""
    from heedful.choose import BACKENDS, UNAVAILABLE

    names = [name for name, backend in BACKENDS.items() if backend.devices and "cuda" in backend.devices]
    names = [name for name in names if name != "reference"]
    if not names:
        return {"name": None, "available": False, "reason": "this heedful has none"}
    return {"name": names[0], "available": names[0] not in UNAVAILABLE, "reason": UNAVAILABLE.get(names[0])}


def environment() -> dict[str, Any]:
    """The record stored with every measurement: machine, limits, versions and the moment. JSON-serialisable."""
    import torch

    from heedful import __version__ as heedful_version

    info = cpu_flags()
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "flags": [flag for flag in FLAGS_OF_INTEREST if flag in info],
        "caches": caches(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threads": thread_limits(),
        "heedful_isa": os.environ.get("HEEDFUL_ISA"),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            **{name: version_of(name) for name in ("numpy", "transformers")},
            "heedful": heedful_version,
        },
    }


def memory_bytes() -> int | None:
    """Installed memory, None where the system does not say."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
