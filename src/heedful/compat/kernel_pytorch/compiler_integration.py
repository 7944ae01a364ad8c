"""The names of `kernel_pytorch.compiler_integration`."""

from heedful.graphs.optimizer import (
    CUDAGraphState,
    GraphDeploymentStrategy,
    PyGraphCUDAOptimizer,
    WorkloadAnalysis,
)

__all__ = ["CUDAGraphState", "GraphDeploymentStrategy", "PyGraphCUDAOptimizer", "WorkloadAnalysis"]
