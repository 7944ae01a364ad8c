"""`PyGraphCUDAOptimizer`: captures a model where measuring says that a graph pays."""

from __future__ import annotations

import time
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from heedful.checks import what
from heedful.errors import unsupported, wrong_type, wrong_value
from heedful.graphs.captured import Captured, capture
from heedful.graphs.cost import Cost, compare, spread
from heedful.graphs.cuda import CudaGraphs, Device
from heedful.graphs.errors import CaptureError


class GraphDeploymentStrategy(Enum):
    """How much of a call must be launching for a graph to be recommended, in multiples of `cost_threshold`."""

    CONSERVATIVE = "conservative"
    BALANCED = "balanced"
    AGGRESSIVE = "aggressive"

    @property
    def factor(self) -> float:
        return {"conservative": 2.0, "balanced": 1.0, "aggressive": 0.5}[self.value]


@dataclass(frozen=True)
class WorkloadAnalysis:
    """What measuring a model on some inputs gave.

    cpu_launch_overhead: seconds of a call that a graph saves. overhead_share: their share of the eager call.
    memory_overhead: bytes that the graph holds. expected_speedup: eager time / replay time, as measured.
    graph_recommended: whether overhead_share is above the threshold. reason: why not, or the capture's error; then
    there is nothing measured, and the numbers are None.
    """

    cpu_launch_overhead: float | None
    overhead_share: float | None
    memory_overhead: int | None
    graph_recommended: bool
    expected_speedup: float | None
    deployment_strategy: GraphDeploymentStrategy
    reason: str | None
    cost: Cost | None = None


@dataclass
class CUDAGraphState:
    """A captured model, and how often it has run. capture_time: seconds that warm-up and capture took. memory: bytes
    that the graph's buffers hold."""

    graph: Captured
    capture_time: float
    memory: int
    replay_count: int = 0


class PyGraphCUDAOptimizer:
    """Measures whether a CUDA graph pays for a model, captures it, and runs it.

    Graphs belong to a model's instance and the shapes and dtypes of its inputs. Every number is measured on the model
    and inputs that it is about; without CUDA there is none, and the methods raise.

    Args:
        cost_threshold: the share of an eager call that launching must take for a graph to be recommended, 0 to 1.
        strategy: "conservative" asks for twice that share, "balanced" for it, "aggressive" for half of it.
        device: what captures, in place of CUDA; for tests.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self, cost_threshold: float = 0.1, strategy: str = "balanced", *, device: Device | None = None
    ) -> None:
        if isinstance(cost_threshold, bool) or not isinstance(cost_threshold, int | float):
            raise wrong_type("cost_threshold", what(cost_threshold), "a number")
        if not 0 <= cost_threshold <= 1:
            raise wrong_value("cost_threshold", cost_threshold, "a share of the time, 0 to 1")
        names = [known.value for known in GraphDeploymentStrategy]
        if not isinstance(strategy, GraphDeploymentStrategy) and strategy not in names:
            raise wrong_value("strategy", repr(strategy), f"one of {', '.join(map(repr, names))}")
        self.cost_threshold, self.strategy = float(cost_threshold), GraphDeploymentStrategy(strategy)
        self._backend = device or CudaGraphs()
        self._states: dict[Hashable, CUDAGraphState] = {}
        self._analyses: dict[Hashable, WorkloadAnalysis] = {}

    def analyze_workload(
        self, model: nn.Module, inputs: Sequence[Tensor], num_warmup: int = 3, num_trials: int = 10
    ) -> WorkloadAnalysis:
        """Captures the model as it is, in train() or eval(), and times replays against eager calls, turn by turn.

        Args:
            model: a module; it is kept, with its graphs, until `clear_cache`.
            inputs: its positional arguments, tensors on one CUDA device.
            num_warmup: runs before the capture, at least 3 are made.
            num_trials: samples of each side, 2 or more.

        Raises:
            UnsupportedError: there is no CUDA; `.reasons` says why.
        """
        key = self._key(model, inputs)
        found = self._analyses.get(key)
        if found is None:
            found = self._analyses[key] = self._analyze(model, inputs, num_warmup, num_trials)
        return found

    def create_cuda_graph(
        self, model: nn.Module, inputs: Sequence[Tensor], analysis: WorkloadAnalysis | None = None
    ) -> CUDAGraphState:
        """The model's graph for such inputs, captured if it is not there yet; warns where none is recommended.

        Raises:
            UnsupportedError: there is no CUDA; `.reasons` says why.
            CaptureError: the model does what no graph can hold.
        """
        analysis = analysis or self.analyze_workload(model, inputs)
        if not analysis.graph_recommended:
            warnings.warn(f"a CUDA graph is not recommended for this workload: {analysis.reason}", stacklevel=2)
        return self._state(model, inputs, 3)

    def execute_cuda_graph(self, graph_manager: CUDAGraphState, inputs: Sequence[Tensor]) -> list[Any]:
        """The model's outputs for these inputs, as a list."""
        if not isinstance(graph_manager, CUDAGraphState):
            raise wrong_type("graph_manager", what(graph_manager), "what create_cuda_graph returned")
        outputs = graph_manager.graph(*inputs)
        graph_manager.replay_count += 1
        return list(outputs) if isinstance(outputs, list | tuple) else [outputs]

    def benchmark_vs_eager(self, model: nn.Module, inputs: Sequence[Tensor], num_trials: int = 100) -> dict[str, Any]:
        """The model as it is against its graph: both sides' times, the speed-up, and whether a graph is recommended.

        Both sides take turns in one process, on results that were found to be the same.

        Returns:
            "analysis", the `WorkloadAnalysis`; "eager_execution" and "graph_execution", seconds of each sample's mean,
            min, max, standard deviation, median and quartiles; "performance", with "speedup" and its quartiles,
            "cpu_overhead_reduction" in seconds, "memory_overhead_mb" and "deployment_recommended".

        Raises:
            UnsupportedError: there is no CUDA; `.reasons` says why.
            CaptureError: the model cannot be captured.
        """
        analysis = self._analyze(model, inputs, 3, num_trials, refuse=True)
        cost, state = analysis.cost, self._state(model, inputs, 3)
        assert cost is not None
        assert analysis.memory_overhead is not None
        return {
            "analysis": analysis,
            "eager_execution": spread(cost.eager_samples),
            "graph_execution": spread(cost.graph_samples) | {"capture_time": state.capture_time},
            "performance": {
                "speedup": cost.speedup,
                "speedup_low": cost.speedup_low,
                "speedup_high": cost.speedup_high,
                "cpu_overhead_reduction": cost.launch_seconds,
                "memory_overhead_mb": analysis.memory_overhead / 2**20,
                "deployment_recommended": analysis.graph_recommended,
            },
        }

    def clear_cache(self) -> None:
        """Forgets all graphs and analyses."""
        self._states.clear()
        self._analyses.clear()

    def _analyze(
        self, model: nn.Module, inputs: Sequence[Tensor], warmup: int, trials: int, refuse: bool = False
    ) -> WorkloadAnalysis:
        try:
            state = self._state(model, inputs, warmup)
        except CaptureError as error:
            if refuse:
                raise
            return WorkloadAnalysis(None, None, None, False, None, self.strategy, str(error))
        cost = compare(state.graph, *inputs, rounds=max(2, trials))
        wanted = self.cost_threshold * self.strategy.factor
        recommended = cost.share > wanted
        reason = None
        if not recommended:
            reason = f"launching takes {100 * cost.share:.1f} % of a call, and the threshold is {100 * wanted:.1f} %"
        return WorkloadAnalysis(
            cost.launch_seconds, cost.share, state.memory, recommended, cost.speedup, self.strategy, reason, cost
        )

    def _state(self, model: nn.Module, inputs: Sequence[Tensor], warmup: int) -> CUDAGraphState:
        key = self._key(model, inputs)
        if key not in self._states:
            before, begun = _reserved(inputs), time.perf_counter()
            graph = capture(model, tuple(inputs), warmup=max(3, warmup), device=self._backend)
            seconds = time.perf_counter() - begun
            self._states[key] = CUDAGraphState(graph, seconds, max(0, _reserved(inputs) - before))
        return self._states[key]

    def _key(self, model: nn.Module, inputs: Sequence[Tensor]) -> Hashable:
        why = self._backend.why_not()
        if why is not None:
            raise unsupported("there is nothing to measure CUDA graphs on", {"cuda": [why]})
        if not isinstance(model, nn.Module):
            raise wrong_type("model", what(model), "a torch.nn.Module")
        if isinstance(inputs, Tensor) or not all(isinstance(tensor, Tensor) for tensor in inputs):
            raise wrong_type("inputs", what(inputs), "a list of tensors, the model's positional arguments")
        # The module itself, by identity: what prints alike is not the same.
        return model, *[(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]


def _reserved(inputs: Sequence[Tensor]) -> int:
    """Bytes that the device has set aside for what is alive."""
    if not (inputs and inputs[0].is_cuda):
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(inputs[0].device)
