"""The training step as one CUDA graph: launched by one call, however many kernels it has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)

# Calls before the capture: they compile what is compiled and create what is created lazily.
EAGER_CALLS = 2


class GraphedWork:
    """Work on fixed addresses, run as it is at first and replayed from a CUDA graph after that.

    The work takes no arguments, returns nothing, waits for nothing and allocates nothing that
    outlives it: it reads and writes tensors that keep their addresses. `key` tells variants of the
    work apart (such as recursion schedules); each has a graph of its own, all in one memory pool.
    A replay runs the same kernels on the same addresses, so its results are those of the work
    itself, bit for bit. NCCL's collectives are captured with the rest, on every rank alike.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.calls: dict[Hashable, int] = {}
        self.pool: tuple[int, int] | None = None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do `work`, whose variant is `key`, on the current stream."""
        calls = self.calls.get(key, 0)
        self.calls[key] = calls + 1
        if calls < EAGER_CALLS:
            self._aside(work)
            return
        if key not in self.graphs:
            self._capture(key, work)
        self.graphs[key].replay()

    def _aside(self, work: Callable[[], None]) -> None:
        """On a side stream, as the capture will: autograd ties its nodes to the first stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self, key: Hashable, work: Callable[[], None]) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph's pool takes the place of what the eager calls used
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # the saver's thread and NCCL's may ask for their events meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
            work()
        self.pool = graph.pool()
        self.graphs[key] = graph
        logger.debug("captured a CUDA graph")
