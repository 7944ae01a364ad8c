"""A device on which capturing is running: replays run the model again into the outputs of the capture."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves


class Recorded:
    def __init__(self, device, run, outputs):
        self.device, self.run, self.outputs = device, run, outputs
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.device.log.append("replay")
        for mine, new in zip(tree_leaves(self.outputs), tree_leaves(self.run()), strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(new)


class FakeDevice:
    type = "cpu"

    def __init__(self, why_not=None):
        self.why, self.log, self.graphs, self.pools, self.here = why_not, [], [], 0, "main"

    def why_not(self):
        return self.why

    def pool(self):
        self.pools += 1
        return self.pools

    def aside(self, run, device):
        self.log.append("aside")
        run()

    def capture(self, run, device, pool, generators):
        self.log.append(f"capture in pool {pool}")
        graph = Recorded(self, run, None)
        graph.outputs = run()
        self.graphs.append(graph)
        return graph, graph.outputs

    def stream(self, device):
        return self.here

    def wait_for(self, stream, device):
        self.log.append(f"{self.here} waits for {stream}")

    def synchronize(self, device):
        self.log.append("synchronize")
