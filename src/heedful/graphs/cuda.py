"""What `heedful.graphs` asks of a device; `CudaGraphs` is the one there is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch


class Graph(Protocol):
    def replay(self) -> None: ...


class Device(Protocol):
    """How to capture and to replay on one kind of device."""

    type: str

    def why_not(self) -> str | None:
        """Why nothing can be captured in this process, or None."""

    def pool(self) -> Any:
        """Memory that the graphs of one model share."""

    def aside(self, run: Callable[[], object], device: torch.device) -> None:
        """Run something on a stream of its own, where captures may be prepared, and wait for it."""

    def capture(
        self, run: Callable[[], Any], device: torch.device, pool: Any, generators: Sequence[torch.Generator]
    ) -> tuple[Graph, Any]:
        """The graph of a run, and what it returned, whose memory replays write. What the run raises comes out."""

    def stream(self, device: torch.device) -> Any:
        """The stream that this thread works on."""

    def wait_for(self, stream: Any, device: torch.device) -> None:
        """Lets this thread's stream wait for what another one has been given so far."""

    def synchronize(self, device: torch.device) -> None: ...


class CudaGraphs:
    type = "cuda"

    def why_not(self) -> str | None:
        if torch.cuda.is_available():
            return None
        return "torch is a build without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def aside(self, run: Callable[[], object], device: torch.device) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()

    def capture(
        self, run: Callable[[], Any], device: torch.device, pool: Any, generators: Sequence[torch.Generator]
    ) -> tuple[Graph, Any]:
        graph = torch.cuda.CUDAGraph()
        # PyTorch's own generator of the device is registered by every capture.
        for generator in generators:
            graph.register_generator_state(generator)
        # torch.cuda.graph keeps one stream for all devices, and leaves it current where a capture breaks.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
            # Other threads may allocate and wait meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                outputs = run()
            except BaseException:
                try:
                    graph.capture_end()
                except RuntimeError:
                    _recover(device, pool)
                raise
            try:
                graph.capture_end()
            except RuntimeError:
                _recover(device, pool)
                raise
        return graph, outputs

    def stream(self, device: torch.device) -> Any:
        return torch.cuda.current_stream(device)

    def wait_for(self, stream: Any, device: torch.device) -> None:
        torch.cuda.current_stream(device).wait_stream(stream)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)


def _recover(device: torch.device, pool: Any) -> None:
    """Where a capture cannot even be ended, PyTorch's allocator and generator believe that it goes on: memory is not
    freed, and random numbers outside of a capture are refused. The end of another capture tells the generator."""
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        with suppress(RuntimeError, AttributeError):
            getattr(torch._C, name)(device.index, pool)
    # What broke the capture is what the caller is to hear of.
    with suppress(RuntimeError):
        place = torch.zeros(1, device=device)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            another = torch.cuda.CUDAGraph()
            another.capture_begin(capture_error_mode="thread_local")
            place.zero_()
            another.capture_end()
