"""What `heedful bench` measures beside its table, one function a mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heedful.report.document import Document

from .console import steps

SWEEP_CASES, QUICK_CASES, QUICK_STEPS, QUICK_SECONDS = 200, 30, 20, 0.15


class Unavailable(Exception):
    """Why a mode can measure nothing here."""


@dataclass(frozen=True)
class Options:
    """What the user asked for; each mode reads what it knows."""

    command: str
    quick: bool
    threads: int | None
    count: int | None
    seed: int
    full: bool
    steps: int | None
    only: str | None
    dtype: str
    stored: tuple[Path, ...] = ()


def run(mode: str, options: Options) -> tuple[dict[str, Any], Document]:
    """Measure, and the result with what it has to say.

    Raises:
        ValueError: an option's value is not possible here.
        Unavailable: there is nothing here to measure.
    """
    modes: dict[str, Callable[[Options], tuple[dict[str, Any], Document]]] = {
        "sweep": _sweep,
        "decode": _decode,
        "training": _training,
        "density": _density,
        "gpu": _gpu,
    }
    return modes[mode](options)


def _sweep(options: Options) -> tuple[dict[str, Any], Document]:
    from heedful.measure.sweep import measure_sweep
    from heedful.report.sweep import document

    count = options.count or (QUICK_CASES if options.quick else SWEEP_CASES)
    with steps(count) as progress:
        result = measure_sweep(
            count, threads=options.threads or 1, seed=options.seed, command=options.command, progress=progress
        )
    return result, document(result)


def _decode(options: Options) -> tuple[dict[str, Any], Document]:
    from heedful.measure import decode
    from heedful.report.decode import document

    chosen = _named(decode.shapes(full=options.full), options.only)
    seconds = QUICK_SECONDS if options.quick else decode.CASE_SECONDS
    with steps(len(chosen) + 1) as progress:
        result = decode.measure_decode(
            chosen, threads=options.threads or 1, command=options.command, progress=progress, seconds=seconds
        )
    return result, document(result)


def _training(options: Options) -> tuple[dict[str, Any], Document]:
    from heedful.measure.training import STEPS, measure_training
    from heedful.report.training import document

    count = options.steps or (QUICK_STEPS if options.quick else STEPS)
    with steps(count + 1) as progress:
        result = measure_training(count, threads=options.threads or 1, command=options.command, progress=progress)
    return result, document(result)


def _density(options: Options) -> tuple[dict[str, Any], Document]:
    from heedful.measure import density
    from heedful.report.density import document

    if options.dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"--dtype takes float32, bfloat16, float16 or float64, got {options.dtype!r}")
    chosen = _named(density.points(), options.only)
    seconds = QUICK_SECONDS if options.quick else density.CASE_SECONDS
    with steps(len(chosen) + 1) as progress:
        result = density.measure_density(
            chosen,
            dtype=options.dtype,
            threads=options.threads or 1,
            command=options.command,
            progress=progress,
            seconds=seconds,
        )
    return result, document(result)


def _gpu(options: Options) -> tuple[dict[str, Any], Document]:
    from heedful.measure import gpu
    from heedful.measure.gpu_cases import cases
    from heedful.report.gpu import document

    if options.stored:
        result = gpu.joined([json.loads(path.read_text()) for path in options.stored])
        return result, document(result)
    why = gpu.why_not()
    if why is not None:
        raise Unavailable(why)
    front = options.only is None or options.only in gpu.FRONT_DOOR
    every = cases(quick=options.quick)
    chosen = [] if options.only in (gpu.FRONT_DOOR,) else _named(every, options.only)
    with steps(len(chosen) + front + 2) as progress:
        result = gpu.measure_gpu(chosen, command=options.command, progress=progress, front_door=front)
    return result, document(result)


def _named(cases: list[Any], only: str | None) -> list[Any]:
    chosen = [case for case in cases if only is None or only in case.name]
    if not chosen:
        raise ValueError(f"no name contains {only!r}; the first is {cases[0].name!r}")
    return chosen
