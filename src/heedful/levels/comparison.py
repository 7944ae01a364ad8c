"""`compare_optimization_levels`: implementations of one module side by side, once they are known to agree."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from heedful.errors import wrong_type, wrong_value
from heedful.levels.base import Component
from heedful.levels.ladder import interpreting
from heedful.measure.checks import Check, all_passed
from heedful.measure.memory import extra_peak
from heedful.measure.operators import Profile, profile_call
from heedful.measure.peaks import Peaks, measure_peaks
from heedful.measure.timing import pinned_threads, quartiles, take_turns

# The largest difference as a share of the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
RULE = "largest difference ÷ largest value, against the first implementation with the same weights"
MIN_ROUNDS, MAX_ROUNDS = 3, 200


@dataclass(frozen=True)
class LevelResult:
    """One implementation. Times, memory and counts are None where a check failed or `note` says why not.

    forward is timed without gradients, backward alone behind a forward with them. A speed-up is the median of the
    rounds' ratios to the first implementation's times, between their quartiles. peak_bytes is what forward and backward
    together take above inputs and weights. A share is the least time that the machine's measured peaks allow ÷ the time
    taken.
    """

    name: str
    checks: tuple[Check, ...]
    note: str | None = None
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    forward_speedup: tuple[float, float, float] | None = None
    backward_speedup: tuple[float, float, float] | None = None
    forward_share: float | None = None
    backward_share: float | None = None
    peak_bytes: int | None = None
    forward_profile: Profile | None = None
    backward_profile: Profile | None = None

    @property
    def equivalent(self) -> bool:
        """Whether every output and gradient is within the tolerance."""
        return all_passed(self.checks)

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-serialisable."""
        plain = dict(self.__dict__)
        plain["checks"] = [check.to_json() for check in self.checks]
        for name in ("forward_profile", "backward_profile"):
            plain[name] = None if plain[name] is None else plain[name].to_json()
        return plain | {"equivalent": self.equivalent}


@dataclass(frozen=True)
class LevelComparison(Mapping[str, LevelResult]):
    """Results by the implementations' names, in their order; `print` shows a table."""

    results: dict[str, LevelResult]
    shapes: list[tuple[int, ...]]
    dtype: str
    threads: int
    flops: tuple[float, float] = field(default=(0.0, 0.0))
    compulsory_bytes: tuple[int, int] = field(default=(0, 0))

    @property
    def equivalent(self) -> bool:
        """Whether all implementations compute the same."""
        return all(result.equivalent for result in self.results.values())

    def __getitem__(self, name: str) -> LevelResult:
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-serialisable."""
        return {
            "shapes": [list(shape) for shape in self.shapes],
            "dtype": self.dtype,
            "threads": self.threads,
            "flops": list(self.flops),
            "compulsory_bytes": list(self.compulsory_bytes),
            "results": [result.to_json() for result in self.results.values()],
        }

    def __str__(self) -> str:
        from heedful.report.levels import text

        return text(self.to_json())


def compare_optimization_levels(
    implementations: Mapping[str, nn.Module],
    input_shape: Sequence[int] | Sequence[Sequence[int]],
    *,
    inputs: Sequence[Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    threads: int | None = None,
    seconds: float = 1.0,
    seed: int = 0,
    peaks: Peaks | None = None,
) -> LevelComparison:
    """Whether implementations of a module agree, and then how long each takes, with how much memory, doing what.

    Outputs and all gradients (of inputs, and of parameters that share a name) are compared with the first
    implementation's before anything is timed; one that differs is not timed. Times are taken turn by turn on pinned
    threads, so that they may be compared with each other.

    Args:
        implementations: modules by name; those of `heedful.levels.create` and `convert`, or any others that take the
            same inputs and return one tensor.
        input_shape: shape of the input, or a sequence of the inputs' shapes; they are filled with random numbers.
        inputs: the inputs themselves, such as tokens; input_shape is then their shape or shapes.
        dtype: of the inputs and the modules' parameters.
        device: of the inputs; None is that of the first module's parameters, the CPU where it has none. The peaks that
            shares refer to are the processor's, so that there are none on a GPU.
        threads: None is torch's present number.
        seconds: for the rounds of forward, and for those of backward.
        seed: what inputs are drawn from.
        peaks: what `heedful.measure.peaks.measure_peaks` returned; measured once in a process if None.

    Returns:
        A `LevelComparison`: a mapping of names to `LevelResult`s.

    Raises:
        TypeError, ValueError: an argument is none of these.
    """
    if not implementations:
        raise wrong_value("implementations", "none", "one module or more")
    for name, module in implementations.items():
        if not isinstance(module, nn.Module):
            raise wrong_type(f"implementations[{name!r}]", type(module).__name__, "a torch.nn.Module")
    if dtype not in TOLERANCE:
        raise wrong_value("dtype", dtype, "torch.float32, float64, bfloat16 or float16")
    shapes = _shapes(input_shape)
    if inputs is not None and [tuple(x.shape) for x in inputs] != shapes:
        raise wrong_value("inputs", [tuple(x.shape) for x in inputs], f"tensors of input_shape, {shapes}")
    threads = torch.get_num_threads() if threads is None else threads
    parameters = chain.from_iterable(module.parameters() for module in implementations.values())
    where = next((x.device for x in parameters), torch.device("cpu")) if device is None else torch.device(device)
    with pinned_threads(threads):
        found = peaks or _peaks(threads)
        sides = {
            name: _Side(module, _inputs(shapes, inputs, dtype, where, seed), seed)
            for name, module in implementations.items()
        }
        return _compare(sides, shapes, dtype, threads, seconds, found)


def _shapes(given: Any) -> list[tuple[int, ...]]:
    try:
        shapes = [tuple(given)] if all(isinstance(size, int) for size in given) else [tuple(s) for s in given]
    except TypeError:
        shapes = []
    if not shapes or not all(shape and all(isinstance(n, int) and n > 0 for n in shape) for shape in shapes):
        raise wrong_value("input_shape", given, "positive ints, or a sequence of such shapes")
    return shapes


@functools.cache
def _peaks(threads: int) -> Peaks | None:
    return measure_peaks((threads,))


def _inputs(
    shapes: list[tuple[int, ...]], given: Sequence[Tensor] | None, dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    """The same numbers for every side, each side with leaves of its own."""
    generator = torch.Generator().manual_seed(seed)
    made = given or [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [x.detach().to(device).requires_grad_(x.is_floating_point()) for x in made]


class _Side:
    """One implementation with its inputs, and the calls that are measured."""

    def __init__(self, module: nn.Module, inputs: list[Tensor], seed: int) -> None:
        self.module, self.inputs, self.seed = module, inputs, seed
        self.named = {f"input {index}": x for index, x in enumerate(inputs) if x.requires_grad}
        self.named |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.grad_out: Tensor | None = None
        self.gpu = next((x.device for x in inputs if x.is_cuda), None)

    def run(self) -> Tensor:
        """Forward, with gradients to come."""
        with torch.enable_grad():
            out: Tensor = self.module(*self.inputs)
        return out

    @torch.no_grad()
    def forward(self) -> object:
        """Forward alone."""
        out = self.module(*self.inputs)
        self.wait()
        return out

    def wait(self) -> None:
        """Until a GPU has done what it was told."""
        if self.gpu is not None:
            torch.cuda.synchronize(self.gpu)

    def gradients(self, out: Tensor) -> tuple[Tensor | None, ...]:
        """Backward behind a forward."""
        if self.grad_out is None:
            generator = torch.Generator().manual_seed(self.seed + 1)
            self.grad_out = torch.randn(out.shape, generator=generator).to(out)
        leaves = list(self.named.values())
        return torch.autograd.grad(out, leaves, self.grad_out, allow_unused=True) if leaves else ()

    def step(self) -> object:
        """Forward and backward; what both return stays until the end, as it would in training."""
        out = self.run()
        return out, self.gradients(out)

    def seconds_of_backward(self) -> float:
        """Of one backward."""
        out = self.run()
        self.wait()
        start = time.perf_counter()
        self.gradients(out)
        self.wait()
        return time.perf_counter() - start

    def peak(self) -> int | None:
        """Bytes that forward and backward take at their peak above what was there."""
        if self.gpu is None:
            return extra_peak(self.step)
        torch.cuda.reset_peak_memory_stats(self.gpu)
        before = torch.cuda.memory_allocated(self.gpu)
        self.step()
        return torch.cuda.max_memory_allocated(self.gpu) - before


def _compare(
    sides: dict[str, _Side],
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    threads: int,
    seconds: float,
    peaks: Peaks | None,
) -> LevelComparison:
    first = next(iter(sides))
    answers = {name: _answers(side) for name, side in sides.items()}
    checks = {name: _checks(name, found, answers[first], TOLERANCE[dtype]) for name, found in answers.items()}
    flops, moved = _flops(sides[first], shapes), _compulsory(sides[first], answers[first])
    del answers
    notes = {name: _note(side.module, all_passed(checks[name])) for name, side in sides.items()}
    timed = {name: side for name, side in sides.items() if notes[name] is None}
    results = {name: LevelResult(name, checks[name], notes[name]) for name in sides}
    if timed:
        forwards = take_turns(
            [side.forward for side in timed.values()], seconds=seconds, min_rounds=MIN_ROUNDS, max_rounds=MAX_ROUNDS
        )
        backwards = _backward_turns(list(timed.values()), seconds)
        reference = list(timed).index(first) if first in timed else None
        name_of_dtype = str(dtype).removeprefix("torch.")
        # The peaks that are measured are the processor's.
        peaks = peaks if sides[first].gpu is None else None
        ideal = [_ideal(flops[i], moved[i], name_of_dtype, threads, peaks) for i in range(2)]
        for index, (name, side) in enumerate(timed.items()):
            forward, backward = median(forwards[index]), median(backwards[index])
            out = side.run()
            results[name] = LevelResult(
                name,
                checks[name],
                None,
                forward,
                backward,
                _speedup(forwards, reference, index),
                _speedup(backwards, reference, index),
                None if ideal[0] is None else ideal[0] / forward,
                None if ideal[1] is None else ideal[1] / backward,
                side.peak(),
                profile_call(side.forward),
                profile_call(functools.partial(side.gradients, out)),
            )
            del out
    return LevelComparison(results, shapes, str(dtype).removeprefix("torch."), threads, flops, moved)


def _answers(side: _Side) -> dict[str, Tensor]:
    """The output and every gradient."""
    out = side.run()
    found = {"output": out.detach()}
    for name, gradient in zip(side.named, side.gradients(out), strict=True):
        if gradient is not None:
            found[f"gradient of {name}"] = gradient
    return found


def _checks(name: str, found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float) -> tuple[Check, ...]:
    """One of the output, and one of the worst gradient."""
    made = [Check(f"{name}: output", _apart(found["output"], wanted["output"]), limit, RULE)]
    shared = [key for key in wanted if key != "output" and key in found]
    if shared:
        worst = max(shared, key=lambda key: _apart(found[key], wanted[key]))
        made.append(Check(f"{name}: {worst}, the worst", _apart(found[worst], wanted[worst]), limit, RULE))
    return tuple(made)


def _apart(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    difference = (found.double() - wanted.to(found.device).double()).abs().max() / wanted.double().abs().max()
    return float(difference.nan_to_num(nan=torch.inf))


def _note(module: nn.Module, equivalent: bool) -> str | None:
    """Why a side is not timed."""
    if not equivalent:
        return "differs from the first implementation, and is not timed"
    if isinstance(module, Component) and module.level == 4 and interpreting():
        return "ran under Triton's interpreter: checked, not timed"
    return None


def _backward_turns(sides: list[_Side], seconds: float) -> list[list[float]]:
    """Seconds of each side's backward, one sample a round; the side that goes first changes."""
    for side in sides:
        side.seconds_of_backward()
    samples: list[list[float]] = [[] for _ in sides]
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < MAX_ROUNDS and (rounds < MIN_ROUNDS or time.perf_counter() < deadline):
        for turn in range(len(sides)):
            index = (rounds + turn) % len(sides)
            samples[index].append(sides[index].seconds_of_backward())
        rounds += 1
    return samples


def _speedup(samples: list[list[float]], reference: int | None, index: int) -> tuple[float, float, float] | None:
    """Lower quartile, median and upper quartile of the rounds' ratios."""
    if reference is None:
        return None
    return quartiles([a / b for a, b in zip(samples[reference], samples[index], strict=True)])


def _flops(side: _Side, shapes: list[tuple[int, ...]]) -> tuple[float, float]:
    """Of forward and backward: a component's own count, otherwise what PyTorch counts in the first implementation."""
    if isinstance(side.module, Component):
        return side.module.flops(*shapes)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as forward:
        out = side.run()
    with FlopCounterMode(display=False) as backward:
        side.gradients(out)
    return float(forward.get_total_flops()), float(backward.get_total_flops())


def _compulsory(side: _Side, answers: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes that any implementation moves: inputs, weights and output; with their gradients in the backward."""

    def size(tensors: Any) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    read = size({id(x): x for x in [*side.inputs, *side.module.parameters()]}.values())
    out = size([answers["output"]])
    gradients = size([x for name, x in answers.items() if name != "output"])
    return read + out, read + out + gradients


def _ideal(flops: float, moved: int, dtype: str, threads: int, peaks: Peaks | None) -> float | None:
    """Seconds at the machine's measured peaks: of multiply-adds or of memory, whichever takes longer."""
    if peaks is None or threads not in peaks.read_bandwidth:
        return None
    rate = peaks.flops_of(dtype, threads)
    if rate is None:
        return None
    return max(flops / rate, moved / peaks.read_bandwidth[threads])
