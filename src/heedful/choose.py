"""From a problem to the backend that runs it."""

from __future__ import annotations

import logging

import torch

from heedful.backend.base import Backend
from heedful.backend.native.backend import NativeBackend
from heedful.backend.native.prefer import native_is_faster
from heedful.backend.reference import ReferenceBackend
from heedful.backend.sdpa import SdpaBackend
from heedful.backend.triton.backend import TritonBackend
from heedful.backend.triton.prefer import triton_is_faster
from heedful.errors import unsupported, wrong_value
from heedful.problem import Problem

logger = logging.getLogger("heedful")

# From the fastest to the one that runs everything.
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (NativeBackend(), TritonBackend(), SdpaBackend(), ReferenceBackend())
}
ENGINE = "native"

# Asked once, when attention is first used: loading the engine is no part of a call, nor of a traced graph.
UNAVAILABLE: dict[str, str] = {
    name: why for name, why in ((name, backend.available()) for name, backend in BACKENDS.items()) if why is not None
}

_logged: set[tuple[str, tuple[str, ...]]] = set()


def reasons(problem: Problem) -> dict[str, list[str]]:
    """For every backend, why it cannot run the problem; empty lists for those that can."""
    return {
        name: [UNAVAILABLE[name]] if name in UNAVAILABLE else backend.not_supported_reasons(problem)
        for name, backend in BACKENDS.items()
    }


def choose(problem: Problem, requested: str | None = None) -> Backend:
    """The best backend that supports a problem, or the requested one; the reference where there is nothing to compute.

    Raises:
        ValueError: no backend has the requested name.
        UnsupportedError: the requested backend, or every one, cannot run the problem.
    """
    found = reasons(problem)
    backend = decide(problem, requested, found)
    best = fastest(problem)
    if requested is None and backend.name != best and found[best] and not problem.empty:
        _log_slower_road(backend, best, found[best], problem)
    return backend


def fastest(problem: Problem) -> str:
    """The backend that is the fastest on a problem's device for what it supports, a few kinds of call aside."""
    return "triton" if problem.device_type == "cuda" else ENGINE


def decide(problem: Problem, requested: str | None, found: dict[str, list[str]]) -> Backend:
    """As `choose`, from the reasons that were found, and without a word to the log."""
    if requested is not None and not (isinstance(requested, str) and requested in BACKENDS):
        raise wrong_value("backend", repr(requested), f"None or one of {', '.join(map(repr, BACKENDS))}")
    if requested is not None and found[requested]:
        raise unsupported(f"backend {requested!r} cannot run this call", {requested: found[requested]})
    able = [
        name
        for name, backend in BACKENDS.items()
        if not found[name] and (name == requested or not backend.on_request_only(problem))
    ]
    if not able:
        raise unsupported("no backend can run this call", found)
    if problem.empty:
        return BACKENDS["reference"]
    if requested is not None:
        return BACKENDS[requested]
    if "sdpa" in able and (
        (able[0] == ENGINE and not native_is_faster(problem)) or (able[0] == "triton" and not triton_is_faster(problem))
    ):
        return BACKENDS["sdpa"]
    return BACKENDS[able[0]]


def _log_slower_road(backend: Backend, best: str, why: list[str], problem: Problem) -> None:
    # A traced call says it in heedful.explain only: logging cannot be part of a graph.
    if torch.compiler.is_compiling() or (backend.name, tuple(why)) in _logged:
        return
    _logged.add((backend.name, tuple(why)))
    logger.warning(
        "attention runs on %s instead of %s: %s (said once for calls of this kind, heedful.explain says it for any)",
        backend.name,
        best,
        "; ".join([*(reason.rstrip(".") for reason in why), *backend.notes(problem)]),
    )
