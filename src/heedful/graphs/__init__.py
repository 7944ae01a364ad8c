"""CUDA graphs of a model: `capture` gives a callable that replays."""

from heedful.graphs.buckets import Buckets
from heedful.graphs.captured import Captured, capture
from heedful.graphs.cost import Cost, compare
from heedful.graphs.errors import CaptureError
from heedful.graphs.watch import Finding

__all__ = ["Buckets", "CaptureError", "Captured", "Cost", "Finding", "capture", "compare"]
