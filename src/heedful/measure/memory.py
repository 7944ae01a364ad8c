"""Peak resident memory, read by a process about itself."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path


def peak_bytes() -> int:
    """The most memory this process has held resident so far (VmHWM on Linux)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Start the peak anew from what is resident now; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def extra_peak(call: Callable[[], object]) -> int | None:
    """Bytes that a call takes at its peak above what the process holds before it; None where nothing can tell.

    What the call returns counts. Memory that the allocator keeps from earlier calls is given back to the system first,
    so that it cannot serve the call unseen; the figure is exact to some hundred KiB.
    """
    _trim()
    if not reset_peak():
        return None
    before = peak_bytes()
    kept = call()
    after = peak_bytes()
    del kept
    return max(after - before, 0)


def _trim() -> None:
    """Let the C library return what it holds for reuse."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
